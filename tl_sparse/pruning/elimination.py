"""Removing from a circuit what it does not need."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

#: After so many rounds, of which each takes several thorough tests, nothing else is removed.
_MOST_ROUNDS = 3


class Budget:
    """How many circuits a search tries while it removes parts of one.

    Attributes:
        most: the largest number; None for no limit.
        n_tried: the number that have been tried.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.n_tried = 0

    @property
    def is_spent(self) -> bool:
        """Whether no more may be tried."""
        return self.n_tried == self.most

    def take(self) -> bool:
        """Count one more test, if there may be one; whether there may."""
        if self.is_spent:
            return False
        self.n_tried += 1
        return True


def eliminate(
    candidates: Sequence[T],
    holds: Callable[[list[T]], bool],
    decides: Callable[[list[T]], bool],
    tried: Callable[[int], object] = lambda _n_candidates: None,
    budget: Budget | None = None,
) -> list[T]:
    """The candidates that can be removed from a circuit.

    The quick test removes as many as it allows. If the thorough test then fails, the first ones of
    them are removed with which it passes, the next one stays, and those after it are tried again.
    A quick test that learns from the failures of the thorough one thus soon agrees with it.

    Args:
        candidates: nodes or edges, in the order in which they are tried.
        holds: a quick test of whether the rest is still a circuit without the given candidates.
        decides: the same as a thorough test.
        tried: called with the number of candidates whenever the quick test has decided on some, and
            with minus the number of those that are tried again.
        budget: how many quick tests there may be, after which all other candidates stay; by default
            there is no limit.
    """
    budget = budget or Budget()
    gone: list[T] = []
    waiting = list(candidates)
    for _ in range(_MOST_ROUNDS):
        removed = _removed_by_test(gone, waiting, holds, tried, budget)
        n_passing = _n_passing(gone, removed, decides)
        gone += removed[:n_passing]
        waiting = removed[n_passing + 1 :]
        if not waiting:
            return gone
        tried(-len(waiting))
    tried(len(waiting))
    return gone


def _n_passing(gone: Sequence[T], removed: Sequence[T], decides: Callable[[list[T]], bool]) -> int:
    """How many of `removed` can be removed together besides `gone`, by bisection."""
    n_passing = 0
    too_many = len(removed) + 1
    n_tried = len(removed)
    while too_many - n_passing > 1:
        if decides([*gone, *removed[:n_tried]]):
            n_passing = n_tried
        else:
            too_many = n_tried
        n_tried = (n_passing + too_many) // 2
    return n_passing


def _removed_by_test(
    gone: Sequence[T],
    candidates: Sequence[T],
    holds: Callable[[list[T]], bool],
    tried: Callable[[int], object],
    budget: Budget,
) -> list[T]:
    """The candidates that can be removed besides `gone` according to `holds`.

    They are tried in groups. The group size doubles after each group that can be removed, and is
    halved after each group that cannot. Each group is one test of the budget.
    """
    removed: list[T] = []
    first = 0
    size = 1
    while first < len(candidates) and budget.take():
        group = list(candidates[first : first + size])
        if holds([*gone, *removed, *group]):
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
