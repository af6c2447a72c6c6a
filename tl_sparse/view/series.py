"""What figures draw of measurements: points of size and score, and the names of their circuits."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Literal, get_args

from tl_sparse.config import check
from tl_sparse.errors import DataError
from tl_sparse.evaluation import SizedScore
from tl_sparse.view.axes import as_label
from tl_sparse.view.measurements import Drawn, WholeScore

Size = Literal["edges", "nodes"]
Measure = Literal["loss", "accuracy"]

#: Size → what is said of circuits of size 0, which a logarithmic axis cannot show.
ZERO_NOTES: Mapping[Size, str] = {
    "edges": "Circuits without edges stand at 0, apart from the logarithmic scale.",
    "nodes": "Circuits without nodes stand at 0, apart from the logarithmic scale.",
}
#: What a circuit without nodes is.
NO_NODES_NOTE = (
    "Without nodes only the last token itself, through the bigram table, chooses the answer."
)


@dataclass(frozen=True, order=True)
class Point:
    """A circuit's size and score, and the standard error of the score; 0 if it is not known."""

    size: float
    score: float
    error: float = 0.0


def points_of(
    sized_scores: Iterable[SizedScore | WholeScore], against: Size, measure: Measure
) -> list[Point]:
    """The points of circuits; those whose score is not a finite number are left out."""
    points = []
    for sized in sized_scores:
        size = sized.n_edges if against == "edges" else sized.n_nodes
        score = sized.circuit.accuracy if measure == "accuracy" else sized.circuit.loss
        error = sized.circuit.standard_error if measure == "loss" else None
        if error is None or not 0 <= error < math.inf:
            error = 0.0
        if math.isfinite(score):
            points.append(Point(size, score, error))
    return points


def subject(drawn: Drawn) -> str:
    """The task and the model of a circuit, as in "var_swap in tiny-python-sparse"."""
    return f"{drawn.task or 'no task'} in {drawn.model or 'an unnamed model'}"


@dataclass(frozen=True)
class Names:
    """What a figure is called, and what its legend calls each source."""

    title: str
    labels: dict[str, str]


def names_of(measured: Mapping[str, Drawn]) -> Names:
    """The names that tell the sources apart: task and model, or the name of the source, or both.

    If all sources have the same task and model, the title names these.
    """
    n_sources = Counter(map(subject, measured.values()))
    labels = {}
    for name, drawn in measured.items():
        label = subject(drawn)
        if len(measured) == 1:
            label = "the circuit"
        elif len(n_sources) == 1:
            label = name
        elif n_sources[label] > 1:
            label = f"{label} ({name})"
        labels[name] = as_label(label)
    title = "Circuits by their size"
    if len(n_sources) == 1:
        title = f"Circuits of {as_label(next(iter(n_sources)))}"
    return Names(title, labels)


def check_not_empty(values: Sized, *names: str) -> None:
    """Raise `DataError` if there are no values; `names` says where they would be."""
    if len(values):
        return
    where = f" in {', '.join(names)}" if names else ""
    raise DataError(f"there is nothing to draw{where}")


def check_size(against: str) -> None:
    """Raise `ConfigError` unless `against` is a size of circuits."""
    check(against in get_args(Size), "against", against, "'edges' or 'nodes'")
