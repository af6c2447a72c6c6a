"""Removing from a large circuit what it does not need, in groups led by gradients.

A test of each node alone takes as many runs of the model as there are nodes, which are tens of
thousands in a dense model. One gradient estimates the effect of them all, and those with the least
are removed together. Removal changes the effects of the others, so these are then estimated again.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import counted
from tl_sparse.pruning.criterion import Criterion, SearchData, representative
from tl_sparse.pruning.elimination import Budget
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import slopes_at
from tl_sparse.tasks import TaskData

#: Circuits of at most so many nodes lose them one by one, or a few at once, which finds small
#: circuits in about as many tests.
SMALL = 512
#: The largest share of a circuit that is removed at once: the estimates hold for small changes.
_MOST = 1 / 4
#: If not even this share can be removed, the estimates are of no more use.
_LEAST = 1 / 128
#: In each round, the loss may rise by this share of what is left up to the target, or the first
#: groups would leave no room for others.
_ROOM = 1 / 3
#: Effects are estimated on at most so many pairs, each of which takes a run forward and backward.
_PAIRS = 16


def without_groups(
    kept: Bool[Tensor, " gate"],
    ranking: Ranking,
    criterion: Criterion,
    data: SearchData,
    budget: Budget,
    bar: Any,
) -> Bool[Tensor, " gate"]:
    """The gates of a circuit, without those that can be removed in groups.

    Args:
        kept: the gates of the circuit, which passes the criterion.
        budget: how many circuits may still be tried.
        bar: a progress bar of the circuits that are tried.
    """
    groups = _Groups(kept, ranking, criterion, data, budget, bar)
    n_nodes = int(kept.sum())
    while n_nodes > SMALL and groups.remove_one():
        n_nodes = int(groups.kept.sum())
        bar.set_postfix_str(counted(n_nodes, "node"))
    return groups.kept


class _Groups:
    """The removal of groups of nodes from one circuit.

    Attributes:
        kept: the gates of the circuit that is left.
        share: the share of its nodes that is removed next, if it can be.
    """

    def __init__(
        self,
        kept: Bool[Tensor, " gate"],
        ranking: Ranking,
        criterion: Criterion,
        data: SearchData,
        budget: Budget,
        bar: Any,
    ) -> None:
        self.kept = kept
        self.ranking = ranking
        self.criterion = criterion
        self.data = data
        self.budget = budget
        self.bar = bar
        self.share = _MOST
        self.generator = torch.Generator().manual_seed(criterion.config.seed)

    def remove_one(self) -> bool:
        """Remove the nodes of least effect, as large a share as passes; whether any were.

        The share is halved until it passes, and is then twice as large in the next round.
        """
        least_first = self._least_effect_first()
        whole = self.ranking.of_gates(self.kept)
        some_pairs = representative(whole, self.criterion, self.data.selection)
        while self.share >= _LEAST:
            group = least_first[: int(self.share * len(least_first))]
            if len(group) == 0 or not self.budget.take():
                return False
            self.bar.update()
            kept = self.kept.clone()
            kept[group] = False
            circuit = self.ranking.of_gates(kept)
            stricter = self._stricter(whole, some_pairs)
            if stricter.passes_quickly(circuit, some_pairs) and self.criterion.passes(
                circuit, self.data.selection
            ):
                self.kept = kept
                self.share = min(_MOST, 2 * self.share)
                return True
            self.share /= 2
        return False

    def _stricter(self, whole: Circuit, some_pairs: TaskData) -> Criterion:
        """The criterion with a lower target, which the circuit before the removal still reaches.

        Its loss is that under the worst of what a quick test tries, which can be another subset
        after each test.
        """
        losses = []
        for left in self.criterion.quick_conditions:
            losses.append(self.criterion.loss(whole, some_pairs, left))
        room = _ROOM * (self.criterion.config.target_loss - max(losses))
        return self.criterion.with_target(max(losses) + max(0.0, room))

    def _least_effect_first(self) -> Int[Tensor, " removable"]:
        """The gates that may be removed, those of least effect first.

        The effect is the mean magnitude over pairs. The magnitude of the mean would not do: a node
        that raises the loss at some pairs and lowers it at others has an effect on both. For the
        same reason, pairs take turns with what is left: a node can do nothing while all others are
        held, and much under a subset.
        """
        train = self.data.train
        n_pairs = min(_PAIRS, self.criterion.config.ranking_pairs, train.n_pairs)
        drawn = torch.randperm(train.n_pairs, generator=self.generator)[:n_pairs]
        effects = torch.zeros_like(self.ranking.gates.tau)
        conditions = self.criterion.quick_conditions
        for i, pair in enumerate(drawn.split(1)):
            left = conditions[i % len(conditions)]
            pairs = train.pairs(pair)
            effects += slopes_at(self.kept, self.ranking, self.criterion, pairs, left).abs()
        is_removable = self.kept & ~self.ranking.fixed.included
        least_first = effects.argsort()
        return least_first[is_removable[least_first]]
