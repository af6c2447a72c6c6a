"""Finding the edges between nodes, which are nonzero weights of the model, and cutting them.

Gao et al. 2025 (arXiv 2511.13653) prune nodes only, and name the superfluous edges that remain
between them as a weakness. Cutting makes it possible to prune each edge separately.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits.nodes import (
    LOCATIONS,
    MATRICES,
    Edge,
    Node,
    indices_by_location,
    weight_matrices,
)
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import PruneError
from tl_sparse.hooks import NodeValues, TLModel, is_sparse_model

#: Node location → the weight matrix that leads to it and has a bias.
_MATRIX_INTO = {matrix.target: matrix for matrix in MATRICES if matrix.bias}


def edges_between(nodes: Iterable[Node], model: TLModel) -> list[Edge]:
    """Every nonzero weight that joins two of `nodes`, in the order of the forward pass."""
    indices = indices_by_location(nodes)
    edges = []
    for layer in range(model.cfg.n_layers):
        for source, target, weights in weight_matrices(model, layer):
            rows = indices.get((layer, source), [])
            columns = indices.get((layer, target), [])
            for i, j in weights[rows][:, columns].nonzero().tolist():
                source_node = Node(layer, source, rows[i])
                target_node = Node(layer, target, columns[j])
                weight = float(weights[rows[i], columns[j]])
                edges.append(Edge(source_node, target_node, weight))
    return edges


def uncut_edges(circuit: CircuitParts, model: TLModel) -> list[Edge]:
    """The edges between the circuit's nodes, without those that edge pruning has cut."""
    edges = edges_between(circuit.nodes, model)
    if circuit.edge_set is None:
        return edges
    return [edge for edge in edges if edge.ends in circuit.edge_set]


def edge_shares(edges: Collection[Edge], model: TLModel) -> dict[tuple[int, str, str], float]:
    """(layer, source location, target location) → the fraction of the nonzero weights between these
    locations that are in `edges`.
    """
    n_edges = Counter[tuple[int, str, str]]()
    for edge in edges:
        n_edges[edge.source.layer, edge.source.location, edge.target.location] += 1
    n_weights = Counter[tuple[int, str, str]]()
    for layer in range(model.cfg.n_layers):
        for source, target, weights in weight_matrices(model, layer):
            n_weights[layer, source, target] += int(weights.count_nonzero())
    shares = {}
    for place, n_nonzero in n_weights.items():
        shares[place] = n_edges[place] / max(1, n_nonzero)
    return shares


def bias_at(model: TLModel, node: Node) -> Float[Tensor, ""] | None:
    """The bias at a node; None if its location has no bias, or the model does not have it."""
    matrix = _MATRIX_INTO.get(node.location)
    if matrix is None:
        return None
    module = getattr(model.blocks[node.layer], matrix.module, None)
    bias = getattr(module, matrix.bias, None)
    if bias is None:
        return None
    return bias.detach().flatten()[node.index]


@contextmanager
@torch.no_grad()
def cutting(model: TLModel, edges: Iterable[Edge], means: NodeValues) -> Iterator[None]:
    """A context in which each edge contributes its mean instead of its activation.

    The weight of the edge is set to zero, and weight · (mean of the source) is added to the bias at
    its target. For an edge that leaves a head, the mean is that of `attn.hook_z`; if `means` lacks
    it, the mean of the value is used, which is larger if a sink takes part of the attention. On
    leaving the context, the weights are restored bit for bit.

    Raises:
        PruneError: if `model` is not a model of tl_sparse, since other models store their weights
            in other forms.
    """
    edges = list(edges)
    if edges and not is_sparse_model(model):
        raise PruneError(
            f"edges can be cut only in models of tl_sparse, not in a {type(model).__name__}"
        )
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for edge in edges:
            weight, bias = _weight_and_bias(model, edge)
            new_bias = bias + weight * _mean_through(edge, means)
            originals.append((weight, weight.clone()))
            originals.append((bias, bias.clone()))
            weight.zero_()
            bias.copy_(new_bias)
        yield
    finally:
        for entry, original in reversed(originals):
            entry.copy_(original)


def _mean_through(edge: Edge, means: NodeValues) -> Float[Tensor, ""]:
    """The mean of the activation that the weight of an edge multiplies."""
    block = f"blocks.{edge.source.layer}"
    hook_point = LOCATIONS[edge.source.location].hook_points[0]
    mean = means[f"{block}.{hook_point}"]
    if edge.source.location == "attn_v":
        # W_O reads z: the values after attention has averaged them over positions.
        mean = means.get(f"{block}.attn.hook_z", mean)
    return mean.flatten()[edge.source.index]


def _weight_and_bias(model: TLModel, edge: Edge) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Views of the weight of an edge and of the bias at its target, in a model of tl_sparse."""
    matrix = _MATRIX_INTO[edge.target.location]
    module = getattr(model.blocks[edge.source.layer], matrix.module)
    weight_name = matrix.weight
    source = edge.source.index
    if edge.source.location.endswith("_in") and source >= model.cfg.d_model:
        weight_name = matrix.positional_weight
        source -= model.cfg.d_model
    weight = getattr(module, weight_name).detach()
    bias = getattr(module, matrix.bias).detach()
    target = edge.target.index
    if LOCATIONS[edge.target.location].is_by_head:
        head, channel = divmod(target, model.cfg.d_head)
        return weight[head, source, channel], bias[head, channel]
    if edge.target.location == "attn_out":
        head, channel = divmod(source, model.cfg.d_head)
        return weight[head, channel, target], bias[target]
    return weight[source, target], bias[target]
