"""The subset of the nodes outside a circuit that harms it most when left as it is.

The adversary chooses, once for all prompts, which nodes outside the circuit are held and which are
as they are in the model. It learns the choice by gradient ascent on masks. Since the choice is the
same for all prompts, it cannot exploit the noise of single ones.

An adversary that may leave only a few nodes first learns as if it might leave any. It then holds
those that do the least harm, until few enough are left. The other way round it would miss nodes
that act together: as long as a query channel is held, its key channel seems to do nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
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
        steps: the number of steps. With a budget, only the first half of them is gradient ascent;
            in the others, nodes that do little harm are held.
        lr: the learning rate of Adam.
        pairs_per_step: the number of pairs in each step.
        seed: the seed of the initial mask and of the order of the pairs.

    Returns:
        Hook point → mask of the nodes that are left, none of which is in the circuit.

    Raises:
        ConfigError: for an impossible `budget`, `steps`, `lr` or `pairs_per_step`.
        CircuitError: if `model` is not the circuit's model, or the circuit has no means.
    """
    if budget is not None:
        check(budget >= 0, "budget", budget, "at least 0, or None for no limit")
    check(steps >= 1, "steps", steps, "at least 1")
    check(lr > 0, "lr", lr, "above 0")
    circuit.check_model(model)
    circuit.check_means()
    n_shrinking = 0 if budget is None else steps // 2
    with differentiating(model), frozen(model):
        adversary = _Adversary(circuit, model, data, ablation, objective, pairs_per_step, seed)
        left = adversary.learned(steps - n_shrinking, lr)
        if budget is not None:
            left = adversary.shrunk(left, budget, max(1, n_shrinking))
        return {name: mask.cpu() for name, mask in adversary.gates.at_nodes(left).items()}


class _Adversary:
    """An adversary of one circuit. Each step has the next few of the pairs.

    Attributes:
        gates: the masks that it learns.
        kept: the gates of the circuit's nodes, which it cannot change.
    """

    def __init__(
        self,
        circuit: Circuit,
        model: TLModel,
        data: TaskData,
        ablation: Ablation,
        objective: Objective,
        pairs_per_step: int,
        seed: int,
    ) -> None:
        self.circuit = circuit
        self.model = model
        self.ablation = ablation
        self.objective = objective
        device = next(model.parameters()).device
        self.gates = NodeGates(
            {name: circuit.means[name].to(device) for name in circuit.kept},
            init_bias=0.0,
            init_scale=ADVERSARY_SPREAD,
            seed=seed,
            vectors=circuit.component_hooks,
        )
        self.kept = self.gates.of_nodes(circuit.kept)
        self._batches = random_batches(data, pairs_per_step, seed)

    def learned(self, steps: int, lr: float) -> Bool[Tensor, " gate"]:
        """The nodes to leave after gradient ascent, of any number."""
        optimizer = torch.optim.Adam([self.gates.tau], lr=lr, maximize=True)
        for _ in range(steps):
            loss = self._loss(self.gates.openings().masked_fill(self.kept, 1.0))
            if not loss.isfinite():
                break  # no subset is worse than one that makes the model diverge
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.gates.clamp()
        return (self.gates.tau.detach() > 0) & ~self.kept

    def shrunk(self, left: Bool[Tensor, " gate"], budget: int, steps: int) -> Bool[Tensor, " gate"]:
        """At most `budget` of the nodes: those whose holding would lower the loss most.

        In each step the same share of them is held, since without these, others do more or less.
        """
        n_left = int(left.sum())
        share = (budget / max(1, n_left)) ** (1 / steps)
        for step in range(1, steps + 1):
            n_next = budget if step == steps else round(n_left * share**step)
            if n_next < int(left.sum()):
                harms = self._slopes(left).masked_fill(~left, -torch.inf)
                left = torch.zeros_like(left)
                left[harms.topk(n_next).indices] = True
        return left

    def _slopes(self, left: Bool[Tensor, " gate"]) -> Float[Tensor, " gate"]:
        """The change of the loss when each node is left, to first order, with those of `left`."""
        openings = (left | self.kept).to(self.gates.tau.dtype).requires_grad_()
        (slopes,) = torch.autograd.grad(self._loss(openings), openings)
        return slopes.nan_to_num()

    def _loss(self, openings: Float[Tensor, " gate"]) -> Tensor:
        """The loss on the next pairs, with 1 for each node that is as it is in the model."""
        batch = ready_for(self.objective, self.model, next(self._batches))
        values = held_values(self.circuit, self.model, self.ablation)(batch)
        cut = self.circuit.cut_edges(self.model)
        with (
            freezing_norms(self.circuit.frozen_norms, self.model, batch),
            self.circuit.holding(self.model, {}, {}, cut),
            self.gates.attached(self.model, values=values, openings=openings),
        ):
            return objective_loss(self.model, batch, self.objective)
