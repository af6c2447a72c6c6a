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
def _is_protected(keys, indices, inside, bounds, lasts, n_columns):
    """Whether entries are among the minimum that their rows keep, see `row_bounds`."""
    rows = indices // n_columns
    bound = tl.load(bounds + rows, mask=inside, other=0)
    last = tl.load(lasts + rows, mask=inside, other=0)
    return (keys > bound) | ((keys == bound) & (indices - rows * n_columns <= last))


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

    Only those are counted that are not protected, and whose bits from `above` on are those of the
    threshold.
    """
    prefix = tl.load(threshold) >> above
    found = tl.zeros((DIGITS,), tl.int32)
    n_others = 0
    start = tl.program_id(0) * segment
    for first in range(start, tl.minimum(start + segment, size), BLOCK):
        indices = first + tl.arange(0, BLOCK)
        inside = indices < size
        values = tl.load(x + indices, mask=inside, other=0)
        keys = magnitude_keys(values, KEY, UNSIGNED, INFINITY)
        is_counted = inside & ((keys >> above) == prefix)
        if HAS_MINIMUM:
            protected = _is_protected(keys, indices, inside, bounds, lasts, n_columns)
            is_counted = is_counted & (protected == 0)
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
            inside = indices < size
            values = tl.load(x + indices, mask=inside, other=0)
            keys = magnitude_keys(values, KEY, UNSIGNED, INFINITY)
            is_tied = inside & (keys == bound)
            if HAS_MINIMUM:
                protected = _is_protected(keys, indices, inside, bounds, lasts, n_columns)
                is_tied = is_tied & (protected == 0)
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
        inside = indices < size
        values = tl.load(x + indices, mask=inside, other=0)
        keys = magnitude_keys(values, KEY, UNSIGNED, INFINITY)
        kept = keys > bound
        is_tied = inside & (keys == bound)
        if HAS_MINIMUM:
            protected = _is_protected(keys, indices, inside, bounds, lasts, n_columns)
            kept = kept | protected
            is_tied = is_tied & (protected == 0)
        n_tied = tl.sum(is_tied.to(tl.int32), 0)
        if n_tied > 0:
            place = tl.cumsum(is_tied.to(tl.int32), 0)
            kept = kept | (is_tied & (place <= n_left))
            n_left -= n_tied
        is_zeroed = inside & ((kept == 0) | (keys == 0))
        tl.store(x + indices, tl.zeros((BLOCK,), KEY), mask=is_zeroed)
