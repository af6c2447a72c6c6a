"""Suites along training: the models that runs keep of their steps, and the table by step."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tl_sparse.checkpoints import find, kept_steps, read_step_record, step_folder
from tl_sparse.config import check
from tl_sparse.suites.models import model_name
from tl_sparse.suites.results import cell, in_one_line, markdown_table
from tl_sparse.view import StepModel, TaskResults, read_results

#: Which steps of runs are meant: none, all that a run keeps, or these.
Steps = bool | int | Iterable[int]

_HEADER = [
    "task",
    "step",
    "validation loss",
    "L0",
    "model's loss",
    "solved",
    "nodes",
    "edges",
    "circuit's loss",
    "edge-pruned: nodes",
    "edges",
    "loss",
]
_NOTE = """\
The validation loss is that of the model at this step, in nats per token; L0 is the number of
nonzero weights in its matrices. The losses of model and circuits are those of the task, in nats
between the two answers, on held-out pairs. A task is solved if the model's loss is at most the
target loss. Cells are the median (range) over seeds."""


def _chosen_steps(given: Any) -> bool | list[int]:
    """Which steps are meant: False for none, True for all that a run keeps, or their numbers.

    Raises:
        ConfigError: if anything else is given, or a step twice.
    """
    if isinstance(given, bool):
        return given
    steps = given
    if isinstance(given, int):
        steps = [given]
    is_list = isinstance(steps, Iterable) and not isinstance(steps, str)
    steps = list(steps) if is_list else []
    is_valid = bool(steps) and all(type(step) is int and step >= 1 for step in steps)
    expected = "true, for all steps that the runs keep, or the numbers of one or more of them"
    check(is_valid, "checkpoints", given, expected)
    check(len(set(steps)) == len(steps), "checkpoints", given, "numbers that are all different")
    return sorted(steps)


@dataclass(frozen=True)
class RunSteps:
    """The chosen steps of training runs; none for a suite that is not along training.

    Attributes:
        sources: the sources RUN@STEP of their models.
        steps: the name of each run → its steps, each as the fields of a `StepModel`.
    """

    sources: list[str] = field(default_factory=list)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def steps_of_runs(models: Iterable[str], checkpoints: Steps) -> RunSteps:
    """The chosen steps of the runs in the folders `models`.

    Raises:
        CheckpointError: if there is no such folder, or a run does not keep one of the steps, or the
            record of a step is damaged.
        ConfigError: if two runs have the same name, or `checkpoints` is nothing of the kind.
    """
    chosen = _chosen_steps(checkpoints)
    along = RunSteps()
    if chosen is False:
        return along
    for source in models:
        run = _run_folder(source)
        name = model_name(str(run))
        check(name not in along.steps, "models", source, "a run with another name than the others")
        # Of a run that keeps no steps, `step_folder` says so.
        wanted = (kept_steps(run) or [1]) if chosen is True else chosen
        along.steps[name] = []
        for step in wanted:
            record = read_step_record(step_folder(run, step))
            along.sources.append(f"{run}@{step}")
            along.steps[name].append(asdict(StepModel(f"{name}@{step}", record)))
    return along


def _run_folder(source: str) -> Path:
    """The folder of a run, whose path ends in a name that can stand before the "@"."""
    folder = find(source)
    is_named = folder.name not in ("", "..")
    return folder if is_named else folder.resolve()


def steps_table(results: Mapping[str, Any]) -> str:
    """The results of a suite along training, by task and step, as Markdown.

    Args:
        results: the result of `run_suite` with `checkpoints`.

    Raises:
        DataError: if `results` do not have the form of such results.
    """
    read = read_results(results)
    rows = []
    problems = []
    for run in read.steps:
        for task, entries in read.along(run).items():
            for step, entry in entries:
                rows.append([run, task, *_cells(step, entry, read.is_solved(entry))])
                if read.is_solved(entry):
                    problems += _problems(f"{task} at step {step.record.step} of {run}", entry)
    parts = [markdown_table(["run", *_HEADER], rows), "", _NOTE]
    if problems:
        parts += ["", "Solved, but without a circuit:", *problems]
    return "\n".join(parts) + "\n"


def _cells(step: StepModel, entry: TaskResults, is_solved: bool | None) -> list[str]:
    """The cells of a row after the task."""
    record = step.record
    return [
        f"{record.step:,}",
        f"{record.validation_loss:.3f}",
        f"{record.nonzero_weights:,} ({record.nonzero_fraction:.1%})",
        cell(entry.full, "loss"),
        {True: "yes", False: "no", None: "–"}[is_solved],
        *(cell(entry.node_pruned, name) for name in ("nodes", "edges", "loss")),
        *(cell(entry.edge_pruned, name) for name in ("nodes", "edges", "loss")),
    ]


def _problems(place: str, entry: TaskResults) -> list[str]:
    """Why there is no circuit, for each seed, as lines of a list."""
    lines = []
    for seed, problem in entry.problems.items():
        lines.append(in_one_line(f"- {place}, seed {seed}: {problem}"))
    return lines
