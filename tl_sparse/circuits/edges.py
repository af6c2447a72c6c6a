"""Edges of a model: which weights join nodes, and cutting them.

Gao et al. 2025 prune nodes only, and name the edges left over between them as a weakness
(arXiv 2511.13653); cutting lets each edge be pruned by itself.
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

#: Node location → the matrix with a bias that leads to it.
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
    """The edges between a circuit's nodes that edge pruning has not cut."""
    edges = edges_between(circuit.nodes, model)
    if circuit.edge_set is None:
        return edges
    return [edge for edge in edges if edge.ends in circuit.edge_set]


def edge_shares(edges: Collection[Edge], model: TLModel) -> dict[tuple[int, str, str], float]:
    """(layer, source, target) → the share of the nonzero weights there that are among `edges`."""
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
    """The bias of a node that edges lead to; None for other nodes, and where the model has none."""
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
    """Within the context, each edge contributes its mean: its weight is zero, and weight · mean is
    added to the bias at its target.

    The mean of an edge that leaves a head is that of `attn.hook_z`. If it is not known, the mean
    of the value takes its place, which is larger where a sink takes a part of the attention.
    Afterwards the weights are bit for bit what they were.

    Raises:
        PruneError: if `model` is not a model of tl_sparse: others store their weights in other
            forms.
    """
    edges = list(edges)
    if edges and not is_sparse_model(model):
        raise PruneError(
            f"edges can be cut in models of tl_sparse only, not in a {type(model).__name__}"
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
    """The mean of what an edge multiplies with its weight."""
    block = f"blocks.{edge.source.layer}"
    hook_point = LOCATIONS[edge.source.location].hook_points[0]
    mean = means[f"{block}.{hook_point}"]
    if edge.source.location == "attn_v":
        # What leaves a head is the value as attention has mixed it over positions.
        mean = means.get(f"{block}.attn.hook_z", mean)
    return mean.flatten()[edge.source.index]


def _weight_and_bias(model: TLModel, edge: Edge) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Views of the weight of an edge, and of the bias at its target, in one of our models."""
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
