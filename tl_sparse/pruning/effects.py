"""What single nodes do for the loss of a circuit, measured on a few pairs."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.criterion import Criterion, SearchData, few_of
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import slopes_at

#: Of a large circuit, the effects of only so many nodes are measured, each of which takes a run.
_MOST_MEASURED = 64


class Effects:
    """Measures losses of circuits, and how much the loss of one depends on single nodes.

    Circuits are given by the gates of their nodes, which may be any gates of the ranking.

    Attributes:
        left: the nodes outside that are left as they are while losses are measured: of a robust
            circuit, the subset that has made one fail most recently.
    """

    def __init__(self, ranking: Ranking, criterion: Criterion, data: SearchData) -> None:
        self.ranking = ranking
        self.criterion = criterion
        self.left = criterion.hardest
        self._pairs = few_of(data.some)
        self._pairs_of_slopes = few_of(data.train)

    def loss(self, kept: Bool[Tensor, " gate"]) -> float:
        """The loss of a circuit."""
        return self.criterion.loss(self.ranking.of_gates(kept), self._pairs, self.left)

    def slopes(self, kept: Bool[Tensor, " gate"]) -> Float[Tensor, " gate"]:
        """The change of the loss when each gate opens, to first order."""
        pairs = self._pairs_of_slopes
        return slopes_at(kept, self.ranking, self.criterion, pairs, self.left)

    def least_needed(
        self, kept: Bool[Tensor, " gate"], slopes: Float[Tensor, " gate"]
    ) -> list[int]:
        """The gates that the circuit needs least to first order, of those that may be removed.

        There are at most as many as are measured in a large circuit.
        """
        may_be_removed = kept & ~self.ranking.fixed.included
        least_needed_first = slopes.argsort(descending=True)
        gates: list[int] = least_needed_first[may_be_removed[least_needed_first]].tolist()
        return gates[:_MOST_MEASURED]

    def rises(self, kept: Bool[Tensor, " gate"], gates: Sequence[int]) -> dict[int, float]:
        """Gate → the loss of the circuit without it, less the loss with it; lowest first.

        Its node is held, also if it is one of those that are left when they are outside.
        """
        loss = self.loss(kept)
        rises = {}
        for gate in gates:
            without = kept.clone()
            without[gate] = False
            circuit = self.ranking.of_gates(without)
            left = self._left_but(gate)
            rises[gate] = self.criterion.loss(circuit, self._pairs, left) - loss
        return lowest_first(rises)

    def _left_but(self, gate: int) -> NodeMasks | None:
        """The nodes that are left, without that of the gate."""
        if self.left is None:
            return None
        left = self.ranking.gates.of_nodes(self.left)
        left[gate] = False
        return self.ranking.gates.at_nodes(left)


def lowest_first(rises: dict[int, float]) -> dict[int, float]:
    """The same rises, in increasing order."""
    return dict(sorted(rises.items(), key=lambda item: item[1]))
