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

from tl_sparse.arguments import checked
from tl_sparse.errors import ConfigError, HookNameError
from tl_sparse.hooks.points import NodeValues, TLModel, hooked
from tl_sparse.hooks.shapes import check_activation, check_no_nan, check_values
from tl_sparse.precision import in_float32


class NodeGates(nn.Module):
    """Gates at hook points of a TransformerLens model, one for every entry of `means`.

    A gate is open if its parameter τ is above 0; the node is then kept, with its activation as it
    is. If the gate is closed, the node is held at its mean. Activations are `[batch, pos, *node]`.

    Attributes:
        means: hook name → the mean activation of each node, at least in float32.
        temperature: the temperature T of the surrogate gradient; see `_Gate`.
        tau: the parameters τ of all gates, as one vector, at least in float32: in half precision,
            most steps of an optimizer would be rounded away.
        index: hook name → the index in `tau` of each node's gate, `[*node]`.
    """

    @checked()
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
        """Make the gates.

        Args:
            means: hook name → the mean activation of each node at that hook point.
            init_bias, init_scale: τ starts at init_bias + init_scale · N(0, 1), clamped to [-1, 1].
            temperature: the temperature T of the surrogate gradient; see `_Gate`.
            seed: the seed of the noise in the initial τ.
            tied: hook name → a hook name earlier in `means`, with as many nodes, whose gates it
                shares: a query channel and its key channel, for example.
        """
        super().__init__()
        if not means:
            raise ConfigError("gates need the means of at least one hook point")
        for name, mean in means.items():
            check_no_nan(name, mean)
        self.means = {name: in_float32(mean).clone() for name, mean in means.items()}
        self.temperature = temperature
        self.index: dict[str, Tensor] = {}
        tied = tied or {}
        n_gates = 0
        for name, mean in means.items():
            if name in tied:
                self.index[name] = self.index[tied[name]]
                continue
            gates = n_gates + torch.arange(mean.numel(), device=mean.device)
            self.index[name] = gates.view(mean.shape)
            n_gates += mean.numel()
        noise = torch.randn(n_gates, generator=torch.Generator().manual_seed(seed))
        initial_tau = (init_bias + init_scale * noise).clamp(-1, 1)
        # One vector for all hook points, so that there is one optimizer state and one ranking of
        # all nodes.
        self.tau = nn.Parameter(initial_tau.to(next(iter(self.means.values()))))

    @checked()
    @contextmanager
    def attached(
        self, model: TLModel, inverted: bool = False, values: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Within the context, the gates act on every run of `model`.

        Args:
            model: any TransformerLens model.
            inverted: hold the nodes whose gates are open and keep the others, which runs the model
                without the circuit instead of the circuit alone.
            values: hook name → the values that nodes are held at instead of their means: `[*node]`,
                or `[batch, pos, *node]`, such as their activations on other prompts.

        Raises:
            HookNameError: for a hook name that the model does not have, or that `values` lacks.
            ArgumentError: if the means or values do not have the shape of the nodes there. At hook
                points whose shape only a run shows, this is raised in the run.
        """
        held_at = self.means if values is None else values
        if missing := self.index.keys() - held_at.keys():
            raise HookNameError(f"no values for the gates at {', '.join(sorted(missing))}")
        functions = {}
        for name, index in self.index.items():
            check_values(model, name, self.means[name], index.shape)
            check_values(model, name, held_at[name], index.shape)
            functions[name] = partial(self._gate, name, inverted, held_at[name])
        alike = all(held_at[name].shape == index.shape for name, index in self.index.items())
        with hooked(model, functions, positions_alike=alike):
            yield

    def _gate(
        self, name: str, inverted: bool, value: Tensor, activation: Tensor, hook: object
    ) -> Tensor:
        check_activation(name, activation, value, self.index[name].shape)
        tau = self.tau[self.index[name]]
        gated: Tensor = _Gate.apply(activation, tau, value, self.temperature, inverted)
        return gated

    def at_nodes(self, of_gates: Tensor) -> dict[str, Tensor]:
        """Map one value per gate to the nodes of the gates: hook name → `[*node]`."""
        return {name: of_gates[index] for name, index in self.index.items()}

    def kept(self) -> dict[str, Bool[Tensor, " *node"]]:
        """Hook name → mask of the nodes whose gates are open."""
        return self.at_nodes(self.tau.detach() > 0)

    def expected_size(self) -> Float[Tensor, ""]:
        """The number of open gates, with the same surrogate gradient as the gates themselves.

        Nodes that share a gate count once.
        """
        soft = torch.sigmoid(self.tau / self.temperature)
        return (self.tau > 0).sum() + (soft - soft.detach()).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp τ to [-1, 1]; to be called after every optimizer step (A.5)."""
        self.tau.clamp_(-1, 1)


class _Gate(torch.autograd.Function):
    """The gated activation: x where the gate is open, else the value that the node is held at.

    The step from closed to open has no useful derivative, so the gradient of τ is that of a soft
    gate, sigmoid(τ / T) (A.5): a straight-through estimator.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tau: Tensor, value: Tensor, temperature: float, inverted: bool
    ) -> Tensor:
        is_open = (tau > 0) != inverted
        ctx.save_for_backward(x, tau, value, is_open)
        ctx.temperature = temperature
        ctx.sign = -1.0 if inverted else 1.0
        held_at = value.to(x.dtype)
        if x.device.type == "cpu":
            # Multiplying finite values by 0 or 1 is exact, and on a CPU several times faster than
            # torch.where. An infinite value times 0 is NaN, which shows in the sum.
            gate = is_open.to(x.dtype)
            gated = torch.addcmul(held_at * (1 - gate), x, gate)
            if bool(gated.sum(dtype=torch.float32).isfinite()):
                return gated
        return torch.where(is_open, x, held_at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tau, value, is_open = ctx.saved_tensors
        # The gradient of the gate: Σ grad · (x − value) over batch and position.
        precise = in_float32(grad)
        if value.shape == tau.shape:
            # The same sum, without allocating x − value, which is as large as the activation.
            grad_gate = (precise * x).sum((0, 1)) - precise.sum((0, 1)) * value
        else:
            grad_gate = (precise * (x - value)).sum((0, 1))
        # An infinite activation has no finite effect to learn from.
        grad_gate = grad_gate.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        grad_x = grad * is_open.to(grad.dtype) if ctx.needs_input_grad[0] else None
        soft = torch.sigmoid(tau / ctx.temperature)
        grad_tau = ctx.sign * grad_gate * soft * (1 - soft) / ctx.temperature
        return grad_x, grad_tau, None, None, None
