"""The output of the commands: any encoding, readers that go away, and what they may delete."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import script_environment
from micro import micro_circuit, micro_model, save_micro, save_pairs
from tl_sparse.cli import main
from tl_sparse.cli.output import CLOSED_PIPE, print_error
from tl_sparse.cli.parser import build_parser
from tl_sparse.tasks import TASKS

pytestmark = pytest.mark.any_line

PROGRAM = """
import sys
from pathlib import Path
from tl_sparse.cli import arguments, parser

def run(args):
    print({text!r})
    print("an error", file=sys.stderr)
    for _ in range({lines}):
        print("x" * 100)
    Path({done!r}).touch()

def add_tasks(commands):
    arguments.add_running_flags(arguments.add_command(commands, "tasks", "", "", run))

parser.add_tasks = add_tasks
sys.exit(parser.main(["tasks"]))
"""


def printing(done, text="→ … ‘’", lines=0, encoding="utf-8", **options):
    """A process whose command prints `text` and more lines, and then makes the file `done`."""
    program = PROGRAM.format(text=text, lines=lines, done=str(done))
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=script_environment() | {"PYTHONIOENCODING": encoding},
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_characters_that_the_terminal_lacks_are_escaped(encoding, tmp_path):
    process = printing(tmp_path / "done", "→ \udc80", encoding=encoding, stdout=subprocess.PIPE)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    arrow = "→" if encoding == "utf-8" else "\\u2192"
    assert printed.decode(encoding).split() == [arrow, "\\udc80"]
    assert (tmp_path / "done").exists()


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path):
    process = printing(tmp_path / "done", lines=100_000, stdout=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read().strip() in (b"", b"an error")
    assert process.wait(60) == CLOSED_PIPE


def test_a_reader_of_the_help_that_goes_away(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "from tl_sparse.cli import main; main(['train', '--help'])"],
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is a file of Linux")
def test_output_that_cannot_be_written_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        process = printing(tmp_path / "done", stdout=full)
        _, errors = process.communicate(timeout=60)
    (line,) = [line for line in errors.decode().splitlines() if line != "an error"]
    assert line.startswith("tl-sparse: error: ")
    assert line.endswith("[Errno 28] No space left on device")
    assert process.returncode == 1


def test_an_error_is_one_printable_line(capsys):
    print_error("a\n   b \x1b[31m\udc80")
    assert capsys.readouterr().err == "tl-sparse: error: a b \\x1b[31m\\udc80\n"


def test_interrupting_a_command_is_one_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_sparse.checkpoints.open_model", interrupted)
    assert main(["tasks", "tiny-python-sparse"]) == 130
    assert capsys.readouterr().err == "tl-sparse: error: interrupted\n"


def test_evaluate_writes_its_results_before_it_prints_them(tmp_path, monkeypatch):
    model = save_micro(tmp_path / "model")
    task = save_pairs(tmp_path / "micro.jsonl")
    circuit = str(tmp_path / "circuit")
    micro_circuit(micro_model()).save(circuit)

    def failing(results):
        raise OSError("no terminal")

    monkeypatch.setattr("tl_sparse.view.evaluation_tables", failing)
    out = tmp_path / "all.json"
    command = ["evaluate", circuit, "--model", model, "--task", task, "-o", str(out)]
    assert main([*command, "--pairs", "8"]) == 1
    assert json.loads(out.read_text())["task"] == "micro"


@pytest.fixture
def demo(monkeypatch):
    """Runs a demo that finds its circuit and writes its page at once: two text files."""

    def pruned(model, task, config, out, device, quiet):
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, "circuit.json").write_text("found")

    def page(out, circuit, model, device, progress):
        Path(out).write_text("drawn")

    monkeypatch.setattr("tl_sparse.cli.demo.prune_and_report", pruned)
    monkeypatch.setattr("tl_sparse.cli.demo.write_page", page)
    return lambda out: main(["demo", "--out", str(out)])


def test_a_demo_replaces_the_files_of_an_earlier_one(demo, tmp_path):
    assert demo(tmp_path / "out") == 0
    assert demo(tmp_path / "out") == 0
    assert (tmp_path / "out" / "circuit" / "circuit.json").read_text() == "found"
    assert (tmp_path / "out" / "page.html").read_text() == "drawn"


def test_a_demo_ends_with_what_to_try_next(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tl_sparse.cli.demo._program", lambda: "tl-sparse")
    out = tmp_path / "a folder"
    assert demo(out) == 0
    _, page, *commands = capsys.readouterr().out.strip().rsplit("\n", 4)
    assert page.startswith(f"{out}/page.html is the circuit as a page; ")
    parsed = []
    for command in commands:
        program, *words = shlex.split(command, comments=True)
        assert program == "tl-sparse"
        parsed.append(build_parser().parse_args(words))
    evaluate, tasks, prune = parsed
    assert (evaluate.circuit, evaluate.model) == (f"{out}/circuit", None)
    assert tasks.model == prune.model == "tiny-python-wide"
    assert prune.task in TASKS


def test_a_quiet_demo_says_nothing_but_its_results(demo, tmp_path, capsys):
    assert main(["demo", "--quiet", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", ["circuit/thesis.txt", "model/thesis.txt", "thesis.txt"])
@pytest.mark.parametrize("after_a_demo", [False, True])
def test_a_demo_deletes_no_file_that_it_did_not_write(file, after_a_demo, demo, tmp_path, capsys):
    if after_a_demo:
        assert demo(tmp_path) == 0
    thesis = tmp_path / file
    thesis.parent.mkdir(exist_ok=True)
    thesis.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert demo(tmp_path) == 1
    assert f"such as {thesis}; give another folder with --out" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_demo_deletes_no_file_that_was_changed_since(demo, tmp_path):
    assert demo(tmp_path) == 0
    (tmp_path / "circuit" / "circuit.json").write_text("changed")
    assert demo(tmp_path) == 1
    assert (tmp_path / "circuit" / "circuit.json").read_text() == "changed"


def test_a_demo_follows_no_link(demo, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model").symlink_to(mine, target_is_directory=True)
    assert demo(out) == 1
    assert (mine / "thesis.txt").read_text() == "mine"
