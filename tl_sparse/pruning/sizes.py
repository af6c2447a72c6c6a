"""Finding the smallest circuit that reaches the target loss, given a ranking of the nodes."""

import dataclasses
import math
from typing import Any

from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import PruneError, counted
from tl_sparse.pruning.adversaries import n_attacks, succeeding_attack
from tl_sparse.pruning.criterion import Criterion, representative
from tl_sparse.pruning.groups import SMALL
from tl_sparse.pruning.phases import phase, say_reached
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.refinement import refined
from tl_sparse.pruning.repair import MOST_REPAIRS, MOST_ROUNDS, OuterNodes, repaired
from tl_sparse.tasks import TaskData

#: The factor between successive sizes while the search moves outwards from the learned size.
SIZE_FACTOR = 1.3
#: Where nodes are removed in groups afterwards, the size may be too large by this share: gradients
#: tell what a circuit can do without better than the ranking, as long as its loss leaves room.
TOLERANCE = 0.25
#: Circuits of more nodes are made smaller again after they were mended. Of one with 273 nodes, this
#: left 225, and of circuits with 34 and 70, all.
_LARGE = 100


def discretise(
    ranking: Ranking,
    criterion: Criterion,
    train: TaskData,
    selection: TaskData,
    progress: bool = False,
    is_refined: bool = True,
) -> Circuit:
    """The smallest circuit of top-ranked nodes on the selection pairs (A.5).

    With learned gates, it is then made smaller by changes that are tried one by one. If it must
    withstand adversaries, fresh ones attack it. After each that succeeds, its subset is added to
    those of the criterion, and the search begins again at the size that had been chosen. A robust
    circuit at last gets the nodes that it needs under fresh random subsets.

    Args:
        is_refined: whether it is made smaller after its size is chosen.

    Raises:
        PruneError: if not even the set of all nodes passes the criterion.
    """
    config = criterion.config
    is_refined = is_refined and config.method == "learned"
    tolerance = TOLERANCE if is_refined else 0.0

    def smallest(start: int | None = None) -> tuple[int, Circuit]:
        size = _chosen_size(ranking, criterion, selection, progress, start, tolerance)
        circuit = ranking.circuit(size)
        if is_refined:
            circuit = refined(circuit, ranking, criterion, train, selection, progress)
        return size, circuit

    size, circuit = smallest()
    for attack in range(n_attacks(config)):
        subset = succeeding_attack(circuit, criterion, train, selection, attack, progress)
        if subset is not None:
            criterion.add(subset)
            size, circuit = smallest(size)
    if is_refined:
        circuit = _mended(circuit, ranking, criterion, train, selection, progress)
    return dataclasses.replace(circuit, scores=_scores(ranking, circuit))


def _mended(
    circuit: Circuit,
    ranking: Ranking,
    criterion: Criterion,
    train: TaskData,
    selection: TaskData,
    progress: bool,
) -> Circuit:
    """The circuit with the nodes that it needs under fresh subsets.

    A large one is then made smaller once more, and mended again, as long as that helps: its search
    kept the hardest of all subsets that it met, which ask for more nodes than others do.
    """
    nodes = OuterNodes(circuit, ranking, criterion, train)
    mended = repaired(nodes, criterion, selection, progress=progress)
    for repair in range(1, MOST_REPAIRS):
        if criterion.config.robust == "none" or mended.n_nodes <= _LARGE:
            break
        criterion.begin_again()
        smaller = refined(mended, ranking, criterion, train, selection, progress)
        nodes = OuterNodes(smaller, ranking, criterion, train)
        smaller = repaired(nodes, criterion, selection, repair * MOST_ROUNDS, progress)
        if smaller.n_nodes >= mended.n_nodes:
            break
        mended = smaller
    return mended


def _scores(ranking: Ranking, circuit: Circuit) -> dict[str, Tensor]:
    """A score of each node, by which those of the circuit rank above all others."""
    scores: dict[str, Tensor] = {}
    for name, tau in ranking.gates.at_nodes(ranking.comparable_tau()).items():
        scores[name] = tau + 2 * circuit.kept[name]  # tau is in [-1, 1]
    return scores


def _chosen_size(
    ranking: Ranking,
    criterion: Criterion,
    selection: TaskData,
    progress: bool,
    start: int | None,
    tolerance: float,
) -> int:
    """`_smallest_size` with a progress bar."""
    with phase("choosing the size", progress) as bar:
        size = _smallest_size(ranking, criterion, selection, bar, start, tolerance)
        if progress:  # the loss takes a run over all pairs, and is only shown
            loss = criterion.loss(ranking.circuit(size), selection)
            say_reached(bar, size, loss, "selection")
    return size


def _smallest_size(
    ranking: Ranking,
    criterion: Criterion,
    selection: TaskData,
    bar: Any,
    start: int | None,
    tolerance: float,
) -> int:
    """The smallest number of top-ranked nodes that pass the criterion.

    It is found by bisection between a size that is too small and a size that is enough. Both are
    searched outwards from the learned size, because the loss is nearly monotonic there, but not
    over the whole ranking.

    Args:
        start: where the search begins; by default at the learned size.
        tolerance: the share by which the size of a large circuit may be larger than the smallest.
    """

    def is_enough(size: int, pairs: TaskData, quick: bool) -> bool:
        bar.set_postfix_str(f"trying {counted(size, 'node')}")
        bar.update()
        test = criterion.passes_quickly if quick else criterion.passes
        return test(ranking.circuit(size), pairs)

    smallest, largest = ranking.smallest, ranking.largest
    enough = start or int((ranking.gates.tau > 0).sum())
    enough = min(largest, max(smallest, enough))
    too_small = smallest - 1
    while not is_enough(enough, selection, quick=False):
        if enough == largest:
            raise _failure_of_all(ranking, criterion, selection)
        too_small = enough
        enough = min(largest, math.ceil(enough * SIZE_FACTOR))
    surely_enough = enough
    some_pairs = representative(ranking.circuit(enough), criterion, selection)
    while enough - too_small > _steps_within(tolerance, enough):
        # Until a size is known to be too small, the search moves down from the learned size.
        size = (enough + too_small) // 2
        if too_small == smallest - 1:
            size = max(smallest, int(enough / SIZE_FACTOR))
        if is_enough(size, some_pairs, quick=True):
            enough = size
        else:
            too_small = size
    # A size that is enough on some of the pairs may be too small on all of them.
    while enough < surely_enough and not is_enough(enough, selection, quick=False):
        enough = min(surely_enough, enough + math.ceil(enough / 20))
    return enough


def _steps_within(tolerance: float, size: int) -> int:
    """How much smaller a size must be to be worth a test."""
    return 1 if size <= SMALL else max(1, int(tolerance * size))


def _failure_of_all(ranking: Ranking, criterion: Criterion, selection: TaskData) -> PruneError:
    """The error if no tried size passes, not even the largest."""
    circuit = ranking.circuit(ranking.largest)
    loss = criterion.loss(circuit, selection)
    config = criterion.config
    under = ""
    if loss <= config.target_loss and criterion.hardest is not None:
        loss = criterion.loss(circuit, selection, criterion.hardest)
        under = " while some nodes outside are left as they are"
    largest = f"all {ranking.largest} nodes"
    if config.max_nodes == ranking.largest:
        largest = f"the {counted(ranking.largest, 'node')} that max_nodes allows"
    message = (
        f"no circuit was found at any size that was tried, up to {largest}: with these, the loss "
        f"is {loss:.3f}{under} (it must be at most {config.target_loss})"
    )
    if config.ablated_accuracy < 1:
        accuracy = criterion.ablated_accuracy(circuit, selection)
        message += (
            f", and the accuracy of the model without them is {accuracy:.1%} (it must be at most "
            f"{config.ablated_accuracy:.1%})"
        )
    return PruneError(message)
