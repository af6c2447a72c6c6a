"""The paths of a circuit of channels between components.

The edges of a channel circuit are weights within a layer. Between layers, whatever is written to a
residual channel is there for every later layer that reads this channel. So a path from component to
component leads from a value channel or a neuron through a residual channel to a query, key or value
channel or a neuron. Norms are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits.component_layout import ComponentLayout
from tl_sparse.circuits.nodes import EMBED_HOOK, weight_matrices
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.hooks import NodeValues, TLModel

#: Location of the channels that a head computes from its reads → the letter of their input.
LETTERS = {"attn_q": "q", "attn_k": "k", "attn_v": "v"}


@dataclass(frozen=True)
class ComponentPaths:
    """What leads from components into the residual channels, and from there into components.

    Attributes:
        written: for each source and residual channel, how strongly the one writes to the other.
        read: for each residual channel and target, how strongly the other reads the one.
        nodes: for each source, the largest value of one of its own channels.
    """

    written: Float[Tensor, "source d_model"]
    read: Float[Tensor, "d_model target"]
    nodes: Float[Tensor, " source"]


@dataclass(frozen=True)
class Openings:
    """The value of each node of a circuit: 1 if it is kept and else 0, or its rank.

    Attributes:
        circuit: the circuit. Nodes at locations that it does not have are always kept.
        values: hook point → the values of its nodes.
    """

    circuit: CircuitParts
    values: NodeValues

    def at(self, layer: int, location: str, size: int) -> Float[Tensor, " node"]:
        """The values of the `size` nodes at a location."""
        hook_name = self.circuit.hooks.get((layer, location))
        if hook_name is None:
            return torch.ones(size)
        return self.values[hook_name].flatten().float().cpu()

    def of_embedding(self, d_model: int) -> Float[Tensor, " d_model"]:
        """The values of the channels of the token embedding."""
        if EMBED_HOOK not in self.values:
            return torch.ones(d_model)
        return self.values[EMBED_HOOK].float().cpu()


def summed_paths(model: TLModel, layout: ComponentLayout, openings: Openings) -> ComponentPaths:
    """The sums of the absolute weights whose ends are kept, without those that have been cut.

    Of the tokens' rows of the embedding and the unembedding, it is the mean.
    """
    embed, unembed = _mean_of_tokens(model)
    written = torch.zeros(layout.n_sources, layout.d_model)
    read = torch.zeros(layout.d_model, layout.n_targets)
    nodes = torch.zeros(layout.n_sources)
    written[0] = embed * openings.of_embedding(layout.d_model)
    nodes[0] = 1.0
    read[:, layout.logits] = unembed
    for join in _joins(model, layout, openings, without_cut=True):
        sums = (join.weights * join.inner).sum(-1) * join.channels[:, None]
        if join.inputs is None:
            written[join.components] += sums.T
        else:
            read[:, join.inputs] += sums
        nodes[join.components] = nodes[join.components].maximum(join.inner.amax(-1))
    return ComponentPaths(written, read, nodes)


def weakest_parts(model: TLModel, layout: ComponentLayout, openings: Openings) -> ComponentPaths:
    """The smaller of the values of the two ends, of the nonzero weight for which it is largest."""
    embed, unembed = _mean_of_tokens(model)
    written = torch.zeros(layout.n_sources, layout.d_model)
    read = torch.zeros(layout.d_model, layout.n_targets)
    nodes = torch.zeros(layout.n_sources)
    written[0] = (embed > 0) * openings.of_embedding(layout.d_model)
    nodes[0] = 1.0
    read[:, layout.logits] = (unembed > 0).float()
    for join in _joins(model, layout, openings, without_cut=False):
        best_inner = ((join.weights > 0) * join.inner).amax(-1)
        weakest = best_inner.minimum(join.channels[:, None])
        if join.inputs is None:
            written[join.components] = written[join.components].maximum(weakest.T)
        else:
            read[:, join.inputs] = read[:, join.inputs].maximum(weakest)
        nodes[join.components] = nodes[join.components].maximum(join.inner.amax(-1))
    return ComponentPaths(written, read, nodes)


def _mean_of_tokens(model: TLModel) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """The mean absolute weights of the embedding and of the unembedding, over the tokens."""
    embed = model.W_E.detach().abs().float().mean(0)
    unembed = model.W_U.detach().abs().float().mean(1)
    return embed.cpu(), unembed.cpu()


@dataclass(frozen=True)
class _Join:
    """The absolute weights between residual channels and the channels of some components.

    Attributes:
        components: the numbers of the components among the sources.
        inputs: the numbers among the targets of what reads; None if the components write.
        channels: the values of the nodes that read or write the residual channels.
        inner: the values of the components' own channels.
        weights: the absolute weights.
    """

    components: Int[Tensor, " component"]
    inputs: Int[Tensor, " component"] | None
    channels: Float[Tensor, " d_model"]
    inner: Float[Tensor, "component inner"]
    weights: Float[Tensor, "d_model component inner"]


def _joins(
    model: TLModel, layout: ComponentLayout, openings: Openings, without_cut: bool
) -> Iterator[_Join]:
    """All weight matrices of the model; with `without_cut`, weights that have been cut are zero."""
    d_head = model.cfg.d_head
    for layer in range(layout.n_layers):
        n_parts = 0  # of W_O
        for source, target, stored in weight_matrices(model, layer):
            weights = stored.abs().float().cpu()
            at_source = openings.at(layer, source, weights.shape[0])
            at_target = openings.at(layer, target, weights.shape[1])
            if without_cut and openings.circuit.edge_set is not None:
                weights = weights * _is_uncut(openings.circuit, layer, source, target, weights)
            if source == "attn_v":
                by_head = weights.T.unflatten(1, (-1, d_head))
                inner = at_source.unflatten(0, (-1, d_head))
                yield _heads_write(layout, layer, n_parts, at_target, inner, by_head)
                n_parts += 1
            elif source == "mlp_neuron":
                mlp = torch.tensor([layout.mlp(layer)])
                yield _Join(mlp, None, at_target, at_source[None], weights.T[:, None])
            else:
                # The rows after those of the residual channels are positional channels.
                weights, at_source = weights[: layout.d_model], at_source[: layout.d_model]
                if target == "mlp_neuron":
                    mlp = torch.tensor([layout.mlp(layer)])
                    inputs = torch.tensor([layout.mlp_input(layer)])
                    yield _Join(mlp, inputs, at_source, at_target[None], weights[:, None])
                else:
                    by_head = weights.unflatten(1, (-1, d_head))
                    inner = at_target.unflatten(0, (-1, d_head))
                    yield _heads_read(layout, layer, target, at_source, inner, by_head)


def _is_uncut(
    circuit: CircuitParts, layer: int, source: str, target: str, weights: Tensor
) -> Float[Tensor, "source target"]:
    """1 for the edges of a circuit with pruned edges, and 0 for all other weights of a matrix."""
    is_uncut = torch.zeros(weights.shape)
    for first, second in circuit.edge_set or ():
        if (first.layer, first.location, second.location) == (layer, source, target):
            is_uncut[first.index, second.index] = 1.0
    return is_uncut


def _heads_read(
    layout: ComponentLayout,
    layer: int,
    target: str,
    channels: Float[Tensor, " d_model"],
    inner: Float[Tensor, "stored d_head"],
    weights: Float[Tensor, "d_model stored d_head"],
) -> _Join:
    """W_Q, W_K or W_V, of which query heads may share a stored head."""
    heads = torch.arange(layout.n_heads)
    shared_by = layout.n_heads // len(inner)
    return _Join(
        components=layout.heads(layer).start + heads,
        inputs=layout.head_inputs(layer, LETTERS[target]).start + heads,
        channels=channels,
        inner=inner[heads // shared_by],
        weights=weights[:, heads // shared_by],
    )


def _heads_write(
    layout: ComponentLayout,
    layer: int,
    part: int,
    channels: Float[Tensor, " d_model"],
    inner: Float[Tensor, "stored d_head"],
    weights: Float[Tensor, "d_model stored d_head"],
) -> _Join:
    """A part of W_O: that of the first, the second … of the query heads that share a value head."""
    shared_by = layout.n_heads // len(inner)
    heads = torch.arange(len(inner)) * shared_by + part
    return _Join(layout.heads(layer).start + heads, None, channels, inner, weights)
