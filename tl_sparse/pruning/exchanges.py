"""Trying nodes outside a circuit in place of two of its own.

Learned gates close together, and a node that could do the work of two others may close before it
shows. These trials, each of which runs the circuit, find such nodes.
"""

from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import counted
from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.criterion import Criterion, SearchData, few_of
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import slopes_at

#: For each node outside, so many pairs of nodes of the circuit are tried.
_PAIRS_TRIED = 3
#: Of a large circuit, the effects of only so many nodes are measured, each of which takes a run.
_MOST_MEASURED = 64
#: After an exchange, the effects of only so many are measured again, those that matter least.
_MEASURED_AGAIN = 8


def exchanged(
    circuit: Circuit, ranking: Ranking, criterion: Criterion, data: SearchData, progress: bool
) -> Circuit:
    """The circuit, in which two nodes at a time are replaced by one, as long as it passes.

    Nodes outside are tried in the order of how much they would lower the loss, to first order.
    """
    n_tried = criterion.config.exchanges
    with phase("exchanging nodes", progress, n_tried, "node") as bar:
        exchanges = _Exchanges(circuit, ranking, criterion, data, bar)
        while n_tried > 0:
            n_before = exchanges.n_tried
            found = exchanges.exchange_one(n_tried)
            if not found:
                break
            n_tried -= exchanges.n_tried - n_before
    return ranking.with_gates(circuit, exchanges.kept)


class _Exchanges:
    """Exchanges of nodes in one circuit.

    Attributes:
        kept: the gates of the circuit's nodes, after the exchanges so far.
        tried: the gates of nodes outside that have been tried.
        rises: gate of the circuit → the loss without its node, less the loss with it; lowest first.
        loss: the loss on a few pairs before the exchange that is being tried.
        left: the nodes outside that are left as they are when losses are measured: of a robust
            circuit, the subset that made one fail most recently when the effects were measured.
    """

    def __init__(
        self,
        circuit: Circuit,
        ranking: Ranking,
        criterion: Criterion,
        data: SearchData,
        bar: Any,
    ) -> None:
        self.circuit = circuit
        self.ranking = ranking
        self.criterion = criterion
        self.data = data
        self.few = few_of(data.some)
        self.bar = bar
        self.kept = ranking.gates.of_nodes(circuit.kept)
        self.tried = torch.zeros_like(self.kept)
        self.rises: dict[int, float] = {}
        self.loss = torch.inf
        self.left: NodeMasks | None = None

    @property
    def n_tried(self) -> int:
        """The number of nodes outside that have been tried."""
        return int(self.tried.sum())

    def exchange_one(self, n_most: int) -> bool:
        """Try nodes outside, at most so many, until one is exchanged; whether one was.

        An exchange changes what all other nodes do, so their effects are then estimated again.
        """
        self.left = self.criterion.hardest
        slopes = self._slopes()
        self._measure_rises(slopes)
        for added in self._outside(slopes)[:n_most]:
            self.tried[added] = True
            self.bar.update()
            if self._exchange(added):
                return True
        return False

    def _slopes(self) -> Float[Tensor, " gate"]:
        pairs = few_of(self.data.train)
        return slopes_at(self.kept, self.ranking, self.criterion, pairs, self.left)

    def _outside(self, slopes: Float[Tensor, " gate"]) -> list[int]:
        """The gates outside that have not been tried, those that lower the loss most first."""
        is_tried_next = ~(self.kept | self.tried | self.ranking.fixed.excluded) & (slopes < 0)
        steepest_first = slopes.argsort()
        return steepest_first[is_tried_next[steepest_first]].tolist()

    def _measure_rises(self, slopes: Float[Tensor, " gate"]) -> None:
        """Measure `rises` of all nodes or, after an exchange, of those that matter least.

        Gates whose nodes are always used are left out, and so are those of a large circuit whose
        nodes matter most to first order.
        """
        if self.rises:
            gates = list(self.rises)[:_MEASURED_AGAIN]
        else:
            can_be_removed = self.kept & ~self.ranking.fixed.included
            flattest_first = slopes.argsort(descending=True)
            gates = flattest_first[can_be_removed[flattest_first]][:_MOST_MEASURED].tolist()
        self.loss = self._loss(self.kept)
        for gate in gates:
            self.rises[gate] = self._loss(self._changed(removed=[gate])) - self.loss
        self.rises = dict(sorted(self.rises.items(), key=lambda item: item[1]))

    def _exchange(self, added: int) -> bool:
        """Add one gate and remove two, if that passes."""
        gain = self.loss - self._loss(self._changed(added=[added]))
        # With the new node, others may matter less than before: twice its gain allows for that.
        room = self.criterion.config.target_loss - self.loss + 2 * gain
        for pair in islice(_pairs_within(self.rises, room), _PAIRS_TRIED):
            kept = self._changed(added=[added], removed=pair)
            circuit = self.ranking.with_gates(self.circuit, kept)
            if not self.criterion.passes_quickly(circuit, self.data.some):
                continue
            if self.criterion.passes(circuit, self.data.selection):
                self.kept = kept
                for gate in pair:
                    del self.rises[gate]
                self.bar.set_postfix_str(counted(int(kept.sum()), "node"))
                return True
        return False

    def _changed(
        self, added: list[int] | None = None, removed: list[int] | None = None
    ) -> Bool[Tensor, " gate"]:
        kept = self.kept.clone()
        kept[added or []] = True
        kept[removed or []] = False
        return kept

    def _loss(self, kept: Bool[Tensor, " gate"]) -> float:
        circuit = self.ranking.with_gates(self.circuit, kept)
        return self.criterion.loss(circuit, self.few, self.left)


def _pairs_within(rises: dict[int, float], room: float) -> Iterator[list[int]]:
    """Two gates each, whose rises add up to at most `room`; low ones first."""
    for first, second in combinations(rises, 2):
        if rises[first] + rises[second] <= room:
            yield [first, second]
