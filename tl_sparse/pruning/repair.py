"""Repairing a robust circuit that fails under random subsets that its search has not tried.

Each change of a search is tried under some dozens of random subsets of the nodes outside. What is
left after thousands of changes just passes under all of these, and fails under more of the others
than the dozens would suggest. So it is at last tried under fresh ones, and where it fails, nodes
are added, or edges that were cut. They are chosen for the subsets that were just tried, so that the
next round is one of other subsets, until a circuit has passed a round as it is.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import counted
from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.criterion import Criterion, evenly
from tl_sparse.pruning.phases import phase, say_reached
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import slopes_at, steepest_first
from tl_sparse.tasks import TaskData

Part = TypeVar("Part")

#: Each time, so many of the nodes outside are tried, and the best one is added.
_NODES_TRIED = 4
#: After so many parts that did not lower the loss below what it had been, no other is added for the
#: same subset. One alone may do nothing: a query channel needs its key channel.
_MOST_IN_VAIN = 3
#: After so many rounds there is no progress: few subsets are left that make a circuit fail.
MOST_ROUNDS = 6
#: A search repairs its circuit at most so many times, and removes nodes in between.
MOST_REPAIRS = 3


class Additions(Protocol[Part]):
    """A circuit, and the parts that can be added to it.

    Attributes:
        circuit: the circuit with the parts added so far.
        n_added: their number.
    """

    circuit: Circuit
    n_added: int

    def candidates(self, subset: NodeMasks) -> Sequence[Part]:
        """Parts that may help under this subset; none if nothing may be added."""

    def circuit_with(self, part: Part) -> Circuit:
        """The circuit with this part too."""

    def add(self, part: Part) -> None:
        """Go on with this circuit."""


class OuterNodes:
    """The nodes outside a circuit; see `Additions`.

    Args:
        train: the pairs on which slopes are measured.
    """

    def __init__(
        self, circuit: Circuit, ranking: Ranking, criterion: Criterion, train: TaskData
    ) -> None:
        self.circuit = circuit
        self.n_added = 0
        self._kept = ranking.gates.of_nodes(circuit.kept)
        self._ranking = ranking
        self._criterion = criterion
        self._train = evenly(train, criterion.config.subset_pairs)

    def candidates(self, subset: NodeMasks) -> list[int]:
        """The gates that would lower the loss most under this subset, to first order."""
        if int(self._kept.sum()) >= self._ranking.largest:
            return []
        slopes = slopes_at(self._kept, self._ranking, self._criterion, self._train, subset)
        may_be_added = ~(self._kept | self._ranking.fixed.excluded)
        return steepest_first(slopes, may_be_added)[:_NODES_TRIED]

    def circuit_with(self, part: int) -> Circuit:
        """The circuit with the nodes of this gate too."""
        return self._ranking.of_gates(self._with(part))

    def add(self, part: int) -> None:
        """Go on with this circuit."""
        self._kept = self._with(part)
        self.circuit = self._ranking.of_gates(self._kept)
        self.n_added += 1

    def _with(self, gate: int) -> Bool[Tensor, " gate"]:
        kept = self._kept.clone()
        kept[gate] = True
        return kept


def repaired(
    additions: Additions[Part],
    criterion: Criterion,
    selection: TaskData,
    first_round: int = 0,
    progress: bool = False,
) -> Circuit:
    """The circuit with parts added, if it misses the target loss under fresh random subsets.

    If it then no longer passed the criterion, the given circuit is returned.

    Args:
        criterion: what the circuit passes. With robust="none" nothing is added.
        selection: the pairs on which circuits are tried.
        first_round: the number of rounds of subsets that a search has used before.
    """
    circuit = additions.circuit
    config = criterion.config
    if config.robust == "none":
        return circuit
    some_pairs = evenly(selection, config.subset_pairs)
    met: list[NodeMasks] = []  # those of the round before that made it fail
    with phase("trying fresh subsets", progress, unit="subset") as bar:
        for i in range(first_round, first_round + MOST_ROUNDS):
            # An added part can do harm under the subsets that the circuit had withstood, and those
            # that left the criterion have not been tried for long.
            of_search = _failing(
                criterion.all_subsets, additions.circuit, criterion, some_pairs, bar
            )
            tried = [*met, *criterion.fresh_subsets(circuit, i)]
            met = _failing(tried, additions.circuit, criterion, some_pairs, bar)
            failing = [*of_search, *met]
            if not failing:
                break
            for subset in failing:
                mend(additions, subset, criterion, some_pairs, bar)
        if additions.n_added and criterion.passes(additions.circuit, selection, n_others=0):
            circuit = additions.circuit
        if progress:
            say_reached(bar, circuit.n_nodes, criterion.loss(circuit, selection), "selection")
    return circuit


def _failing(
    subsets: Sequence[NodeMasks],
    circuit: Circuit,
    criterion: Criterion,
    some_pairs: TaskData,
    bar: Any,
) -> list[NodeMasks]:
    """The subsets under which the circuit misses the target loss."""
    failing = []
    for subset in subsets:
        if not criterion.withstands(circuit, some_pairs, subset):
            failing.append(subset)
        bar.update()
    return failing


def mend(
    additions: Additions[Part],
    subset: NodeMasks,
    criterion: Criterion,
    some_pairs: TaskData,
    bar: Any,
) -> None:
    """Add parts until the circuit reaches the target loss under this subset, if any can help."""
    lowest = criterion.loss(additions.circuit, some_pairs, subset)
    n_in_vain = 0
    while n_in_vain < _MOST_IN_VAIN:
        if criterion.withstands(additions.circuit, some_pairs, subset):
            return
        candidates = additions.candidates(subset)
        if not candidates:
            return
        losses = []
        for part in candidates:
            losses.append(criterion.loss(additions.circuit_with(part), some_pairs, subset))
        loss = min(losses)
        additions.add(candidates[losses.index(loss)])
        bar.set_postfix_str(counted(additions.circuit.n_nodes, "node"))
        n_in_vain = 0 if loss < lowest else n_in_vain + 1
        lowest = min(lowest, loss)
