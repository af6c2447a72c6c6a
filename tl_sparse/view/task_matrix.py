"""The figure of what each task loses without the circuit of each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tl_sparse.evaluation import SpecificityMatrix, TaskLoss
from tl_sparse.view.axes import GREY, add_notes, as_label, figure_with_panels
from tl_sparse.view.measurements import read_matrix
from tl_sparse.view.series import check_not_empty

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: The loss in nats at which the colours end; chance is 0.693.
DARKEST = 0.7


def specificity(values: Mapping[str, Any], name: str = "these values") -> Figure:
    """Draw what each task loses without each circuit, as a heat map, beside random nodes.

    Rows are circuits, columns are tasks. The colour and the number of a cell are the rise of the
    task loss in nats when the circuit's nodes are held at their means. Frames mark each circuit's
    own task. The second panel shows the same for as many random nodes.

    Args:
        values: `dataclasses.asdict` of what `specificity_matrix` returns.
        name: the name of the values in error messages.

    Raises:
        DataError: if they do not have the form of such values, or contain no circuit or task.
    """
    matrix = read_matrix(values, name)
    circuits = list(matrix.losses)
    check_not_empty(circuits, name)
    tasks = _tasks_of(matrix)
    check_not_empty(tasks, name)
    # Room for the names, and for a number in each cell.
    size = (2 * (0.5 * len(tasks) + 1.2) + 2.5, 0.36 * len(circuits) + 3.4)
    figure, (of_circuits, of_random) = figure_with_panels(2, size)
    _draw_cells(of_circuits, matrix, tasks, of_random=False)
    _draw_cells(of_random, matrix, tasks, of_random=True)
    rows = [as_label(circuit, 30) for circuit in circuits]
    of_circuits.set(title="without the circuit", ylabel="circuit of")
    of_circuits.set_yticks(range(len(rows)), rows)
    of_random.set(title="without as many random nodes")
    of_random.set_yticks(range(len(rows)), [])
    figure.suptitle("What each task loses without a circuit", weight="bold", size=11)
    add_notes(
        figure,
        [
            "Cells: rise of the task loss in nats when nodes are held at their means; "
            "chance is a loss of 0.693. Framed: the circuit's own task."
        ],
    )
    return figure


def _tasks_of(matrix: SpecificityMatrix) -> list[str]:
    """All tasks: first those that have a circuit, in the order of the circuits, then the others."""
    measured: dict[str, None] = {}
    for losses in matrix.losses.values():
        measured |= dict.fromkeys(losses)
    own = [task for task in matrix.own_tasks.values() if task in measured]
    return list(dict.fromkeys([*own, *measured]))


def _draw_cells(
    axes: Axes, matrix: SpecificityMatrix, tasks: Sequence[str], of_random: bool
) -> None:
    """Draw a cell with its number for each circuit and task."""
    from matplotlib.patches import Rectangle

    axes.grid(False)
    axes.spines[:].set_visible(False)
    rises = []
    for losses in matrix.losses.values():
        rises.append([_rise(losses.get(task), of_random) for task in tasks])
    axes.imshow(rises, cmap="Blues", vmin=0, vmax=DARKEST, aspect="auto")
    for row, (circuit, of_tasks) in enumerate(zip(matrix.losses, rises, strict=True)):
        for column, rise in enumerate(of_tasks):
            color = "white" if rise > 0.6 * DARKEST else "black"
            # The sum makes the zero of "-0.00" positive.
            text = "" if math.isnan(rise) else f"{round(rise, 2) + 0.0:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
            if tasks[column] == matrix.own_tasks.get(circuit):
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="#D55E00", lw=2))
    labels = [as_label(task, 30) for task in tasks]
    axes.set_xticks(range(len(tasks)), labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0, labelsize=8, color=GREY)
    axes.set_xlabel("task that is measured")


def _rise(loss: TaskLoss | None, of_random: bool) -> float:
    """The rise of the loss in a cell; NaN if the task was not measured without this circuit."""
    if loss is None:
        return math.nan
    estimate = loss.random_rise if of_random else loss.rise
    return estimate.value
