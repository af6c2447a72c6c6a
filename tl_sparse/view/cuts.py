"""The scores of a circuit when some of its nodes are ablated."""

import math
from collections.abc import Sequence

from tqdm.auto import tqdm

from tl_sparse.circuits import Circuit, Node
from tl_sparse.evaluation import (
    all_next_token_logits,
    holding_nodes,
    scaled_sizes,
    score_next_tokens,
)
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData
from tl_sparse.view.activations import node_points
from tl_sparse.view.limits import LIMITS


def most_important_first(
    circuit: Circuit, nodes: Sequence[Node], effects: Sequence[float]
) -> list[int]:
    """The positions of the nodes, sorted by the circuit's scores or, without them, by `effects`."""
    importance = list(effects)
    if circuit.scores:
        importance = []
        for point in node_points(circuit, nodes):
            importance.append(float(circuit.scores[point.hook].flatten()[point.index]))
    return sorted(range(len(nodes)), key=lambda position: -importance[position])


def circuits_by_size(circuit: Circuit, model: TLModel, nodes: Sequence[Node]) -> list[Circuit]:
    """Circuits of rising size: the first of `nodes`, then all of them, which is the circuit itself.

    If the circuit has scores, they are followed by circuits twice, four and eight times as large.

    Args:
        nodes: the nodes of the circuit, the most important first.
    """
    n_sizes = LIMITS.curve_sizes
    sizes = {round(len(nodes) ** (step / (n_sizes - 1))) for step in range(n_sizes)}
    circuits = []
    for size in sorted(sizes):
        circuits.append(circuit.without(nodes[size:], model))
    if circuit.scores:
        for size in scaled_sizes(circuit, (2, 4, 6)):
            if size > len(nodes):
                circuits.append(circuit.of_size(size))
    return circuits


def faithfulness_by_size(
    circuits: Sequence[Circuit], model: TLModel, pairs: TaskData, progress: bool
) -> list[list[float]]:
    """The number of nodes and edges of each circuit, its task loss and accuracy, and its divergence
    from the model; see `NextToken.kl`.
    """
    full_logits = all_next_token_logits(model, pairs)
    curve: list[list[float]] = []
    for circuit in tqdm(circuits, "scoring sizes", disable=not progress, unit=" circuits"):
        run_context = holding_nodes(circuit, model)
        logits = all_next_token_logits(model, pairs, run_context=run_context)
        scored = score_next_tokens(logits, pairs, full_logits)
        kl = scored.next_token.kl if scored.next_token else math.nan
        n_edges = circuit.n_edges(model)
        curve.append([circuit.n_nodes, n_edges, scored.loss, scored.accuracy, kl])
    return curve
