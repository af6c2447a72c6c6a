"""The scores of a circuit when some of its nodes are ablated."""

from collections.abc import Sequence

from tqdm.auto import tqdm

from tl_sparse.circuits import Circuit, Node
from tl_sparse.evaluation import holding_nodes, scaled_sizes, score, sized_score
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData
from tl_sparse.view.activations import node_points
from tl_sparse.view.limits import LIMITS


def circuit_loss(circuit: Circuit, model: TLModel, pairs: TaskData) -> float:
    """The task loss of the circuit on `pairs`."""
    return score(model, pairs, run_context=holding_nodes(circuit, model)).loss


def cut_losses(
    circuit: Circuit, model: TLModel, nodes: Sequence[Node], pairs: TaskData
) -> list[float]:
    """For each of `nodes`, the task loss of the circuit without this node."""
    losses = []
    for node in tqdm(nodes, "cutting nodes", disable=None):
        without_node = circuit.without([node], model)
        losses.append(circuit_loss(without_node, model, pairs))
    return losses


def most_important_first(
    circuit: Circuit, nodes: Sequence[Node], losses: Sequence[float]
) -> list[int]:
    """The positions of the nodes, sorted by the circuit's scores or, without these, by `losses`."""
    importance = list(losses)
    if circuit.scores:
        importance = []
        for point in node_points(circuit, nodes):
            importance.append(float(circuit.scores[point.hook].flatten()[point.index]))
    return sorted(range(len(nodes)), key=lambda position: -importance[position])


def curve_by_size(
    circuit: Circuit, model: TLModel, nodes: Sequence[Node], pairs: TaskData
) -> list[list[float]]:
    """The number of nodes, number of edges, task loss and accuracy of circuits of rising size.

    These circuits consist of the first of `nodes`. If the circuit has scores, they are followed by
    circuits up to eight times as large.

    Args:
        nodes: the nodes of the circuit, the most important first.
    """
    n_sizes = LIMITS.curve_sizes
    sizes = {round(len(nodes) ** (step / (n_sizes - 1))) for step in range(n_sizes)}
    circuits = [circuit.without(nodes[size:], model) for size in sorted(sizes)]
    if circuit.scores:
        for size in scaled_sizes(circuit, range(1, 7)):
            if size > len(nodes):
                circuits.append(circuit.of_size(size))
    curve: list[list[float]] = []
    for sized_circuit in circuits:
        sized = sized_score(sized_circuit, model, pairs)
        curve.append([sized.n_nodes, sized.n_edges, sized.circuit.loss, sized.circuit.accuracy])
    return curve
