"""Products with the network's weight matrices: dense, or by their nonzero entries alone where that is faster."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.kernels import bits, kernel, n_threads, shared_out

Kernels = Literal["auto", "dense", "sparse"]
#: Tokens that the compiled product takes at a time.
TILE = 32


class Compressed(NamedTuple):
    """The nonzero entries of a matrix, row by row: those of row r are [starts[r], starts[r + 1])."""

    starts: Int[Tensor, "row_1"]
    indices: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]


class Product(nn.Module):
    """x · W + bias for a matrix W of the network.

    On a CPU with numba its nonzero entries are taken out once, and again after any change of the weights, which is
    noticed by a checksum. `kernels` = "auto" uses them alone where the measured times of both ways say so; gradients
    are those of the dense product. Products of fewer than 32 tokens are dense.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Kernels = "auto"
        self._checksums: object = None
        self._n_nonzero = 0
        self._entries: tuple[Compressed, Compressed] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checksums": None, "_entries": None}

    def forward(
        self, x: Float[Tensor, "*batch d_in"], weights: Sequence[Tensor], matrix: Callable[[], Tensor], bias: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        """`matrix()` makes [d_in, d_out] of `weights`."""
        entries = self._compressed(x, weights, matrix)
        if entries is None:
            return F.linear(x, matrix().T, bias)
        learned = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        out = _SparseProduct.apply(x.flatten(0, -2), matrix() if learned else None, bias, *entries)
        return out.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def _compressed(
        self, x: Tensor, weights: Sequence[Tensor], matrix: Callable[[], Tensor]
    ) -> tuple[Compressed, Compressed] | None:
        """Wᵀ and W compressed; None if the product is better done densely, or has to be."""
        if self.kernels == "dense" or x.numel() < TILE * x.shape[-1] or torch.compiler.is_compiling():
            return None
        if kernel("multiply", x) is None or torch.is_autocast_enabled("cpu") or weights[0].dtype != x.dtype:
            return None
        parts = [weight.detach().contiguous() for weight in weights]
        checksums = parts[0].dtype, *(kernel("checksum", part)(bits(part).view(-1)) for part in parts)
        if checksums != self._checksums:
            self._checksums, self._entries = checksums, None
            self._n_nonzero = sum(int(part.count_nonzero()) for part in parts)
        d_in, n_weights = x.shape[-1], sum(part.numel() for part in parts)
        if self.kernels == "auto" and not _pays(x.numel() // d_in, d_in, n_weights // d_in, self._n_nonzero):
            return None
        if self._entries is None:
            self._entries = _compress(matrix().detach().contiguous())
        return self._entries


def _pays(n_tokens: int, d_in: int, d_out: int, n_nonzero: int) -> bool:
    """Whether a product takes less time by the nonzero entries alone.

    Measured with AVX-512, in units of a dense multiplication on one thread: an entry takes 5, a number of the input 15,
    of the output 60, and everything around it 6 million.
    """
    entries = (5 * n_nonzero + 15 * d_in + 60 * d_out) / n_threads(n_tokens * (d_in + d_out))
    return n_tokens * (d_in * d_out / torch.get_num_threads() - entries) > 6e6


def _compress(matrix: Float[Tensor, "d_in d_out"]) -> tuple[Compressed, Compressed]:
    """Its transpose, and itself."""
    n_nonzero = int(matrix.count_nonzero())
    by_input, by_output = (
        Compressed(
            torch.zeros(rows + 1, dtype=torch.int64),
            torch.empty(n_nonzero, dtype=torch.int32),
            matrix.new_empty(n_nonzero),
        )
        for rows in matrix.shape
    )
    kernel("compress", matrix)(matrix, *by_input)
    kernel("transpose", matrix)(*by_input, *by_output)
    return by_output, by_input


class _SparseProduct(torch.autograd.Function):
    """x · W + bias; `by_output` are the rows of Wᵀ, `by_input` those of W, `matrix` is W where it has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor | None, bias: Tensor | None, by_output: Compressed, by_input: Compressed
    ) -> Tensor:
        rows = x.detach().contiguous()
        out = rows.new_empty(len(rows), len(by_output.starts) - 1)
        offsets = rows.new_empty(0) if bias is None else bias.detach().contiguous()
        tiles = (len(rows) + TILE - 1) // TILE
        shared_out(kernel("multiply", rows), tiles, rows.numel() + out.numel(), rows, *by_output, offsets, out)
        ctx.save_for_backward(x if matrix is not None else None, matrix)
        ctx.entries = by_output, by_input
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        by_output, by_input = ctx.entries
        needs_x, needs_matrix, needs_bias = ctx.needs_input_grad[:3]
        back = None if matrix is None else matrix.T
        of_x = _SparseProduct.apply(grad, back, None, by_input, by_output) if needs_x else None
        of_matrix = x.T @ grad if needs_matrix else None
        return of_x, of_matrix, grad.sum(0) if needs_bias else None, None, None
