"""The nonzero entries of weights, trained in place of the whole weights.

While the zeros of a weight stay zeros, a vector with its nonzero entries takes its place in
training: the vector has the gradient, and the optimizer's moments. Positions and values are kept
apart, so that a step changes values only, in place.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.hooks import MatrixLayout
from tl_sparse.kernels import kernel, shared_out
from tl_sparse.network.compressed import Compressed, StackedEntries


class Nonzeros:
    """The nonzero entries of a weight, as a vector that is trained in its place.

    Args:
        weight: the weight, of any shape.
        positions: the indices of the entries in the flattened weight, in increasing order. None
            means those of its nonzero entries.

    Attributes:
        values: the entries, a parameter without a place in any module.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, positions: Int[Tensor, " entry"] | None = None) -> None:
        if positions is None:
            positions = weight.flatten().nonzero().flatten()
        self.weight = weight
        self.positions = positions
        self.values = nn.Parameter(self.entries(weight))

    def entries(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, " entry"]:
        """The entries of a tensor of the weight's shape in these positions."""
        return tensor.detach().take(self.positions)

    def spread(self, entries: Float[Tensor, " entry"]) -> Float[Tensor, "..."]:
        """The tensor of the weight's shape that has these entries, and zeros elsewhere."""
        return torch.zeros_like(self.weight, requires_grad=False).put_(self.positions, entries)

    @torch.no_grad()
    def write(self) -> None:
        """Write the values into the weight, which must be zero elsewhere."""
        self.weight.put_(self.positions, self.values)

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Add the entries of the weight's gradient, if it has one, to that of the values.

        The weight has a gradient if it was used whole, for example by an embedding.
        """
        if self.weight.grad is None:
            return
        gradient = self.entries(self.weight.grad)
        self.weight.grad = None
        if self.values.grad is None:
            self.values.grad = gradient
        else:
            self.values.grad += gradient


class NonzeroMatrix:
    """The matrix W `[d_in, d_out]` of a product, of which the nonzero entries are trained.

    Args:
        parts: the nonzero entries of the weights that W stacks along its rows.
        layout: the layout of each weight as a matrix.

    Attributes:
        by_input: W, row by row.
        by_output: Wᵀ, row by row.
    """

    def __init__(self, parts: Sequence[Nonzeros], layout: MatrixLayout) -> None:
        self.parts = parts
        shapes = [part.weight.shape for part in parts]
        entries = StackedEntries.of([part.positions for part in parts], shapes, layout)
        inputs, outputs = entries.rows, entries.columns
        d_in, d_out = entries.n_rows, entries.n_columns
        # Compressed first with the index of each entry as its value, which shows their order.
        index = torch.arange(len(inputs))
        by_input = Compressed.of_entries(inputs, outputs, index, d_in, d_out)
        by_output = Compressed.of_entries(outputs, inputs, index, d_out, d_in)
        self._input_order: Int[Tensor, " entry"] = by_input.values
        self._output_order: Int[Tensor, " entry"] = by_output.values
        values = self._values()
        self.by_input = replace(by_input, values=values[self._input_order])
        self.by_output = replace(by_output, values=values[self._output_order])

    def _values(self) -> Float[Tensor, " entry"]:
        """The values of all parts, one after the other."""
        return torch.cat([part.values.detach() for part in self.parts])

    def update(self) -> None:
        """Take over the values of the parts, after a step."""
        values = self._values()
        torch.index_select(values, 0, self._input_order, out=self.by_input.values)
        torch.index_select(values, 0, self._output_order, out=self.by_output.values)

    @property
    def dtype(self) -> torch.dtype:
        return self.by_input.values.dtype

    def times(
        self,
        x: Float[Tensor, "*batch d_in"],
        bias: Float[Tensor, " d_out"],
        dense: Float[Tensor, "d_in d_out"] | None,
    ) -> Float[Tensor, "*batch d_out"]:
        """The product x · W + bias, in which the values of the parts have gradients.

        Args:
            x: the inputs.
            bias: the bias.
            dense: W as a dense matrix, if multiplying by it is faster; else None.
        """
        values = [part.values for part in self.parts]
        product: Tensor = _NonzeroProduct.apply(x, bias, dense, self, *values)
        return product

    def gradients(
        self, x: Float[Tensor, "*batch d_in"], grad: Float[Tensor, "*batch d_out"]
    ) -> list[Float[Tensor, " entry"]]:
        """The gradients of the values of each part, given that of the product with `x`."""
        x = x.detach().flatten(0, -2).contiguous()
        grad = grad.detach().flatten(0, -2).contiguous()
        sums = shared_out(
            kernel("sampled_product", x),
            len(x),
            x.numel() + grad.numel(),
            x,
            grad,
            self.by_input.starts,
            self.by_input.columns,
        )
        total = torch.from_numpy(sum(sums[1:], start=sums[0]))
        in_order = torch.empty_like(total)
        in_order[self._input_order] = total
        return list(in_order.split([len(part.values) for part in self.parts]))


class _NonzeroProduct(torch.autograd.Function):
    """`NonzeroMatrix.times`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        dense: Tensor | None,
        matrix: NonzeroMatrix,
        *values: Tensor,
    ) -> Float[Tensor, "*batch d_out"]:
        ctx.save_for_backward(x, dense)
        ctx.matrix = matrix
        if dense is None:
            return matrix.by_output.times(x, bias)
        # Not a view, because autograd forbids changing such an output of ours in place.
        out = x.new_empty(*x.shape[:-1], dense.shape[1])
        torch.addmm(bias, x.flatten(0, -2), dense, out=out.flatten(0, -2))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dense = ctx.saved_tensors
        matrix: NonzeroMatrix = ctx.matrix
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        grad_x = grad_bias = None
        if needs_x and dense is None:
            grad_x = matrix.by_input.times(grad, None)
        elif needs_x:
            grad_x = grad @ dense.T
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None, None, *matrix.gradients(x, grad)
