"""Finding the smallest circuit that reaches the target loss, given a ranking of the nodes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import PruneError, counted
from tl_sparse.evaluation import all_logits, holding_nodes, score
from tl_sparse.hooks import NodeGates, TLModel
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.phases import phase, say_reached
from tl_sparse.tasks import Score, TaskData, task_loss_and_accuracy

T = TypeVar("T")
#: The factor between successive sizes while the search moves outwards from the learned size.
SIZE_FACTOR = 1.3


def is_circuit(circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig) -> bool:
    """Whether the circuit is sufficient and necessary.

    It is sufficient if it reaches the target loss. It is necessary if the accuracy of the model
    without it is at most `ablated_accuracy`; if that is 1, this is not tested.
    """
    if circuit_score(circuit, model, data, config).loss > config.target_loss:
        return False
    if config.ablated_accuracy == 1:
        return True
    without = circuit_score(circuit, model, data, config, inverted=True)
    return without.accuracy <= config.ablated_accuracy


def circuit_score(
    circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig, inverted: bool = False
) -> Score:
    """The score of the circuit alone or, if `inverted`, of the model without it."""
    under = holding_nodes(circuit, model, config.ablation, inverted)
    return score(model, data, config.batch_size, under)


class _Ranking:
    """Makes circuits of the nodes whose gates rank highest."""

    def __init__(self, empty: Circuit, gates: NodeGates) -> None:
        self.empty = empty
        self.gates = gates
        self.order = gates.tau.detach().argsort(descending=True, stable=True)
        self.rank = self.order.argsort()  # the rank of each gate, from 0

    def __len__(self) -> int:
        return len(self.order)

    def circuit(self, size: int, removed: Sequence[int] = ()) -> Circuit:
        """The circuit of the `size` highest-ranked gates, without the gates in `removed`."""
        kept = self.rank < size
        if removed:
            kept[list(removed)] = False
        return dataclasses.replace(self.empty, kept=self.gates.at_nodes(kept))


def discretise(
    empty: Circuit,
    model: TLModel,
    gates: NodeGates,
    selection: TaskData,
    config: PruneConfig,
    progress: bool = False,
) -> Circuit:
    """The smallest circuit of top-ranked nodes on the selection pairs (A.5).

    With learned gates, nodes that this circuit does not need are then removed from it.

    Raises:
        PruneError: if not even the set of all nodes passes `is_circuit`.
    """
    ranking = _Ranking(empty, gates)

    def loss(circuit: Circuit) -> float:
        return circuit_score(circuit, model, selection, config).loss

    with phase("choosing the size", progress) as bar:
        size = _smallest_size(ranking, model, selection, config, bar)
        if progress:  # the loss takes a run over all pairs, and is only shown
            say_reached(bar, size, loss(ranking.circuit(size)), "selection")
    some_pairs = representative(ranking.circuit(size), model, selection, config)
    candidates: list[int] = []
    if config.method == "learned":
        # All gates are learned together, so some remain open although no kept node reads their
        # node, or another node has taken over its function. The lowest-ranked is tried first.
        candidates = ranking.order[:size].flip(0).tolist()
    with phase("removing nodes", progress and bool(candidates), len(candidates), "node") as bar:
        removed = eliminate(
            candidates,
            lambda gone: is_circuit(ranking.circuit(size, gone), model, some_pairs, config),
            lambda gone: is_circuit(ranking.circuit(size, gone), model, selection, config),
            bar.update,
        )
        circuit = ranking.circuit(size, removed)
        if progress:
            say_reached(bar, circuit.n_nodes, loss(circuit), "selection")
    scores: dict[str, Tensor] = {}
    for name, tau in gates.at_nodes(gates.tau.detach()).items():
        # τ is in [-1, 1], so adding 2 ranks the kept nodes above all others.
        scores[name] = tau + 2 * circuit.kept[name]
    return dataclasses.replace(circuit, scores=scores)


def _smallest_size(
    ranking: _Ranking, model: TLModel, selection: TaskData, config: PruneConfig, bar: Any
) -> int:
    """The smallest number of top-ranked nodes that pass `is_circuit`.

    It is found by bisection between a size that is too small and a size that is enough. Both are
    searched outwards from the learned size, because the loss is nearly monotonic there, but not
    over the whole ranking.
    """

    def is_enough(size: int, pairs: TaskData) -> bool:
        bar.set_postfix_str(f"trying {counted(size, 'node')}")
        bar.update()
        return is_circuit(ranking.circuit(size), model, pairs, config)

    enough = max(1, int((ranking.gates.tau > 0).sum()))
    too_small = 0
    while not is_enough(enough, selection):
        if enough == len(ranking):
            raise _failure_of_all(ranking, model, selection, config)
        too_small = enough
        enough = min(len(ranking), math.ceil(enough * SIZE_FACTOR))
    some_pairs = representative(ranking.circuit(enough), model, selection, config)
    while enough - too_small > 1:
        # Until a size is known to be too small, the search moves down from the learned size.
        size = (enough + too_small) // 2 if too_small else int(enough / SIZE_FACTOR)
        if is_enough(size, some_pairs):
            enough = size
        else:
            too_small = size
    # A size that is enough on some of the pairs may be too small on all of them.
    while enough < len(ranking) and not is_enough(enough, selection):
        enough += math.ceil(enough / 20)
    return enough


def _failure_of_all(
    ranking: _Ranking, model: TLModel, selection: TaskData, config: PruneConfig
) -> PruneError:
    """The error if no tried size passes, although the last one has all nodes."""
    circuit = ranking.circuit(len(ranking))
    loss = circuit_score(circuit, model, selection, config).loss
    without = circuit_score(circuit, model, selection, config, inverted=True)
    return PruneError(
        f"no circuit was found at any size that was tried, up to all {len(ranking)} nodes: with "
        f"these, the loss is {loss:.3f} (it must be at most {config.target_loss}), and the "
        f"accuracy of the model without them is {without.accuracy:.1%} (it must be at most "
        f"{config.ablated_accuracy:.1%})"
    )


def representative(
    circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig
) -> TaskData:
    """A sample of `cleanup_pairs` pairs, on which many circuits can be tested quickly.

    The pairs are sorted by the circuit's loss and sampled at even intervals, so that its mean loss
    over the sample is close to its mean loss over all pairs.
    """
    under = holding_nodes(circuit, model, config.ablation)
    logits = all_logits(model, data, config.batch_size, under)
    losses, _ = task_loss_and_accuracy(logits, data.correct)
    by_loss = losses.view(-1, 2).mean(1).argsort()
    n_chosen = min(config.cleanup_pairs, data.n_pairs)
    positions = (torch.arange(n_chosen, device=by_loss.device) + 0.5) * data.n_pairs / n_chosen
    return data.pairs(by_loss[positions.long()])


def eliminate(
    candidates: Sequence[T],
    holds: Callable[[list[T]], bool],
    decides: Callable[[list[T]], bool],
    tried: Callable[[int], object],
) -> list[T]:
    """The candidates that can be removed from a circuit.

    Args:
        candidates: nodes or edges, in the order in which they are tried.
        holds: a quick test of whether the rest is still a circuit without the given candidates.
        decides: the same as a thorough test. If it fails, the candidates that were removed last are
            restored until it passes.
        tried: called with the number of candidates whenever the quick test has decided on some.
    """
    removed = _removed_by_test(candidates, holds, tried)
    n_gone = 0
    too_many = len(removed) + 1
    n_tried = len(removed)
    while too_many - n_gone > 1:
        if decides(removed[:n_tried]):
            n_gone = n_tried
        else:
            too_many = n_tried
        n_tried = (n_gone + too_many) // 2
    return removed[:n_gone]


def _removed_by_test(
    candidates: Sequence[T], holds: Callable[[list[T]], bool], tried: Callable[[int], object]
) -> list[T]:
    """The candidates that can be removed according to `holds`.

    They are tried in groups. The group size doubles after each group that can be removed, and is
    halved after each group that cannot.
    """
    removed: list[T] = []
    first = 0
    size = 1
    while first < len(candidates):
        group = list(candidates[first : first + size])
        if holds(removed + group):
            removed += group
            first += len(group)
            size *= 2
            tried(len(group))
        elif len(group) > 1:
            size = len(group) // 2
        else:
            first += 1
            tried(1)
    return removed
