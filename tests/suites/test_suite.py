"""Whole suites on the micro model: what they find, how they go on, and the figures they report."""

import dataclasses
import json
import os
import shutil
import statistics
from pathlib import Path

import pytest

import tl_sparse
from helpers import command_flags, must_not_run
from micro import LOSS, NODES, QUICK_SETTINGS, save_micro, save_pairs
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, ConfigError, SuiteError, TaskError
from tl_sparse.files import read_json
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.suites import suite
from tl_sparse.suites.folders import whole_folder
from tl_sparse.suites.jobs import Job
from tl_sparse.suites.results import collected, results_table
from tl_sparse.suites.suite import run_suite
from tl_sparse.suites.workers import in_processes

pytestmark = pytest.mark.any_line

CONFIG = PruneConfig(**QUICK_SETTINGS)
FLAGS = command_flags(QUICK_SETTINGS)


def make_place(folder):
    """Two models of other names; a task that they solve and one that they do not; a folder."""
    models = [save_micro(folder / name) for name in ("one", "two")]
    solved = save_pairs(folder / "micro.jsonl")
    unsolved = save_pairs(folder / "wrong.jsonl", (" no", " yes"))
    return models, [solved, unsolved], folder / "out"


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def counting(monkeypatch, stop_at=None):
    """The calls of `prune`, the real one; one of them is interrupted."""
    calls, real = [], suite.prune

    def prune(model, task, tokens, config, *rest):
        calls.append((task.name, config.seed))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(model, task, tokens, config, *rest)

    monkeypatch.setattr(suite, "prune", prune)
    return calls


@dataclasses.dataclass
class Finished:
    """A suite of two models, two tasks and two seeds that has run."""

    models: list[str]
    tasks: list[str]
    out: Path
    calls: list[tuple[str, int]]
    results: dict


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    models, tasks, out = make_place(tmp_path_factory.mktemp("suite"))
    with pytest.MonkeyPatch.context() as patched:
        calls = counting(patched)
        results = run_suite(models, tasks, out, (0, 1), CONFIG)
    return Finished(models, tasks, out, calls, results)


def test_every_task_is_pruned_with_every_seed(finished):
    of_one_model = [("micro", 0), ("micro", 1), ("wrong", 0), ("wrong", 1)]
    assert finished.calls == of_one_model * 2


@pytest.mark.parametrize("model", ["one", "two"])
def test_a_suite_saves_node_pruned_and_edge_pruned_circuits(model, finished):
    folder = finished.out / model / "micro" / "1"
    for path in (folder, folder / "edges"):
        circuit = tl_sparse.Circuit.load(path)
        assert [str(node) for node in circuit.nodes] == NODES
        assert circuit.measured["config"]["seed"] == 1


@pytest.mark.parametrize("model", ["one", "two"])
def test_the_figures_of_a_task_that_is_solved(model, finished):
    found = finished.results["models"][model]["micro"]
    assert found["problems"] == {}
    for kind in ("node_pruned", "edge_pruned"):
        assert found[kind]["edges"] == {"mean": 2, "median": 2, "min": 2, "max": 2}
        assert found[kind]["loss"]["median"] == pytest.approx(LOSS, rel=1e-3)
    assert found["node_pruned"]["overlap"]["mean"] == 1


@pytest.mark.parametrize("model", ["one", "two"])
def test_a_task_without_a_circuit_has_its_reason(model, finished):
    found = finished.results["models"][model]["wrong"]
    assert found["node_pruned"] == found["edge_pruned"] == {}
    assert "full model's loss on wrong" in found["problems"]["0"]
    folder = finished.out / model / "wrong" / "0"
    assert [path.name for path in folder.iterdir()] == ["job.json"]


def test_models_are_compared_by_the_tasks_that_all_solve(finished):
    results = finished.results
    assert results["solved_by_all"] == ["micro"]
    of_nodes = results["geometric_mean_edges"]["node_pruned"]
    assert of_nodes == {"one": pytest.approx(2), "two": pytest.approx(2)}
    assert results["ratio"] == {"one": 1, "two": 1}


def test_results_are_written_as_json_a_table_and_a_picture(finished):
    written = read_json(finished.out / "results.json")
    assert written == json.loads(json.dumps(finished.results))
    table = (finished.out / "results.md").read_text()
    assert "| one | micro | 3 | 2 |" in table
    assert "- two, wrong, seed 1: the full model's loss" in table
    assert "wrong" not in (finished.out / "results.svg").read_text()


def meanwhile(monkeypatch, work):
    """Do `work` after the next suite has checked its folder, as another process could."""
    real = suite._run_missing

    def run_missing(*arguments):
        monkeypatch.setattr(suite, "_run_missing", real)
        work()
        real(*arguments)

    monkeypatch.setattr(suite, "_run_missing", run_missing)


def test_suites_with_other_seeds_can_work_in_one_folder(place, monkeypatch):
    [model, _], [task, _], out = place
    meanwhile(monkeypatch, lambda: run_suite(model, task, out, 1, CONFIG))
    assert run_suite(model, task, out, 0, CONFIG)["seeds"] == [0]
    monkeypatch.setattr(suite, "prune", must_not_run("a finished circuit is searched again"))
    assert run_suite(model, task, out, (0, 1), CONFIG)["seeds"] == [0, 1]


def test_circuits_of_other_settings_are_noticed_that_come_meanwhile(place, monkeypatch):
    [model, _], [task, _], out = place
    other = dataclasses.replace(CONFIG, target_loss=0.2)
    meanwhile(monkeypatch, lambda: run_suite(model, task, out, 0, other))
    with pytest.raises(SuiteError, match=r"0 was made with target_loss = 0\.2"):
        run_suite(model, task, out, 0, CONFIG)


def test_a_folder_that_another_process_makes_at_the_same_moment(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "job.json").write_text("of the other")
    exists = Path.exists
    answers = [False]  # to the first question, the other folder is not there yet
    is_asked = lambda path: answers.pop() if answers else exists(path)  # noqa: E731
    with whole_folder(tmp_path / "0") as written:
        written.mkdir()
        (written / "job.json").write_text("of this one")
        monkeypatch.setattr(Path, "exists", is_asked)
    assert (tmp_path / "0" / "job.json").read_text() == "of the other"


def test_what_is_there_is_not_searched_again(finished, monkeypatch):
    monkeypatch.setattr(suite, "prune", must_not_run("a finished circuit is searched again"))
    again = run_suite(finished.models, finished.tasks, finished.out, (0, 1), CONFIG)
    assert again == finished.results


def test_the_command_searches_only_what_is_missing(finished, monkeypatch, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    calls = counting(monkeypatch)
    task = finished.tasks[0]
    command = ["suite", *finished.models, "--out", str(out), "--tasks", task, "--seeds", "0,2"]
    assert main([*command, *FLAGS]) == 0
    assert calls == [("micro", 2), ("micro", 2)]


def test_an_interrupted_suite_keeps_what_is_finished_and_goes_on(place, monkeypatch, capsys):
    models, tasks, out = place
    calls = counting(monkeypatch, stop_at=3)
    command = ["suite", *models, "--out", str(out), "--tasks", tasks[0], "--seeds", "0,1", *FLAGS]
    assert main(command) == 1
    assert "interrupted; finished work is kept" in capsys.readouterr().err
    assert sorted(path.parent.name for path in out.glob("*/micro/*/job.json")) == ["0", "1"]
    assert not list(out.rglob(".*"))
    assert not (out / "results.json").exists()
    assert main(command) == 0
    assert calls == [("micro", 0), ("micro", 1), ("micro", 0), ("micro", 0), ("micro", 1)]
    assert f"Saved in {out}" in capsys.readouterr().out


def test_a_folder_of_other_settings_is_refused(place):
    models, tasks, out = place
    run_suite(models[:1], tasks[:1], out, (0,), CONFIG)
    before = sorted(out.rglob("*"))
    with pytest.raises(
        SuiteError, match=r"one/micro/0 was made with steps = 30, now 31\. Continue with those"
    ):
        run_suite(models[:1], tasks[1:], out, (1,), dataclasses.replace(CONFIG, steps=31))
    with pytest.raises(SuiteError, match="corpus = None, now 'builtin'"):
        run_suite(models[1:], tasks[:1], out, (0,), CONFIG, corpus="builtin")
    assert sorted(out.rglob("*")) == before


def test_the_seed_is_not_a_setting(place, monkeypatch):
    """Each circuit has a seed of its own, so finished ones are taken whatever `config.seed` is."""
    models, tasks, out = place
    run_suite(models[:1], tasks[:1], out, (0,), CONFIG)
    monkeypatch.setattr(suite, "prune", must_not_run("a finished circuit is searched again"))
    run_suite(models[:1], tasks[:1], out, (0,), dataclasses.replace(CONFIG, seed=7))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": ["nowhere"]}, CheckpointError, "there is no folder 'nowhere'"),
        ({"models": []}, ConfigError, r"models = \[\] is not possible; it must be one or more"),
        ({"tasks": ["single_quote"]}, TaskError, "did you mean 'single_double_quote'"),
        (
            {"tasks": ["var_if", "var_if"]},
            ConfigError,
            r"tasks = \['var_if', 'var_if'\] is not possible",
        ),
        ({"seeds": []}, ConfigError, "seeds"),
        ({"workers": 0}, ConfigError, "workers = 0 is not possible; it must be at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(change, error, message, place):
    models, tasks, out = place
    with pytest.raises(error, match=message):
        run_suite(**{"models": models, "tasks": tasks, "out": out, "config": CONFIG, **change})
    assert not out.exists()


def test_seeds_are_numbers(place, capsys):
    models, _, out = place
    assert main(["suite", *models, "--out", str(out), "--seeds", "0,a"]) == 1
    assert (
        "seeds = '0,a' is not possible; it must be whole numbers separated by commas"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_processes_find_the_same_circuits(place):
    models, tasks, out = place
    run_suite(models[:1], tasks[:1], out / "a", (0, 1), CONFIG)
    run_suite(models[:1], tasks[:1], out / "b", (0, 1), CONFIG, workers=2)
    for seed in ("0", "1"):
        circuit = Path("one", "micro", seed, "circuit.safetensors")
        assert (out / "a" / circuit).read_bytes() == (out / "b" / circuit).read_bytes()


def test_a_process_that_dies_is_an_error():
    with pytest.raises(SuiteError, match="a process died, perhaps because memory ran out"):
        list(in_processes(os._exit, [3], 2))


def write_job(
    out: Path,
    model: str,
    task: str,
    seed: int,
    edges: int | None,
    kept: str = "a",
    cut: int | None = None,
    reached: float | None = None,
):
    """A finished job with made-up figures: of the nodes, and of the circuit with edges cut."""
    job = Job(model, task, seed, out / model / task / str(seed))
    found = {}
    for kind, n_edges in (("node_pruned", edges), ("edge_pruned", cut)):
        if n_edges is not None:
            found[kind] = {
                "nodes": n_edges + 1,
                "edges": n_edges,
                "loss": n_edges / 100,
                "standard_error": 0.01,
                "accuracy_without": 0.5,
                "seconds": 10 * n_edges,
                "kept": list(kept),
                "kl": n_edges / 10,
                "target_loss": 0.06,
                "subsets_worst": n_edges / 50,
                "reached_loss": reached,
            }
    job.folder.mkdir(parents=True)
    (job.folder / "job.json").write_text(json.dumps({"problem": None if found else "no", **found}))
    return job


@pytest.fixture
def jobs(tmp_path):
    return [
        write_job(tmp_path, "sparse", "p", 0, 2, "ab", cut=1),
        write_job(tmp_path, "sparse", "p", 1, 8, "bc", cut=3),
        write_job(tmp_path, "sparse", "p", 2, 4, "ab", cut=2),
        *(write_job(tmp_path, "sparse", "q", seed, 0, "a", cut=0) for seed in range(3)),
        *(write_job(tmp_path, "sparse", "r", seed, 5, "a", cut=0) for seed in range(3)),
        *(write_job(tmp_path, "dense", "p", seed, 100 * seed + 100) for seed in range(3)),
        *(write_job(tmp_path, "dense", "q", seed, 50) for seed in range(3)),
        write_job(tmp_path, "dense", "r", 0, 9),
        write_job(tmp_path, "dense", "r", 1, None),
        write_job(tmp_path, "dense", "r", 2, 7),
    ]


def test_figures_are_those_computed_by_hand(jobs):
    results = collected(jobs)
    of = results["models"]["sparse"]["p"]
    assert of["node_pruned"]["edges"] == {
        "mean": pytest.approx(14 / 3),
        "median": 4,
        "min": 2,
        "max": 8,
    }
    assert of["node_pruned"]["nodes"]["median"] == 5
    assert of["edge_pruned"]["edges"] == {"mean": 2, "median": 2, "min": 1, "max": 3}
    assert of["node_pruned"]["loss"]["median"] == 0.04
    assert of["node_pruned"]["overlap"]["mean"] == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert results["models"]["dense"]["r"]["problems"] == {"1": "no"}
    assert results["models"]["dense"]["r"]["node_pruned"]["edges"]["median"] == 8
    assert results["models"]["dense"]["p"]["edge_pruned"] == {}


def test_means_over_tasks_are_those_computed_by_hand(jobs):
    """The dense model does not solve task r with every seed; no edges count as one."""
    results = collected(jobs)
    assert results["solved_by_all"] == ["p", "q"]
    means = results["geometric_mean_edges"]
    assert means["node_pruned"] == {"sparse": pytest.approx(2), "dense": pytest.approx(100)}
    assert means["edge_pruned"] == {"sparse": pytest.approx(statistics.geometric_mean([2, 1]))}
    assert results["ratio"] == {"sparse": 1, "dense": pytest.approx(50)}


def test_what_misses_the_target_is_decided_by_the_loss_that_was_searched(tmp_path):
    """The first misses its target by the task loss alone, which its search did not look at."""
    reached = [
        write_job(tmp_path, "m", "p", 0, 10, reached=0.05),
        write_job(tmp_path, "m", "q", 0, 2, reached=0.5),
    ]
    table = results_table(collected(reached))
    assert "| m | p | 11 | 10 | 0.100 | 0.010 |" in table
    assert "| m | q | 3 | 2 | 0.020 † | 0.010 |" in table


def test_a_figure_that_is_no_number_ends_one_circuit_not_the_suite(place, monkeypatch):
    models, tasks, out = place
    real = suite.robustness

    def diverging(*arguments):
        return dataclasses.replace(real(*arguments), adversary=float("nan"))

    monkeypatch.setattr(suite, "robustness", diverging)
    results = run_suite(models[:1], tasks[:1], out, (0,), CONFIG, progress=False)
    (problem,) = results["models"]["one"]["micro"]["problems"].values()
    assert problem.startswith("node_pruned.adversary is nan: the model diverges")


def test_the_table_has_the_figures(jobs):
    table = results_table(collected(jobs))
    assert "| sparse | p | 5 (3–9) | 4 (2–8) | 0.040 (0.020–0.080) † |" in table
    assert "| sparse | r | 6 | 5 | 0.050 | 0.010 | 0.50 |" in table
    assert "† misses, on held-out pairs and with some seed, the loss that the search had" in table
    assert "count as one edge in geometric means: q in sparse." in table
    assert "| dense | **geometric mean**, × 50.0 |  | 100.0 |" in table
    assert (
        "| 0.56 (0.33–1.00) | 3 (2–4) | 2 (1–3) | 0.020 (0.010–0.030) | 0.040 (0.020–0.060) | – |"
    ) in table
    assert "- dense, r, seed 1: no" in table
