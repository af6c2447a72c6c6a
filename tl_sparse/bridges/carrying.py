"""Changes of a sparse model that are carried into the dense one: nodes, or a whole circuit.

The sparse model is run twice on the same tokens, as it is and with the change. What the change does
to its stream at a site is decoded, and added to the dense model's stream there (Gao et al. 2025,
sections 3.3 and A.4).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.bridges.streams import Streams, changing_stream, rms, run_with_streams
from tl_sparse.circuits import LOCATIONS, Circuit, Node, NodeSizes, node_hooks
from tl_sparse.errors import CircuitError, DataError
from tl_sparse.hooks import NodeMasks, TLModel, ablating, recording, tokens_for

if TYPE_CHECKING:
    from tl_sparse.bridges.pair import Bridges


@dataclass(frozen=True, eq=False)
class NodeChange:
    """Nodes of a sparse model that take other values.

    Attributes:
        nodes: hook point → mask of the nodes.
        values: hook point → the values there, `[*node]` for all positions, or
            `[batch, pos, *node]`. Values of other nodes are not used.
    """

    nodes: NodeMasks
    values: Mapping[str, Float[Tensor, "*node"]]

    @classmethod
    def to_means(
        cls, circuit: Circuit, model: TLModel, nodes: Iterable[str | Node] | None = None
    ) -> "NodeChange":
        """Nodes that are held at a circuit's means.

        Args:
            circuit: a circuit with means.
            model: its model.
            nodes: the nodes or their names; None means those of the circuit.

        Raises:
            CircuitError: if there is no such node, or the circuit has no means.
        """
        if not circuit.means:
            raise CircuitError("the circuit has no means at which nodes could be held")
        masks = circuit.kept if nodes is None else masks_of(model, nodes)
        return cls(masks, circuit.means)

    @classmethod
    def from_run(
        cls, model: TLModel, nodes: Iterable[str | Node], tokens: Int[Tensor, "batch pos"]
    ) -> "NodeChange":
        """Nodes that take the values that they have in the model's run on other tokens.

        Args:
            model: the sparse model.
            nodes: the nodes, or their names.
            tokens: the other tokens, of the same shape as those on which the change is made.

        Raises:
            CircuitError: if there is no such node.
            DataError: if the tokens are not those of the model.
        """
        masks = masks_of(model, nodes)
        tokens = tokens_for(model, tokens).to(next(model.parameters()).device)
        with torch.no_grad(), recording(model, masks) as values:
            model(tokens)
        return cls(masks, values)

    def applied(self, model: TLModel) -> AbstractContextManager[None]:
        """The context in which the nodes of `model` have their new values."""
        return ablating(model, self.nodes, self.values)


#: A change of the sparse model: nodes, a circuit under which it runs, or a context of hooks on it.
Change = NodeChange | Circuit | AbstractContextManager[Any]


def masks_of(model: TLModel, nodes: Iterable[str | Node]) -> dict[str, Tensor]:
    """Hook point → mask of the nodes there, from nodes or their names.

    Raises:
        CircuitError: if the model has no such node.
    """
    hooks = node_hooks(model)
    sizes = NodeSizes.of_model(model)
    masks: dict[str, Tensor] = {}
    for given in nodes:
        node = given if isinstance(given, Node) else Node.parse(given, sizes)
        hook = hooks.get((node.layer, node.location))
        size = model.sparse_cfg.location_size(node.location) if hook else 0
        if hook is None or node.index >= size:
            raise CircuitError(f"the sparse model has no node {node}")
        mask = masks.setdefault(hook, torch.zeros(size, dtype=torch.bool))
        mask[node.index] = True
    for (_, location), hook in hooks.items():
        if hook in masks and LOCATIONS[location].is_by_head:
            masks[hook] = masks[hook].view(model.cfg.n_heads, -1)
    return masks


@torch.no_grad()
def change_of_stream(
    bridges: "Bridges", change: Change, tokens: Int[Tensor, "batch pos"], number: int
) -> Float[Tensor, "batch pos d_dense"]:
    """What a change of the sparse model does to its stream at a site, in terms of the dense one."""
    before = run_with_streams(bridges.sparse, tokens).written[number]
    applied = change.applied(bridges.sparse) if hasattr(change, "applied") else change
    with applied:
        after = run_with_streams(bridges.sparse, tokens).written[number]
    return decoded_difference(bridges, number, after - before)


@torch.no_grad()
def change_of_reads(
    bridges: "Bridges", change: NodeChange, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_dense"]:
    """What changes in the stream if nodes that are read from it have their new values there."""
    (name,) = change.nodes
    with recording(bridges.sparse, [name]) as reads:
        streams = run_with_streams(bridges.sparse, tokens)
    return difference_of_reads(bridges, change, reads[name], streams)


def difference_of_reads(
    bridges: "Bridges",
    change: NodeChange,
    reads: Float[Tensor, "batch pos d_read"],
    streams: Streams,
) -> Float[Tensor, "batch pos d_dense"]:
    """The same from what was read, and the streams, in the run without the change.

    Reads are behind a norm, so that their change is multiplied by the root mean square of the
    stream and divided by the weight of the norm. Section A.4 takes the mean of the former over a
    data set; here it is that of each position. Positional channels are not part of the stream.
    """
    (name,) = change.nodes
    number = _first_site(bridges.sparse, name)
    layer, norm_name = name.split(".")[1:3]
    norm = getattr(bridges.sparse.blocks[int(layer)], norm_name)
    differences = (change.values[name] - reads) * change.nodes[name]
    in_stream = differences[..., : bridges.sparse.cfg.d_model]
    weight = torch.where(norm.w == 0, 1.0, norm.w)  # what a weight of 0 lets through is 0
    return decoded_difference(bridges, number, in_stream * rms(streams.read[number]) / weight)


def decoded_difference(
    bridges: "Bridges", number: int, difference: Float[Tensor, "batch pos d_sparse"]
) -> Float[Tensor, "batch pos d_dense"]:
    """A difference of sparse streams as one of dense streams; the bias of the decoder cancels."""
    weight = bridges.maps[number].decoder.weight
    return difference.to(weight) @ weight.T


def are_reads(change: NodeChange) -> bool:
    """Whether a change is one of nodes that attention, or an MLP, reads from the stream."""
    return len(change.nodes) == 1 and next(iter(change.nodes)).endswith("hook_read")


def default_site(sparse: TLModel, change: NodeChange | Circuit) -> int:
    """The number of the first site that sees a change.

    For nodes that are read from the stream, it is the site where they are read.
    """
    if isinstance(change, Circuit):
        return 2 * sparse.cfg.n_layers
    if are_reads(change):
        return _first_site(sparse, next(iter(change.nodes)))
    last = 0
    for (layer, location), hook in node_hooks(sparse).items():
        if hook in change.nodes:
            last = max(last, 2 * layer + (1 if location.startswith("attn") else 2))
    return last


def _first_site(sparse: TLModel, read: str) -> int:
    """The number of the site at which the nodes at a read hook point are read."""
    for (layer, location), hook in node_hooks(sparse).items():
        if hook == read:
            return 2 * layer + (1 if location == "mlp_in" else 0)
    raise CircuitError(f"{read!r} is not a hook point with nodes")


@contextmanager
def adding(
    model: TLModel, number: int, difference: Float[Tensor, "batch pos d_model"]
) -> Iterator[None]:
    """Within the context, `difference` is added to the stream of `model` at a site.

    Raises:
        DataError: in a run on tokens of another shape.
    """

    def add(stream: Tensor) -> Tensor:
        if stream.shape != difference.shape:
            expected, actual = list(difference.shape[:2]), list(stream.shape[:2])
            raise DataError(
                f"the change was computed for tokens of shape {expected}, and the dense model runs "
                f"on {actual}"
            )
        return stream + difference.to(stream)

    with changing_stream(model, number, add):
        yield
