"""What single nodes do for the loss of a circuit, measured on a few pairs."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.criterion import Criterion, SearchData, few_of, few_per_subset
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import slopes_at

#: Of a robust circuit, effects are measured under so many subsets, those that have made one fail
#: most recently. A node that does nothing under one of them may do much under another.
_MOST_SUBSETS = 3
#: Of a large circuit, the effects of only so many nodes are measured, each of which takes a run.
_MOST_MEASURED = 64


class Effects:
    """What the nodes of one circuit do for its loss.

    Circuits are given by the gates of their nodes.

    Args:
        kept: the gates of the circuit.
        ranking: the gates of all nodes.
        criterion: what the circuit must pass.
        data: the pairs, of which only a few are used.

    Attributes:
        lefts: the nodes outside that are left as they are while losses are measured. All losses
            are means over these.
        loss: the loss of the circuit.
        slopes: the change of the loss when each gate opens, to first order.
    """

    def __init__(
        self,
        kept: Bool[Tensor, " gate"],
        ranking: Ranking,
        criterion: Criterion,
        data: SearchData,
    ) -> None:
        self.kept = kept
        self.ranking = ranking
        self.criterion = criterion
        self.lefts: list[NodeMasks | None] = [None]
        few = few_of
        if criterion.subsets:
            self.lefts = [*criterion.subsets[:_MOST_SUBSETS]]
            few = few_per_subset
        self._pairs = few(data.some)
        self.loss = self.loss_of(kept)
        self.slopes: Float[Tensor, " gate"] = torch.zeros_like(ranking.gates.tau)
        for left in self.lefts:
            slopes = slopes_at(kept, ranking, criterion, few(data.train), left)
            self.slopes += slopes / len(self.lefts)

    def loss_of(self, kept: Bool[Tensor, " gate"]) -> float:
        """The loss of another circuit, with the same nodes left."""
        return self._loss(kept, self.lefts)

    def least_needed(self) -> list[int]:
        """The gates that the circuit needs least to first order, of those that may be removed.

        There are at most as many as are measured in a large circuit.
        """
        may_be_removed = self.kept & ~self.ranking.fixed.included
        least_needed_first = self.slopes.argsort(descending=True)
        gates: list[int] = least_needed_first[may_be_removed[least_needed_first]].tolist()
        return gates[:_MOST_MEASURED]

    def rises(self, gates: Sequence[int]) -> dict[int, float]:
        """Gate → the loss of the circuit without it, less the loss with it; lowest first.

        Its node is held, also if it is one of those that are left when they are outside.
        """
        rises = {}
        for gate in gates:
            without = self.kept.clone()
            without[gate] = False
            lefts = [self._but(gate, left) for left in self.lefts]
            rises[gate] = self._loss(without, lefts) - self.loss
        return lowest_first(rises)

    def _loss(self, kept: Bool[Tensor, " gate"], lefts: Sequence[NodeMasks | None]) -> float:
        circuit = self.ranking.of_gates(kept)
        losses = [self.criterion.loss(circuit, self._pairs, left) for left in lefts]
        return sum(losses) / len(losses)

    def _but(self, gate: int, left: NodeMasks | None) -> NodeMasks | None:
        """The nodes that are left, without that of the gate."""
        if left is None:
            return None
        opened = self.ranking.gates.of_nodes(left)
        opened[gate] = False
        return self.ranking.gates.at_nodes(opened)


def lowest_first(rises: dict[int, float]) -> dict[int, float]:
    """The same rises, in increasing order."""
    return dict(sorted(rises.items(), key=lambda item: item[1]))
