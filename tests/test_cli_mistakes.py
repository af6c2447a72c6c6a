"""Broken arguments and files: every command ends in one clear line, and never in a traceback."""

import json

import pytest

from helpers import command_flags
from micro import QUICK_SETTINGS, micro_circuit, micro_model, save_micro, save_pairs
from tl_sparse.cli import main
from tl_sparse.cli.parser import build_parser

pytestmark = pytest.mark.any_line

HUGE = "9" * 30
COMMANDS = {
    "train": ["train", "--out", "OUT"],
    "prune": ["prune", "MODEL", "TASK", "--out", "OUT"],
    "suite": ["suite", "MODEL", "--tasks", "TASK", "--out", "OUT"],
    "search": ["search", "MODEL", "TASK", "--out", "OUT", "--trials", "1"],
    "tasks": ["tasks", "MODEL"],
    "view": ["view", "CIRCUIT", "--model", "MODEL", "--task", "TASK", "-o", "OUT.html"],
    "export": ["export", "CIRCUIT", "--model", "MODEL", "--task", "TASK", "-o", "OUT.csv"],
    "evaluate": ["evaluate", "CIRCUIT", "--model", "MODEL", "--task", "TASK"],
    "plot": ["plot", "curve", "FIGURES", "-o", "OUT.svg"],
    "demo": ["demo", "--out", "OUT"],
}
#: Flags that are wrong wherever they are given.
WRONG = [
    ["--seed", HUGE],
    ["--seed", "-1"],
    ["--seeds", HUGE],
    ["--seeds", "0,,1"],
    ["--device", "abacus"],
    ["--device", ""],
    ["--config", "TEXT"],
    ["--config", "FOLDER"],
    ["--config", "missing.yaml"],
    ["--corpus", "missing/*.txt"],
    ["--corpus", "FOLDER"],
    ["--corpus", ""],
    ["--model", "TEXT"],
    ["--task", "TEXT"],
    ["--task", "single_double_qoute"],
    ["--tasks", ","],
    ["--steps", "0"],
    ["--steps", "1e99"],
    ["--pairs", "-3"],
    ["--lr", "nan"],
    ["--min-weight", "nan"],
    ["--workers", "0"],
    ["--trials", "0"],
    ["--storage", "FOLDER"],
    ["--storage", "nonsense://"],
    ["--l0-groups", "[" * 100_000],
    ["--l0-groups", '{"*": "a"}'],
    ["--abs-topk", "nan"],
    ["--out", "TEXT"],
    ["--out", "TEXT/inside"],
    ["--out", "x" * 5000],
    ["-o", "FOLDER"],
    ["-o", "TEXT/inside.svg"],
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "folder").mkdir()
    (folder / "text").write_text("just: [text")
    (folder / "figures.json").write_text("{}")
    micro_circuit(micro_model()).save(folder / "circuit")
    return {
        "MODEL": save_micro(folder / "model"),
        "TASK": save_pairs(folder / "micro.jsonl"),
        "CIRCUIT": str(folder / "circuit"),
        "TEXT": str(folder / "text"),
        "FOLDER": str(folder / "folder"),
        "FIGURES": str(folder / "figures.json"),
    }


def run(words, capsys):
    """The exit status of a command, and the last error that it wrote, without where the help is."""
    try:
        status = main(words)
    except SystemExit as stopped:
        status = stopped.code
    lines = capsys.readouterr().err.splitlines()
    if status == 2:
        assert lines.pop().endswith("--help lists the options")
    return status, lines[-1:]


def takes(command, flag):
    """Whether a command has a flag."""
    commands = build_parser()._subparsers._group_actions[0].choices
    return flag in commands[command]._option_string_actions


CASES = []
for name in COMMANDS:
    CASES += [(name, wrong) for wrong in WRONG if takes(name, wrong[0])]
# A page replaces an earlier one, which may be any file.
CASES.remove(("view", ["--out", "TEXT"]))
CASES.remove(("export", ["--out", "TEXT"]))


def short(case):
    name, (flag, value) = case
    return f"{name} {flag} {value[:20]}"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=short)
def test_a_wrong_flag_ends_in_one_line(case, places, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, wrong = case
    words = [*COMMANDS[name], *wrong]
    if name in ("prune", "suite", "search"):
        words[-2:-2] = command_flags(QUICK_SETTINGS)
    for place, path in {**places, "OUT": str(tmp_path / "out")}.items():
        words = [word.replace(place, path) if word.isascii() else word for word in words]
    status, lines = run(words, capsys)
    assert status in (1, 2)
    assert lines[0].startswith(("tl-sparse: error: ", f"tl-sparse {name}: error: "))


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", "\udc80", "[" * 100_000, "NaN"])
@pytest.mark.parametrize("kind", ["curve", "tasks", "frontier"])
def test_figures_that_are_none(content, kind, tmp_path, capsys):
    path = tmp_path / "figures.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    status, lines = run(["plot", kind, str(path), "-o", str(tmp_path / "a.svg")], capsys)
    assert status == 1
    assert str(path) in lines[0]


def test_a_number_of_pairs_below_one(places, capsys):
    status, lines = run(["tasks", places["MODEL"], "--pairs", "0"], capsys)
    assert status == 1
    assert lines == ["tl-sparse: error: n_pairs = 0 is not possible; it must be at least 1"]


def test_an_export_of_an_unknown_task(places, tmp_path, capsys):
    """The task is not used in every format."""
    command = ["export", places["CIRCUIT"], "--model", places["MODEL"], "--task", "var_iff"]
    status, lines = run([*command, "-o", str(tmp_path / "a.csv")], capsys)
    assert status == 1
    assert "no task 'var_iff'; did you mean 'var_if'?" in lines[0]


def test_a_flag_of_a_field_that_may_be_none():
    args = build_parser().parse_args(["train", "--out", "x", "--norm-eps", "1e-3"])
    assert args.norm_eps == 1e-3
    assert not hasattr(build_parser().parse_args(["train", "--out", "x"]), "norm_eps")


@pytest.mark.parametrize("text", ["-1", "9" * 30, "one", "1.5"])
@pytest.mark.parametrize("command", ["tasks", "evaluate", "demo"])
def test_seeds_that_torch_cannot_take(text, command, capsys):
    status, lines = run([*COMMANDS[command], f"--seed={text}"], capsys)
    assert status == 2
    assert f"argument --seed: '{text}' is not a whole number from 0 to " in lines[0]


def test_a_circuit_with_a_damaged_configuration(places, tmp_path, capsys):
    folder = tmp_path / "circuit"
    from dataclasses import replace

    for odd in ([1], {"steps": "many"}, "text"):
        circuit = replace(micro_circuit(micro_model()), measured={"config": odd})
        circuit.save(folder)
        command = ["evaluate", str(folder), "--model", places["MODEL"], "--task", places["TASK"]]
        status, lines = run(command, capsys)
        assert status == 1
        assert lines[0].startswith("tl-sparse: error: ")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_task_file_that_is_damaged(places, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    for content in ("", "{}", "[1]", '{"prompts": ["a"], "answers": ["b", "c"]}'):
        path.write_text(content)
        command = ["prune", places["MODEL"], str(path), "--out", str(tmp_path / "out")]
        status, lines = run(command, capsys)
        assert status == 1
        assert str(path) in lines[0]
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["prompts"] == ["a"]
