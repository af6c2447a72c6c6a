"""What a circuit withstands besides all other nodes being held."""

from dataclasses import dataclass

from tl_sparse.circuits import Circuit
from tl_sparse.config import MAX_SEED
from tl_sparse.evaluation import adversary_score, subset_scores
from tl_sparse.hooks import TLModel
from tl_sparse.pruning import PruneConfig
from tl_sparse.tasks import TaskData

#: The most nodes that an adversary with a limit may leave as they are.
LIMIT = 30
#: The number of pairs on which each random subset is tried.
_N_PAIRS = 32


@dataclass(frozen=True)
class Robustness:
    """The task loss of a circuit on held-out pairs when not all other nodes are held.

    Attributes:
        subsets_mean, subsets_worst: the mean and the largest loss while random subsets of the other
            nodes are left as they are in the model; see `subset_scores`.
        limited_adversary: the loss while at most `LIMIT` of them are left, which a fresh adversary
            chose.
        adversary: the same without a limit.
    """

    subsets_mean: float
    subsets_worst: float
    limited_adversary: float
    adversary: float


def robustness(
    circuit: Circuit, model: TLModel, config: PruneConfig, train: TaskData, data: TaskData
) -> Robustness:
    """Measure what a circuit withstands.

    Args:
        config: the settings of its search.
        train: the pairs on which adversaries learn.
        data: the pairs on which losses are measured.
    """
    # Searches draw subsets and start adversaries with small seeds, so these are others.
    seed = MAX_SEED - config.seed
    subsets = subset_scores(
        circuit,
        model,
        data,
        config.ablation,
        n_pairs=_N_PAIRS,
        batch_size=config.batch_size,
        seed=seed,
    )

    def under_adversary(budget: int | None) -> float:
        attacked = adversary_score(
            circuit,
            model,
            train,
            data,
            budget,
            config.ablation,
            config.adversary_steps,
            restarts=1,
            batch_size=config.batch_size,
            seed=seed,
        )
        return attacked.score.loss

    return Robustness(
        subsets_mean=subsets.mean.value,
        subsets_worst=subsets.worst.loss,
        limited_adversary=under_adversary(LIMIT),
        adversary=under_adversary(None),
    )
