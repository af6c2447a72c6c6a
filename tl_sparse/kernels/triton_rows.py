"""AbsTopK on a GPU: the k largest magnitudes of each row, found by bisection, compiled by Triton.

One program holds one row in registers and halves the range of the threshold until exactly k entries
are at or above it. Nothing is sorted: a row is read once and written once. RTop-K (Xie et al. 2025,
arXiv 2409.00822) selects in the same way.

The kernels see floating-point numbers as integers, whose order without the sign bit is that of the
magnitudes. NaN is above infinity, and every NaN is the same, as in `torch.topk`. Of equal
magnitudes at the threshold those in the first columns are kept.
"""

import triton
import triton.language as tl


@triton.jit
def magnitude_keys(values, KEY: tl.constexpr, UNSIGNED: tl.constexpr, INFINITY: tl.constexpr):
    """The magnitudes of numbers, of which the bits are given, as integers of the same order."""
    return tl.minimum(values.to(KEY) & UNSIGNED, INFINITY + 1)


@triton.jit
def _row(
    x,
    n_columns,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The number of the row of this program, its columns, values and magnitudes.

    The magnitudes of columns outside of the row are -1.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n_columns
    values = tl.load(x + row * n_columns + columns, mask=inside, other=0)
    keys = tl.where(inside, magnitude_keys(values, KEY, UNSIGNED, INFINITY), -1)
    return row, columns, values, keys


@triton.jit
def largest_of_row(keys, k):
    """Whether each key is among the `k` largest; of equal ones at the threshold the first are.

    Keys outside the row are -1; `k` is at most the number of the others.

    Returns:
        Whether each key is kept, and the threshold: all keys above it are kept, those below it not.
    """
    # More than k keys are at least `low` (or exactly k, if all of the row is kept), and fewer than
    # k are at least `high`; if exactly k are, the search ends.
    high = tl.max(keys, 0) + 1
    low = high * 0
    n_high = k * 0
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        n = tl.sum((keys >= middle).to(tl.int32), 0)
        low = tl.where(n > k, middle, tl.where(n == k, middle - 1, low))
        high = tl.where(n > k, high, middle)
        n_high = tl.where(n > k, n_high, n)
    kept = keys >= high
    n_ties_kept = k - n_high
    if n_ties_kept > 0:
        is_tied = keys == high - 1
        place = tl.cumsum(is_tied.to(tl.int32), 0)
        kept = kept | (is_tied & (place <= n_ties_kept))
    return kept, high - 1


@triton.jit
def abs_topk(
    x,
    out,
    mask,
    k,
    n_columns,
    n_bytes,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zero all but the `k` largest entries of a row, except for their sign bit.

    The kept entries are marked in the mask: bit i of byte j is that of column 8 · j + i.
    """
    row, columns, values, keys = _row(x, n_columns, KEY, UNSIGNED, INFINITY, BLOCK)
    kept, _ = largest_of_row(keys, k)
    zeros = values & ~UNSIGNED
    chosen = tl.where(kept, values, zeros)
    tl.store(out + row * n_columns + columns, chosen, mask=columns < n_columns)
    eights = tl.reshape(kept.to(tl.int32), (BLOCK // 8, 8))
    packed = tl.sum(eights << tl.arange(0, 8)[None, :], 1)
    places = tl.arange(0, BLOCK // 8)
    tl.store(mask + row * n_bytes + places, packed.to(tl.uint8), mask=places < n_bytes)


@triton.jit
def times(
    x,
    mask,
    out,
    n_columns,
    n_bytes,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = x · mask for a row, with a mask from `abs_topk`."""
    row, columns, values, keys = _row(x, n_columns, KEY, UNSIGNED, INFINITY, BLOCK)
    inside = columns < n_columns
    byte = tl.load(mask + row * n_bytes + columns // 8, mask=inside, other=0)
    kept = (byte.to(tl.int32) >> (columns % 8)) & 1
    is_finite = keys < INFINITY
    # 0 · x keeps the sign of x, and is NaN if x is infinite or NaN; all bits set is a NaN.
    zeros = tl.where(is_finite, values & ~UNSIGNED, -1)
    tl.store(out + row * n_columns + columns, tl.where(kept == 1, values, zeros), mask=inside)


@triton.jit
def row_bounds(
    x,
    bounds,
    lasts,
    k,
    n_columns,
    KEY: tl.constexpr,
    UNSIGNED: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is among the `k` largest of a row, in two numbers.

    These are the entries above the bound, and those at the bound up to the last column.
    """
    row, columns, _, keys = _row(x, n_columns, KEY, UNSIGNED, INFINITY, BLOCK)
    kept, bound = largest_of_row(keys, k)
    last = tl.max(tl.where(kept & (keys == bound), columns, -1), 0)
    tl.store(bounds + row, bound)
    tl.store(lasts + row, last)
