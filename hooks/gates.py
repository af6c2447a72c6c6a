"""Learned gates: one parameter per node decides whether the node is kept or held at its mean.

Gao et al. 2025, section 2.2 and A.5.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.hooks.points import NodeValues, TLModel, hooked


class _Gated(torch.autograd.Function):
    """Forward: x where the gate is open, else the value. Backward to τ: as if it were sigmoid(τ /
    T) (A.5).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tau: Tensor, value: Tensor, temperature: float, inverted: bool
    ) -> Tensor:
        is_open = (tau > 0) != inverted
        ctx.save_for_backward(x, tau, value, is_open)
        ctx.temperature, ctx.sign = temperature, -1.0 if inverted else 1.0
        share = is_open.to(
            x.dtype
        )  # 0 or 1: exact, and on a CPU several times faster than torch.where
        return torch.addcmul(value * (1 - share), x, share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tau, value, is_open = ctx.saved_tensors
        open_share = torch.sigmoid(tau / ctx.temperature)
        if value.shape == tau.shape:
            # Σ grad · (x − mean) over batch and position, without a tensor of the activation's size
            # for x − mean.
            towards_open = (grad * x).sum((0, 1)) - grad.sum((0, 1)) * value
        else:
            towards_open = (grad * (x - value)).sum((0, 1))
        grad_tau = ctx.sign * towards_open * open_share * (1 - open_share) / ctx.temperature
        grad_x = grad * is_open.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_tau, None, None, None


class NodeGates(nn.Module):
    """Gates at hook points of a TransformerLens model: every entry of `means` (hook name → mean) is
    a gated node.

    τ starts at init_bias + init_scale · N(0, 1), clamped to [-1, 1]; `temperature` is T of the
    backward pass.

    Attributes:
        tau: one number a gate; a gate is open above 0.
        index: hook name → which gate each node there has. Nodes at the hook points of a pair in
            `tied` share theirs.
    """

    def __init__(
        self,
        means: NodeValues,
        *,
        init_bias: float,
        init_scale: float,
        temperature: float = 1.0,
        seed: int,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.means = {name: mean.clone() for name, mean in means.items()}
        self.temperature, n_gates = temperature, 0
        self.index: dict[str, Tensor] = {}
        for name, mean in means.items():
            if first := (tied or {}).get(name):
                self.index[name] = self.index[first]
            else:
                self.index[name] = n_gates + torch.arange(mean.numel(), device=mean.device).view(
                    mean.shape
                )
                n_gates += mean.numel()
        noise = torch.randn(n_gates, generator=torch.Generator().manual_seed(seed))
        # One flat parameter for all gates: one optimizer state, one ranking.
        self.tau = nn.Parameter((init_bias + init_scale * noise).clamp(-1, 1).to(mean))

    def at_nodes(self, flat: Tensor) -> dict[str, Tensor]:
        """A value of each gate, as of the nodes: hook name → `[*node]`."""
        return {name: flat[index] for name, index in self.index.items()}

    def kept(self) -> dict[str, Bool[Tensor, " *node"]]:
        """Hook name → which gates are open."""
        return self.at_nodes(self.tau.detach() > 0)

    def expected_size(self) -> Float[Tensor, ""]:
        """The number of open gates, differentiable through the same surrogate as the gates."""
        soft = torch.sigmoid(self.tau / self.temperature)
        return (self.tau > 0).sum() + (soft - soft.detach()).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep τ in [-1, 1]; called after every optimizer step (A.5)."""
        self.tau.clamp_(-1, 1)

    @contextmanager
    def attached(
        self, model: TLModel, inverted: bool = False, values: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Within the context, the gates act on everything `model` runs.

        Inverted, they hold the open nodes at their means and keep the others: the model without the
            circuit instead
        of the circuit alone. `values` are held in place of the means, such as the activations of
        another run. `HookNameError` for a hook name that the model does not have.
        """
        values = self.means if values is None else values
        with hooked(
            model, {name: partial(self._gate, name, inverted, values[name]) for name in self.index}
        ):
            yield

    def _gate(
        self, name: str, inverted: bool, value: Tensor, activation: Tensor, hook: object
    ) -> Tensor:
        gated: Tensor = _Gated.apply(
            activation, self.tau[self.index[name]], value, self.temperature, inverted
        )
        return gated
