"""Products with the network's weight matrices: dense, or by their nonzero entries alone where that is faster."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.kernels import bits, kernel, shared_out

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
        self._known: tuple[object, tuple[Compressed, Compressed] | None] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": (None, None)}

    def forward(
        self, x: Float[Tensor, "*batch d_in"], weights: Sequence[Tensor], matrix: Callable[[], Tensor], bias: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        """`matrix()` makes [d_in, d_out] of `weights`."""
        entries = self._entries(x, weights, matrix)
        if entries is None:
            return F.linear(x, matrix().T, bias)
        learned = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        out = _SparseProduct.apply(x.flatten(0, -2), matrix() if learned else None, bias, *entries)
        return out.unflatten(0, x.shape[:-1])

    def _entries(
        self, x: Tensor, weights: Sequence[Tensor], matrix: Callable[[], Tensor]
    ) -> tuple[Compressed, Compressed] | None:
        """W and its transpose compressed; None if the product is better done densely, or has to be."""
        if self.kernels == "dense" or x.numel() < TILE * x.shape[-1] or torch.compiler.is_compiling():
            return None
        if kernel("multiply", x) is None or torch.is_autocast_enabled("cpu") or weights[0].dtype != x.dtype:
            return None
        detached = [weight.detach().contiguous() for weight in weights]
        key = self.kernels, *(kernel("checksum", w)(bits(w).view(-1)) for w in detached), detached[0].dtype
        if key != self._known[0]:
            self._known = key, self._compress(matrix)
        return self._known[1]

    @torch.no_grad()
    def _compress(self, matrix: Callable[[], Tensor]) -> tuple[Compressed, Compressed] | None:
        found = matrix().detach()
        d_in, d_out, n = *found.shape, int(found.count_nonzero())
        # The time of a dense product is that of d_in · d_out multiplications. Measured on AVX-512: one by one they take
        # five times as long, and moving a number in or out as long as 20.
        if self.kernels == "auto" and 5 * n + 20 * (d_in + d_out) > d_in * d_out:
            return None
        by_input, by_output = (
            Compressed(
                torch.zeros(rows + 1, dtype=torch.int64), torch.empty(n, dtype=torch.int32), found.new_empty(n)
            )
            for rows in (d_in, d_out)
        )
        kernel("compress", found)(found.contiguous(), *by_input)
        kernel("transpose", found)(*by_input, *by_output)
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
        shared_out(kernel("multiply", rows), tiles, rows, *by_output, offsets, out)
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
