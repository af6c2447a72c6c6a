"""Figures of circuits by size, the circuits of a suite, and a model's sparsity."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_sparse.errors import ConfigError, DataError, counted
from tl_sparse.outputs import replacing
from tl_sparse.tasks import Score
from tl_sparse.view.axes import (
    GREY,
    LOSS_LABEL,
    add_legend,
    add_notes,
    as_label,
    draw_loss_references,
    draw_reference,
    figure_with_panels,
    reaches_zero,
    series_style,
    set_log_x,
    set_log_y,
)
from tl_sparse.view.family_rounds import family as family
from tl_sparse.view.measurements import Drawn, SuiteResults, read_drawn, read_results, summary
from tl_sparse.view.series import (
    ZERO_NOTES,
    Measure,
    Point,
    Size,
    check_not_empty,
    check_size,
    names_of,
    points_of,
    subject,
)
from tl_sparse.view.shares import sparsity as sparsity
from tl_sparse.view.task_matrix import specificity as specificity
from tl_sparse.view.task_sizes import tasks as tasks
from tl_sparse.view.training_steps import training as training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ENDINGS = (".png", ".svg")
ACCURACY_LABEL = "accuracy on held-out pairs\n(right answer ahead of the other)"
ERROR_LABEL = "± standard error over pairs"
#: A legend names the tasks of a suite if there are at most this many, and counts them otherwise.
NAMED_TASKS = 3


def check_drawing(path: str | Path) -> None:
    """Check that a figure can be written to `path`.

    Raises:
        ConfigError: unless `path` ends in .png or .svg and matplotlib is installed.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        allowed = " or ".join(ENDINGS)
        raise ConfigError(
            f"{path}: figures cannot be written as {ending!r}; the name must end in {allowed}"
        )
    if not find_spec("matplotlib"):
        raise ConfigError("drawing needs matplotlib: pip install 'tl-sparse[plots]'")


def save(figure: Figure, path: str | Path, overwrite: bool = False) -> None:
    """Write a figure as PNG or SVG, depending on the extension of `path`.

    Args:
        figure: the figure.
        path: the file.
        overwrite: whether a file with other contents is replaced.

    Raises:
        ConfigError: for any other extension, or if there is a file with other contents and
            `overwrite` is False.
        CheckpointError: if the file cannot be written.
        DataError: if the figure is too large.
    """
    check_drawing(path)
    from matplotlib import rc_context

    ending = Path(path).suffix[1:].lower()
    # The same figure gives the same file, without the date and with the same identifiers.
    metadata = {"Date": None} if ending == "svg" else {}
    with replacing(path, overwrite) as temporary, rc_context({"svg.hashsalt": "tl_sparse"}):
        try:
            figure.savefig(temporary, format=ending, dpi=200, metadata=metadata)
        except ValueError as error:
            raise DataError(f"{path}: the figure cannot be drawn: {error}") from error


# --- the faithfulness curve


def curve(figures: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """Draw the faithfulness curve: held-out loss in nats, and accuracy, by the size of the circuit.

    The large marker is the circuit itself. The line shows circuits of the highest-ranked nodes. Bar
    and band are the standard error over pairs. Lines across the panels show chance and, if they are
    known, the target losses.

    Args:
        figures: a name → the measurements that `full_evaluation` returns and `tl-sparse evaluate`
            writes. The name is shown where task and model do not tell two of them apart.
        against: what the size of a circuit is measured in.

    Raises:
        DataError: if there is nothing to draw, or a value does not have the form of such
            measurements.
    """
    check_not_empty(figures)
    check_size(against)
    measured = {name: read_drawn(values, name) for name, values in figures.items()}
    names = names_of(measured)
    figure, (loss_axes, accuracy_axes) = figure_with_panels(2, (8, 4.6))
    for number, (name, drawn) in enumerate(measured.items()):
        style = series_style(number)
        _draw_curve(loss_axes, names.labels[name], drawn, against, "loss", style)
        _draw_curve(accuracy_axes, names.labels[name], drawn, against, "accuracy", style)
    draw_loss_references(loss_axes, [drawn.evaluation.target_loss for drawn in measured.values()])
    draw_reference(accuracy_axes, 0.5, "chance\n50%")
    _explain_signs(loss_axes)
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel(f"number of {against} in the circuit")
        set_log_x(axes, unit=1)
    loss_axes.set_ylabel(LOSS_LABEL)
    accuracy_axes.set_ylabel(ACCURACY_LABEL)
    set_log_y(loss_axes, unit=1e-3)
    accuracy_axes.yaxis.set_major_formatter("{x:.0%}")
    add_legend(figure, loss_axes, names.title)
    if reaches_zero(loss_axes):
        add_notes(figure, [ZERO_NOTES[against]])
    return figure


def _draw_curve(
    axes: Axes,
    label: str,
    drawn: Drawn,
    against: Size,
    measure: Measure,
    style: Mapping[str, Any],
) -> None:
    color = style["color"]
    whole = drawn.evaluation
    axes.axhline(_score(whole.full, measure), color=color, ls=":", lw=1.2)
    x, y, _ = _columns(points_of(drawn.random, against, measure))
    axes.plot(x, y, ls="", ms=5, color=color, marker="x")
    x, y, error = _columns(points_of(drawn.ladder, against, measure))
    axes.plot(x, y, ms=3.5, lw=1.2, **style)
    low = [score - width for score, width in zip(y, error, strict=True)]
    high = [score + width for score, width in zip(y, error, strict=True)]
    axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    x, y, error = _columns(points_of([whole], against, measure))
    axes.errorbar(x, y, error, fmt="none", ecolor=color, capsize=4)
    axes.plot(x, y, ls="", ms=9, mec="black", label=label, **style)


def _explain_signs(axes: Axes) -> None:
    """Add to the legend what the lines and marks of all series mean."""
    axes.plot([], [], ".-", color=GREY, label="fewer or more of the ranked nodes")
    axes.plot([], [], ls="", marker="x", color=GREY, label="random circuits of its size")
    axes.plot([], [], ":", color=GREY, label="the full model")
    axes.errorbar([], [], [], fmt="none", ecolor=GREY, capsize=4, label=ERROR_LABEL)


# --- the frontier


def frontier(sources: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """Draw the held-out loss in nats of many circuits by their size.

    For a full evaluation, these are the circuit and the circuits of its faithfulness curve, and a
    line shows the least loss up to each size for each model and task. For a suite, these are the
    medians over the seeds of each task's circuits.

    Args:
        sources: any name → the values that `full_evaluation` or `run_suite` returns, and the
            commands `tl-sparse evaluate` and `tl-sparse suite` write.
        against: what the size of a circuit is measured in.

    Raises:
        DataError: if there is nothing to draw, or a value does not have the form of such values.
    """
    check_not_empty(sources)
    check_size(against)
    measured = _Measured()
    for name, source in sources.items():
        if "models" in source:
            measured.add_suite(read_results(source, name), against, name)
        else:
            measured.add_evaluation(read_drawn(source, name, "evaluate or suite"), against)
    shown = {label: sorted(points) for label, points in measured.points.items() if points}
    check_not_empty(shown, *sources)
    figure, (axes,) = figure_with_panels(1, (6.5, 5))
    for number, (label, points) in enumerate(shown.items()):
        _draw_frontier(axes, label, points, label in measured.evaluated, series_style(number))
    draw_loss_references(axes, measured.targets)
    if measured.evaluated:
        axes.plot([], [], color=GREY, label="the least loss up to this size")
        axes.errorbar([], [], [], fmt="none", ecolor=GREY, capsize=2, label=ERROR_LABEL)
    axes.set(xlabel=f"number of {against} in the circuit", ylabel=LOSS_LABEL)
    set_log_x(axes, unit=1)
    set_log_y(axes, unit=1e-3)
    add_legend(figure, axes, "Loss of circuits by their size")
    notes = []
    if shown.keys() - measured.evaluated:
        notes.append("Each mark of a suite is a task: its medians over the seeds.")
    if reaches_zero(axes):
        notes.append(ZERO_NOTES[against])
    add_notes(figure, notes)
    return figure


@dataclass
class _Measured:
    """What a frontier draws.

    Attributes:
        points: the label of a series → its points.
        evaluated: the labels of the series from full evaluations, whose circuits are of one task.
        targets: the target losses of the circuits.
    """

    points: defaultdict[str, list[Point]] = field(default_factory=lambda: defaultdict(list))
    evaluated: set[str] = field(default_factory=set)
    targets: list[float | None] = field(default_factory=list)

    def add_evaluation(self, drawn: Drawn, against: Size) -> None:
        """Add the circuit and its curve to the series of its task and model."""
        label = subject(drawn)
        self.evaluated.add(label)
        self.targets.append(drawn.evaluation.target_loss)
        self.points[label] += points_of([drawn.evaluation, *drawn.ladder], against, "loss")

    def add_suite(self, results: SuiteResults, against: Size, name: str) -> None:
        """For each model and kind of pruning, add the medians over the seeds of each task."""
        self.targets.append(results.config.target_loss)
        for model, entries in results.models.items():
            by_kind = {
                "nodes pruned": {task: entry.node_pruned for task, entry in entries.items()},
                "edges pruned too": {task: entry.edge_pruned for task, entry in entries.items()},
            }
            for words, summaries_of in by_kind.items():
                found = {task: summaries for task, summaries in summaries_of.items() if summaries}
                label = f"{_in_words(list(found))} in {model}, {words}"
                for summaries in found.values():
                    size = summary(summaries, against, "median", name)
                    loss = summary(summaries, "loss", "median", name)
                    self.points[label].append(Point(size, loss))


def _in_words(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) if len(tasks) <= NAMED_TASKS else counted(len(tasks), "task")


def _draw_frontier(
    axes: Axes, label: str, points: Sequence[Point], of_one_task: bool, style: Mapping[str, Any]
) -> None:
    """Draw the points of one series, which are in the order of their size."""
    x, y, error = _columns(points)
    axes.plot(x, y, ls="", ms=6, alpha=0.8, label=as_label(label), **style)
    if of_one_task:
        axes.errorbar(x, y, error, fmt="none", ecolor=style["color"], capsize=2, alpha=0.6)
        best = list(itertools.accumulate(y, min))
        axes.plot(x, best, drawstyle="steps-post", lw=1.2, color=style["color"])


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float], list[float]]:
    """The sizes, scores and standard errors of points."""
    sizes = [point.size for point in points]
    scores = [point.score for point in points]
    errors = [point.error for point in points]
    return sizes, scores, errors


def _score(score: Score, measure: Measure) -> float:
    return score.loss if measure == "loss" else score.accuracy
