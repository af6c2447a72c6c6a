"""Launches of the Triton kernels: blocks, programs, warps and scratch memory."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tl_sparse.kernels import triton_matrices, triton_rows
from tl_sparse.kernels.float_bits import FLOAT_BITS, bits

#: The number of entries of a matrix that a program reads at once.
BLOCK = 2048
#: The number of programs that share a matrix: several for each multiprocessor of a large GPU.
PROGRAMS = 2048
#: The number of bits of the magnitudes that one pass over a matrix decides: four passes for
#: float32, two for half precision. Counting a digit takes the more instructions the more values it
#: has: for 8, 9, 10 and 11 bits, Triton 3.7.1 compiles a block of 2048 to 1,248, 1,640, 2,648 and
#: 4,128 instructions of an H200. So three passes of 11 bits would take longer than four of 8.
DIGIT_BITS = 8


def abs_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All but the `k` largest entries of each row zeroed, and a mask with one bit per entry.

    Args:
        x: a contiguous tensor of at least one dimension; the last one has the rows' entries.
        k: at least 0 and at most the number of columns.
    """
    n_columns = x.shape[-1]
    n_bytes = triton.cdiv(n_columns, 8)
    out = torch.empty_like(x)
    mask = x.new_empty((*x.shape[:-1], n_bytes), dtype=torch.uint8)
    n_rows = x.numel() // max(1, n_columns)
    if n_rows:
        with torch.cuda.device_of(x):
            triton_rows.abs_topk[(n_rows,)](
                bits(x), bits(out), mask, k, n_columns, n_bytes, **_of_rows(x)
            )
    return out, mask


def times(x: Tensor, mask: Tensor) -> Tensor:
    """x · mask, with a mask from `abs_topk`."""
    n_columns = x.shape[-1]
    out = torch.empty_like(x)
    n_rows = x.numel() // max(1, n_columns)
    if n_rows:
        with torch.cuda.device_of(x):
            triton_rows.times[(n_rows,)](
                bits(x), mask, bits(out), n_columns, mask.shape[-1], **_of_rows(x)
            )
    return out


def zero_all_but(matrix: Tensor, k: int, minimum: int) -> None:
    """Zero all but the `k` largest entries of a contiguous matrix, in place.

    The `minimum` largest entries of each row are kept first; `k` counts them too.
    """
    if matrix.numel() == 0:
        return
    with torch.cuda.device_of(matrix):
        shared = _divided(matrix, minimum)
        # How many are tied, and kept, stays on the GPU, so that the CPU need not wait for it.
        n_others = matrix.new_full((), k - minimum * len(matrix), dtype=torch.int64)
        n_ties, n_ties_kept = _find_threshold(shared, n_others)
        ties = matrix.new_zeros(shared.n_segments, dtype=torch.int32)
        shared.launch(triton_matrices.count_ties, n_ties, n_ties_kept, ties)
        ties_before = ties.cumsum(0) - ties
        shared.launch(triton_matrices.cut, n_ties_kept, ties_before)


@dataclass(frozen=True)
class _SharedMatrix:
    """A matrix that is divided among programs.

    Attributes:
        matrix: the matrix.
        bounds: with `lasts`, which entries of each row its minimum keeps, see `row_bounds`.
        lasts: see `bounds`. Both hold nothing if there is no minimum.
        threshold: the threshold as far as it is found: the magnitude bits, a single integer.
        has_minimum: whether there is a minimum.
        segment: the number of entries of each program, but the last one.
    """

    matrix: Tensor
    bounds: Tensor
    lasts: Tensor
    threshold: Tensor
    has_minimum: bool
    segment: int

    @property
    def n_segments(self) -> int:
        return triton.cdiv(self.matrix.numel(), self.segment)

    def launch(self, kernel: Any, *arguments: Any, **constants: int) -> None:
        """Run a kernel of `triton_matrices`: the arguments beside those that all of them take."""
        kernel[(self.n_segments,)](
            bits(self.matrix),
            self.bounds,
            self.lasts,
            self.threshold,
            self.matrix.numel(),
            self.segment,
            self.matrix.shape[1],
            *arguments,
            **_of_magnitudes(self.matrix),
            **constants,
            HAS_MINIMUM=self.has_minimum,
            BLOCK=BLOCK,
        )


def _divided(matrix: Tensor, minimum: int) -> _SharedMatrix:
    """The matrix, divided among programs, with what the minimum of each row keeps."""
    n_rows, n_columns = matrix.shape
    n_blocks = triton.cdiv(matrix.numel(), BLOCK)
    key = FLOAT_BITS[matrix.dtype].key
    bounds = matrix.new_empty(n_rows, dtype=key)
    lasts = matrix.new_empty(n_rows, dtype=torch.int32)
    if minimum > 0:
        triton_rows.row_bounds[(n_rows,)](
            bits(matrix), bounds, lasts, minimum, n_columns, **_of_rows(matrix)
        )
    return _SharedMatrix(
        matrix,
        bounds,
        lasts,
        threshold=matrix.new_zeros((), dtype=key),
        has_minimum=minimum > 0,
        segment=triton.cdiv(n_blocks, PROGRAMS) * BLOCK,
    )


def _find_threshold(shared: _SharedMatrix, k: Tensor) -> tuple[Tensor, Tensor]:
    """Find the `k`-th largest of the entries that no minimum keeps, and write it into `shared`.

    Returns:
        How many entries are at the threshold, and how many of these are kept.
    """
    n_ties = n_ties_kept = k
    above = FLOAT_BITS[shared.matrix.dtype].n_bits
    while above > 0:
        shift = max(0, above - DIGIT_BITS)
        counts = shared.matrix.new_zeros(1 << DIGIT_BITS, dtype=torch.int32)
        shared.launch(triton_matrices.count_digits, counts, shift, above, DIGITS=1 << DIGIT_BITS)
        possible = counts[: 1 << (above - shift)]
        digit, n_ties, n_ties_kept = _next_digit(possible, n_ties_kept)
        shared.threshold.add_(digit << shift)
        above = shift
    return n_ties, n_ties_kept


def _next_digit(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The digit of the `k`-th largest of the entries that were counted.

    Returns:
        The digit, how many entries have it, and how many of these are among the `k` largest.
    """
    at_least = counts.flip(0).cumsum(0)  # from the largest digit down
    is_too_few = at_least < k
    place = is_too_few.sum()
    n_larger = (at_least * is_too_few).max()
    n_equal = counts.flip(0)[place]
    return len(counts) - 1 - place, n_equal, k - n_larger


_TRITON_DTYPES = {torch.int32: tl.int32, torch.int64: tl.int64}


def _of_magnitudes(x: Tensor) -> dict[str, Any]:
    """What kernels need to know of the dtype."""
    of_dtype = FLOAT_BITS[x.dtype]
    return {
        "KEY": _TRITON_DTYPES[of_dtype.key],
        "UNSIGNED": of_dtype.unsigned,
        "INFINITY": of_dtype.infinity,
    }


def _of_rows(x: Tensor) -> dict[str, Any]:
    """What the kernels need that hold a row in registers: up to 16 entries in each thread."""
    block = max(16, triton.next_power_of_2(x.shape[-1]))
    n_warps = min(32, max(1, block // 512))
    return {**_of_magnitudes(x), "BLOCK": block, "num_warps": n_warps}
