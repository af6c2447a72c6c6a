"""Choosing a size: from a ranking of the nodes to the smallest circuit that reaches the target."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import PruneError
from tl_sparse.evaluation import all_logits, holding_circuit, score
from tl_sparse.hooks import NodeGates, TLModel
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.tasks import Score, TaskData, task_loss_and_accuracy

T = TypeVar("T")


def is_circuit(circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig) -> bool:
    """Sufficient: the circuit reaches the target loss. Necessary: the model without it loses the
    task.
    """
    if circuit_score(circuit, model, data, config).loss > config.target_loss:
        return False
    if config.ablated_accuracy == 1:
        return True
    return (
        circuit_score(circuit, model, data, config, inverted=True).accuracy
        <= config.ablated_accuracy
    )


def circuit_score(
    circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig, inverted: bool = False
) -> Score:
    under = holding_circuit(circuit, model, config.ablation, inverted)
    return score(model, data, config.batch_size, under)


def discretise(
    empty: Circuit, model: TLModel, gates: NodeGates, selection: TaskData, config: PruneConfig
) -> Circuit:
    """The smallest number of top-ranked nodes that make a circuit on the selection pairs (A.5), and
    of these only the ones that it needs.

    Bisection between a size that is too small and one that is enough, both found by going outwards
    from the learned size: the loss is not monotonic over the whole ranking, but nearly so around
        there.

    Raises:
        PruneError: if not even all nodes make a circuit.
    """
    order = gates.tau.detach().argsort(descending=True, stable=True)
    rank = order.argsort()

    def circuit(kept: Bool[Tensor, " gate"]) -> Circuit:
        return dataclasses.replace(empty, kept=gates.at_nodes(kept))

    enough, too_small = max(1, int((gates.tau > 0).sum())), 0
    while not is_circuit(circuit(rank < enough), model, selection, config):
        if enough == len(order):
            raise PruneError(
                f"no set of nodes reaches the target loss {config.target_loss} such that the model without it has an "
                f"accuracy of at most {config.ablated_accuracy}, not even all {len(order)} nodes"
            )
        too_small, enough = enough, min(len(order), math.ceil(enough * 1.3))
    part = representative(circuit(rank < enough), model, selection, config)
    while (
        enough - too_small > 1
    ):  # down from the learned size until it is too small, then bisection
        size = (enough + too_small) // 2 if too_small else int(enough / 1.3)
        holds = is_circuit(circuit(rank < size), model, part, config)
        enough, too_small = (size, too_small) if holds else (enough, size)
    while enough < len(order) and not is_circuit(circuit(rank < enough), model, selection, config):
        enough += math.ceil(enough / 20)  # the part was too kind
    part = representative(circuit(rank < enough), model, selection, config)

    def without(gone: list[int]) -> Circuit:
        dropped = torch.tensor(gone, dtype=torch.long, device=rank.device)
        return circuit((rank < enough).index_fill(0, dropped, False))

    # Gates learn all at once: some stay open that nothing kept reads, or whose part another node
    # took over.
    gone = eliminate(
        order[:enough].flip(0).tolist() if config.method == "learned" else [],
        lambda gone: is_circuit(without(gone), model, part, config),
        lambda gone: is_circuit(without(gone), model, selection, config),
    )
    found = without(gone)
    scores = {
        name: tau + 2 * found.kept[name] for name, tau in gates.at_nodes(gates.tau.detach()).items()
    }
    return dataclasses.replace(found, scores=scores)


def representative(
    circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig
) -> TaskData:
    """`cleanup_pairs` of the pairs, with which much is tried: evenly spaced in the order of the
    circuit's loss on them, so that its mean over them is nearly that over all."""
    logits = all_logits(
        model, data, config.batch_size, holding_circuit(circuit, model, config.ablation)
    )
    order = task_loss_and_accuracy(logits, data.correct)[0].view(-1, 2).mean(1).argsort()
    size = min(config.cleanup_pairs, data.n_pairs)
    return data.pairs(
        order[((torch.arange(size, device=order.device) + 0.5) * data.n_pairs / size).long()]
    )


def eliminate(
    candidates: Sequence[T], holds: Callable[[list[T]], bool], decides: Callable[[list[T]], bool]
) -> list[T]:
    """What can be taken away, tried in order by a quick test: more and more at once as long as that
    works, less and less when not. If the last of them were too many by the test that decides, they
    come back.
    """
    gone: list[T] = []
    first, size = 0, 1
    while first < len(candidates):
        some = list(candidates[first : first + size])
        if holds([*gone, *some]):
            gone, first, size = [*gone, *some], first + len(some), 2 * size
        elif len(some) > 1:
            size = len(some) // 2
        else:
            first += 1
    enough, too_many, size = 0, len(gone) + 1, len(gone)
    while too_many - enough > 1:
        enough, too_many = (size, too_many) if decides(gone[:size]) else (enough, size)
        size = (enough + too_many) // 2
    return gone[:enough]
