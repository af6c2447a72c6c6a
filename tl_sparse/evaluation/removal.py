"""What the removal of nodes and edges changes, measured pair by pair."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, Edge, Node
from tl_sparse.evaluation.prompt_runs import PromptScores, Runs
from tl_sparse.hooks import TLModel, is_sparse_model
from tl_sparse.tasks import TaskData


def removable_parts(circuit: Circuit, model: TLModel) -> list[Node | Edge]:
    """The nodes of the circuit and, in models of this package, its edges between channels; no
    others can be cut.
    """
    if not is_sparse_model(model) or circuit.node_kind == "components":
        return list(circuit.nodes)
    return [*circuit.nodes, *circuit.edges(model)]


@checked()
def removal_rises(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    parts: Sequence[Node | Edge],
    batch_size: int = 256,
    progress: bool = False,
) -> Float[Tensor, "part pair"]:
    """By how much the circuit's loss at each pair rises when one of its nodes or edges is removed.

    A node is removed by holding it at its mean, an edge by cutting it: its contribution is held at
    its mean. This does not check that `model` is the circuit's model.

    Args:
        parts: the nodes and edges, each of which is removed alone.
        progress: show a progress bar.

    Raises:
        CircuitError: if a part is not in the circuit, or the circuit has no means.
        PruneError: if an edge is to be cut in a model that is not of this package.
    """
    runs = Runs(model, data, batch_size)
    return rises_above(runs.alone(circuit), runs, circuit, parts, progress)


def rises_above(
    whole: PromptScores,
    runs: Runs,
    circuit: Circuit,
    parts: Sequence[Node | Edge],
    progress: bool = False,
) -> Float[Tensor, "part pair"]:
    """The same, of a circuit whose scores are known."""
    rises = []
    for part in tqdm(parts, "removing parts", disable=not progress, unit=" parts"):
        rest = circuit.without([part], runs.model)
        rises.append(runs.alone(rest).pair_losses - whole.pair_losses)
    return torch.stack(rises) if rises else whole.pair_losses.new_zeros(0, runs.data.n_pairs)


@checked()
def effects(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    batch_size: int = 256,
    progress: bool = False,
) -> dict[Node | Edge, float]:
    """The effect of each node and edge of the circuit: the mean of `removal_rises` over the pairs.

    Edges can only be cut in models of this package, and have no entry for others.

    Raises:
        CircuitError: if `model` is not the circuit's model.
    """
    circuit.check_model(model)
    parts = removable_parts(circuit, model)
    rises = removal_rises(circuit, model, data, parts, batch_size, progress)
    return dict(zip(parts, rises.double().mean(1).tolist(), strict=True))
