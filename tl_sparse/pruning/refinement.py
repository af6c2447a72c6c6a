"""Making a circuit smaller by changes that are tried one by one.

Gates are learned all together, so some remain open although no kept node reads their node, or
another node has taken over its function. Here nodes are removed, and nodes outside are tried in
place of two of the circuit's own. Each change alters what all other nodes do. So their effects are
then measured again, and both go on in turns until neither makes the circuit smaller.
"""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import counted
from tl_sparse.pruning.criterion import Criterion, SearchData
from tl_sparse.pruning.effects import Effects
from tl_sparse.pruning.elimination import Budget, eliminate
from tl_sparse.pruning.exchanges import exchanged
from tl_sparse.pruning.groups import without_groups
from tl_sparse.pruning.phases import phase, say_reached
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.tasks import TaskData

#: A node is tried if without it, the loss on a few pairs is at most the target times this. On all
#: pairs, it may be lower.
_ALLOWANCE = 1.25


def refined(
    circuit: Circuit,
    ranking: Ranking,
    criterion: Criterion,
    train: TaskData,
    selection: TaskData,
    progress: bool = False,
) -> Circuit:
    """A circuit that is at least as small, and passes the criterion as the given one does."""
    kept = ranking.gates.of_nodes(circuit.kept)
    with phase("removing nodes", progress) as bar:
        refinement = Refinement(kept, ranking, criterion, train, selection, bar)
        refinement.remove_groups()
        refinement.remove_superfluous()
        while refinement.exchange():
            refinement.remove_superfluous()
        circuit = ranking.of_gates(refinement.kept)
        if progress:
            say_reached(bar, circuit.n_nodes, criterion.loss(circuit, selection), "selection")
    return circuit


class Refinement:
    """The changes to one circuit.

    Args:
        kept: the gates of the circuit, which passes the criterion.
        ranking: the gates of all nodes.
        criterion: what the circuit must pass after each change.
        train, selection: see `SearchData`.
        bar: a progress bar of the circuits that are tried.

    Attributes:
        kept: the gates of the circuit after the changes so far.
        data: the pairs on which changes to this circuit are tried.
        budget: how many circuits may still be tried while nodes are removed.
    """

    def __init__(
        self,
        kept: Bool[Tensor, " gate"],
        ranking: Ranking,
        criterion: Criterion,
        train: TaskData,
        selection: TaskData,
        bar: Any,
    ) -> None:
        self.ranking = ranking
        self.criterion = criterion
        self.bar = bar
        self.budget = Budget(criterion.config.removal_tests)
        self.kept = kept
        self.data = SearchData.around(ranking.of_gates(kept), criterion, train, selection)

    def remove_groups(self) -> None:
        """Remove groups of nodes from a large circuit."""
        kept = without_groups(
            self.kept, self.ranking, self.criterion, self.data, self.budget, self.bar
        )
        self._change_to(kept)

    def remove_superfluous(self) -> None:
        """Remove single nodes that the circuit does not need.

        Those that it needs least are removed first. What the others do is then measured again,
        until none can be removed.
        """
        while not self.budget.is_spent:
            removed = self._removable()
            if not removed:
                break
            kept = self.kept.clone()
            kept[removed] = False
            self._change_to(kept)

    def exchange(self) -> bool:
        """Put nodes from outside in the place of two of the circuit's own; whether any were."""
        kept = exchanged(self.kept, self.ranking, self.criterion, self.data, self.bar)
        return self._change_to(kept)

    def _change_to(self, kept: Bool[Tensor, " gate"]) -> bool:
        """Go on with another circuit; whether it is another."""
        if torch.equal(kept, self.kept):
            return False
        self.kept = kept
        circuit = self.ranking.of_gates(kept)
        data = self.data
        self.data = SearchData.around(circuit, self.criterion, data.train, data.selection)
        self.bar.set_postfix_str(counted(circuit.n_nodes, "node"))
        return True

    def _removable(self) -> list[int]:
        """Gates that can be removed together, of those that the circuit needs least."""
        criterion, data = self.criterion, self.data
        effects = Effects(self.kept, self.ranking, criterion, data)
        room = _ALLOWANCE * criterion.config.target_loss - effects.loss
        rises = effects.rises(effects.least_needed())
        candidates = [gate for gate, rise in rises.items() if rise <= max(room, 0)]

        def without(gone: list[int]) -> Circuit:
            rest = self.kept.clone()
            rest[gone] = False
            return self.ranking.of_gates(rest)

        def passes_quickly(gone: list[int]) -> bool:
            self.bar.update()
            return criterion.passes_quickly(without(gone), data.some)

        def passes(gone: list[int]) -> bool:
            return criterion.passes(without(gone), data.selection)

        return eliminate(candidates, passes_quickly, passes, budget=self.budget)
