"""The figure of the size of circuits by task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tl_sparse.errors import counted
from tl_sparse.view.axes import (
    GREY,
    add_legend,
    add_notes,
    as_label,
    figure_with_panels,
    reaches_zero,
    series_style,
    set_log_x,
)
from tl_sparse.view.measurements import SuiteResults, read_results, summary
from tl_sparse.view.series import NO_NODES_NOTE, ZERO_NOTES, Size, check_not_empty, check_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tasks(results: Mapping[str, Any], against: Size = "edges", name: str = "results") -> Figure:
    """Draw the size of each task's node-pruned circuits.

    Each model has a marker at the median over the seeds, and a line from the smallest to the
    largest size. If the size is the number of edges, a dotted line shows each model's geometric
    mean over the tasks that all models solve, in which circuits without edges count as 1 edge.

    Args:
        results: the results that `run_suite` returns and `tl-sparse suite` writes.
        against: what the size of a circuit is measured in.
        name: the name of the results in error messages.

    Raises:
        DataError: if `results` do not have the form of such results, or contain no circuit.
    """
    check_size(against)
    read = read_results(results, name)
    means: Mapping[str, float] = {}
    if against == "edges":
        means = read.geometric_mean_edges.get("node_pruned", {})
    sizes = _node_pruned_sizes(read, against, name)
    order = _largest_first(sizes)
    check_not_empty(order, name)
    figure, (axes,) = figure_with_panels(1, (6.5, 2.2 + 0.27 * len(order)))
    for number, (model, size_of) in enumerate(sizes.items()):
        # A little apart, so that the models do not hide each other.
        offset = 0.4 * ((number + 0.5) / len(sizes) - 0.5)
        rows = [order.index(task) - offset for task in size_of]
        _draw_model(axes, model, rows, list(size_of.values()), series_style(number))
        if model in means:
            _draw_mean(axes, means[model], series_style(number))
    labels = [as_label(task, 30) for task in order]
    axes.set(yticks=range(len(order)), yticklabels=labels, ylim=(-0.5, len(order) - 0.5))
    axes.set_xlabel(f"number of {against} in the node-pruned circuit")
    set_log_x(axes, unit=1)
    axes.plot([], [], "|-", color=GREY, label="median and range over the seeds")
    if means:
        n_tasks = counted(len(read.solved_by_all), "task")
        axes.plot([], [], ":", color=GREY, label=f"geometric mean over the {n_tasks} all solve")
    add_legend(figure, axes, "Size of the circuit of each task")
    add_notes(figure, _notes(axes, against, bool(means)))
    return figure


def _draw_model(
    axes: Axes, model: str, rows: Sequence[float], sizes: Sequence[_Range], style: Mapping[str, Any]
) -> None:
    low = [size.low for size in sizes]
    high = [size.high for size in sizes]
    medians = [size.median for size in sizes]
    axes.hlines(rows, low, high, color=style["color"])
    axes.plot(medians, rows, ls="", ms=6, clip_on=False, label=as_label(model), **style)


def _draw_mean(axes: Axes, mean: float, style: Mapping[str, Any]) -> None:
    """Draw a dotted line from the top to the bottom, with the marker of its model on the top."""
    axes.axvline(mean, ls=":", ms=6, markevery=[1], clip_on=False, **style)


def _notes(axes: Axes, against: Size, has_means: bool) -> list[str]:
    """What has to be said of circuits without edges or nodes, if there are any."""
    if not reaches_zero(axes):
        return []
    notes = [ZERO_NOTES[against]]
    if has_means:
        notes.append("In the geometric mean they count as 1 edge.")
    return [*notes, NO_NODES_NOTE]


@dataclass(frozen=True)
class _Range:
    """The median and range of a size over the seeds."""

    low: float
    median: float
    high: float


def _node_pruned_sizes(
    results: SuiteResults, against: Size, name: str
) -> dict[str, dict[str, _Range]]:
    """Model → task → its size; tasks without a circuit are left out."""
    sizes: dict[str, dict[str, _Range]] = {}
    for model, entries in results.models.items():
        sizes[model] = {}
        for task, entry in entries.items():
            if entry.node_pruned:
                place = f"{name}: {task} in {model}"
                low, median, high = (
                    summary(entry.node_pruned, against, key, place)
                    for key in ("min", "median", "max")
                )
                sizes[model][task] = _Range(low, median, high)
    return sizes


def _largest_first(sizes: Mapping[str, Mapping[str, _Range]]) -> list[str]:
    """The tasks in falling order of the largest median size over the models."""
    medians = defaultdict[str, list[float]](list)
    for size_of in sizes.values():
        for task, size in size_of.items():
            medians[task].append(size.median)
    return sorted(medians, key=lambda task: -max(medians[task]))
