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

from tl_sparse.errors import counted
from tl_sparse.pruning.criterion import Criterion, SearchData
from tl_sparse.pruning.effects import Effects, lowest_first
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import steepest_first

#: For each node outside, so many pairs of nodes of the circuit are tried.
_PAIRS_TRIED = 3
#: After an exchange, the effects of only so many are measured again, those that matter least.
_MEASURED_AGAIN = 8


def exchanged(
    kept: Bool[Tensor, " gate"],
    ranking: Ranking,
    criterion: Criterion,
    data: SearchData,
    bar: Any,
) -> Bool[Tensor, " gate"]:
    """The gates of a circuit, two at a time replaced by one, as long as it passes.

    Nodes outside are tried in the order of how much they would lower the loss, to first order.

    Args:
        kept: the gates of the circuit, which passes the criterion.
        bar: a progress bar of the circuits that are tried.
    """
    n_most = criterion.config.exchanges
    exchanges = _Exchanges(kept, ranking, criterion, data, bar)
    while exchanges.n_tried < n_most and exchanges.exchange_one(n_most - exchanges.n_tried):
        pass
    return exchanges.kept


class _Exchanges:
    """Exchanges of nodes in one circuit.

    Attributes:
        kept: the gates of the circuit's nodes, after the exchanges so far.
        tried: the gates of nodes outside that have been tried.
        rises: gate of the circuit → the loss without its node, less the loss with it; lowest first.
    """

    def __init__(
        self,
        kept: Bool[Tensor, " gate"],
        ranking: Ranking,
        criterion: Criterion,
        data: SearchData,
        bar: Any,
    ) -> None:
        self.ranking = ranking
        self.criterion = criterion
        self.data = data
        self.bar = bar
        self.kept = kept
        self.tried = torch.zeros_like(kept)
        self.rises: dict[int, float] = {}

    @property
    def n_tried(self) -> int:
        """The number of nodes outside that have been tried."""
        return int(self.tried.sum())

    def exchange_one(self, n_most: int) -> bool:
        """Try nodes outside, at most so many, until one is exchanged; whether one was.

        An exchange changes what all other nodes do, so their effects are then measured again.
        """
        effects = Effects(self.kept, self.ranking, self.criterion, self.data)
        self._measure_rises(effects)
        for added in self._outside(effects.slopes)[:n_most]:
            self.tried[added] = True
            if self._exchange(added, effects):
                return True
        return False

    def _outside(self, slopes: Float[Tensor, " gate"]) -> list[int]:
        """The gates outside that have not been tried, those that lower the loss most first."""
        may_be_tried = ~(self.kept | self.tried | self.ranking.fixed.excluded)
        return steepest_first(slopes, may_be_tried)

    def _measure_rises(self, effects: Effects) -> None:
        """Measure `rises`; after an exchange, only those of nodes that matter least."""
        if self.rises:
            gates = list(self.rises)[:_MEASURED_AGAIN]
        else:
            gates = effects.least_needed()
        self.rises = lowest_first(self.rises | effects.rises(gates))

    def _exchange(self, added: int, effects: Effects) -> bool:
        """Add one gate and remove two, if that passes."""
        self.bar.update()
        gain = effects.loss - effects.loss_of(self._changed(added=[added]))
        # With the new node, others may matter less than before: twice its gain allows for that.
        room = self.criterion.config.target_loss - effects.loss + 2 * gain
        for pair in islice(_pairs_within(self.rises, room), _PAIRS_TRIED):
            kept = self._changed(added=[added], removed=pair)
            if self._passes(kept):
                self.kept = kept
                for gate in pair:
                    del self.rises[gate]
                self.bar.set_postfix_str(counted(int(kept.sum()), "node"))
                return True
        return False

    def _passes(self, kept: Bool[Tensor, " gate"]) -> bool:
        circuit = self.ranking.of_gates(kept)
        if not self.criterion.passes_quickly(circuit, self.data.some):
            return False
        return self.criterion.passes(circuit, self.data.selection)

    def _changed(
        self, added: list[int] | None = None, removed: list[int] | None = None
    ) -> Bool[Tensor, " gate"]:
        kept = self.kept.clone()
        kept[added or []] = True
        kept[removed or []] = False
        return kept


def _pairs_within(rises: dict[int, float], room: float) -> Iterator[list[int]]:
    """Two gates each, whose rises add up to at most `room`; low ones first."""
    for first, second in combinations(rises, 2):
        if rises[first] + rises[second] <= room:
            yield [first, second]
