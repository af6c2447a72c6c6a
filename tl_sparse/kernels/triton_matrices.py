"""The exact weight top-k of a whole matrix on a GPU, compiled by Triton.

The threshold is found digit by digit, from the highest bits of the magnitudes to the lowest: each
pass over the matrix counts how many entries have each value of the digit, among those whose higher
digits are the threshold's. Nothing is sorted, and the CPU never waits for the GPU.

A matrix is divided into as many consecutive segments as there are programs, each read in blocks.
"""

import triton
import triton.language as tl

from tl_sparse.kernels.triton_rows import magnitude_keys


@triton.jit
def _magnitudes(
    x,
    indices,
    size,
    bounds,
    lasts,
    n_columns,
    HAS_MINIMUM: tl.constexpr,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
):
    """The magnitudes of some entries, and whether each of them competes for being kept.

    Those do not that are among the minimum that their rows keep, see `row_bounds`, nor those
    outside of the matrix.
    """
    inside = indices < size
    values = tl.load(x + indices, mask=inside, other=0)
    keys = magnitude_keys(values, KEY, UNSIGNED, INFINITY)
    competes = inside
    if HAS_MINIMUM:
        rows = indices // n_columns
        bound = tl.load(bounds + rows, mask=inside, other=0)
        last = tl.load(lasts + rows, mask=inside, other=0)
        is_at_bound = (keys == bound) & (indices - rows * n_columns <= last)
        competes = inside & (((keys > bound) | is_at_bound) == 0)
    return keys, competes


@triton.jit
def count_digits(
    x,
    bounds,
    lasts,
    threshold,
    size,
    segment,
    n_columns,
    counts,
    shift,
    above,
    HAS_MINIMUM: tl.constexpr,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the entries with each value of a digit, the bits from `shift` up to `above`.

    Only those are counted that compete, and whose bits from `above` on are those of the threshold.
    """
    prefix = tl.load(threshold) >> above
    found = tl.zeros((DIGITS,), tl.int32)
    n_others = 0
    start = tl.program_id(0) * segment
    for first in range(start, tl.minimum(start + segment, size), BLOCK):
        indices = first + tl.arange(0, BLOCK)
        keys, competes = _magnitudes(
            x, indices, size, bounds, lasts, n_columns, HAS_MINIMUM, KEY, UNSIGNED, INFINITY
        )
        is_counted = competes & ((keys >> above) == prefix)
        digits = (keys >> shift) & ((1 << (above - shift)) - 1)
        # Entries that do not count are counted as 0, and taken off again below.
        found += tl.histogram(tl.where(is_counted, digits, 0).to(tl.int32), DIGITS)
        n_others += BLOCK - tl.sum(is_counted.to(tl.int32), 0)
    places = tl.arange(0, DIGITS)
    tl.atomic_add(counts + places, found - tl.where(places == 0, n_others, 0))


@triton.jit
def count_ties(
    x,
    bounds,
    lasts,
    threshold,
    size,
    segment,
    n_columns,
    n_ties,
    n_ties_kept,
    counts,
    HAS_MINIMUM: tl.constexpr,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the entries at the threshold in each segment, if not all of them are kept."""
    if tl.load(n_ties_kept) < tl.load(n_ties):
        bound = tl.load(threshold)
        found = 0
        start = tl.program_id(0) * segment
        for first in range(start, tl.minimum(start + segment, size), BLOCK):
            indices = first + tl.arange(0, BLOCK)
            keys, competes = _magnitudes(
                x, indices, size, bounds, lasts, n_columns, HAS_MINIMUM, KEY, UNSIGNED, INFINITY
            )
            is_tied = competes & (keys == bound)
            found += tl.sum(is_tied.to(tl.int32), 0)
        tl.store(counts + tl.program_id(0), found)


@triton.jit
def cut(
    x,
    bounds,
    lasts,
    threshold,
    size,
    segment,
    n_columns,
    n_ties_kept,
    n_ties_before,
    HAS_MINIMUM: tl.constexpr,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zero the entries below the threshold, and of those at the threshold all but the first.

    A kept -0.0 becomes 0.0 as well.
    `n_ties_before` has, for each segment, the number of entries at the threshold in those before.
    """
    bound = tl.load(threshold)
    n_left = tl.load(n_ties_kept) - tl.load(n_ties_before + tl.program_id(0))
    start = tl.program_id(0) * segment
    for first in range(start, tl.minimum(start + segment, size), BLOCK):
        indices = first + tl.arange(0, BLOCK)
        keys, competes = _magnitudes(
            x, indices, size, bounds, lasts, n_columns, HAS_MINIMUM, KEY, UNSIGNED, INFINITY
        )
        kept = (keys > bound) | (competes == 0)
        is_tied = competes & (keys == bound)
        n_tied = tl.sum(is_tied.to(tl.int32), 0)
        if n_tied > 0:
            place = tl.cumsum(is_tied.to(tl.int32), 0)
            kept = kept | (is_tied & (place <= n_left))
            n_left -= n_tied
        is_zeroed = (indices < size) & ((kept == 0) | (keys == 0))
        tl.store(x + indices, tl.zeros((BLOCK,), KEY), mask=is_zeroed)
