"""Selecting the nodes and edges of a circuit that a page draws."""

from collections.abc import Iterable, Sequence

from tl_sparse.circuits import Circuit, Edge, Node, joined_nodes, why_no_nodes
from tl_sparse.errors import CircuitError
from tl_sparse.hooks import TLModel
from tl_sparse.view.limits import LIMITS


def drawn(
    circuit: Circuit, model: TLModel, min_weight: float = 0.0
) -> tuple[list[Node], list[Edge]]:
    """The nodes and edges to draw, in the order of the forward pass.

    Args:
        min_weight: leave out edges with a smaller absolute weight, and nodes that then have no
            edges.

    Raises:
        CircuitError: if there are no nodes to draw, or too many nodes or edges, or `model` is not
            the circuit's model.
    """
    nodes = circuit.nodes
    edges = circuit.edges(model)
    if not nodes:
        raise CircuitError(f"nothing can be drawn: {why_no_nodes(model)}")
    if min_weight > 0:
        edges = [edge for edge in edges if abs(edge.weight) >= min_weight]
        joined = joined_nodes(edges)
        nodes = [node for node in nodes if node in joined]
        if not nodes:
            raise CircuitError(
                "no edge of the circuit has an absolute weight of "
                f"min_weight = {min_weight:g} or more"
            )
    if len(nodes) > LIMITS.nodes or len(edges) > LIMITS.edges:
        offer = ""
        if edges:
            weight = _sufficient_min_weight(edges)
            offer = f"; min_weight = {weight:.3g} leaves few enough"
        raise CircuitError(
            f"{len(nodes):,} nodes and {len(edges):,} edges are more than the "
            f"{LIMITS.nodes:,} and {LIMITS.edges:,} that can be drawn{offer}"
        )
    return nodes, edges


def _sufficient_min_weight(edges: Sequence[Edge]) -> float:
    """A `min_weight` that leaves few enough edges and nodes.

    It leaves a tenth fewer edges than would be possible, because the error message rounds it.
    """
    weights = sorted((abs(edge.weight) for edge in edges), reverse=True)
    n_edges = min(len(edges), LIMITS.edges)
    while _n_joined_above(edges, weights[n_edges - 1]) > LIMITS.nodes:
        n_edges = n_edges * 9 // 10
    return weights[n_edges * 9 // 10]


def _n_joined_above(edges: Iterable[Edge], weight: float) -> int:
    return len(joined_nodes(edge for edge in edges if abs(edge.weight) > weight))
