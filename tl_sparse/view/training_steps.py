"""The figure of circuits along training: sizes and losses by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tl_sparse.view.axes import (
    COLORS,
    GREY,
    LOSS_LABEL,
    add_legend,
    add_notes,
    as_label,
    draw_loss_references,
    figure_with_panels,
    percent,
    series_style,
    set_log_x,
    set_log_y,
)
from tl_sparse.view.measurements import (
    StepModel,
    SuiteResults,
    Summaries,
    TaskResults,
    read_results,
)
from tl_sparse.view.series import Size, check_not_empty, check_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What is drawn of a task at each step: its circuits, or the whole model.
Measured = Literal["node_pruned", "edge_pruned", "full"]


def training(results: Mapping[str, Any], against: Size = "edges", name: str = "results") -> Figure:
    """Draw the circuits of a suite along training, against the step of their models.

    The first panel has the size of each task's circuits, with the range over the seeds; the second
    the task loss of circuits and whole models on held-out pairs, in nats; the third the validation
    loss of the models, in nats per token, and the share of their weights that is nonzero.

    Args:
        results: the results that `run_suite` returns and `tl-sparse suite` writes, of a suite with
            `checkpoints`.
        against: what the size of a circuit is measured in.
        name: the name of the results in error messages.

    Raises:
        DataError: if `results` do not have the form of such results, or contain no step.
    """
    check_size(against)
    read = read_results(results, name)
    check_not_empty(read.steps, name)
    figure, (of_sizes, of_losses, of_models) = figure_with_panels(3, (12, 4.8))
    of_sizes.sharex(of_models)  # also where there is no circuit
    of_losses.sharex(of_models)
    for number, series in enumerate(_series_of(read)):
        style = series_style(number)
        series.draw(of_sizes, "node_pruned", against, ms=4, label=series.label, **style)
        series.draw(of_sizes, "edge_pruned", against, ls="--", lw=1, color=style["color"])
        series.draw(of_losses, "node_pruned", "loss", ms=4, **style)
        series.draw(of_losses, "full", "loss", ls=":", color=style["color"])
    draw_loss_references(of_losses, [read.config.target_loss])
    of_shares = of_models.twinx()
    for number, steps in enumerate(read.steps.values()):
        _draw_run(of_models, of_shares, steps, number)
    _explain_signs(of_sizes, read)
    _name_axes(of_sizes, of_losses, of_models, of_shares, against)
    add_legend(figure, of_sizes, "Circuits along training")
    add_notes(figure, [_NOTE])
    return figure


_NOTE = (
    "A task has no circuit at steps at which the model misses the target loss. Bars are the range "
    "over the seeds."
)


@dataclass(frozen=True)
class _Series:
    """A task in the models of one run.

    Attributes:
        label: its name in the legend.
        entries: the steps, each with the circuits found there.
    """

    label: str
    entries: Sequence[tuple[StepModel, TaskResults]]

    def draw(self, axes: Axes, measured: Measured, figure: str, **style: Any) -> None:
        """Draw the median of a figure by step, and its range over the seeds.

        A line is broken where there is no circuit.
        """
        steps = [step.record.step for step, _ in self.entries]
        summaries: list[Summaries] = [getattr(entry, measured) for _, entry in self.entries]
        low, middle, high = (
            [each.get(figure, {}).get(key, math.nan) for each in summaries]
            for key in ("min", "median", "max")
        )
        axes.plot(steps, middle, **{"lw": 1.4, **style})
        axes.vlines(steps, low, high, color=style["color"], lw=1, alpha=0.5)


def _series_of(read: SuiteResults) -> list[_Series]:
    """The tasks in each run, in the order of the results."""
    found = []
    for run in read.steps:
        for task, entries in read.along(run).items():
            label = task if len(read.steps) == 1 else f"{task} in {run}"
            found.append(_Series(as_label(label), entries))
    return found


def _draw_run(of_losses: Axes, of_shares: Axes, steps: Sequence[StepModel], number: int) -> None:
    """Draw the validation loss and the share of nonzero weights of the models of a run."""
    color = _run_color(number)
    records = [step.record for step in steps]
    x = [record.step for record in records]
    of_losses.plot(x, [each.validation_loss for each in records], ".-", lw=1.4, color=color)
    shares = [each.nonzero_fraction for each in records]
    of_shares.plot(x, shares, ls="--", lw=1, color=color)


def _run_color(number: int) -> str:
    """The last colours, since the first ones are those of the tasks."""
    return COLORS[-1 - number % len(COLORS)]


def _explain_signs(axes: Axes, read: SuiteResults) -> None:
    """Add to the legend what the lines of all series mean."""
    axes.plot([], [], "--", lw=1, color=GREY, label="left: edges pruned too")
    axes.plot([], [], ":", color=GREY, label="middle: the whole model")
    for number, run in enumerate(read.steps):
        label = "right: validation loss"
        if len(read.steps) > 1:
            label += f" of {as_label(run)}"
        axes.plot([], [], ".-", color=_run_color(number), label=label)
    axes.plot([], [], "--", lw=1, color=_run_color(0), label="right: nonzero weights")


def _name_axes(
    of_sizes: Axes, of_losses: Axes, of_models: Axes, of_shares: Axes, against: Size
) -> None:
    of_sizes.set_ylabel(f"number of {against} in the circuit")
    of_losses.set_ylabel(LOSS_LABEL)
    of_models.set_ylabel("validation loss of the model\n(nats per token)")
    of_shares.set_ylabel("nonzero weights")
    of_shares.spines["top"].set_visible(False)
    of_shares.yaxis.set_major_formatter(percent)
    of_shares.set_ylim(0, 1.03)
    set_log_y(of_losses, unit=1e-3)
    has_circuits = math.isfinite(of_sizes.dataLim.height)
    if has_circuits:
        set_log_y(of_sizes, unit=1)
        low, high = of_sizes.dataLim.intervaly
        if low >= 1 and high < 2 * low:
            of_sizes.set_ylim(low / 1.5, 1.5 * high)  # so wide that there are ticks in it
    for axes in (of_sizes, of_losses, of_models):
        axes.set_xlabel("training step")
    set_log_x(of_models, unit=1)  # and that of the others, which share it
