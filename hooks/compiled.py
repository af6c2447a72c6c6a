"""The k largest magnitudes, compiled by numba: what `kernels.py` runs on a CPU where numba is installed.

Floats are compared by their bits without the sign: as integers these have the order of the magnitudes, NaN above
infinity. Every result of integer arithmetic is cast to the type of the bits, since numba would widen it, and the
loops would run several times slower.
"""

from typing import Any

import numpy as np
from numba import config, njit, prange, set_num_threads

Array = Any  # of numpy; numba infers the rest


def set_threads(n: int) -> None:
    """Let the kernels called from this thread use `n` threads."""
    set_num_threads(min(n, config.NUMBA_NUM_THREADS))


@njit(cache=True, nogil=True)
def _count(bits: Array, t: int) -> int:
    """How many magnitudes have bits of at least `t`."""
    T = bits.dtype.type
    unsigned, bound, n = T((1 << (8 * bits.itemsize - 1)) - 1), T(t), T(0)
    for i in range(bits.size):
        n = T(n + T(T(bits[i] & unsigned) >= bound))
    return int(n)


@njit(cache=True, nogil=True)
def _threshold(bits: Array, k: int, minimum: int, guess: int) -> tuple[int, int]:
    """Where to cut off for `k` entries of `[row, column]` to stay when each row keeps `minimum` in any case.

    Returns t and n: n ≤ k entries stay if those of at least t do, and if n < k the others have the bits t - 1.
    """
    rows, columns = bits.shape
    low, high = 0, (1 << (8 * bits.itemsize - 1)) - 1  # too many stay at low, too few at high
    n_low, n_high = rows * columns, rows * minimum
    t, step, probes = guess, 1 << (8 * bits.itemsize - 14), 0
    while high - low > 1:
        if not low < t < high:
            t = low + (high - low) // 2
        n = 0
        for row in range(rows):
            n += max(minimum, _count(bits[row], t))
        if n == k:
            return t, n
        if n > k:
            low, n_low = t, n
        else:
            high, n_high = t, n
        probes += 1
        step *= 4
        if probes % 4 == 0:  # halve now and then: interpolation alone can take as many probes as there are bits
            t = low + (high - low) // 2
        elif n_high == rows * minimum:
            t = low + step
        elif low == 0:
            t = high - step
        else:
            t = low + int((high - low) * ((n_low - k) / (n_low - n_high)))
    return high, n_high


@njit(cache=True, nogil=True)
def _mark(bits: Array, t: int, kept: Array) -> None:
    """Mark the magnitudes whose bits are at least `t`."""
    T = bits.dtype.type
    unsigned, bound = T((1 << (8 * bits.itemsize - 1)) - 1), T(t)
    for i in range(bits.size):
        kept[i] = T(bits[i] & unsigned) >= bound


@njit(cache=True, nogil=True, parallel=True)
def abs_topk(x: Array, bits: Array, k: int, out: Array, mask: Array) -> int:
    """out = x · mask with the `k` largest entries of each row in the mask.

    Returns the number of rows in which fewer are, since a tie would have to be broken.
    """
    T = x.dtype.type
    tied = 0
    for chunk in prange((len(x) + 63) // 64):
        t = 0
        for row in range(64 * chunk, min(64 * chunk + 64, len(x))):
            t, n = _threshold(bits[row : row + 1], k, 0, t)  # a row's threshold is a good guess for the next
            tied += n != k
            _mark(bits[row], t, mask[row])
            for i in range(x.shape[1]):
                out[row, i] = x[row, i] * T(mask[row, i])
    return tied


@njit(cache=True, nogil=True)
def zero_all_but(bits: Array, k: int, minimum: int) -> bool:
    """Zero a matrix but for its `k` largest entries, of which the `minimum` largest of each row come first.

    Returns False, with nothing done, if a tie would have to be broken.
    """
    t, n = _threshold(bits, k, minimum, 0)
    tied = n != k and t > 1  # among zeros there is nothing to choose
    bounds = np.full(len(bits), t)
    for row in range(len(bits)):
        if _count(bits[row], t) < minimum:
            bounds[row], n = _threshold(bits[row : row + 1], minimum, 0, t)
            tied = tied or (n != minimum and bounds[row] > 1)
    if not tied:
        kept = np.empty(bits.shape[1], np.bool_)
        for row in range(len(bits)):
            _mark(bits[row], bounds[row], kept)
            for i in range(len(kept)):
                bits[row, i] = bits[row, i] if kept[i] else 0
    return not tied


@njit(cache=True, nogil=True, parallel=True)
def times(x: Array, mask: Array, out: Array) -> None:
    """out = x · mask"""
    T = x.dtype.type
    for i in prange(len(x)):
        out[i] = x[i] * T(mask[i])
