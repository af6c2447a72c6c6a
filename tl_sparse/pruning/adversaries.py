"""Fresh adversaries that attack a circuit which must withstand them."""

import math

from tl_sparse.circuits import Circuit
from tl_sparse.evaluation import learned_subset
from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion, evenly
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.seeds import seed_of_attack
from tl_sparse.tasks import TaskData


def n_attacks(config: PruneConfig) -> int:
    """The number of times that a fresh adversary attacks a circuit."""
    return config.adversaries if config.robust == "adversary" else 0


def succeeding_attack(
    circuit: Circuit,
    criterion: Criterion,
    train: TaskData,
    selection: TaskData,
    attack: int,
    progress: bool,
) -> NodeMasks | None:
    """The nodes outside the circuit that a fresh adversary leaves as they are, if that raises the
    loss above the target; else None.

    Args:
        train: the pairs on which it learns.
        selection: the pairs on which the circuit is then tried.
        attack: the number of the attack, which decides its seed.
    """
    config = criterion.config
    n_outside = circuit.n_candidates - circuit.n_nodes
    with phase("training an adversary", progress, total=1) as bar:
        subset = learned_subset(
            circuit,
            criterion.model,
            train,
            math.ceil(config.adversary_budget * n_outside),
            config.ablation,
            config.objective,
            steps=config.adversary_steps,
            seed=seed_of_attack(config.seed, attack),
        )
        some_pairs = evenly(selection, config.subset_pairs)
        is_withstood = criterion.withstands(circuit, some_pairs, subset)
        bar.update()
    return None if is_withstood else subset
