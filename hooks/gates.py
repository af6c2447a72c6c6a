"""Learned gates: one parameter per node decides whether the node is kept or held at its mean.

Gao et al. 2025, section 2.2 and A.5.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.hooks.points import NodeValues, TLModel, hooked


class _GatedMean(torch.autograd.Function):
    """Forward: x where the gate is open, else the mean. Backward to τ: as if it were sigmoid(τ / T) (A.5)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: Tensor, mean: Tensor, temperature: float, inverted: bool) -> Tensor:
        is_open = (tau > 0) != inverted
        ctx.save_for_backward(x, tau, mean, is_open)
        ctx.temperature, ctx.sign = temperature, -1.0 if inverted else 1.0
        return torch.where(is_open, x, mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tau, mean, is_open = ctx.saved_tensors
        open_share = torch.sigmoid(tau / ctx.temperature)
        # Σ grad · (x − mean) over batch and position, without a tensor of the activation's size for x − mean.
        towards_open = (grad * x).sum((0, 1)) - grad.sum((0, 1)) * mean
        grad_tau = ctx.sign * towards_open * open_share * (1 - open_share) / ctx.temperature
        grad_x = grad * is_open.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_tau, None, None, None


class NodeGates(nn.Module):
    """Gates at hook points of a TransformerLens model: every entry of `means` (hook name → mean) is a gated node.

    τ starts at init_bias + init_scale · N(0, 1), clamped to [-1, 1]; `temperature` is T of the backward pass.
    """

    means: Tensor

    def __init__(
        self, means: NodeValues, *, init_bias: float, init_scale: float, temperature: float = 1.0, seed: int
    ) -> None:
        super().__init__()
        self.shapes = {name: mean.shape for name, mean in means.items()}
        flat = torch.cat([mean.flatten() for mean in means.values()])
        noise = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(seed))
        # One flat parameter for all nodes: one optimizer state, one ranking.
        self.tau = nn.Parameter((init_bias + init_scale * noise).clamp(-1, 1).to(flat))
        self.register_buffer("means", flat.clone())
        self.temperature = temperature

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Values of all nodes in one vector → hook name → `[*node]`."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def kept(self) -> dict[str, Bool[Tensor, " *node"]]:
        """Hook name → which gates are open."""
        return self.split(self.tau.detach() > 0)

    def expected_size(self) -> Float[Tensor, ""]:
        """The number of open gates, differentiable through the same surrogate as the gates."""
        soft = torch.sigmoid(self.tau / self.temperature)
        return (self.tau > 0).sum() + (soft - soft.detach()).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep τ in [-1, 1]; called after every optimizer step (A.5)."""
        self.tau.clamp_(-1, 1)

    @contextmanager
    def attached(self, model: TLModel, inverted: bool = False) -> Iterator[None]:
        """Within the context, the gates act on everything `model` runs.

        Inverted, they hold the open nodes at their means and keep the others: the model without the circuit instead
        of the circuit alone. `HookNameError` for a hook name that the model does not have.
        """
        with hooked(model, {name: partial(self._gate, name, inverted) for name in self.shapes}):
            yield

    def _gate(self, name: str, inverted: bool, activation: Tensor, hook: object) -> Tensor:
        # Split at each call, for the gradient of each forward pass to reach τ.
        tau, mean = self.split(self.tau)[name], self.split(self.means)[name]
        gated: Tensor = _GatedMean.apply(activation, tau, mean, self.temperature, inverted)
        return gated
