"""The largest weights of matrices that are spread over several processes.

No process sees a whole matrix. Thresholds are found by counting: in each pass, every process counts
how many of its entries have which next digit of their magnitude, the counts are added up over the
processes, and all of them know in which digit the threshold lies. The result is exactly that of
`zero_all_but`, for any number of processes and any division of the weights.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.hooks.layouts import MatrixLayout
from tl_sparse.hooks.selection import largest_in_rows, magnitude_order

#: The number of bits that a pass looks at. With 11, the magnitudes of float32 take three passes.
_DIGIT_BITS = 11
_N_DIGITS = 1 << _DIGIT_BITS


class Exchange(Protocol):
    """What processes exchange. All of them call these methods together."""

    def total(self, counts: Tensor) -> Tensor:
        """The sum of the counts of all processes."""

    def collected(self, part: Tensor) -> Tensor:
        """The parts of all processes, of the same shape, joined along their last axis."""


@dataclass(frozen=True)
class Piece:
    """The part of a weight that this process holds, and its place in the matrix of a group.

    Attributes:
        values: the part; a change of it is a change of the weight.
        layout: the layout of the weight as a matrix.
        rows: the row in the group's matrix of each row of the part's own matrix.
        columns: the same for its columns, in increasing order.
    """

    values: Tensor
    layout: MatrixLayout
    rows: Int[Tensor, " row"]
    columns: Int[Tensor, " column"]

    def order(self) -> Int[Tensor, "row column"]:
        """The entries as integers in the order of their magnitudes."""
        return magnitude_order(self.layout.matrix(self.values))

    def zero_all_but(self, kept: Bool[Tensor, "row column"]) -> None:
        """Zero all other entries; a kept -0.0 becomes 0.0 as well."""
        is_kept = self.layout.weight(kept, self.values.shape) & (self.values != 0)
        self.values.masked_fill_(~is_kept, 0.0)


@dataclass(frozen=True)
class Band:
    """The pieces that this process holds of some rows of a matrix.

    Attributes:
        pieces: the pieces, all of which have the same rows.
        has_whole_rows: whether no other process holds entries of these rows.
    """

    pieces: tuple[Piece, ...]
    has_whole_rows: bool


@dataclass(frozen=True)
class Selection:
    """How many entries are kept of a matrix of which every process holds some pieces.

    Attributes:
        bands: what this process holds.
        shape: the numbers of rows and columns of the whole matrix.
        n_kept: the number of entries that are kept.
        min_per_row: the number of largest entries of each row that are kept first.
    """

    bands: tuple[Band, ...]
    shape: tuple[int, int]
    n_kept: int
    min_per_row: int

    @property
    def n_others(self) -> int:
        """The number that is kept of the entries that `min_per_row` does not keep already."""
        n_rows, n_columns = self.shape
        n_protected = n_rows * min(self.min_per_row, n_columns)
        return max(self.n_kept - n_protected, 0)


@torch.no_grad()
def zero_all_but_selected(selections: Sequence[Selection], exchange: Exchange) -> None:
    """Zero the entries of all matrices that are not selected, in place.

    All processes call this together, with selections that differ only in what they hold.
    """
    contests = [_Contest(selection, exchange) for selection in selections]
    thresholds = _thresholds(
        [contest.orders for contest in contests],
        [selection.n_others for selection in selections],
        max((contest.n_order_bits for contest in contests), default=0),
        exchange,
    )
    # Of tied entries, those with the smallest positions in their matrix are kept.
    tied = [i for i, threshold in enumerate(thresholds) if threshold.is_tied]
    last_places = _thresholds(
        [functools.partial(contests[i].tied_places, thresholds[i].value) for i in tied],
        [thresholds[i].n_equal_chosen for i in tied],
        max((contest.n_entries.bit_length() for contest in contests), default=0),
        exchange,
    )
    smallest_place = dict.fromkeys(range(len(selections)), 0)
    for i, last in zip(tied, last_places, strict=True):
        smallest_place[i] = last.value
    for i, contest in enumerate(contests):
        contest.decide(thresholds[i], smallest_place[i])


@dataclass(frozen=True)
class _Threshold:
    """The smallest of the n largest of some integers.

    Attributes:
        value: that integer; if n is 0, one above all of them.
        n_equal: how many integers are equal to it, over all processes.
        n_equal_chosen: how many of these are among the n largest.
    """

    value: int
    n_equal: int
    n_equal_chosen: int

    @property
    def is_tied(self) -> bool:
        """Whether only some of the equal integers are chosen; zeros may all be."""
        return self.value > 0 and self.n_equal_chosen < self.n_equal


@dataclass(frozen=True)
class _RowBounds:
    """The last of the entries that each row keeps first: its order, and its column."""

    order: Int[Tensor, "row 1"]
    column: Int[Tensor, "row 1"]

    def keep(
        self, order: Int[Tensor, "row column"], columns: Int[Tensor, " column"]
    ) -> Bool[Tensor, "row column"]:
        is_equal = order == self.order
        return (order > self.order) | (is_equal & (columns <= self.column))


class _Contest:
    """The entries of a matrix that compete for being kept, because no row keeps them first."""

    def __init__(self, selection: Selection, exchange: Exchange) -> None:
        self.selection = selection
        self.bounds: list[_RowBounds | None] = []
        for band in selection.bands:
            bounds = None
            if selection.min_per_row > 0:
                bounds = _row_bounds(band, selection.min_per_row, exchange)
            self.bounds.append(bounds)

    @property
    def n_entries(self) -> int:
        n_rows, n_columns = self.selection.shape
        return n_rows * n_columns

    @property
    def n_order_bits(self) -> int:
        """The number of bits of the order of an entry: all but that of the sign."""
        return 8 * self.selection.bands[0].pieces[0].values.itemsize - 1

    def _pieces(self) -> Iterator[tuple[Piece, Int[Tensor, "row column"]]]:
        """Each piece and the order of its entries, with -1 for those that do not compete."""
        for band, bounds in zip(self.selection.bands, self.bounds, strict=True):
            for piece in band.pieces:
                order = piece.order()
                if bounds is not None:
                    order = order.masked_fill(bounds.keep(order, piece.columns), -1)
                yield piece, order

    def orders(self) -> Iterator[Int[Tensor, " entry"]]:
        """The integers among which the threshold is."""
        for _, order in self._pieces():
            yield order.flatten()

    def _places(self, piece: Piece, entries: Int[Tensor, "entry 2"]) -> Int[Tensor, " entry"]:
        """For entries of a piece: how many positions follow in the matrix, row by row."""
        row, column = entries.unbind(1)
        position = piece.rows[row] * self.selection.shape[1] + piece.columns[column]
        return self.n_entries - 1 - position

    def tied_places(self, tied_order: int) -> Iterator[Int[Tensor, " entry"]]:
        """For the tied entries: how many positions follow, so that the first one has the most."""
        for piece, order in self._pieces():
            yield self._places(piece, (order == tied_order).nonzero())

    def decide(self, threshold: _Threshold, smallest_place: int) -> None:
        """Zero what is not kept. Of the entries at the threshold, those are kept that at least
        `smallest_place` positions follow.
        """
        for piece, order in self._pieces():
            kept = (order > threshold.value) | (order == -1)
            if threshold.n_equal_chosen > 0 and threshold.value > 0:
                equal = (order == threshold.value).nonzero()
                row, column = equal.unbind(1)
                kept[row, column] = self._places(piece, equal) >= smallest_place
            piece.zero_all_but(kept)


def _row_bounds(band: Band, n: int, exchange: Exchange) -> _RowBounds:
    """The last of the `n` largest entries of each row; of equal ones, the first are kept."""
    orders, columns = [], []
    for piece in band.pieces:
        order, column = _candidates(piece, n)
        orders.append(order)
        columns.append(column)
    order, column = torch.cat(orders, 1), torch.cat(columns, 1)
    if not band.has_whole_rows:
        order, column = exchange.collected(torch.stack([order, column]))
    by_column = column.argsort(1)
    order, column = order.gather(1, by_column), column.gather(1, by_column)
    kept = largest_in_rows(order, n)
    above_all = torch.iinfo(order.dtype).max
    last_order = order.masked_fill(~kept, above_all).amin(1, keepdim=True)
    is_last = kept & (order == last_order)
    last_column = column.masked_fill(~is_last, -1).amax(1, keepdim=True)
    return _RowBounds(last_order, last_column)


def _candidates(piece: Piece, n: int) -> tuple[Int[Tensor, "row n"], Int[Tensor, "row n"]]:
    """The order and the column of the `n` largest entries of each row of a piece.

    If it has fewer, some of order -1 are added.
    """
    order = piece.order()
    n_rows, n_columns = order.shape
    n_found = min(n, n_columns)
    row, column = largest_in_rows(order, n_found).nonzero().unbind(1)
    orders = order.new_full((n_rows, n), -1, dtype=torch.long)
    columns = torch.zeros_like(orders)
    orders[:, :n_found] = order[row, column].view(n_rows, n_found)
    columns[:, :n_found] = piece.columns[column].view(n_rows, n_found)
    return orders, columns


def _thresholds(
    integers: Sequence[Callable[[], Iterable[Int[Tensor, " entry"]]]],
    n_chosen: Sequence[int],
    n_bits: int,
    exchange: Exchange,
) -> list[_Threshold]:
    """The smallest of the n largest integers, for each of several sets of integers.

    Args:
        integers: for each set, a function that gives the integers of this process, in one or more
            tensors. Negative ones do not count. The function is called once for each pass, so that
            not all integers need be in memory together.
        n_chosen: for each set the number n, at most the number of its integers over all processes.
        n_bits: the number of bits of the largest integer.
        exchange: the processes.
    """
    if not integers:
        return []
    thresholds = [_Threshold(0, 0, n) for n in n_chosen]
    for shift in reversed(range(0, n_bits, _DIGIT_BITS)):
        counts = []
        for integers_of_set, threshold in zip(integers, thresholds, strict=True):
            per_tensor = [
                _digit_counts(each, threshold.value, shift, n_bits) for each in integers_of_set()
            ]
            counts.append(torch.stack(per_tensor).sum(0))
        totals = exchange.total(torch.stack(counts)).cpu()
        thresholds = [
            _with_next_digit(threshold, digit_counts)
            for threshold, digit_counts in zip(thresholds, totals, strict=True)
        ]
    above_all = _Threshold((1 << n_bits) - 1, 0, 0)
    return [
        threshold if n > 0 else above_all for threshold, n in zip(thresholds, n_chosen, strict=True)
    ]


def _digit_counts(
    integers: Int[Tensor, " entry"], prefix: int, shift: int, n_bits: int
) -> Int[Tensor, " digit"]:
    """How many integers with this prefix have which digit after it.

    The digit begins at bit `shift`, and the prefix is what is above the digit.
    """
    above_digit = shift + _DIGIT_BITS
    if above_digit < n_bits:
        has_prefix = (integers >> above_digit) == prefix
    else:
        has_prefix = integers >= 0
    digits = (integers[has_prefix] >> shift) & (_N_DIGITS - 1)
    return torch.bincount(digits, minlength=_N_DIGITS)


def _with_next_digit(threshold: _Threshold, counts: Int[Tensor, " digit"]) -> _Threshold:
    """The threshold with one more digit, from how many integers have which digit there."""
    n_at_least = counts.flip(0).cumsum(0)  # of the largest digit, the two largest, …
    n_larger_digits = int((n_at_least < threshold.n_equal_chosen).sum())
    n_larger = int(n_at_least[n_larger_digits - 1]) if n_larger_digits > 0 else 0
    digit = _N_DIGITS - 1 - n_larger_digits
    return _Threshold(
        value=threshold.value * _N_DIGITS + digit,
        n_equal=int(counts[digit]),
        n_equal_chosen=threshold.n_equal_chosen - n_larger,
    )
