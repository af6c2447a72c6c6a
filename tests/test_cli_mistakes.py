"""Broken arguments and files: every command ends in one clear line, and never in a traceback."""

import json
import warnings
from dataclasses import replace

import pytest

import tl_sparse
from helpers import command_flags, must_not_run
from micro import QUICK_SETTINGS, micro_circuit, micro_model, save_micro, save_pairs
from tl_sparse.cli import main
from tl_sparse.cli.output import warnings_in_one_line
from tl_sparse.cli.parser import build_parser
from tl_sparse.errors import CheckpointError, ConfigError

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


# --- One thing given where another is wanted


def folder_of_a_suite(folder):
    (folder / "suite").mkdir()
    (folder / "suite" / "results.json").write_text("{}")
    return str(folder / "suite")


@pytest.mark.parametrize(
    "command",
    [["evaluate"], ["view", "-o", "x.html"], ["export", "-o", "x.csv"]],
    ids=lambda x: x[0],
)
@pytest.mark.parametrize("model", ["MODEL", "tiny-python-sparse"])
def test_a_model_where_a_circuit_is_wanted(command, model, places, capsys):
    source = places.get(model, model)
    status, lines = run([command[0], source, *command[1:]], capsys)
    assert status == 1
    advice = f"`tl-sparse prune {source} TASK --out FOLDER` finds a circuit in it"
    assert lines == [f"tl-sparse: error: {source} is a model, not a circuit; {advice}"]


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "CIRCUIT", "var_if", "--out", "OUT"],
        ["suite", "CIRCUIT", "--out", "OUT"],
        ["search", "CIRCUIT", "var_if", "--out", "OUT"],
        ["tasks", "CIRCUIT"],
        ["plot", "sparsity", "CIRCUIT", "-o", "OUT.svg"],
    ],
    ids=lambda words: words[0],
)
def test_a_circuit_where_a_model_is_wanted(command, places, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = [word.replace("CIRCUIT", places["CIRCUIT"]).replace("OUT", out) for word in command]
    status, lines = run(words, capsys)
    assert status == 1
    assert f"{places['CIRCUIT']} holds a circuit, not a model" in lines[0]


def test_load_of_a_circuit_names_its_model(tmp_path):
    replace(micro_circuit(micro_model()), model_name="my-model").save(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        tl_sparse.load(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds a circuit, not a model; its model is 'my-model'"


def test_a_folder_that_holds_the_wanted_one(places, tmp_path, capsys):
    micro_circuit(micro_model()).save(tmp_path / "circuit")
    _, lines = run(["evaluate", str(tmp_path)], capsys)
    assert lines[0].endswith(f"there is no circuit.json; did you mean '{tmp_path}/circuit'?")
    _, lines = run(["evaluate", str(tmp_path / "circuit" / "circuit.json")], capsys)
    assert lines[0].endswith(f"did you mean its folder, '{tmp_path}/circuit'?")
    save_micro(tmp_path / "model")
    _, lines = run(["tasks", str(tmp_path)], capsys)
    assert lines[0].endswith(f"; did you mean '{tmp_path}/model'?")


def test_a_suite_where_a_circuit_is_wanted(tmp_path, capsys):
    folder = folder_of_a_suite(tmp_path)
    _, lines = run(["evaluate", folder], capsys)
    assert f"{folder} holds a suite; its circuits are in {folder}/MODEL/TASK/SEED" in lines[0]


@pytest.mark.parametrize("kind", ["curve", "frontier"])
@pytest.mark.parametrize("given", ["CIRCUIT", "MODEL", "FOLDER", "TEXT"])
def test_what_holds_no_figures(kind, given, places, tmp_path, capsys):
    source = places[given]
    status, lines = run(["plot", kind, source, "-o", str(tmp_path / "a.svg")], capsys)
    assert status == 1
    circuit = source if given == "CIRCUIT" else "CIRCUIT"
    command = f"`tl-sparse evaluate {circuit} -o figures.json`"
    assert lines[0].startswith(f"tl-sparse: error: {source} is ")
    assert f"{command} measures a circuit and writes one" in lines[0]


def test_tasks_are_plotted_from_a_suite(places, tmp_path, capsys):
    _, lines = run(["plot", "tasks", places["CIRCUIT"], "-o", str(tmp_path / "a.svg")], capsys)
    assert "`tl-sparse suite MODEL --out FOLDER` measures the circuits of all tasks" in lines[0]


def test_the_folder_of_a_suite_stands_for_its_results(tmp_path, capsys):
    folder = folder_of_a_suite(tmp_path)
    _, in_folder = run(["plot", "tasks", folder, "-o", str(tmp_path / "a.svg")], capsys)
    file = f"{folder}/results.json"
    _, in_file = run(["plot", "tasks", file, "-o", str(tmp_path / "a.svg")], capsys)
    assert in_folder == [line.replace(file, folder) for line in in_file]


# --- Said at once


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "view CIRCUIT -o page.pdf",
            "page.pdf: a page cannot be written as '.pdf'; the name must ",
        ),
        (
            "view CIRCUIT -o page",
            "page: a page needs an ending; the name must end in .html or .htm",
        ),
        ("view CIRCUIT -o page.htlm", "page.htlm: a page cannot be written as '.htlm'"),
        ("export CIRCUIT -o circuit.svg", "circuit.svg: nothing is exported as '.svg'"),
        ("evaluate CIRCUIT -o figures.csv", "a measurement cannot be written as '.csv'"),
        ("plot curve FIGURES -o a.pdf", "a.pdf: figures cannot be written as '.pdf'"),
    ],
)
def test_a_wrong_ending_before_any_work(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tl_sparse.Circuit.load", must_not_run("reading the circuit"))
    status, lines = run(command.split(), capsys)
    assert status == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_page_without_prompts_names_the_flag(places, tmp_path, capsys):
    """The micro task is not built in."""
    page = tmp_path / "page.html"
    command = ["view", places["CIRCUIT"], "--model", places["MODEL"], "-o", str(page)]
    with pytest.warns(UserWarning, match="the page has no prompts: .* --task with a file of pairs"):
        assert main(command) == 0
    assert page.is_file()


def test_a_warning_is_one_line(capsys):
    with warnings_in_one_line():
        line = warnings.formatwarning("a\n  b \x1b", UserWarning, "file.py", 3)
    assert line == "tl-sparse: warning: a b \\x1b\n"
    assert "file.py" in warnings.formatwarning("a", UserWarning, "file.py", 3)


def test_a_circuit_is_not_saved_over_another(tmp_path):
    circuit = micro_circuit(micro_model())
    circuit.save(tmp_path)
    with pytest.raises(ConfigError, match="overwrite=True in Python"):
        replace(circuit, task="another").save(tmp_path)
    assert tl_sparse.Circuit.load(tmp_path).task == "micro"


# --- Usage


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "m", "t", "--out", "x", "--stpes", "3"], "--stpes 3; did you mean --steps?"),
        (["prune", "m"], "the following arguments are required: TASK, --out"),
        (["train", "--out", "x", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["plot", "curv", "a.json", "-o", "a.svg"], "; did you mean curve?"),
        (["demo", "--out"], "argument --out: expected one argument"),
    ],
)
def test_a_mistake_in_the_flags_is_two_lines(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error, where = capsys.readouterr().err.splitlines()
    assert error.startswith(f"tl-sparse {words[0]}: error: ")
    assert message in error
    assert where == f"tl-sparse {words[0]} --help lists the options"


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit):
        main(["prun"])
    error, where = capsys.readouterr().err.splitlines()
    assert error.startswith(
        "tl-sparse: error: argument COMMAND: invalid choice: 'prun' (choose from"
    )
    assert error.endswith("; did you mean prune?")
    assert where == "tl-sparse --help lists the options"


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["prune", "m", "t", "--out", "x", "--step", "3"], "--steps"),
        (["evaluate", "c", "--mod", "x"], "--model"),
        (["train", "--out", "x", "--validate", "3"], "--validate-steps"),
    ],
)
def test_a_flag_is_written_in_full(words, flag, capsys):
    status, lines = run(words, capsys)
    assert status == 2
    assert lines[0].endswith(f"; did you mean {flag}?")


# --- Missing files


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "MODEL", "MISSING.jsonl", "--out", "OUT"],
        ["prune", "MODEL", "TASK", "--out", "OUT", "--config", "MISSING.yaml"],
        ["plot", "curve", "MISSING.json", "-o", "OUT.svg"],
    ],
)
def test_a_missing_file_and_the_nearest_name(words, places, tmp_path, capsys):
    for ending in ("json", "jsonl", "yaml"):
        (tmp_path / f"misssing.{ending}").touch()
    missing = str(tmp_path / "missing")
    places = {**places, "MISSING": missing, "OUT": str(tmp_path / "out")}
    for place, path in places.items():
        words = [word.replace(place, path) for word in words]
    file = next(word for word in words if word.startswith(missing))
    status, lines = run(words, capsys)
    assert status == 1
    near = file.replace("missing.", "misssing.")
    assert lines == [f"tl-sparse: error: there is no file {file}; did you mean {near}?"]


def test_a_circuit_is_no_run_to_resume(places, capsys):
    folder = places["CIRCUIT"]
    _, lines = run(["train", "--out", folder, "--resume"], capsys)
    assert lines == [
        f"tl-sparse: error: there is no unfinished run in {folder}; it holds a circuit"
    ]


@pytest.mark.parametrize("command", ["prune", "search"])
def test_the_model_comes_first(command, places, tmp_path, capsys):
    words = [command, "var_if", places["MODEL"], "--out", str(tmp_path / "out")]
    _, lines = run(words, capsys)
    message = f"var_if is a task; the model comes first: {places['MODEL']} var_if"
    assert lines == [f"tl-sparse: error: {message}"]


def test_tasks_are_not_plotted_from_any_folder(tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    _, lines = run(["plot", "tasks", str(tmp_path), "-o", str(tmp_path / "a.svg")], capsys)
    assert f"{tmp_path} is a folder with a.txt, not the folder of a suite" in lines[0]


@pytest.mark.parametrize(
    ("words", "what"), [(["suite", "MODEL"], "a suite"), (["search", "MODEL", "TASK"], "a search")]
)
def test_a_folder_with_other_contents_is_not_taken(words, what, places, capsys):
    folder = places["CIRCUIT"]
    words = [places.get(word, word) for word in words]
    status, lines = run([*words, "--out", folder], capsys)
    assert status == 1
    message = f"out = {folder!r} is not the folder of {what}: it holds circuit.json, "
    assert lines[0].startswith(f"tl-sparse: error: {message}")


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "MODEL", "TASK", "--out", "OUT"],
        ["suite", "MODEL", "--tasks", "TASK", "--out", "OUT"],
        ["search", "MODEL", "TASK", "--out", "OUT"],
        ["evaluate", "CIRCUIT", "--model", "MODEL"],
        ["view", "CIRCUIT", "--model", "MODEL", "-o", "OUT.html"],
        ["plot", "sparsity", "MODEL", "-o", "OUT.svg"],
    ],
    ids=lambda words: words[0],
)
def test_a_missing_corpus_before_the_model_is_opened(
    command, places, tmp_path, monkeypatch, capsys
):
    opening = must_not_run("opening the model")
    monkeypatch.setattr("tl_sparse.checkpoints.open_model", opening)
    monkeypatch.setattr("tl_sparse.checkpoints.dense.open_model", opening)
    out = str(tmp_path / "out")
    words = [places.get(word, word.replace("OUT", out)) for word in command]
    _, lines = run([*words, "--corpus", "nothere/"], capsys)
    assert lines[0].startswith("tl-sparse: error: no files at nothere/: give ")


def test_a_model_that_can_do_no_task(places, capsys):
    status, lines = run(["tasks", places["MODEL"], "--pairs", "2"], capsys)
    assert status == 1
    message = f"none of the 20 tasks is possible with {places['MODEL']}: single_double_quote: "
    assert lines[0].startswith(f"tl-sparse: error: {message}the prompts of a pair of ")


def test_whose_text_the_means_are_taken_over(places, tmp_path, capsys):
    circuit = micro_circuit(micro_model())
    replace(circuit, means={}).save(tmp_path / "circuit")
    words = ["evaluate", str(tmp_path / "circuit"), "--model", places["MODEL"]]
    words += ["--task", places["TASK"], "--pairs", "4"]
    assert main(words) == 0
    said = capsys.readouterr().err
    sample = f"they are taken over the sample of text of {places['MODEL']}"
    assert f"the circuit has no means; {sample} (--corpus TEXT takes another text)" in said
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
