"""Removing from a circuit what it does not need."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def eliminate(
    candidates: Sequence[T],
    holds: Callable[[list[T]], bool],
    decides: Callable[[list[T]], bool],
    tried: Callable[[int], object],
) -> list[T]:
    """The candidates that can be removed from a circuit.

    Args:
        candidates: nodes or edges, in the order in which they are tried.
        holds: a quick test of whether the rest is still a circuit without the given candidates.
        decides: the same as a thorough test. If it fails, the candidates that were removed last are
            restored until it passes.
        tried: called with the number of candidates whenever the quick test has decided on some.
    """
    removed = _removed_by_test(candidates, holds, tried)
    n_gone = 0
    too_many = len(removed) + 1
    n_tried = len(removed)
    while too_many - n_gone > 1:
        if decides(removed[:n_tried]):
            n_gone = n_tried
        else:
            too_many = n_tried
        n_tried = (n_gone + too_many) // 2
    return removed[:n_gone]


def _removed_by_test(
    candidates: Sequence[T], holds: Callable[[list[T]], bool], tried: Callable[[int], object]
) -> list[T]:
    """The candidates that can be removed according to `holds`.

    They are tried in groups. The group size doubles after each group that can be removed, and is
    halved after each group that cannot.
    """
    removed: list[T] = []
    first = 0
    size = 1
    while first < len(candidates):
        group = list(candidates[first : first + size])
        if holds(removed + group):
            removed += group
            first += len(group)
            size *= 2
            tried(len(group))
        elif len(group) > 1:
            size = len(group) // 2
        else:
            first += 1
            tried(1)
    return removed
