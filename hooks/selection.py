"""Which weights are the largest, and zeroing all others: what every way of choosing them follows.

Weights are compared by their magnitudes (`magnitude_order`). Of equal ones, the one that comes
first in its matrix, row by row, counts as larger. So the same weights are kept on every device and
by any number of processes.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.kernels import FLOAT_BITS, bits, kernel, zero_all_but_by_triton


def magnitude_order(x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Integers of at least 0 in the order of the magnitudes of `x`, with NaN above infinity.

    They are the bits of the numbers without the sign.
    """
    return bits(x) & FLOAT_BITS[x.dtype].unsigned


def largest_in_rows(order: Int[Tensor, "row column"], n: int) -> Bool[Tensor, "row column"]:
    """Mask of the `n` largest integers of each row; of equal ones, the first.

    All are in it if a row has fewer than `n`.
    """
    n_columns = order.shape[1]
    if n <= 0 or n >= n_columns:
        return torch.full_like(order, n > 0, dtype=torch.bool)
    smallest = order.topk(n, dim=1, sorted=False).values.amin(1, keepdim=True)
    is_larger = order > smallest
    is_equal = order == smallest
    n_missing = n - is_larger.sum(1, keepdim=True)
    mask = is_larger | is_equal
    has_tie = is_equal.sum(1, keepdim=True) > n_missing
    tied_rows = has_tie.flatten().nonzero().flatten()
    if len(tied_rows) > 0:
        equal = is_equal[tied_rows]
        is_first = equal & (equal.cumsum(1) <= n_missing[tied_rows])
        mask[tied_rows] = is_larger[tied_rows] | is_first
    return mask


def top_mask(
    magnitudes: Float[Tensor, "row column"], k: int, min_per_row: int
) -> Bool[Tensor, "row column"]:
    """Mask of the `k` largest entries; the `min_per_row` largest of each row go first (A.2).

    Exactly max(k, number of protected entries) are kept, even when magnitudes are tied: then the
    first ones, see the top of this file.
    """
    order = magnitude_order(magnitudes)
    mask = largest_in_rows(order, min_per_row)
    n_protected = len(order) * min(min_per_row, order.shape[1])
    others = order.masked_fill(mask, -1).view(1, -1)
    return mask | largest_in_rows(others, k - n_protected).view_as(mask)


def zero_all_but(matrix: Float[Tensor, "row column"], k: int, min_per_row: int) -> None:
    """Zero the entries of a contiguous matrix that are not in its `top_mask`, in place.

    A kept -0.0 becomes 0.0 as well.
    """
    minimum = min(min_per_row, matrix.shape[1])
    n_kept = max(k, minimum * len(matrix))
    if zero_all_but_by_triton(matrix, n_kept, minimum):
        return
    compiled = kernel("zero_all_but", matrix)
    if compiled is not None and compiled(bits(matrix), n_kept, minimum):
        return
    is_kept = top_mask(matrix, k, min_per_row) & (matrix != 0)
    matrix.masked_fill_(~is_kept, 0.0)
