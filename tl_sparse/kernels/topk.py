"""The k largest magnitudes, compiled by numba.

Floats are compared by their bits without the sign: as integers these have the order of the
magnitudes, NaN above infinity. Every result of integer arithmetic is cast to the type of the bits,
since numba would widen it, and the loops would run several times slower.
"""

from typing import Any

import numpy as np
from numba import njit

Array = Any  # of numpy; numba infers the rest


@njit(cache=True, nogil=True)
def _count(bits: Array, row: int, t: int) -> int:
    """How many magnitudes of a row have bits of at least `t`."""
    T = bits.dtype.type
    unsigned, bound, n = T((1 << (8 * bits.itemsize - 1)) - 1), T(t), T(0)
    for i in range(bits.shape[1]):
        n = T(n + T(T(bits[row, i] & unsigned) >= bound))
    return int(n)


@njit(cache=True, nogil=True)
def _threshold(
    bits: Array, first: int, last: int, k: int, minimum: int, guess: int
) -> tuple[int, int]:
    """Where to cut off for `k` entries of some rows to stay when each row keeps `minimum` in any
    case.

    Returns t and n: n ≤ k entries stay if those of at least t do, and if n < k the others have the
        bits t - 1.
    """
    rows = last - first
    low, high = 0, (1 << (8 * bits.itemsize - 1)) - 1  # too many stay at low, too few at high
    n_low, n_high = rows * bits.shape[1], rows * minimum
    # About the distance in bits at which one more entry stays, where the magnitudes are those of a
    # normal variable.
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
        if (
            probes % 4 == 0
        ):  # halve now and then: interpolation alone can take as many probes as there are bits
            t = low + (high - low) // 2
        elif low == 0 or n_high == rows * minimum:
            t += (n - k) * step
            step *= 4
        else:
            t = low + int((high - low) * ((n_low - k) / (n_low - n_high)))
    return high, n_high


@njit(cache=True, nogil=True)
def _cut(bits: Array, row: int, t: int, mask: Array) -> None:
    """Zero the entries of a row with bits below `t` > 0, but for their sign; mark the others, if
    there is a mask.
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
    """Zero all but the `k` largest entries of each row; these are marked in the mask, which may be
    empty.

    Of the rows, the eights [first, last).

    The mask has a bit for each entry: row i of `bits` has bit i % 8 in row i // 8. Rows in which a
        tie would have to be
    broken are left as they are, and are marked in `tied`; returns whether there are any. Without a
    mask it makes no difference which zeros are kept.
    """
    t, any_tied = 0, False
    for row in range(8 * first, min(8 * last, len(bits))):
        t, n = _threshold(
            bits, row, row + 1, k, 0, t
        )  # a row's threshold is a good guess for the next
        tied[row] = n != k and (t > 1 or len(mask) > 0)
        any_tied = any_tied or tied[row]
        if not tied[row]:
            _cut(bits, row, t, mask)
    return any_tied


@njit(cache=True, nogil=True)
def keep(bits: Array, rows: Array, columns: Array, mask: Array) -> None:
    """Zero all but the given columns of each of some rows, but for the sign; mark these columns."""
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
    """Zero a matrix but for its `k` largest entries, of which the `minimum` largest of each row
    come first.

    Returns False, with nothing done, if a tie would have to be broken.
    """
    t, n = _threshold(bits, 0, len(bits), k, minimum, 0)
    tied = n != k and t > 1  # among zeros there is nothing to choose
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
    """out = x · mask, of a mask as `abs_topk` makes it, for the eights [first, last) of rows."""
    T = x.dtype.type
    for row in range(8 * first, min(8 * last, len(x))):
        byte, bit = row // 8, np.uint8(row % 8)
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * T(np.uint8(mask[byte, i] >> bit) & np.uint8(1))
