"""Nodes and edges of a model (Gao et al. 2025, section 2.2).

This defines the locations and names of nodes, and the weight matrices that join them. Nodes are of
one of two kinds: "channels", the entries of activations, or "components", the outputs of whole
heads and MLPs.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import CircuitError, HookNameError
from tl_sparse.hooks import NodeMasks, TLModel


@dataclass(frozen=True)
class NodeLocation:
    """A place in the network at which each entry of the activation is a node.

    At the locations of components, each vector along the last axis is a node.

    Attributes:
        name: the name of the location, as part of the names of its nodes.
        openai_name: the name of the location in OpenAI's files. These have no components, so theirs
            is `name`.
        description: a description of its nodes for users.
        hook_points: the hook points of a block that can carry its activation; the first one that
            the model has is used.
        is_by_head: whether the nodes are channels of heads.
    """

    name: str
    openai_name: str
    description: str
    hook_points: tuple[str, ...]
    is_by_head: bool = False


#: The locations in each block, in the order of the forward pass.
#:
#: The hook points of the reads are, in this order, those of tl_sparse models (after AbsTopK), of a
#: `TransformerBridge` (after the norm), and of a `HookedTransformer` (before the weight of the norm
#: is applied; holding an entry at its mean has the same effect there).
BLOCK_LOCATIONS = (
    NodeLocation(
        name="attn_in",
        openai_name="attn.act_in",
        description="read by attention",
        hook_points=("ln1.hook_read", "attn.hook_in", "ln1.hook_normalized"),
    ),
    NodeLocation("attn_q", "attn.q", "query channels", ("attn.hook_q",), is_by_head=True),
    NodeLocation("attn_k", "attn.k", "key channels", ("attn.hook_k",), is_by_head=True),
    NodeLocation("attn_v", "attn.v", "value channels", ("attn.hook_v",), is_by_head=True),
    NodeLocation("attn_out", "attn.resid_delta", "written by attention", ("hook_attn_out",)),
    NodeLocation(
        name="mlp_in",
        openai_name="mlp.act_in",
        description="read by MLP",
        hook_points=("ln2.hook_read", "mlp.hook_in", "ln2.hook_normalized"),
    ),
    NodeLocation("mlp_neuron", "mlp.post_act", "MLP neurons", ("mlp.hook_post",)),
    NodeLocation("mlp_out", "mlp.resid_delta", "written by MLP", ("hook_mlp_out",)),
)
#: The channels of the token embedding. This location is outside the blocks, its nodes belong to
#: layer 0, and it is used only with `PruneConfig.embed_gates`.
EMBED_LOCATION = NodeLocation("embed_out", "embed", "written by tokens", hook_points=())
EMBED_HOOK = "hook_embed"

#: The locations of components in each block, in the order of the forward pass. A head's output is
#: its z: what it writes to the residual stream is a linear function of that.
COMPONENT_LOCATIONS = (
    NodeLocation("head", "head", "outputs of heads", ("attn.hook_z",)),
    NodeLocation("mlp", "mlp", "outputs of MLPs", ("hook_mlp_out",)),
)
COMPONENT_NAMES = tuple(location.name for location in COMPONENT_LOCATIONS)
#: The hook point of a component → its location.
_COMPONENT_AT = {point: loc for loc in COMPONENT_LOCATIONS for point in loc.hook_points}

#: All node locations by name.
_ALL_LOCATIONS = (*BLOCK_LOCATIONS, EMBED_LOCATION, *COMPONENT_LOCATIONS)
LOCATIONS = {location.name: location for location in _ALL_LOCATIONS}
#: The same by our name and by OpenAI's.
_BY_ANY_NAME = dict(LOCATIONS)
for _location in LOCATIONS.values():
    _BY_ANY_NAME[_location.openai_name] = _location
#: The locations of channels in a block by each of their hook points.
_CHANNELS_AT = {point: loc for loc in BLOCK_LOCATIONS for point in loc.hook_points}


@dataclass(frozen=True)
class WeightMatrix:
    """A weight matrix that joins two node locations of a block.

    Attributes:
        module: the name of the module of the block that contains it.
        weight: the name of its parameter in that module.
        source, target: the names of the locations that it joins.
        bias: the parameter that is added at the target; "" for W_gate, since the bias of the
            neurons belongs to W_in.
        positional_weight: the parameter with the rows for positional channels; "" if no model has
            such rows for this matrix.
        grouped_weight: the parameter in which a `HookedTransformer` with grouped-query attention
            stores each key and value head once, while `weight` repeats it for every query head; ""
            for matrices that query heads never share.
    """

    module: str
    weight: str
    source: str
    target: str
    bias: str = ""
    positional_weight: str = ""
    grouped_weight: str = ""


#: No matrix leads from writes to later reads, because the residual stream joins them directly.
MATRICES = (
    WeightMatrix("attn", "W_Q", "attn_in", "attn_q", "b_Q", "W_Q_pos"),
    WeightMatrix("attn", "W_K", "attn_in", "attn_k", "b_K", "W_K_pos", grouped_weight="_W_K"),
    WeightMatrix("attn", "W_V", "attn_in", "attn_v", "b_V", "W_V_pos", grouped_weight="_W_V"),
    WeightMatrix("attn", "W_O", "attn_v", "attn_out", "b_O"),
    WeightMatrix("mlp", "W_in", "mlp_in", "mlp_neuron", "b_in", "W_in_pos"),
    WeightMatrix("mlp", "W_gate", "mlp_in", "mlp_neuron"),
    WeightMatrix("mlp", "W_out", "mlp_neuron", "mlp_out", "b_out"),
)


@dataclass(frozen=True)
class NodeSizes:
    """The sizes of a model that the names of its nodes depend on; None where they are not known.

    Attributes:
        d_model: the number of residual channels. Reads with a higher index are positional channels.
        d_head: the number of channels of each head.
    """

    d_model: int | None = None
    d_head: int | None = None

    @classmethod
    def of_model(cls, model: TLModel) -> "NodeSizes":
        """The sizes of `model`."""
        return cls(model.cfg.d_model, model.cfg.d_head)

    @classmethod
    def of_masks(cls, masks: NodeMasks) -> "NodeSizes":
        """The sizes that the shapes of a circuit's masks show."""
        d_model = None
        d_head = None
        for hook_name, mask in masks.items():
            _, location = place_at(hook_name, mask)
            if LOCATIONS[location].is_by_head and mask.ndim == 2:
                d_head = mask.shape[1]
            elif location in ("attn_out", "mlp_out"):
                d_model = mask.numel()
        return cls(d_model, d_head)

    def shown_index(self, location: str, index: int) -> str:
        """The index as a node's name shows it: `h3.7` is channel 7 of head 3, and `p2` is
        positional channel 2.
        """
        if LOCATIONS[location].is_by_head and self.d_head is not None:
            head, channel = divmod(index, self.d_head)
            return f"h{head}.{channel}"
        if location.endswith("_in") and self.d_model is not None and index >= self.d_model:
            return f"p{index - self.d_model}"
        return str(index)

    def index_of(self, location: str, shown: str) -> int | None:
        """The inverse of `shown_index`; None if `shown` is no index at this location."""
        if shown.isdecimal():
            return int(shown)
        by_head = re.fullmatch(r"h([0-9]{1,9})\.([0-9]{1,9})", shown)
        if by_head and LOCATIONS[location].is_by_head and self.d_head is not None:
            head, channel = int(by_head[1]), int(by_head[2])
            return head * self.d_head + channel if channel < self.d_head else None
        positional = re.fullmatch(r"p([0-9]{1,9})", shown)
        if positional and location.endswith("_in") and self.d_model is not None:
            return self.d_model + int(positional[1])
        return None


NO_SIZES = NodeSizes()
_NODE_NAME = re.compile(
    r"([0-9]{1,9})\.([a-z_.]+)[. ](p?[0-9]{1,9}|h[0-9]{1,9}\.[0-9]{1,9})", re.ASCII
)
_MLP_NAME = re.compile(r"([0-9]{1,9})\.mlp", re.ASCII)


@dataclass(frozen=True, order=True, repr=False)
class Node:
    """One node: an entry of the activation at a location of a layer, or a whole component.

    Its name, `str(node)`, is for example `0.mlp_in 62`, `0.attn_v h3.7` (channel 7 of head 3) or
    `0.attn_in p2` (positional channel 2). Those of components are `0.head 3` and `1.mlp`.

    Attributes:
        layer: the number of the layer, from 0.
        location: the name of the location, one of `LOCATIONS`.
        index: the position in the flat activation. At attn_q, attn_k and attn_v, it runs over the
            channels of all heads (head = index // d_head), as in OpenAI's files. That of a head is
            its number, and that of an MLP 0.
        shown_index: the index as the name shows it. The nodes of a circuit have it. It plays no
            part in comparisons; without it, the name shows `index`.
    """

    layer: int
    location: str
    index: int
    shown_index: str = field(default="", compare=False)

    def __str__(self) -> str:
        if self.location == "mlp" and self.index == 0:  # a layer has one
            return f"{self.layer}.mlp"
        return f"{self.layer}.{self.location} {self.shown_index or self.index}"

    def __repr__(self) -> str:
        return f"Node({str(self)!r})"

    @property
    def indexed_name(self) -> str:
        """The name in files, such as `0.attn_v.55`: it can be read without the model's sizes."""
        return f"{self.layer}.{self.location}.{self.index}"

    @property
    def openai_name(self) -> str:
        """The name of the node in OpenAI's notation, such as `0.attn.q.5` or `0.mlp.post_act.7`."""
        return f"{self.layer}.{LOCATIONS[self.location].openai_name}.{self.index}"

    @property
    def is_read(self) -> bool:
        """Whether the node is a channel of the residual stream that attention or an MLP reads."""
        return self.location.endswith("_in")

    @property
    def is_write(self) -> bool:
        """Whether the node is what attention, an MLP or the tokens write to a channel."""
        return self.location.endswith("_out")

    @property
    def is_component(self) -> bool:
        """Whether the node is the output of a whole head or MLP."""
        return self.location in COMPONENT_NAMES

    @classmethod
    def parse(cls, text: str, sizes: NodeSizes = NO_SIZES) -> "Node":
        """The node with this name: `0.attn_v h3.7`, its name in files, or OpenAI's name.

        Args:
            text: the name.
            sizes: the sizes of the model, which names with a head or a positional channel need.

        Raises:
            CircuitError: if the text is not the name of a node.
        """
        if mlp := _MLP_NAME.fullmatch(text):
            return cls(int(mlp[1]), "mlp", 0)
        match = _NODE_NAME.fullmatch(text)
        if match is None or match[2] not in _BY_ANY_NAME:
            raise CircuitError(
                f"{text!r} is not a node; nodes are written like '0.mlp_neuron 7', "
                f"'0.attn_v h3.7' or '0.head 3', and the locations are {', '.join(_BY_ANY_NAME)}"
            )
        location = _BY_ANY_NAME[match[2]].name
        index = sizes.index_of(location, match[3])
        if index is None:
            raise CircuitError(
                f"{text!r} is not a node: {match[3]!r} cannot be read there; heads (h3.7) are "
                "those of attn_q, attn_k and attn_v, positional channels (p2) those of attn_in and "
                "mlp_in, and both need the sizes of the model, as `circuit.node` has them"
            )
        return cls(int(match[1]), location, index, sizes.shown_index(location, index))


@dataclass(frozen=True, order=True)
class Edge:
    """A nonzero weight that joins two nodes.

    An edge between components is a path from the output of one to a later one that reads it from
    the residual stream; see `component_edges`.

    Attributes:
        source: the node that the edge leaves.
        target: the node that it enters.
        weight: the nonzero weight; between components, the norm of the product of the two
            matrices.
    """

    source: Node
    target: Node
    weight: float

    def __str__(self) -> str:
        return f"{self.source} → {self.target}  {self.weight:+.3f}"

    @property
    def ends(self) -> tuple[Node, Node]:
        """The source and target nodes, without the weight."""
        return self.source, self.target


@checked()
def joined_nodes(edges: Iterable[Edge]) -> set[Node]:
    """All source and target nodes of the edges."""
    nodes = set()
    for edge in edges:
        nodes.add(edge.source)
        nodes.add(edge.target)
    return nodes


def place_at(hook_name: str, mask: Bool[Tensor, " *node"]) -> tuple[int, str]:
    """The layer and the location of the nodes of a mask at a hook point.

    Raises:
        HookNameError: if the hook point does not belong to a node location.
    """
    if is_of_components(hook_name, mask):
        _, layer, point = hook_name.split(".", 2)
        return int(layer), _COMPONENT_AT[point].name
    node = node_at(hook_name, 0)
    return node.layer, node.location


def node_at(hook_name: str, index: int, sizes: NodeSizes = NO_SIZES) -> Node:
    """The channel with this index at a hook point; its name depends on `sizes`.

    Raises:
        HookNameError: if the hook point does not belong to a node location.
    """
    if hook_name == EMBED_HOOK:
        return Node(0, EMBED_LOCATION.name, index)
    _, layer, point = hook_name.split(".", 2)
    if point not in _CHANNELS_AT:
        raise HookNameError(
            f"{hook_name!r} is not a node location; the node locations of each block are "
            f"{', '.join(_CHANNELS_AT)}"
        )
    location = _CHANNELS_AT[point].name
    return Node(int(layer), location, index, sizes.shown_index(location, index))


def is_of_components(hook_name: str, mask: Bool[Tensor, " *node"]) -> bool:
    """Whether the nodes of a mask are outputs of components: vectors at one of their hook points.

    The channels that an MLP writes are nodes of the same hook point as its output; a mask of the
    output has one entry.
    """
    if hook_name.endswith(".attn.hook_z"):
        return True
    return hook_name.endswith(".hook_mlp_out") and mask.numel() == 1


def kept_nodes(masks: NodeMasks) -> list[Node]:
    """The nodes at which the masks are true, in the order of the masks."""
    sizes = NodeSizes.of_masks(masks)
    nodes = []
    for hook_name, mask in masks.items():
        layer, location = place_at(hook_name, mask)
        for index in mask.flatten().nonzero()[:, 0].tolist():
            nodes.append(Node(layer, location, index, sizes.shown_index(location, index)))
    return nodes


def indices_by_location(nodes: Iterable[Node]) -> dict[tuple[int, str], list[int]]:
    """(layer, location) → the indices of the nodes there, in the order of `nodes`."""
    indices = defaultdict[tuple[int, str], list[int]](list)
    for node in nodes:
        indices[node.layer, node.location].append(node.index)
    return dict(indices)


@checked()
def weight_matrices(
    model: TLModel, layer: int
) -> Iterator[tuple[str, str, Float[Tensor, "source target"]]]:
    """The source, target and weights of each matrix that joins two locations of a layer.

    They are in the order of the forward pass. Several matrices can join the same two locations:
    W_in and W_gate of a gated MLP, or the parts of W_O whose query heads share a value head.
    """
    for matrix in MATRICES:
        module: Any = getattr(model.blocks[layer], matrix.module, None)
        weights = _stored_weights(module, matrix)
        if weights is None:
            continue
        if matrix.source == "attn_v":
            n_value_heads = len(getattr(module, "_W_V", module.W_V))
            pattern = "(value_head shared) s t -> shared (value_head s) t"
            for weights_of_part in rearrange(weights, pattern, value_head=n_value_heads):
                yield matrix.source, matrix.target, weights_of_part
        elif weights.ndim == 3:
            yield matrix.source, matrix.target, rearrange(weights, "h s t -> s (h t)")
        else:
            yield matrix.source, matrix.target, weights


def location_sizes(model: TLModel) -> dict[tuple[int, str], int]:
    """(layer, location) → the number of channels there."""
    sizes = {}
    for layer in range(model.cfg.n_layers):
        for source, target, weights in weight_matrices(model, layer):
            sizes[layer, source], sizes[layer, target] = weights.shape
    return sizes


def _stored_weights(module: Any, matrix: WeightMatrix) -> Tensor | None:
    """The weights in the shape in which the model stores them; None if it does not have the matrix.

    Rows for positional channels follow the other rows.
    """
    name = matrix.weight
    if matrix.grouped_weight and hasattr(module, matrix.grouped_weight):
        name = matrix.grouped_weight
    weights = getattr(module, name, None)
    if weights is None:
        return None
    if matrix.positional_weight:
        positional_rows = getattr(module, matrix.positional_weight, None)
        if positional_rows is not None:
            weights = torch.cat([weights, positional_rows], dim=-2)
    return weights.detach()


@checked()
def n_weights(model: TLModel) -> tuple[int, int]:
    """The number of nonzero weights between node locations, and the number of all of them."""
    n_nonzero = 0
    n_total = 0
    for layer in range(model.cfg.n_layers):
        for _, _, weights in weight_matrices(model, layer):
            n_nonzero += int(weights.count_nonzero())
            n_total += weights.numel()
    return n_nonzero, n_total
