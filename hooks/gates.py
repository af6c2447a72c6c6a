"""Learned gates: one parameter per node decides whether the node is kept or held at its mean.

Gao et al. 2025, section 2.2 and A.5.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.arguments import checked
from tl_sparse.config import check
from tl_sparse.errors import ArgumentError, ConfigError, HookNameError
from tl_sparse.hooks.points import NodeMasks, NodeValues, TLModel, hooked
from tl_sparse.hooks.shapes import check_activation, check_no_nan, check_values
from tl_sparse.precision import in_float32


class NodeGates(nn.Module):
    """Gates at hook points of a TransformerLens model, one for every node.

    The nodes are the entries of `means` or, where that is asked for, the vectors along its last
    axis. A gate is open if its parameter τ is above 0; the node is then kept, with its activation
    as it is. If the gate is closed, the node is held at its mean. Activations are
    `[batch, pos, *node]`.

    Attributes:
        means: hook name → the mean activation of each node, at least in float32.
        temperature: the temperature T of the surrogate gradient; see `openings`.
        tau: the parameters τ of all gates, as one vector, at least in float32: in half precision,
            most steps of an optimizer would be rounded away.
        index: hook name → the index in `tau` of each node's gate, `[*node]`. Where the nodes are
            vectors, the last axis has the size 1.
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
        vectors: Collection[str] = (),
    ) -> None:
        """Make the gates.

        Args:
            means: hook name → the mean activation of each node at that hook point.
            init_bias: τ starts at init_bias + init_scale · N(0, 1), clamped to [-1, 1].
            init_scale: the spread of these values.
            temperature: the temperature T of the surrogate gradient; see `openings`.
            seed: the seed of the noise in the initial τ.
            tied: hook name → a hook name earlier in `means`, with as many nodes, whose gates it
                shares: a query channel and its key channel, for example.
            vectors: the hook names at which each vector along the last axis is one node.
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
            like_nodes = mean[..., :1] if name in vectors else mean
            gates = n_gates + torch.arange(like_nodes.numel(), device=mean.device)
            self.index[name] = gates.view(like_nodes.shape)
            n_gates += like_nodes.numel()
        noise = torch.randn(n_gates, generator=torch.Generator().manual_seed(seed))
        initial_tau = (init_bias + init_scale * noise).clamp(-1, 1)
        # One vector for all hook points, so that there is one optimizer state and one ranking of
        # all nodes.
        self.tau = nn.Parameter(initial_tau.to(next(iter(self.means.values()))))

    @checked()
    def openings(self, n_open: int | None = None) -> Float[Tensor, " gate"]:
        """1 for each open gate and 0 for each closed one, with a surrogate gradient.

        The step from closed to open has no useful derivative, so the gradient of τ is that of a
        soft gate, sigmoid(τ / T) (A.5): a straight-through estimator.

        Args:
            n_open: open the gates with the `n_open` highest τ; by default those with τ above 0.

        Raises:
            ConfigError: if there are not that many gates.
        """
        if n_open is None:
            return _open(self.tau, self.temperature)
        n_gates = self.tau.numel()
        check(0 <= n_open <= n_gates, "n_open", n_open, f"at least 0 and at most {n_gates}")
        return _open(self.tau - self._threshold(n_open), self.temperature)

    def _threshold(self, n_open: int) -> float:
        """A value below the `n_open` highest τ, and not below any of the others."""
        highest_first = self.tau.detach().sort(descending=True).values
        if n_open == 0:
            return float(highest_first[0])
        if n_open == len(highest_first):
            return float(highest_first[-1]) - 1
        return float(highest_first[n_open])

    @checked()
    @contextmanager
    def attached(
        self,
        model: TLModel,
        inverted: bool = False,
        values: Mapping[str, Tensor] | None = None,
        openings: Float[Tensor, " gate"] | None = None,
        closed: Collection[str] = (),
    ) -> Iterator[None]:
        """Within the context, the gates act on every run of `model`.

        Args:
            model: any TransformerLens model.
            inverted: hold the nodes whose gates are open and keep the others, which runs the model
                without the circuit instead of the circuit alone.
            values: hook name → the values that nodes are held at instead of their means: `[*node]`,
                or `[batch, pos, *node]`, such as their activations on other prompts.
            openings: 1 for each gate that is open and 0 for each that is closed; by default
                `openings()`. Gradients flow to it.
            closed: hook names at which all nodes are held, whatever the openings say. No gradient
                flows to these, so a model of this package need not compute what is held there.

        Raises:
            HookNameError: for a hook name that the model does not have, that `values` lacks, or
                that is in `closed` but has no gates.
            ArgumentError: if the means or values do not have the shape of the nodes there, or there
                is not an opening for each gate. At hook points whose shape only a run shows, this
                is raised in the run.
        """
        held_at = self.means if values is None else values
        if missing := self.index.keys() - held_at.keys():
            raise HookNameError(f"no values for the gates at {', '.join(sorted(missing))}")
        if unknown := set(closed) - self.index.keys():
            raise HookNameError(f"no gates to close at {', '.join(sorted(unknown))}")
        if openings is not None and openings.shape != self.tau.shape:
            raise ArgumentError(
                f"openings have the shape {list(openings.shape)}; there are {self.tau.numel()} "
                "gates, each of which needs one"
            )
        functions = {}
        for name, index in self.index.items():
            check_values(model, name, self.means[name], index.shape)
            check_values(model, name, held_at[name], index.shape)
            functions[name] = partial(self._gate, name, inverted, openings, held_at[name])
            if name in closed:
                functions[name] = partial(self._hold, name, held_at[name])
        alike = all(held_at[name].ndim == index.ndim for name, index in self.index.items())
        with hooked(model, functions, positions_alike=alike, overwriting=closed):
            yield

    def _hold(self, name: str, value: Tensor, activation: Tensor, hook: object) -> Tensor:
        check_activation(name, activation, value, self.index[name].shape)
        return value.to(activation).expand_as(activation).contiguous()

    def _gate(
        self,
        name: str,
        inverted: bool,
        openings: Tensor | None,
        value: Tensor,
        activation: Tensor,
        hook: object,
    ) -> Tensor:
        index = self.index[name]
        check_activation(name, activation, value, index.shape)
        if openings is None:
            opening = _open(self.tau[index], self.temperature)
        else:
            opening = openings[index]
        if inverted:
            opening = 1 - opening
        gated: Tensor = _Gate.apply(activation, opening, value)
        return gated

    def at_nodes(self, of_gates: Tensor) -> dict[str, Tensor]:
        """Map one value per gate to the nodes of the gates: hook name → `[*node]`."""
        return {name: of_gates[index] for name, index in self.index.items()}

    def of_nodes(self, at_nodes: NodeMasks) -> Bool[Tensor, " gate"]:
        """Which gates are those of the nodes in these masks: the inverse of `at_nodes`."""
        chosen = torch.zeros_like(self.tau, dtype=torch.bool)
        for name, mask in at_nodes.items():
            chosen[self.index[name][mask.to(chosen.device)]] = True
        return chosen

    def kept(self) -> dict[str, Bool[Tensor, " *node"]]:
        """Hook name → mask of the nodes whose gates are open."""
        return self.at_nodes(self.tau.detach() > 0)

    def expected_size(self) -> Float[Tensor, ""]:
        """The number of open gates, with the same surrogate gradient as the gates themselves.

        Nodes that share a gate count once.
        """
        return self.openings().sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp τ to [-1, 1]; to be called after every optimizer step (A.5)."""
        self.tau.clamp_(-1, 1)


def _open(tau: Tensor, temperature: float) -> Tensor:
    """1 where τ is above 0, else 0; its gradient is that of sigmoid(τ / temperature)."""
    soft = torch.sigmoid(tau / temperature)
    return (tau > 0).to(tau.dtype) + (soft - soft.detach())


class _Gate(torch.autograd.Function):
    """The gated activation: x where the opening is 1, else the value that the node is held at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, opening: Tensor, value: Tensor) -> Tensor:
        is_open = opening > 0.5
        ctx.save_for_backward(x, value, is_open)
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
        x, value, is_open = ctx.saved_tensors
        # The gradient of the opening: Σ grad · (x − value) over batch and position.
        precise = in_float32(grad)
        if value.ndim == is_open.ndim:
            # The same sum, without allocating x − value, which is as large as the activation.
            grad_opening = (precise * x).sum((0, 1)) - precise.sum((0, 1)) * value
        else:
            grad_opening = (precise * (x - value)).sum((0, 1))
        if (
            is_open.shape[-1] == 1 < grad_opening.shape[-1]
        ):  # one gate for each vector along the last axis
            grad_opening = grad_opening.sum(-1, keepdim=True)
        # An infinite activation has no finite effect to learn from.
        grad_opening = grad_opening.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        grad_x = grad * is_open.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_opening, None
