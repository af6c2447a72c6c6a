"""Selection of the k largest magnitudes, compiled by numba.

Magnitudes are compared as integers: without the sign bit, the bits of floating-point numbers have
the same order as the magnitudes, with NaN above infinity. Every result of integer arithmetic is
cast to the dtype of the bits, because numba would otherwise widen it and the loops would run
several times slower.
"""

from typing import Any

import numpy as np
from numba import njit

Array = Any  # a NumPy array; numba infers dtype and dimensions


@njit(cache=True, nogil=True)
def _count(bits: Array, row: int, t: int) -> int:
    """The number of entries of a row whose magnitude bits are at least `t`."""
    T = bits.dtype.type
    unsigned, bound, n = T((1 << (8 * bits.itemsize - 1)) - 1), T(t), T(0)
    for i in range(bits.shape[1]):
        n = T(n + T(T(bits[row, i] & unsigned) >= bound))
    return int(n)


@njit(cache=True, nogil=True)
def _threshold(
    bits: Array, first: int, last: int, k: int, minimum: int, guess: int
) -> tuple[int, int]:
    """Find the threshold at which `k` entries of the rows [first, last) are kept.

    Each row keeps at least its `minimum` largest entries. The search starts at `guess`.

    Returns:
        The threshold t and the number n ≤ k of entries that are kept: those whose magnitude bits
        are at least t, and the `minimum` largest of each row. If n < k, there is a tie between
        entries whose magnitude bits are t - 1.
    """
    rows = last - first
    # The threshold is above `low`, which keeps too many entries, and at most `high`, which keeps
    # too few.
    low, high = 0, (1 << (8 * bits.itemsize - 1)) - 1
    n_low, n_high = rows * bits.shape[1], rows * minimum
    # Estimate of how far the threshold, as an integer, must move to keep one more entry, if the
    # entries are normally distributed.
    step = int((3 << (23 if bits.itemsize == 4 else 52)) * (1.0 / n_low))
    t, probes = guess, 0
    while high - low > 1:
        if not low < t < high:
            t = low + (high - low) // 2
        n = 0
        for row in range(first, last):
            n += max(minimum, _count(bits, row, t))
        if n == k:
            return t, n
        if n > k:
            low, n_low = t, n
        else:
            high, n_high = t, n
        probes += 1
        if probes % 4 == 0:
            # Interpolation alone can converge very slowly, so every fourth probe is a bisection.
            t = low + (high - low) // 2
        elif low == 0 or n_high == rows * minimum:
            t += (n - k) * step
            step *= 4
        else:
            t = low + int((high - low) * ((n_low - k) / (n_low - n_high)))
    return high, n_high


@njit(cache=True, nogil=True)
def _cut(bits: Array, row: int, t: int, mask: Array) -> None:
    """Zero the entries of a row whose magnitude bits are below `t` > 0, except for their sign bit.

    The other entries are marked in the mask, unless the mask is empty.
    """
    T, byte, shift = bits.dtype.type, row // 8, np.uint8(row % 8)
    unsigned, bound = T((1 << (8 * bits.itemsize - 1)) - 1), T(t)
    for i in range(bits.shape[1]):
        kept = T(bits[row, i] & unsigned) >= bound
        bits[row, i] = T(bits[row, i] & T(T(-T(kept)) | ~unsigned))
    if len(mask) > 0:
        for i in range(bits.shape[1]):
            kept = T(bits[row, i] & unsigned) > T(0)
            mask[byte, i] = np.uint8(mask[byte, i] | np.uint8(np.uint8(kept) << shift))


@njit(cache=True, nogil=True)
def abs_topk(bits: Array, k: int, mask: Array, tied: Array, first: int, last: int) -> bool:
    """Zero all but the `k` largest entries of each row, in place, and mark those in the mask.

    This is done for the rows [8 · first, 8 · last). The mask has one bit per entry: the bit of an
    entry in row i is bit i % 8 in row i // 8 of the mask. If no gradient is needed, the mask may be
    empty; then it makes no difference which zeros are kept.

    Returns:
        Whether there are ties to break. Rows with a tie are marked in `tied` and not changed.
    """
    t, any_tied = 0, False
    for row in range(8 * first, min(8 * last, len(bits))):
        # The threshold of a row is a good guess for the next one.
        t, n = _threshold(bits, row, row + 1, k, 0, t)
        tied[row] = n != k and (t > 1 or len(mask) > 0)
        any_tied = any_tied or tied[row]
        if not tied[row]:
            _cut(bits, row, t, mask)
    return any_tied


@njit(cache=True, nogil=True)
def keep(bits: Array, rows: Array, columns: Array, mask: Array) -> None:
    """Zero the given rows in place, except in the given columns and except for the sign bits.

    Row `rows[i]` keeps the columns `columns[i]`. The kept entries are marked in the mask, unless
    the mask is empty.
    """
    T = bits.dtype.type
    sign = T(~((1 << (8 * bits.itemsize - 1)) - 1))
    for i in range(len(rows)):
        row, kept = rows[i], np.zeros(bits.shape[1], np.bool_)
        for column in columns[i]:
            kept[column] = True
            if len(mask) > 0:
                mask[row // 8, column] |= np.uint8(1 << row % 8)
        for column in range(bits.shape[1]):
            bits[row, column] &= T(-T(kept[column])) | sign


@njit(cache=True, nogil=True)
def zero_all_but(bits: Array, k: int, minimum: int) -> bool:
    """Zero all but the `k` largest entries of a matrix, in place.

    The `minimum` largest entries of each row are kept first.

    Returns:
        Whether that was possible. If there is a tie to break, the matrix is not changed.
    """
    t, n = _threshold(bits, 0, len(bits), k, minimum, 0)
    tied = n != k and t > 1  # it makes no difference which zeros are kept
    bounds = np.full(len(bits), t)
    for row in range(len(bits)):
        if _count(bits, row, t) < minimum:
            bounds[row], n = _threshold(bits, row, row + 1, minimum, 0, t)
            tied = tied or (n != minimum and bounds[row] > 1)
    if not tied:
        T = bits.dtype.type
        unsigned = T((1 << (8 * bits.itemsize - 1)) - 1)
        for row in range(len(bits)):
            bound = T(bounds[row])
            for i in range(bits.shape[1]):
                bits[row, i] = bits[row, i] if T(bits[row, i] & unsigned) >= bound else T(0)
    return not tied


@njit(cache=True, nogil=True)
def times(x: Array, mask: Array, out: Array, first: int, last: int) -> None:
    """out = x · mask for the rows [8 · first, 8 · last), with a mask from `abs_topk`."""
    T = x.dtype.type
    for row in range(8 * first, min(8 * last, len(x))):
        byte, bit = row // 8, np.uint8(row % 8)
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * T(np.uint8(mask[byte, i] >> bit) & np.uint8(1))
