"""The edges of a component circuit: which later components read what a component writes.

In the residual stream, each component's output is added to what earlier ones wrote, and every later
head and MLP reads the sum. So an edge is no single weight, as between channels, but a path: from
the matrix with which the source writes, through the channels of the stream, to those with which the
target reads. A head's queries, keys and values count as one read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuits.nodes import Edge, Node, weight_matrices
from tl_sparse.hooks import TLModel

_READS_OF_HEAD = ("attn_q", "attn_k", "attn_v")


def component_edges(nodes: Iterable[Node], model: TLModel) -> list[Edge]:
    """The edges between these components, which are in the order of the forward pass.

    An edge leads from a component to a later one if a channel of the residual stream is written
    with a nonzero weight by the first and read with one by the second; what norms and AbsTopK add
    to this is left out, as between channels. In a dense model, there is an edge to every later
    component; in a sparse one, to those to which a path of nonzero weights leads.

    The weight of an edge is the Frobenius norm of the product of the two matrices: how strongly the
    components compose (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"),
    not divided by the norms of the factors. The target's matrix includes the weight of its norm.
    """
    edges: list[Edge] = []
    earlier: list[_End] = []
    for (layer, location), same_stage in groupby(nodes, lambda node: (node.layer, node.location)):
        stage = list(same_stage)
        matrices = _Matrices(model, layer)
        if location == "mlp" and getattr(model.cfg, "parallel_attn_mlp", False):
            sources = [end for end in earlier if end.node.layer < layer]
        else:
            sources = earlier
        edges += _edges_into([matrices.read(node) for node in stage], sources)
        earlier = earlier + [matrices.written(node) for node in stage]
    return edges


@dataclass(frozen=True)
class _End:
    """What one component writes to the residual stream, or reads from it.

    Attributes:
        node: the component.
        channels: the channels in which it has a nonzero weight.
        gram: the products of the rows of its matrix, which has a row for each channel, with each
            other. The norm of a product of two matrices is the root of the sum of the products of
            their entries.
    """

    node: Node
    channels: Bool[Tensor, " channel"]
    gram: Float[Tensor, "channel channel"]


def _edges_into(targets: list[_End], sources: list[_End]) -> Iterator[Edge]:
    if not targets or not sources:
        return
    written = torch.stack([source.gram.flatten() for source in sources])
    read = torch.stack([target.gram.flatten() for target in targets])
    weights = (written @ read.T).clamp(min=0).sqrt().tolist()
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            if bool((source.channels & target.channels).any()):
                yield Edge(source.node, target.node, weights[i][j])


class _Matrices:
    """The matrices with which the components of a layer read and write the residual stream."""

    def __init__(self, model: TLModel, layer: int) -> None:
        self._block = model.blocks[layer]
        self._d_model = model.cfg.d_model
        self._n_heads = model.cfg.n_heads
        self._weights: dict[tuple[str, str], list[Tensor]] = {}
        for source, target, weights in weight_matrices(model, layer):
            self._weights.setdefault((source, target), []).append(weights.double())

    def written(self, node: Node) -> _End:
        """What a component writes."""
        if node.location == "mlp":
            return _end(node, self._weights["mlp_neuron", "mlp_out"][0].T)
        # There is a part for each of the query heads that share a value head.
        parts = self._weights["attn_v", "attn_out"]
        value_head, part = divmod(node.index, len(parts))
        n_value_heads = self._n_heads // len(parts)
        by_head = rearrange(parts[part], "(head s) t -> head t s", head=n_value_heads)
        return _end(node, by_head[value_head])

    def read(self, node: Node) -> _End:
        """What a component reads."""
        if node.location == "mlp":
            matrices = self._weights["mlp_in", "mlp_neuron"]
            norm = getattr(self._block, "ln2", None)
        else:
            matrices = [self._read_by_head(location, node.index) for location in _READS_OF_HEAD]
            norm = self._block.ln1
        matrix = torch.cat([matrix[: self._d_model] for matrix in matrices], dim=1)
        scale = getattr(norm, "w", getattr(norm, "weight", None))
        if scale is not None:
            matrix = scale.detach().double()[:, None] * matrix
        return _end(node, matrix)

    def _read_by_head(self, location: str, head: int) -> Float[Tensor, "channel d_head"]:
        weights = self._weights["attn_in", location][0]
        d_head = self._weights["attn_in", "attn_q"][0].shape[1] // self._n_heads
        n_shared = self._n_heads * d_head // weights.shape[1]
        first = head // n_shared * d_head
        return weights[:, first : first + d_head]


def _end(node: Node, matrix: Float[Tensor, "channel other"]) -> _End:
    return _End(node, (matrix != 0).any(1), matrix @ matrix.T)
