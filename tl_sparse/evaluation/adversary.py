"""The subset of the nodes outside a circuit that harms it most when left as it is.

The adversary chooses, once for all prompts, which nodes outside the circuit are held and which are
as they are in the model. It learns the choice by gradient ascent on masks. Since the choice is the
same for all prompts, it cannot exploit the noise of single ones.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.evaluation.batches import random_batches
from tl_sparse.evaluation.holding import freezing_norms, held_values
from tl_sparse.evaluation.objectives import objective_loss, ready_for
from tl_sparse.evaluation.scores import Ablation, Objective
from tl_sparse.evaluation.subsets import share_of, subset_score
from tl_sparse.hooks import NodeGates, NodeMasks, TLModel, differentiating, frozen
from tl_sparse.tasks import Score, TaskData

#: The spread of the initial masks: about half of all nodes are left at the start.
ADVERSARY_SPREAD = 0.3
#: The learning rate of Adam.
ADVERSARY_LR = 0.1
#: Below every mask that is learned.
LOWEST = -1000.0


@dataclass(frozen=True)
class AdversaryScore:
    """A circuit's score under the worst of several adversaries.

    Attributes:
        budget: the largest number of nodes that an adversary may leave; None for no limit.
        n_left: how many nodes outside the circuit the worst adversary leaves.
        share_left: the same, as a share of all nodes.
        score: the circuit's score under the worst adversary.
        losses: the circuit's task loss under each of the adversaries.
    """

    budget: int | None
    n_left: int
    share_left: float
    score: Score
    losses: list[float]


@checked()
def adversary_score(
    circuit: Circuit,
    model: TLModel,
    train: TaskData,
    data: TaskData,
    budget: int | None = None,
    ablation: Ablation = "mean",
    steps: int = 100,
    restarts: int = 3,
    batch_size: int = 256,
    seed: int = 0,
) -> AdversaryScore:
    """Train fresh adversaries on one set of pairs, and measure the circuit under them on another.

    Args:
        train: the pairs on which the adversaries learn.
        data: the pairs on which the circuit is measured.
        budget: the largest number of nodes that an adversary may leave as they are.
        ablation: the values at which all other nodes are held.
        steps: the number of steps of gradient ascent of each adversary.
        restarts: the number of adversaries. Each has another start.
        seed: the seed of the first adversary; the others have the next ones.

    Raises:
        ConfigError: for an impossible budget or number of steps or restarts.
        CircuitError: if `model` is not the circuit's model, or the circuit has no means.
    """
    check(restarts >= 1, "restarts", restarts, "at least 1")
    subsets = []
    for restart in range(restarts):
        subset = learned_subset(
            circuit, model, train, budget, ablation, steps=steps, seed=seed + restart
        )
        subsets.append(subset)
    scores = []
    for subset in subsets:
        scores.append(subset_score(circuit, model, data, subset, ablation, batch_size, seed))
    worst = max(range(restarts), key=lambda i: scores[i].loss)
    return AdversaryScore(
        budget=budget,
        n_left=sum(int(mask.sum()) for mask in subsets[worst].values()),
        share_left=share_of(subsets[worst]),
        score=scores[worst],
        losses=[one.loss for one in scores],
    )


@checked()
def learned_subset(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    budget: int | None = None,
    ablation: Ablation = "mean",
    objective: Objective = "candidates",
    *,
    steps: int = 100,
    lr: float = ADVERSARY_LR,
    pairs_per_step: int = 16,
    seed: int = 0,
) -> NodeMasks:
    """The nodes outside the circuit that one adversary leaves as they are.

    Args:
        data: the pairs on which it learns.
        budget: the largest number of nodes that it may leave; None for no limit.
        ablation: the values at which all other nodes are held.
        objective: the loss that it raises.
        steps: the number of steps of gradient ascent.
        lr: the learning rate of Adam.
        pairs_per_step: the number of pairs in each step.
        seed: the seed of the initial mask and of the order of the pairs.

    Returns:
        Hook point → mask of the nodes that are left, none of which is in the circuit.

    Raises:
        ConfigError: for an impossible `budget`, `steps`, `lr` or `pairs_per_step`.
        CircuitError: if `model` is not the circuit's model, or the circuit has no means.
    """
    n_outside = circuit.n_candidates - circuit.n_nodes
    if budget is not None:
        check(budget >= 0, "budget", budget, "at least 0, or None for no limit")
        budget = min(budget, n_outside)
    check(steps >= 1, "steps", steps, "at least 1")
    check(lr > 0, "lr", lr, "above 0")
    circuit.check_model(model)
    circuit.check_means()
    device = next(model.parameters()).device
    with differentiating(model), frozen(model):
        gates = NodeGates(
            {name: circuit.means[name].to(device) for name in circuit.kept},
            init_bias=0.0,
            init_scale=ADVERSARY_SPREAD,
            seed=seed,
            vectors=circuit.component_hooks,
        )
        kept = gates.of_nodes(circuit.kept)
        optimizer = torch.optim.Adam([gates.tau], lr=lr, maximize=True)
        batches = random_batches(data, pairs_per_step, seed)
        for _ in range(steps):
            batch = ready_for(objective, model, next(batches))
            loss = _loss(circuit, model, batch, gates, kept, budget, ablation, objective)
            if not loss.isfinite():
                break  # no subset is worse than one that makes the model diverge
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if budget is None:
                gates.clamp()  # at the ends of the range, a budget could not tell masks apart
        left = _openings(gates, kept, budget).detach() > 0.5
        return {name: mask.cpu() for name, mask in gates.at_nodes(left & ~kept).items()}


def _openings(gates: NodeGates, kept: Bool[Tensor, " gate"], budget: int | None) -> Tensor:
    """1 for each node that is as it is: those of the circuit, and those that are left."""
    with torch.no_grad():
        gates.tau[kept] = LOWEST  # so that the budget is spent outside the circuit
    return gates.openings(budget).masked_fill(kept, 1.0)


def _loss(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    gates: NodeGates,
    kept: Bool[Tensor, " gate"],
    budget: int | None,
    ablation: Ablation,
    objective: Objective,
) -> Tensor:
    """The loss of the circuit while the adversary's nodes are left as they are."""
    values = held_values(circuit, model, ablation)(data)
    with (
        freezing_norms(circuit.frozen_norms, model, data),
        circuit.holding(model, {}, {}, circuit.cut_edges(model)),
        gates.attached(model, values=values, openings=_openings(gates, kept, budget)),
    ):
        return objective_loss(model, data, objective)
