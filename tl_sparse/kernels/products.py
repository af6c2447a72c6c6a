"""Products with sparse matrices, compiled by numba.

`multiply` computes out[token] = x[token] · Wᵀ + bias for one tile of tokens at a time. The tile is
transposed in the CPU's cache, so that the inner loop multiplies one weight by contiguous numbers.
`sampled_product` computes the gradient of each nonzero weight in the same way: as the product of
two rows of such tiles.
Indices are unsigned, because numba checks every signed index for a negative value.
"""

from typing import Any

import numpy as np
from numba import njit

Array = Any  # a NumPy array; numba infers dtype and dimensions

#: Number of tokens in a tile: two vectors of float32 with AVX-512, four with AVX2.
TILE = 32
#: Number of output columns that are written at a time: one cache line of float32.
COLUMNS = 16

_U = np.uint64
# The flags allow the terms of a sum to be added in any order.
_compile = njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})


@njit(cache=True, nogil=True)
def checksum(bits: Array, first: int, last: int) -> int:
    """The sum of the hashes of the entries [first, last); sums of several ranges can be added.

    `bits` must be unsigned. Each entry is hashed together with its index by the invertible steps of
    MurmurHash3. A change of a single entry therefore always changes the sum, and any other change
    leaves the sum the same with a probability of only about 2^-32.
    """
    T = bits.dtype.type
    part, total, half = bits[first:last], T(0), T(4 * bits.itemsize - 1)
    for i in range(len(part)):
        x = T(part[i] ^ T(T(first + i) * T(0x9E3779B1)))
        x = T(x * T(0x85EBCA6B))
        x = T(x ^ T(x >> half))
        x = T(x * T(0xC2B2AE35))
        total = T(total + T(x ^ T(x >> T(half - T(2)))))
    return int(total)


@njit(cache=True, nogil=True)
def compress(matrix: Array, starts: Array, indices: Array, values: Array) -> None:
    """Write the nonzero entries of a matrix row by row (CSR).

    The entries of row r are written to the range [starts[r], starts[r + 1]). `indices` and `values`
    have room for the number of nonzero entries that was counted before.
    """
    n, room = _U(0), _U(len(values))
    for row in range(len(matrix)):
        starts[row] = n
        for column in range(matrix.shape[1]):
            value = matrix[row, column]
            # There may be more nonzero entries than were counted if another thread changes the
            # matrix.
            if value != 0 and n < room:
                indices[n], values[n] = column, value
                n += _U(1)
    starts[len(matrix)] = n


@njit(cache=True, nogil=True)
def transpose(
    starts: Array,
    indices: Array,
    values: Array,
    to_starts: Array,
    to_indices: Array,
    to_values: Array,
) -> None:
    """Write the transpose of a compressed matrix. `to_starts` must be all zeros on entry."""
    for i in range(starts[len(starts) - 1]):
        to_starts[indices[i] + 1] += 1
    for row in range(1, len(to_starts)):
        to_starts[row] += to_starts[row - 1]
    place = to_starts.copy()
    for row in range(len(starts) - 1):
        for i in range(starts[row], starts[row + 1]):
            to = place[indices[i]]
            to_indices[to], to_values[to] = row, values[i]
            place[indices[i]] += 1


@_compile
def _load(x: Array, first: int, n: int, tile: Array) -> None:
    """Copy n ≤ TILE rows of x, tile[i, t] = x[first + t, i], and zero the columns t ≥ n."""
    d = x.shape[1]
    whole = d - d % 8 if n == TILE else 0
    flat, to = x.reshape(-1), tile.reshape(-1)
    for i0 in range(0, whole, 8):
        corner, row = _U(i0 * TILE), _U(first * d + i0)
        for t in range(_U(TILE)):
            for i in range(_U(8)):
                to[corner + i * _U(TILE) + t] = flat[row + i]
            row += _U(d)
    for i in range(whole, d):
        for t in range(TILE):
            tile[i, t] = x[first + t, i] if t < n else 0


@_compile
def multiply(
    x: Array,
    starts: Array,
    indices: Array,
    values: Array,
    bias: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """out = x · Wᵀ + bias for the tokens [first, last), with W in compressed rows.

    An empty `bias` means that there is no bias.
    """
    tile, block = np.empty((x.shape[1], TILE), x.dtype), np.empty((COLUMNS, TILE), x.dtype)
    flat_out, flat_block = out.reshape(-1), block.reshape(-1)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        _load(x, start, n, tile)
        for o in range(0, out.shape[1], COLUMNS):
            width = min(COLUMNS, out.shape[1] - o)
            for j in range(width):
                row, p, end = block[j], _U(starts[o + j]), _U(starts[o + j + 1])
                row[:] = bias[o + j] if len(bias) > 0 else 0
                while p + _U(4) <= end:
                    a, b, c, d = values[p], values[p + _U(1)], values[p + _U(2)], values[p + _U(3)]
                    xa, xb = tile[_U(indices[p])], tile[_U(indices[p + _U(1)])]
                    xc, xd = tile[_U(indices[p + _U(2)])], tile[_U(indices[p + _U(3)])]
                    for t in range(TILE):
                        row[t] += (a * xa[t] + b * xb[t]) + (c * xc[t] + d * xd[t])
                    p += _U(4)
                while p < end:
                    a, xa = values[p], tile[_U(indices[p])]
                    for t in range(TILE):
                        row[t] += a * xa[t]
                    p += _U(1)
            if n == TILE and width == COLUMNS:
                to = _U(start * out.shape[1] + o)
                for t in range(_U(TILE)):
                    for j in range(_U(COLUMNS)):
                        flat_out[to + j] = flat_block[j * _U(TILE) + t]
                    to += _U(out.shape[1])
            else:
                for t in range(n):
                    for j in range(width):
                        out[start + t, o + j] = block[j, t]


@_compile
def sampled_product(
    x: Array, grad: Array, starts: Array, indices: Array, first: int, last: int
) -> Array:
    """The entries of xᵀ · grad, summed over the tokens [first, last), in the places of a pattern.

    Row i of the pattern has the columns `indices[starts[i] : starts[i + 1]]` (CSR). The entry in
    row i and column j is the sum over tokens of x[token, i] · grad[token, j].
    """
    zero = x.dtype.type(0)
    sums = np.zeros(len(indices), x.dtype)
    x_tile, grad_tile = (
        np.empty((x.shape[1], TILE), x.dtype),
        np.empty((grad.shape[1], TILE), x.dtype),
    )
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        _load(x, start, n, x_tile)
        _load(grad, start, n, grad_tile)
        for i in range(len(starts) - 1):
            row, p, end = x_tile[i], _U(starts[i]), _U(starts[i + 1])
            while p + _U(4) <= end:
                ga, gb = grad_tile[_U(indices[p])], grad_tile[_U(indices[p + _U(1)])]
                gc, gd = grad_tile[_U(indices[p + _U(2)])], grad_tile[_U(indices[p + _U(3)])]
                a, b, c, d = zero, zero, zero, zero
                for t in range(TILE):
                    a += row[t] * ga[t]
                    b += row[t] * gb[t]
                    c += row[t] * gc[t]
                    d += row[t] * gd[t]
                sums[p] += a
                sums[p + _U(1)] += b
                sums[p + _U(2)] += c
                sums[p + _U(3)] += d
                p += _U(4)
            while p < end:
                a, ga = zero, grad_tile[_U(indices[p])]
                for t in range(TILE):
                    a += row[t] * ga[t]
                sums[p] += a
                p += _U(1)
    return sums
