"""Finding the edges between nodes, which are nonzero weights of the model, and cutting them.

Gao et al. 2025 (arXiv 2511.13653) prune nodes only, and name the superfluous edges that remain
between them as a weakness. Cutting makes it possible to prune each edge separately.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits.component_edges import component_edges
from tl_sparse.circuits.nodes import (
    LOCATIONS,
    MATRICES,
    Edge,
    Node,
    weight_matrices,
)
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import CircuitError, PruneError, UnsupportedError
from tl_sparse.hooks import NodeValues, TLModel, is_sparse_model, new_scope
from tl_sparse.network import Cut, Product

#: Node location → the weight matrix that leads to it and has a bias.
_MATRIX_INTO = {matrix.target: matrix for matrix in MATRICES if matrix.bias}
#: Weight matrix → the module, in a model of tl_sparse, that multiplies by it.
_PRODUCT_WITH = {
    "W_Q": "times_Q",
    "W_K": "times_K",
    "W_V": "times_V",
    "W_O": "times_O",
    "W_in": "times_in",
    "W_out": "times_out",
}


def edges_between(nodes: Iterable[Node], model: TLModel) -> list[Edge]:
    """Every nonzero weight that joins two of `nodes`, in the order of the forward pass.

    For edges between components, see `component_edges`.
    """
    nodes = list(nodes)
    if any(node.is_component for node in nodes):
        return component_edges(nodes, model)
    nodes_at = defaultdict[tuple[int, str], list[Node]](list)
    for node in nodes:
        nodes_at[node.layer, node.location].append(node)
    edges = []
    for layer in range(model.cfg.n_layers):
        for source, target, weights in weight_matrices(model, layer):
            sources = nodes_at[layer, source]
            targets = nodes_at[layer, target]
            rows = [node.index for node in sources]
            columns = [node.index for node in targets]
            between = weights[rows][:, columns].detach()
            nonzero = between.nonzero()
            values = between[nonzero[:, 0], nonzero[:, 1]]
            for (i, j), weight in zip(nonzero.tolist(), values.tolist(), strict=True):
                edges.append(Edge(sources[i], targets[j], weight))
    return edges


def n_edges_of(circuit: CircuitParts, model: TLModel) -> int:
    """The number of `uncut_edges`, in dense models counted without making millions of them."""
    if circuit.edge_set is not None or circuit.node_kind == "components":
        return len(uncut_edges(circuit, model))
    indices = circuit.nodes_by_location()
    n_edges = 0
    for layer in range(model.cfg.n_layers):
        for source, target, weights in weight_matrices(model, layer):
            rows = indices.get((layer, source), [])
            columns = indices.get((layer, target), [])
            n_edges += int(weights[rows][:, columns].count_nonzero())
    return n_edges


def uncut_edges(circuit: CircuitParts, model: TLModel) -> list[Edge]:
    """The edges between the circuit's nodes, without those that edge pruning has cut."""
    edges = edges_between(circuit.nodes, model)
    if circuit.edge_set is None:
        return edges
    return [edge for edge in edges if edge.ends in circuit.edge_set]


def edge_shares(edges: Collection[Edge], model: TLModel) -> dict[tuple[int, str, str], float]:
    """(layer, source location, target location) → the fraction of the nonzero weights between these
    locations that are in `edges`.

    Raises:
        UnsupportedError: if the edges are between components.
    """
    if any(edge.source.is_component for edge in edges):
        raise UnsupportedError(
            "edges between components are paths in the residual stream, not weights of which they "
            "could be a share"
        )
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
    name = matrix.bias
    if matrix.grouped_weight and hasattr(module, f"_{name}"):
        # With grouped-query attention, a HookedTransformer stores the bias of each key and value
        # head once under this name, while `b_K` and `b_V` repeat it for every query head.
        name = f"_{name}"
    bias = getattr(module, name, None)
    if bias is None:
        return None
    return bias.detach().flatten()[node.index]


@contextmanager
def cutting(model: TLModel, edges: Iterable[Edge], means: NodeValues) -> Iterator[None]:
    """A context in which each edge contributes its mean instead of its activation.

    The model acts as if the weight of the edge were zero, and as if weight · (mean of the source)
    were added to the bias at its target. The weights themselves do not change, and gradients flow
    to them. As in `hooks.hooked`, this acts on the calls of the thread that opens the context.

    Raises:
        PruneError: if `model` is not a model of tl_sparse, since other models multiply by their
            weights in other ways; if the model has no such edge; or if the edges are between
            components.
        CircuitError: if `means` lacks a mean that the activation of an edge has to be held at.
    """
    edges = list(edges)
    if any(edge.source.is_component for edge in edges):
        raise PruneError(
            "edges between components cannot be cut: each is a path in the residual stream, where "
            "the outputs of all earlier components are added up before a later one reads them"
        )
    if edges and not is_sparse_model(model):
        raise PruneError(
            f"edges can be cut only in models of tl_sparse, not in a {type(model).__name__}"
        )
    cuts = _cuts(model, edges, means)
    with new_scope() as scope:
        try:
            for product, cut in cuts.items():
                product.add_cut(scope, cut)
            yield
        finally:
            for product in cuts:
                product.remove_cut(scope)


def _cuts(model: TLModel, edges: Iterable[Edge], means: NodeValues) -> dict[Product, Cut]:
    """The entries that the edges are, by the product that multiplies by them."""
    mean_of_entry: dict[Product, dict[tuple[int, int], float]] = {}
    for edge in edges:
        product = _product_into(model, edge)
        mean = float(_mean_through(edge, means))
        mean_of_entry.setdefault(product, {})[edge.source.index, edge.target.index] = mean
    cuts = {}
    for product, entries in mean_of_entry.items():
        inputs, outputs = torch.tensor(list(entries)).T
        held_at = torch.tensor(list(entries.values()), dtype=torch.float64)
        cuts[product] = Cut(inputs, outputs, held_at)
    return cuts


def _product_into(model: TLModel, edge: Edge) -> Product:
    """The product, in a model of tl_sparse, whose matrix has this edge as one of its entries."""
    matrix = _MATRIX_INTO.get(edge.target.location)
    if matrix is None or matrix.source != edge.source.location:
        raise PruneError(f"{edge} is not an edge: no matrix joins its ends")
    if edge.source.layer != edge.target.layer or edge.source.layer >= model.cfg.n_layers:
        raise PruneError(f"{edge} is not an edge within one of the model's layers")
    module = getattr(model.blocks[edge.source.layer], matrix.module)
    product: Product = getattr(module, _PRODUCT_WITH[matrix.weight])
    d_in, d_out = product.shape
    if edge.source.index >= d_in or edge.target.index >= d_out:
        raise PruneError(f"{edge} is not an edge of this model: its matrix is {d_in} by {d_out}")
    return product


def _mean_through(edge: Edge, means: NodeValues) -> Float[Tensor, ""]:
    """The mean of the activation that the weight of an edge multiplies."""
    hook_point = LOCATIONS[edge.source.location].hook_points[0]
    if edge.source.location == "attn_v":
        # W_O reads z: the values after attention has averaged them over positions.
        hook_point = "attn.hook_z"
    hook_name = f"blocks.{edge.source.layer}.{hook_point}"
    if hook_name not in means:
        raise CircuitError(
            f"cutting {edge} needs the mean at {hook_name}; circuit.with_means("
            "tl_sparse.hooks.mean_activations(model, circuit.mean_hooks, batches_of_tokens)) "
            "adds it"
        )
    return means[hook_name].flatten()[edge.source.index]
