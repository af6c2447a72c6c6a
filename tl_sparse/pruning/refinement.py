"""Making a circuit smaller by changes that are tried one by one.

Gates are learned all together, so some remain open although no kept node reads their node, or
another node has taken over its function. Here nodes are removed, and nodes outside are tried in
place of two of the circuit's own. Each change alters what all other nodes do. So their effects are
then measured again, and both go on in turns until neither makes the circuit smaller.
"""

from typing import Any

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
    data = SearchData.around(circuit, criterion, train, selection)
    budget = Budget(criterion.config.removal_tests)
    kept = ranking.gates.of_nodes(circuit.kept)
    with phase("removing nodes", progress) as bar:
        kept = without_groups(kept, ranking, criterion, data, budget, bar)
        while True:
            kept = without_superfluous(kept, ranking, criterion, data, budget, bar)
            data = SearchData.around(ranking.of_gates(kept), criterion, train, selection)
            smaller = exchanged(kept, ranking, criterion, data, bar)
            if int(smaller.sum()) == int(kept.sum()):
                break
            kept = smaller
        circuit = ranking.of_gates(kept)
        if progress:
            say_reached(bar, circuit.n_nodes, criterion.loss(circuit, selection), "selection")
    return circuit


def without_superfluous(
    kept: Bool[Tensor, " gate"],
    ranking: Ranking,
    criterion: Criterion,
    data: SearchData,
    budget: Budget,
    bar: Any,
) -> Bool[Tensor, " gate"]:
    """The gates of a circuit, without those of nodes that it does not need.

    Those that it needs least are removed first. What the others do is then measured again, until
    none can be removed.

    Args:
        kept: the gates of the circuit, which passes the criterion.
        budget: how many circuits may still be tried.
        bar: a progress bar of the circuits that are tried.
    """
    while not budget.is_spent:
        data = SearchData.around(ranking.of_gates(kept), criterion, data.train, data.selection)
        removed = _removed(kept, ranking, criterion, data, budget, bar)
        if not removed:
            break
        kept = kept.clone()
        kept[removed] = False
        bar.set_postfix_str(counted(int(kept.sum()), "node"))
    return kept


def _removed(
    kept: Bool[Tensor, " gate"],
    ranking: Ranking,
    criterion: Criterion,
    data: SearchData,
    budget: Budget,
    bar: Any,
) -> list[int]:
    """Gates that can be removed together, of those that the circuit needs least."""
    effects = Effects(ranking, criterion, data)
    rises = effects.rises(kept, effects.least_needed(kept, effects.slopes(kept)))
    room = _ALLOWANCE * criterion.config.target_loss - effects.loss(kept)
    candidates = [gate for gate, rise in rises.items() if rise <= max(room, 0)]

    def without(gone: list[int]) -> Circuit:
        rest = kept.clone()
        rest[gone] = False
        return ranking.of_gates(rest)

    def passes_quickly(gone: list[int]) -> bool:
        bar.update()
        return criterion.passes_quickly(without(gone), data.some)

    def passes(gone: list[int]) -> bool:
        return criterion.passes(without(gone), data.selection)

    return eliminate(candidates, passes_quickly, passes, budget=budget)
