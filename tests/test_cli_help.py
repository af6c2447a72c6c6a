"""What the command line says of itself: help, version, the list of tasks, and --quiet."""

import dataclasses
from importlib.metadata import version

import pytest

import tl_sparse
from helpers import command_flags
from micro import QUICK_SETTINGS, save_micro, save_pairs
from tl_sparse.cli import main
from tl_sparse.cli.config_flags import field_texts
from tl_sparse.cli.parser import build_parser
from tl_sparse.cli.pruning import PRUNING_FLAGS
from tl_sparse.cli.training import TRAINING_FLAGS
from tl_sparse.data import DataConfig
from tl_sparse.network import SparseConfig
from tl_sparse.pruning import PruneConfig
from tl_sparse.tasks import TASKS
from tl_sparse.training import TrainConfig

pytestmark = pytest.mark.any_line

COMMANDS = build_parser()._subparsers._group_actions[0].choices


def help_of(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", [SparseConfig, DataConfig, TrainConfig, PruneConfig])
def test_every_field_has_a_sentence_of_its_own(config):
    texts = field_texts(config)
    names = [field.name for field in dataclasses.fields(config)]
    assert list(texts) == names
    assert len(set(texts.values())) == len(names)
    for text in texts.values():
        assert text[0].isupper() or text[0] == '"'
        assert not text.endswith(".")
        assert len(text) < 140


@pytest.mark.parametrize(
    ("groups", "config", "others"),
    [(PRUNING_FLAGS, PruneConfig, []), (TRAINING_FLAGS, TrainConfig, ["model", "data"])],
)
def test_every_field_is_in_one_group(groups, config, others):
    grouped = " ".join(groups.values()).split()
    assert sorted([*grouped, *others]) == sorted(field.name for field in dataclasses.fields(config))


def test_help_is_in_groups_of_one_line_for_each_option(capsys, monkeypatch):
    printed = help_of("prune", capsys, monkeypatch)
    assert printed.startswith("usage: tl-sparse prune MODEL TASK --out FOLDER [options]\n")
    titles = [line for line in printed.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [
        "what to prune:",
        "the result:",
        "the search:",
        "robustness:",
        "the gates:",
        "the pairs:",
        "how it runs:",
    ]
    (line,) = [line for line in printed.splitlines() if line.startswith("  --pairs-per-step")]
    assert line.endswith("The number of prompt pairs in each step (default: 16).")
    assert "Attributes:" not in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_has_a_text(command, capsys, monkeypatch):
    printed = help_of(command, capsys, monkeypatch)
    assert "-q, --quiet" in printed
    assert "==" not in printed
    for action in COMMANDS[command]._actions:
        assert action.help


def test_version(capsys):
    assert tl_sparse.__version__ == version("tl-sparse")
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"tl-sparse {version('tl-sparse')}\n"


def test_tasks_without_a_model_are_listed(capsys):
    assert main(["tasks"]) == 0
    *entries, newline = capsys.readouterr().out.strip().split("\n\n")
    assert newline.startswith("⏎ is a new line.")
    assert [entry.partition(":")[0] for entry in entries] == list(TASKS)
    for entry in entries:
        heading, first, second = entry.splitlines()
        name, description = heading.split(": ", 1)
        assert description == TASKS[name].description
        for line, answer in zip((first, second), TASKS[name].candidates, strict=True):
            assert line.endswith(f"  →  {answer!r}")
            assert len(line) < 100
        assert first != second


def test_a_command_is_quiet_when_asked(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    model = save_micro(tmp_path / "model")
    task = save_pairs(tmp_path / "micro.jsonl")
    prune = ["prune", model, task, *command_flags(QUICK_SETTINGS), "--device", "cpu"]
    assert main([*prune, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    printed = capfd.readouterr()
    assert printed.out.strip().startswith("Circuit of micro in model")
    assert "Saved" not in printed.out
    assert printed.err == ""
    circuit = [str(tmp_path / "quiet"), "--model", model, "--device", "cpu", "-q"]
    assert main(["export", *circuit, "-o", str(tmp_path / "a.csv")]) == 0
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


@pytest.mark.slow
def test_a_quiet_suite(tmp_path, capfd):
    model = save_micro(tmp_path / "model")
    task = save_pairs(tmp_path / "micro.jsonl")
    flags = [*command_flags(QUICK_SETTINGS), "--device", "cpu", "--seeds", "0"]
    out = str(tmp_path / "out")
    assert main(["suite", model, "--tasks", task, "--out", out, *flags, "-q"]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "micro" in printed.out
    assert "Saved" not in printed.out
