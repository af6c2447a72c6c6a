"""Repairing a robust circuit that fails under random subsets that its search has not tried.

Each change of a search is tried under some dozens of random subsets of the nodes outside. What is
left after thousands of changes just passes under all of these, and fails under more of the others
than the dozens would suggest. So it is at last tried under fresh ones, and where it fails, nodes
are added. They are chosen for the subsets that were just tried, so that the next round is one of
other subsets, until a circuit has passed a round as it is.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import counted
from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.criterion import Criterion, evenly
from tl_sparse.pruning.phases import phase, say_reached
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import slopes_at
from tl_sparse.tasks import TaskData

#: Each time, so many of the nodes outside are tried, and the best one is added.
_NODES_TRIED = 4
#: After so many rounds there is no progress: few subsets are left that make a circuit fail.
_MOST_ROUNDS = 6


def repaired(
    circuit: Circuit,
    ranking: Ranking,
    criterion: Criterion,
    train: TaskData,
    selection: TaskData,
    progress: bool = False,
) -> Circuit:
    """The circuit with nodes added, if it misses the target loss under fresh random subsets.

    If it then no longer passed the criterion, the given circuit is returned.

    Args:
        criterion: what the circuit passes. With robust="none" nothing is added.
        train: the pairs on which the nodes that could be added are ranked.
        selection: the pairs on which circuits are tried.
    """
    config = criterion.config
    if config.robust == "none" or config.fresh_subsets == 0:
        return circuit
    met: list[NodeMasks] = []  # those that have made it fail
    with phase("trying fresh subsets", progress, unit="subset") as bar:
        repair = _Repair(circuit, ranking, criterion, train, selection, bar)
        for i in range(_MOST_ROUNDS):
            failing_again = repair.failing(met)
            failing = repair.failing(criterion.fresh_subsets(circuit, i))
            if not failing and not failing_again:
                break
            for subset in [*failing_again, *failing]:
                repair.mend(subset)
            met += failing
        if repair.n_added and criterion.passes(repair.circuit, selection, n_others=0):
            circuit = repair.circuit
        if progress:
            say_reached(bar, circuit.n_nodes, criterion.loss(circuit, selection), "selection")
    return circuit


class _Repair:
    """The nodes that are added to one circuit.

    Attributes:
        circuit: the circuit with the nodes added so far.
        n_added: their number.
    """

    def __init__(
        self,
        circuit: Circuit,
        ranking: Ranking,
        criterion: Criterion,
        train: TaskData,
        selection: TaskData,
        bar: Any,
    ) -> None:
        self.circuit = circuit
        self.n_added = 0
        self._kept = ranking.gates.of_nodes(circuit.kept)
        self._ranking = ranking
        self._criterion = criterion
        self._train = evenly(train, criterion.config.subset_pairs)
        self._selection = evenly(selection, criterion.config.subset_pairs)
        self._bar = bar

    def failing(self, subsets: Sequence[NodeMasks]) -> list[NodeMasks]:
        """The subsets under which the circuit misses the target loss."""
        failing = []
        for subset in subsets:
            if not self._withstands(subset):
                failing.append(subset)
            self._bar.update()
        return failing

    def mend(self, subset: NodeMasks) -> None:
        """Add nodes until the circuit reaches the target loss under this subset, if any can help.

        The circuit grows up to the largest size that the search allows.
        """
        while not self._withstands(subset):
            candidates = self._steepest(subset)
            if not candidates or int(self._kept.sum()) >= self._ranking.largest:
                return
            losses = [self._loss_with(gate, subset) for gate in candidates]
            best = candidates[losses.index(min(losses))]
            self._kept = self._with(best)
            self.circuit = self._ranking.of_gates(self._kept)
            self.n_added += 1
            self._bar.set_postfix_str(counted(self.circuit.n_nodes, "node"))

    def _withstands(self, subset: NodeMasks) -> bool:
        return self._criterion.withstands(self.circuit, self._selection, subset)

    def _steepest(self, subset: NodeMasks) -> list[int]:
        """Gates outside that would lower the loss most under this subset, to first order."""
        slopes: Float[Tensor, " gate"] = slopes_at(
            self._kept, self._ranking, self._criterion, self._train, subset
        )
        may_help = (slopes < 0) & ~self._kept & ~self._ranking.fixed.excluded
        steepest_first = slopes.argsort()
        gates: list[int] = steepest_first[may_help[steepest_first]].tolist()
        return gates[:_NODES_TRIED]

    def _loss_with(self, gate: int, subset: NodeMasks) -> float:
        circuit = self._ranking.of_gates(self._with(gate))
        return self._criterion.loss(circuit, self._selection, subset)

    def _with(self, gate: int) -> Bool[Tensor, " gate"]:
        kept = self._kept.clone()
        kept[gate] = True
        return kept
