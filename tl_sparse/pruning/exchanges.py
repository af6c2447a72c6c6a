"""Trying nodes outside a circuit in place of two of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.gates import gated_loss
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.tasks import TaskData

#: For each node outside, so many pairs of nodes of the circuit are tried.
_PAIRS_TRIED = 3


@dataclass(frozen=True)
class ExchangeData:
    """The pairs of a task that decide on exchanges.

    Attributes:
        train: the pairs on which the effect of adding a node is estimated.
        some: the pairs on which exchanges are tried.
        selection: the pairs on which the circuit must pass after an exchange.
    """

    train: TaskData
    some: TaskData
    selection: TaskData


def exchanged(
    circuit: Circuit,
    ranking: Ranking,
    criterion: Criterion,
    data: ExchangeData,
    progress: bool,
) -> Circuit:
    """The circuit, in which two nodes at a time are replaced by one, as long as it passes.

    The nodes outside that are tried are those that would lower the loss most, to first order. Each
    trial is a run of the circuit.
    """
    n_tried = criterion.config.exchanges
    with phase("exchanging nodes", progress, n_tried, "node") as bar:
        kept = ranking.gates.of_nodes(circuit.kept)
        tried = torch.zeros_like(kept)
        while int(tried.sum()) < n_tried:
            outside = _outside(kept, tried, ranking, criterion, data.train)
            removals = _removals(circuit, kept, ranking, criterion, data.some)
            n_left = n_tried - int(tried.sum())
            found = None
            for added in outside[:n_left]:
                bar.update()
                tried[added] = True
                found = _exchange(circuit, kept, added, removals, ranking, criterion, data)
                if found is not None:
                    break
            if found is None:
                break
            kept = found
            bar.set_postfix_str(f"{int(kept.sum())} nodes")
    return ranking.with_gates(circuit, kept)


def _outside(
    kept: Bool[Tensor, " gate"],
    tried: Bool[Tensor, " gate"],
    ranking: Ranking,
    criterion: Criterion,
    train: TaskData,
) -> list[int]:
    """The gates outside the circuit that would lower the loss, the best to first order first."""
    config = criterion.config
    pairs = train.pairs(range(min(config.ranking_pairs, train.n_pairs)))
    openings = kept.to(ranking.gates.tau).requires_grad_()
    loss = gated_loss(criterion.model, ranking.gates, pairs, config, openings)
    (slopes,) = torch.autograd.grad(loss, openings)
    slopes[kept | tried | ranking.fixed.excluded] = torch.inf
    order = slopes.argsort()
    return order[: int((slopes < 0).sum())].tolist()


@dataclass(frozen=True)
class _Removals:
    """The loss of a circuit, and by how much it rises without each of its gates.

    Attributes:
        loss: the loss of the circuit.
        gates: the gates that can be removed, in the order of their `rises`.
        rises: the rise of the loss without each of them.
    """

    loss: float
    gates: list[int]
    rises: list[float]

    def pairs(self, room: float) -> Iterator[tuple[int, int]]:
        """The two gates of each pair whose rises fit into `room`, if they add up."""
        for i, j in combinations(range(len(self.gates)), 2):
            if self.rises[i] + self.rises[j] <= room:
                yield self.gates[i], self.gates[j]


def _removals(
    circuit: Circuit,
    kept: Bool[Tensor, " gate"],
    ranking: Ranking,
    criterion: Criterion,
    pairs: TaskData,
) -> _Removals:
    whole_loss = criterion.loss(ranking.with_gates(circuit, kept), pairs)
    rise_of = {}
    for gate in (kept & ~ranking.fixed.included).nonzero().flatten().tolist():
        fewer = kept.clone()
        fewer[gate] = False
        rise_of[gate] = criterion.loss(ranking.with_gates(circuit, fewer), pairs) - whole_loss
    lowest_first = sorted(rise_of, key=rise_of.__getitem__)
    return _Removals(whole_loss, lowest_first, [rise_of[gate] for gate in lowest_first])


def _exchange(
    circuit: Circuit,
    kept: Bool[Tensor, " gate"],
    added: int,
    removals: _Removals,
    ranking: Ranking,
    criterion: Criterion,
    data: ExchangeData,
) -> Bool[Tensor, " gate"] | None:
    """The circuit with the gate `added` and without two others; None if none of them passes."""
    larger = kept.clone()
    larger[added] = True
    gain = removals.loss - criterion.loss(ranking.with_gates(circuit, larger), data.some)
    room = criterion.config.target_loss - removals.loss + 2 * gain
    for removed in islice(removals.pairs(room), _PAIRS_TRIED):
        smaller = larger.clone()
        smaller[list(removed)] = False
        trial = ranking.with_gates(circuit, smaller)
        passes = criterion.passes(trial, data.some, quick=True)
        if passes and criterion.passes(trial, data.selection):
            return smaller
    return None
