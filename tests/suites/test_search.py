"""The search for settings: what it minimises, how it goes on, what it refuses."""

import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import tl_sparse
from helpers import command_flags
from micro import NODES, QUICK_SETTINGS, micro_corpus, micro_model, save_micro, save_pairs
from tl_sparse.checkpoints.corpus_sample import CORPUS_SAMPLE
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, ConfigError, PruneError, SuiteError, TaskError
from tl_sparse.files import write_tensors
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.suites import optuna_search as module
from tl_sparse.suites.optuna_search import RANGES, search

pytestmark = pytest.mark.any_line

optuna = pytest.importorskip("optuna")
SETTINGS = QUICK_SETTINGS | {"steps": 50}
CONFIG = PruneConfig(**SETTINGS)
FLAGS = command_flags(SETTINGS)


@pytest.fixture
def place(tmp_path):
    tasks = [save_pairs(tmp_path / f"{name}.jsonl") for name in ("easy", "hard")]
    return save_micro(tmp_path / "one"), tasks, tmp_path / "out"


@pytest.fixture
def tried(monkeypatch):
    """The settings given to a made-up pruner, which fails at the hard task if lr < 1e-3."""
    configs = []

    def prune(model, task, tokens, config, progress, means):
        configs.append(config)
        if task.name == "hard" and config.lr < 1e-3:
            raise PruneError("no set of nodes")
        edges = round(1e6 * config.k_coef) if task.name == "easy" else 4
        return None, SimpleNamespace(n_edges=edges)

    monkeypatch.setattr(module, "prune", prune)
    monkeypatch.setattr(module, "n_weights", lambda model: (300, 1000))
    return configs


def values(configs):
    """What is searched, of every second call: each trial prunes two tasks."""
    return [(c.k_coef, c.lr, c.beta2, c.steps) for c in configs[::2]]


def searched(config, name):
    return 1 - config.beta2 if name == "1 - beta2" else getattr(config, name)


def cost_by_hand(config):
    """The geometric mean of the edges of both tasks; no circuit counts as all 300 weights."""
    easy = max(1, round(1e6 * config.k_coef))
    hard = 4 if config.lr >= 1e-3 else 300
    return (easy * hard) ** 0.5


def test_the_settings_with_the_fewest_edges_are_found(place, tried):
    model, tasks, out = place
    best, text = search(model, tasks, out, 12, config=CONFIG)
    assert tried[0] == CONFIG
    assert tried[0::2] == tried[1::2]
    assert len(tried) == 24
    for name, (low, high) in RANGES.items():
        tries = [searched(config, name) for config in tried]
        assert low <= min(tries) * (1 + 1e-9)
        assert max(tries) <= high * (1 + 1e-9)
        assert len(set(tries)) >= 10
    settings = tried[::2]  # each is tried with two tasks
    costs = [cost_by_hand(config) for config in settings]
    possible = [cost for cost, config in zip(costs, settings, strict=True) if config.lr >= 1e-3]
    least = min(possible)
    assert best == settings[costs.index(least)]
    with module._study(str(out / "study.journal")) as study:
        assert [trial.value for trial in study.trials] == pytest.approx(costs)
    lines = [line.split() for line in text.splitlines()]
    assert ["edges,", "geometric", "mean", f"{costs[0]:.1f}", f"{least:.1f}"] in lines
    assert ["easy", "2000", str(round(1e6 * best.k_coef))] in lines
    assert ["lr", "0.02", f"{best.lr:.3g}"] in lines
    assert PruneConfig(**yaml.safe_load((out / "best.yaml").read_text())) == best


def test_an_interrupted_search_goes_on_as_if_nothing_had_been(place, tried, monkeypatch, tmp_path):
    model, tasks, out = place
    whole, _ = search(model, tasks, out / "whole", 12, config=CONFIG)
    expected, found = values(tried), []
    search(model, tasks, out / "parts", 5, config=CONFIG)
    search(model, tasks, out / "parts", 12, config=CONFIG)
    assert values(tried[24:]) == expected
    assert (out / "parts" / "best.yaml").read_text() == (out / "whole" / "best.yaml").read_text()
    assert search(model, tasks, out / "parts", 12, config=CONFIG)[0] == whole
    assert len(tried) == 48

    def interrupted(*args):
        found.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "prune", interrupted)
        with pytest.raises(SuiteError, match="interrupted; finished work is kept"):
            search(model, tasks, out / "new", 2, config=CONFIG)
    assert "as given" in search(model, tasks, out / "new", 2, config=CONFIG)[1]
    assert len(found) == 1
    assert len(tried) == 52


def test_it_finds_a_circuit_and_prune_takes_its_settings(place, tmp_path, capsys):
    model, tasks, out = place
    assert main(["search", model, tasks[0], "--out", str(out), "--trials", "2", *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert f"Saved {out / 'best.yaml'}" in printed
    assert "easy" in printed
    circuit = str(tmp_path / "circuit")
    command = ["prune", model, tasks[0], "--out", circuit, "--edges"]
    assert main([*command, "--config", str(out / "best.yaml"), "--train-pairs", "33"]) == 0
    settings = tl_sparse.Circuit.load(circuit).measured["config"]
    assert settings == yaml.safe_load((out / "best.yaml").read_text()) | {"train_pairs": 33}
    assert "Pruned by edges\n\nCircuit of easy" in capsys.readouterr().out
    assert [str(node) for node in tl_sparse.Circuit.load(f"{circuit}/edges").nodes] == NODES


def test_no_circuit_at_all_is_an_error(place, monkeypatch):
    model, tasks, out = place

    def prune(*args):
        raise PruneError("no set of nodes")

    monkeypatch.setattr(module, "prune", prune)
    with pytest.raises(PruneError, match="none of 2 trials found a circuit of every task"):
        search(model, tasks, out, 2, config=CONFIG)
    assert not (out / "best.yaml").exists()


def test_a_study_of_something_else_is_refused(place, tried, tmp_path, monkeypatch):
    model, tasks, out = place
    search(model, tasks, out, 1, config=CONFIG)
    with pytest.raises(
        SuiteError,
        match=r"journal was made with tasks = \['easy', 'hard'\], now \['easy'\]\. Continue",
    ):
        search(model, tasks[:1], out, 2, config=CONFIG)
    with pytest.raises(SuiteError, match="model = 'one', now 'two'"):
        search(save_micro(tmp_path / "two"), tasks, out, 2, config=CONFIG)
    with pytest.raises(SuiteError, match="train_pairs = 32, now 2048"):
        search(model, tasks, out, 2, config=PruneConfig(**SETTINGS | {"train_pairs": 2048}))
    monkeypatch.setitem(module.RANGES, "lr", [1e-3, 1e-2])
    with pytest.raises(SuiteError, match=r"lr = .0.0003, 0.05., now .0.001, 0.01."):
        search(model, tasks, out, 2, config=CONFIG)
    assert len(tried) == 2


def test_a_study_of_other_contents_is_refused(place, tried, tmp_path):
    """The names are the same: of a model that was retrained, or of a file with other pairs."""
    model, tasks, out = place
    search(model, tasks, out, 1, config=CONFIG)
    save_pairs(tmp_path / "hard.jsonl", n_pairs=100)
    with pytest.raises(SuiteError, match=r"journal was made with other contents of the task hard"):
        search(model, tasks, out, 2, config=CONFIG)
    save_pairs(tmp_path / "hard.jsonl")
    search(model, tasks, out, 1, config=CONFIG)
    other = micro_model()
    with torch.no_grad():
        other.unembed.W_U.mul_(1.001)
    shutil.rmtree(model)
    other.save_pretrained(model)
    write_tensors(Path(model, CORPUS_SAMPLE), {"tokens": micro_corpus()})
    with pytest.raises(SuiteError, match=r"made with other contents of the model one\. Continue"):
        search(model, tasks, out, 2, config=CONFIG)
    assert len(tried) == 2


def test_trials_that_were_killed_are_run_again(place, tried):
    """Their settings are those that they had before."""
    model, tasks, out = place
    search(model, tasks, out / "whole", 3, config=CONFIG)
    expected = values(tried)
    search(model, tasks, out / "killed", 2, config=CONFIG)
    with module._study(str(out / "killed" / "study.journal")) as study:
        module._proposed(study, CONFIG.seed).set_user_attr("process", ended_process())
    search(model, tasks, out / "killed", 3, config=CONFIG)
    assert values(tried[6:]) == expected
    with module._study(str(out / "killed" / "study.journal")) as study:
        states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def ended_process():
    """The name of a process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{socket.gethostname()}-{process.pid}"


def test_storages_that_cannot_be_used(place, tried, tmp_path, monkeypatch):
    model, tasks, out = place
    (tmp_path / "text").write_text("no journal\n")
    with pytest.raises(
        SuiteError,
        match=r"cannot use the storage .*text: .*it may be locked, or not an Optuna study",
    ):
        search(model, tasks, out, 1, storage=str(tmp_path / "text"), config=CONFIG)
    with pytest.raises(SuiteError, match=r"cannot use the storage .*text/study"):
        search(model, tasks, out, 1, storage=str(tmp_path / "text" / "study"), config=CONFIG)
    with pytest.raises(
        SuiteError,
        match=r"pip install 'tl-sparse\[search\]', or the package that the storage needs",
    ):
        search(model, tasks, out, 1, storage="postgresql+psycopg2://nowhere/study", config=CONFIG)
    database = tmp_path / "study.db"
    search(model, tasks, out, 1, storage=f"sqlite:///{database}", config=CONFIG)
    with sqlite3.connect(database, isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SuiteError, match="database is locked"):
            search(model, tasks, out, 2, storage=f"sqlite:///{database}?timeout=0.1", config=CONFIG)
        connection.execute("ROLLBACK")
    search(model, tasks, out, 2, storage=f"sqlite:///{database}", config=CONFIG)
    assert len(tried) == 4
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SuiteError, match=r"pip install 'tl-sparse\[search\]'"):
        search(model, tasks, out, 1, config=CONFIG)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "nowhere"}, CheckpointError, "there is no folder 'nowhere'"),
        ({"tasks": ["nothing"]}, TaskError, "no task 'nothing'"),
        ({"tasks": []}, ConfigError, r"tasks = \[\] is not possible; it must be one or more"),
        ({"tasks": ["var_if"] * 2}, ConfigError, r"tasks = \['var_if', 'var_if'\] is not possible"),
        ({"tasks": 3}, ConfigError, "tasks = 3 is not possible; it must be one or more names"),
        ({"model": None}, ConfigError, "model = None is not possible; it must be a name or a path"),
        ({"out": 3}, ConfigError, "out = 3 is not possible; it must be a folder"),
        ({"config": {}}, ConfigError, "config = {} is not possible; it must be a PruneConfig"),
        ({"storage": 3}, ConfigError, "storage = 3 is not possible; it must be a name or a path"),
        ({"corpus": 3}, ConfigError, "corpus = 3 is not possible; it must be a name or a path"),
        ({"device": 3}, ConfigError, "device = 3 is not possible; it must be a device"),
        ({"n_trials": "2"}, ConfigError, "trials = '2' is not possible"),
        ({"n_trials": 0}, ConfigError, "trials = 0 is not possible; it must be at least 1"),
        ({"workers": 0}, ConfigError, "workers = 0 is not possible; it must be at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(change, error, message, place):
    model, tasks, out = place
    with pytest.raises(error, match=message):
        search(**{"model": model, "tasks": tasks, "out": out, **change})
    assert not out.exists()


@pytest.mark.slow
def test_processes_share_a_study(place):
    model, tasks, out = place
    search(model, tasks[:1], out, 6, workers=2, config=CONFIG)
    with module._study(str(out / "study.journal")) as study:
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
        assert len({trial.params["lr"] for trial in study.trials}) == 6
