"""Whether a circuit stays sufficient when some of the nodes outside it are left as they are.

If everything outside is held at once, the errors of held nodes can cancel, and a search can pick
nodes for which they do. The circuit then is sufficient as long as all the others are held, and
fails when some of them are as they are in the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation.estimates import Estimate, mean_of
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.judge import score
from tl_sparse.evaluation.scores import Ablation
from tl_sparse.hooks import NodeMasks, TLModel
from tl_sparse.tasks import Score, TaskData

#: So many of the worst subsets are measured on all pairs.
_WORST = 3


@dataclass(frozen=True)
class SubsetScores:
    """The task loss of a circuit while random subsets of the other nodes are left as they are.

    Attributes:
        n_subsets: the number of subsets. Each is the same for all prompts.
        n_pairs: the number of pairs on which each of them is measured.
        mean: the mean task loss over subsets, in nats.
        worst: the score under the worst of them, on all pairs.
        worst_share: the share of the nodes that this one leaves.
        shares: the share of the nodes that each subset leaves.
        losses: the task loss under each subset.
    """

    n_subsets: int
    n_pairs: int
    mean: Estimate
    worst: Score
    worst_share: float
    shares: list[float]
    losses: list[float]


@checked()
def random_subsets(circuit: Circuit, n_subsets: int, seed: int = 0) -> list[NodeMasks]:
    """Masks of random nodes, of which each subset has another share.

    The shares are spread evenly over [0, 1]. A mask may have nodes of the circuit: it depends on
    the hook points alone, so that circuits of the same model can be compared.

    Raises:
        ConfigError: if `n_subsets` is below 1.
    """
    check(n_subsets >= 1, "n_subsets", n_subsets, "at least 1")
    generator = torch.Generator().manual_seed(seed)
    subsets: list[NodeMasks] = []
    for i in range(n_subsets):
        share = (i + 0.5) / n_subsets
        subset = {}
        for name, mask in circuit.kept.items():
            draws = torch.rand(mask.shape, generator=generator, device=generator.device)
            subset[name] = (draws < share).to(mask.device)
        subsets.append(subset)
    return subsets


@checked()
def subset_scores(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    ablation: Ablation = "mean",
    n_subsets: int = 64,
    n_pairs: int = 64,
    batch_size: int = 256,
    seed: int = 0,
) -> SubsetScores:
    """Measure a circuit while random subsets of the nodes outside are left as they are.

    Args:
        ablation: the values at which the other nodes are held.
        n_subsets: the number of subsets.
        n_pairs: the number of pairs for each subset. The worst ones are measured on all of `data`.
        seed: the seed of the subsets, and of the partners in resample ablation.

    Raises:
        ConfigError: if `n_subsets` or `n_pairs` is below 1.
        CircuitError: if `model` is not the circuit's model.
    """
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    circuit.check_model(model)
    subsets = random_subsets(circuit, n_subsets, seed)
    some_pairs = data.first(n_pairs)
    losses = torch.empty(n_subsets, dtype=torch.float64)
    for i, subset in enumerate(subsets):
        of_subset = subset_score(circuit, model, some_pairs, subset, ablation, batch_size, seed)
        losses[i] = of_subset.loss
    worst_subset, worst = _worst(
        circuit,
        model,
        data,
        [subsets[i] for i in losses.argsort(descending=True)[:_WORST].tolist()],
        ablation,
        batch_size,
        seed,
    )
    return SubsetScores(
        n_subsets=n_subsets,
        n_pairs=some_pairs.n_pairs,
        mean=mean_of(losses),
        worst=worst,
        worst_share=share_of(worst_subset),
        shares=[share_of(subset) for subset in subsets],
        losses=losses.tolist(),
    )


@checked("ablation")
def subset_score(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    subset: NodeMasks,
    ablation: Ablation = "mean",
    batch_size: int = 256,
    seed: int = 0,
) -> Score:
    """The score of a circuit while the nodes outside it that are in `subset` are left as they are.

    This does not check that `model` is the circuit's model. For the other arguments and errors see
    `holding_nodes` and `score`.
    """
    run_context = holding_nodes(circuit, model, ablation, left=subset)
    return score(model, data, batch_size, run_context, seed)


def _worst(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    subsets: Sequence[NodeMasks],
    ablation: Ablation,
    batch_size: int,
    seed: int,
) -> tuple[NodeMasks, Score]:
    """The subset under which the task loss is highest, and the score."""
    scores = []
    for subset in subsets:
        scores.append(subset_score(circuit, model, data, subset, ablation, batch_size, seed))
    worst = max(range(len(scores)), key=lambda i: scores[i].loss)
    return subsets[worst], scores[worst]


def share_of(subset: NodeMasks) -> float:
    """The share of all nodes that a subset has."""
    n_chosen = sum(int(mask.sum()) for mask in subset.values())
    n_nodes = sum(mask.numel() for mask in subset.values())
    if n_nodes == 0:
        raise CircuitError("the circuit has no hook points, so there are no nodes to leave")
    return n_chosen / n_nodes
