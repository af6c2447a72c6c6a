"""The figure of a family: the size of its circuits by round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tl_sparse.errors import counted
from tl_sparse.evaluation import EXHAUSTED, OUT_OF_ROUNDS, Family, FamilySearch
from tl_sparse.view.axes import (
    COLORS,
    GREY,
    add_legend,
    add_notes,
    as_label,
    figure_with_panels,
    series_style,
    set_log_y,
)
from tl_sparse.view.measurements import read_family
from tl_sparse.view.series import Size, check_not_empty, check_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def family(
    values: Mapping[str, Any], against: Size = "edges", name: str = "these values"
) -> Figure:
    """Draw the size of a family's circuits by round, a marker for each seed.

    A line joins the smallest circuits. Grey bands mark the rounds in which no seed found a circuit.

    Args:
        values: the contents of family.json, or `dataclasses.asdict` of what `find_family` returns.
        against: what the size of a circuit is measured in.
        name: the name of the values in error messages.

    Raises:
        DataError: if they do not have the form of such values, or contain no circuit.
    """
    check_size(against)
    read = read_family(values, name)
    check_not_empty(read.occurrences, name)
    figure, (axes,) = figure_with_panels(1, (max(5.5, 1.5 + 0.4 * len(read.rounds)), 4.4))
    for number, seed in enumerate(read.seeds):
        _draw_seed(axes, read, seed, number, against)
    _draw_smallest(axes, read, against)
    _draw_empty_rounds(axes, read)
    axes.set_xlabel("round, each without the nodes that the circuits before it share")
    axes.set_ylabel(f"number of {against} in the circuit")
    axes.set_xlim(-0.6, len(read.rounds) - 0.4)
    axes.set_xticks([each.number for each in read.rounds])
    set_log_y(axes, unit=1)
    core = counted(len(read.core), "node")
    title = f"Circuits of {as_label(read.task)} in {as_label(read.model)}\ncore: {core}"
    add_legend(figure, axes, title)
    add_notes(figure, [_note(read)])
    return figure


def _sizes_of(read: Family, seed: int, against: Size) -> tuple[list[int], list[int]]:
    """The rounds in which this seed found a circuit, and the sizes of these."""
    numbers = []
    sizes = []
    for each in read.rounds:
        for search in each.found:
            if search.seed == seed:
                numbers.append(each.number)
                sizes.append(_size(search, against))
    return numbers, sizes


def _size(search: FamilySearch, against: Size) -> int:
    return len(search.nodes) if against == "nodes" else search.n_edges or 0


def _draw_seed(axes: Axes, read: Family, seed: int, number: int, against: Size) -> None:
    numbers, sizes = _sizes_of(read, seed, against)
    # A little apart, so that the seeds do not hide each other.
    offset = 0.4 * ((number + 0.5) / len(read.seeds) - 0.5)
    x = [each + offset for each in numbers]
    axes.plot(x, sizes, ls="", ms=6, clip_on=False, label=f"seed {seed}", **series_style(number))


def _draw_smallest(axes: Axes, read: Family, against: Size) -> None:
    numbers = []
    sizes = []
    for each in read.rounds:
        smallest = each.smallest
        if smallest is not None:
            numbers.append(each.number)
            sizes.append(_size(smallest, against))
    axes.plot(numbers, sizes, color=GREY, lw=1.2, label="the smallest", zorder=1)


def _draw_empty_rounds(axes: Axes, read: Family) -> None:
    label = "no circuit with any seed"
    for each in read.rounds:
        if not each.found:
            axes.axvspan(each.number - 0.5, each.number + 0.5, color=COLORS[1], alpha=0.15, lw=0)
    if any(not each.found for each in read.rounds):
        axes.fill_between([], [], [], color=COLORS[1], alpha=0.15, lw=0, label=label)


def _note(read: Family) -> str:
    endings = {
        EXHAUSTED: "nothing more can be forbidden",
        OUT_OF_ROUNDS: "it may go on",
    }
    ending = endings.get(read.ending, read.ending)
    n_forbidden = len(read.rounds[-1].forbidden)
    return (
        f"The core are the nodes without which no circuit was found. After the last round "
        f"({counted(n_forbidden, 'node')} forbidden), {ending}."
    )
