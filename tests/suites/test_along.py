"""Suites along training: the models of a run's steps, their table and their figure."""

import json
import math
import shutil

import pytest
import torch

from helpers import command_flags, must_not_run
from micro import LOSS, NODES, QUICK_SETTINGS, micro_model, save_micro, save_pairs
from tl_sparse.checkpoints.steps import StepRecord, step_path, write_step_record
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, ConfigError, DataError
from tl_sparse.files import read_json
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.suites import suite
from tl_sparse.suites.along import steps_table
from tl_sparse.suites.suite import run_suite
from tl_sparse.view import plots

pytestmark = pytest.mark.any_line

SETTINGS = {**QUICK_SETTINGS, "adversary_steps": 5}
CONFIG = PruneConfig(**SETTINGS)
FLAGS = command_flags(SETTINGS)


def record(step):
    return StepRecord(step, 2.0, 1000 / step, 1000 // step, 1000)


def make_run(folder):
    """A run that keeps three steps; at the first one the model knows nothing of the task."""
    for step in (1, 10, 100):
        path = step_path(folder, step)
        save_micro(path)
        write_step_record(path, record(step))
    model = micro_model()
    with torch.no_grad():
        model.unembed.W_U.zero_()
    model.save_pretrained(step_path(folder, 1), overwrite=True)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("along")
    return make_run(folder / "run"), save_pairs(folder / "micro.jsonl"), folder / "out"


@pytest.fixture(scope="module")
def finished(place):
    run, task, out = place
    return run_suite(run, task, out, 0, CONFIG, checkpoints=True)


def test_every_kept_step_is_a_model(finished, place):
    assert list(finished["models"]) == ["run@1", "run@10", "run@100"]
    steps = finished["steps"]["run"]
    assert [step["model"] for step in steps] == ["run@1", "run@10", "run@100"]
    assert steps[1]["record"] == {
        "step": 10,
        "training_loss": 2.0,
        "validation_loss": 100.0,
        "nonzero_weights": 100,
        "weights": 1000,
    }
    report = read_json(place[2] / "run@100" / "micro" / "0" / "job.json")
    assert report["node_pruned"]["kept"]
    assert report["settings"]["model"].endswith("run@100")


def test_the_whole_model_is_measured_at_each_step(finished):
    losses = [finished["models"][f"run@{step}"]["micro"]["full"]["loss"] for step in (1, 10, 100)]
    expected = [math.log(2), LOSS, LOSS]
    assert [loss["median"] for loss in losses] == pytest.approx(expected, abs=1e-5)


def test_a_model_that_does_not_solve_the_task_is_listed_as_such(finished):
    first = finished["models"]["run@1"]["micro"]
    assert not first["node_pruned"]
    assert "full model's loss on micro is 0.693" in first["problems"]["0"]
    rows = steps_table(finished).splitlines()
    cells = "| run | micro | 1 | 1000.000 | 1,000 (100.0%) | 0.693 | no | – | – | – | – | – | – |"
    assert rows[2] == cells
    assert rows[4].startswith("| run | micro | 100 | 10.000 | 10 (1.0%) |")
    assert f"| {LOSS:.3f} | yes | {len(NODES)} | 2 | {LOSS:.3f} |" in rows[4]
    assert "without a circuit" not in steps_table(finished)


def test_a_task_that_is_solved_without_a_circuit_has_its_reason(finished):
    results = json.loads(json.dumps(finished))
    entry = results["models"]["run@10"]["micro"]
    entry["node_pruned"] = entry["edge_pruned"] = {}
    entry["problems"] = {"0": "no set of nodes\nreaches the target"}
    table = steps_table(results)
    assert "- micro at step 10 of run, seed 0: no set of nodes reaches the target\n" in table


def test_without_a_target_it_is_not_known_whether_a_task_is_solved(finished):
    results = json.loads(json.dumps(finished))
    results["config"]["objective"] = "model"
    row = steps_table(results).splitlines()[4]
    assert f"| {LOSS:.3f} | – | {len(NODES)} |" in row


def test_the_files_of_the_suite(finished, place):
    out = place[2]
    assert read_json(out / "results.json") == json.loads(json.dumps(finished))
    text = (out / "results.md").read_text()
    assert text.startswith(steps_table(finished))
    assert "| run@100 | micro | 3 | 2 |" in text
    assert "Circuits along training" in (out / "results.svg").read_text()


def test_the_command_opens_chosen_steps_and_searches_nothing_twice(
    finished, place, monkeypatch, capsys, tmp_path
):
    run, task, out = place
    monkeypatch.setattr(suite, "prune", must_not_run("a finished circuit is searched again"))
    out = shutil.copytree(out, tmp_path / "out")
    command = ["suite", run, "--tasks", task, "--out", str(out), "--seeds", "0", *FLAGS]
    assert main([*command, "--checkpoints", "100,10"]) == 0
    printed = capsys.readouterr().out
    assert "| run | micro | 10 |" in printed
    assert "| run | micro | 1 |" not in printed
    assert list(read_json(out / "results.json")["models"]) == ["run@10", "run@100"]
    assert main([*command, "--checkpoints"]) == 0
    assert "| run | micro | 1 |" in capsys.readouterr().out
    image = tmp_path / "along.svg"
    assert main(["plot", "training", str(out), "-o", str(image), "--against", "nodes"]) == 0
    assert "number of nodes" in image.read_text()


@pytest.mark.parametrize("run", [".", "../run", "../run/"])
def test_a_run_may_be_named_by_any_path(run, place, monkeypatch, tmp_path):
    shutil.copytree(place[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    results = run_suite(run, place[1], tmp_path / "out", 0, CONFIG, checkpoints=1)
    assert list(results["models"]) == ["run@1"]


@pytest.mark.parametrize(
    ("checkpoints", "error", "message"),
    [
        ([], ConfigError, r"checkpoints = \[\] is not possible; it must be true, for all"),
        (0, ConfigError, "checkpoints = 0 is not possible"),
        ("100", ConfigError, "checkpoints = '100' is not possible"),
        (None, ConfigError, "checkpoints = None is not possible"),
        ([1, 1.0], ConfigError, r"checkpoints = \[1, 1.0\] is not possible"),
        ([10, 10], ConfigError, r"checkpoints = \[10, 10\] .* numbers that are all different"),
        ([10, 11], CheckpointError, "run keeps no model of step 11; it keeps steps 1, 10, 100"),
    ],
)
def test_steps_that_are_not_there(checkpoints, error, message, place, tmp_path):
    run, task, _ = place
    with pytest.raises(error, match=message):
        run_suite(run, task, tmp_path / "out", 0, CONFIG, checkpoints=checkpoints)
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_name_are_refused(place, tmp_path):
    run, task, _ = place
    other = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"models = .* a run with another name"):
        run_suite([run, str(other)], task, tmp_path / "out", 0, CONFIG, checkpoints=True)


def test_a_model_that_keeps_no_steps_is_refused(place, tmp_path):
    model = save_micro(tmp_path / "one")
    with pytest.raises(CheckpointError, match="one keeps no models of its steps; `tl-sparse train"):
        run_suite(model, place[1], tmp_path / "out", 0, CONFIG, checkpoints=True)


def test_the_flag_takes_numbers(place, tmp_path, capsys):
    command = ["suite", "--checkpoints", place[0], "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(command)
    assert "MODEL" in capsys.readouterr().err
    assert main(["suite", place[0], "--checkpoints", "a", "--out", str(tmp_path / "out")]) == 1
    message = "checkpoints = 'a' is not possible; it must be steps separated by commas"
    assert message in capsys.readouterr().err


# --- the figure


def lines(axes):
    """The points of each line that has any, without those that are not numbers."""
    found = []
    for line in axes.lines:
        points = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        found.append([(x, y) for x, y in points if not math.isnan(y)])
    return [points for points in found if points]


def test_the_figure_has_sizes_and_losses_by_step(finished):
    figure = plots.training(finished)
    sizes, losses, models, shares = figure.axes
    assert lines(sizes) == [[(10, 2), (100, 2)]] * 2  # nodes pruned, and edges pruned too
    circuits, whole = lines(losses)[:2]
    assert [step for step, _ in circuits] == [10, 100]
    assert [loss for _, loss in circuits] == pytest.approx([LOSS, LOSS], abs=1e-4)
    assert [step for step, _ in whole] == [1, 10, 100]
    assert whole[0][1] == pytest.approx(math.log(2))
    assert lines(models) == [[(1, 1000), (10, 100), (100, 10)]]
    assert lines(shares) == [[(1, 1.0), (10, 0.1), (100, 0.01)]]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "micro",
        "left: edges pruned too",
        "middle: the whole model",
        "right: validation loss",
        "right: nonzero weights",
    ]
    assert sizes.get_xscale() == losses.get_xscale() == models.get_xscale() == "log"
    assert sizes.get_xlim() == losses.get_xlim() == models.get_xlim()
    assert lines(plots.training(finished, "nodes").axes[0])[0] == [(10, 3), (100, 3)]


def test_several_runs_are_told_apart(finished):
    results = json.loads(json.dumps(finished))
    results["steps"]["dense"] = results["steps"]["run"]
    figure = plots.training(results)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"micro in run", "micro in dense", "right: validation loss of dense"} <= {*legend}


@pytest.mark.filterwarnings("error")
def test_steps_without_any_circuit_are_drawn(finished):
    results = json.loads(json.dumps(finished))
    for model in results["models"].values():
        for entry in model.values():
            entry["node_pruned"] = entry["edge_pruned"] = {}
    figure = plots.training(results)
    figure.canvas.draw()
    assert lines(figure.axes[0]) == []


def test_a_suite_that_is_not_along_training_is_refused(finished):
    with pytest.raises(DataError, match="there is nothing to draw in results"):
        plots.training({**finished, "steps": {}})
    with pytest.raises(DataError, match="steps"):
        plots.training({**finished, "steps": {"run": [{"model": "run@1"}]}})
