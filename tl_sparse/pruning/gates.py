"""Ranking the nodes by learning a gate for each of them, or by attribution.

"(A.5)" and the like are sections of Gao et al. 2025, arXiv 2511.13653.
"""

import math
from collections.abc import Collection, Iterator
from functools import partial
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.errors import counted
from tl_sparse.evaluation import (
    freezing_norms,
    objective_loss,
    random_batches,
    ready_for,
    resampled,
)
from tl_sparse.hooks import NodeGates, TLModel, mixing
from tl_sparse.memory import check_fits, is_limited, saved_bytes
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.fixed import FixedGates
from tl_sparse.pruning.opponents import opponent
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.settled import SettledWrites
from tl_sparse.tasks import TaskData

#: The lasting part of steering keeps the weight of the number of open gates within this factor of
#: `k_coef`, above or below.
STEERING_RANGE = 100
#: The task loss at chance, in nats.
LOSS_OF_A_COIN = math.log(2)


def learn_gates(
    model: TLModel,
    gates: NodeGates,
    data: TaskData,
    config: PruneConfig,
    fixed: FixedGates,
    progress: bool,
) -> None:
    """Minimise loss + k · (number of open gates) with respect to the gates alone (A.5).

    The weight k starts at `k_coef` and is steered by the loss; see `SizePenalty`. A third term is
    added if `necessity` is not 0: necessity · max(0, ln 2 - task loss without the circuit).

    With the method "any_size", there is no such weight: in each step, another number of gates is
    open, namely those with the highest τ, so that the order of all gates is learned.

    If `robust` is not "none", some of the nodes with closed gates are left as they are; see
    `opponent`.

    The caller has frozen the model. The ranking is the order of `gates.tau` afterwards.
    """
    _check_memory(model, gates, data, config)
    optimizer = torch.optim.AdamW(
        [gates.tau],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    penalty = SizePenalty(config)
    sizes = _random_sizes(gates, fixed, config)
    against = opponent(gates, config)
    settled = SettledWrites(model, gates, config)
    batches = random_batches(data, config.pairs_per_step, config.seed)
    with phase("learning gates", progress, config.steps, "step") as bar:
        for step in range(config.steps):
            batch = next(batches)
            openings = gates.openings(next(sizes))
            loss = gated_loss(
                model, gates, batch, config, openings, against.left(step), settled.hook_names
            )
            k = penalty.update(loss.item())
            objective = loss
            if config.method == "learned":
                objective = loss + k * gates.expected_size()
            if config.necessity > 0:
                # Every second pair, to save time: the first half of a batch, which is sorted by
                # length, would be the shorter pairs.
                half = batch.pairs(range(0, batch.n_pairs, 2))
                objective = objective + _necessity_term(model, gates, half, config, openings)
            optimizer.zero_grad()
            objective.backward()
            nn.utils.clip_grad_norm_([gates.tau], config.grad_clip)
            optimizer.step()
            schedule.step()
            against.learn()
            if config.method == "learned":
                gates.clamp()
            fixed.apply(gates)
            settled.update()
            bar.update()
            if step % 20 == 19:
                n_open = int((gates.tau > 0).sum())
                loss_now = f"{penalty.smoothed_loss:.3f} while they move"
                bar.set_postfix_str(f"{counted(n_open, 'gate')} open, loss {loss_now}")


def _check_memory(model: TLModel, gates: NodeGates, data: TaskData, config: PruneConfig) -> None:
    """Raise `DeviceMemoryError` if a step needs more memory than the GPU has free.

    What one and two pairs take tells what all pairs of a step take.
    """
    if not is_limited(gates.tau.device) or data.n_pairs < 2:
        return
    taken = []
    for n_pairs in (1, 2):
        pairs = data.first(n_pairs)
        opened = gates.openings()
        taken.append(saved_bytes(partial(gated_loss, model, gates, pairs, config, opened), model))
    of_one, of_two = taken
    n_others = min(config.pairs_per_step, data.n_pairs) - 1
    parts = {"activations": of_one + n_others * (of_two - of_one)}
    check_fits("a step of this search", parts, gates.tau.device, "use fewer pairs_per_step")


def _random_sizes(gates: NodeGates, fixed: FixedGates, config: PruneConfig) -> Iterator[int | None]:
    """How many gates are open in each step; None for those with τ above 0.

    With the method "any_size" the logarithm of the number is uniform, so that small circuits, of
    which each node matters, are met as often as large ones.
    """
    generator = torch.Generator().manual_seed(config.seed)
    smallest = max(1, int(fixed.included.sum()))
    largest = len(gates.tau) - int(fixed.excluded.sum())
    while True:
        if config.method == "learned":
            yield None
            continue
        draw = float(torch.rand(1, generator=generator))
        yield round(smallest * (largest / smallest) ** draw)


def _necessity_term(
    model: TLModel,
    gates: NodeGates,
    pairs: TaskData,
    config: PruneConfig,
    openings: Float[Tensor, " gate"],
) -> Float[Tensor, ""]:
    loss_without = gated_loss(model, gates, pairs, config, 1 - openings)
    below_chance = (LOSS_OF_A_COIN - loss_without).clamp(min=0)
    return config.necessity * below_chance


class SizePenalty:
    """The weight k of the number of open gates in the objective, steered by the task loss.

    While the task loss is below `steer_to` · `target_loss`, more gates can close and k rises; while
    it is above, k falls.
    """

    def __init__(self, config: PruneConfig) -> None:
        self.config = config
        self.smoothed_loss: float | None = None
        self.log_k = math.log(config.k_coef)
        self.lowest = self.log_k - math.log(STEERING_RANGE)
        self.highest = self.log_k + math.log(STEERING_RANGE)

    def update(self, loss: float) -> float:
        """Take in the task loss of a step, and return the value of k for that step.

        `log_k` moves by at most `steer_rate` and stays there. Up to `steer_now` more is added or
        taken away for this step alone.
        """
        if self.smoothed_loss is None:
            self.smoothed_loss = loss
        else:
            self.smoothed_loss = 0.9 * self.smoothed_loss + 0.1 * loss
        goal = self.config.steer_to * self.config.target_loss
        room = (goal - self.smoothed_loss) / self.config.target_loss
        room = max(-1.0, min(1.0, room))
        log_k = self.log_k + self.config.steer_rate * room
        self.log_k = max(self.lowest, min(self.highest, log_k))
        return math.exp(self.log_k + self.config.steer_now * room)


def gated_loss(
    model: TLModel,
    gates: NodeGates,
    pairs: TaskData,
    config: PruneConfig,
    openings: Float[Tensor, " gate"],
    left: Float[Tensor, " gate"] | None = None,
    closed: Collection[str] = (),
) -> Float[Tensor, ""]:
    """The loss while nodes are kept as `openings` says, and those in `left` are not held.

    At the hook points `closed` all nodes are held; see `NodeGates.attached`.
    """
    values = None
    if config.ablation == "resample":
        values = resampled(model, pairs, gates.index)
    pairs = ready_for(config.objective, model, pairs)
    if left is not None:
        openings = openings + (1 - openings) * left
    with (
        freezing_norms(config.freeze_norms, model, pairs),
        gates.attached(model, values=values, openings=openings, closed=closed),
    ):
        return objective_loss(model, pairs, config.objective)


def attribution(
    model: TLModel,
    gates: NodeGates,
    data: TaskData,
    config: PruneConfig,
    progress: bool = False,
) -> Float[Tensor, " gate"]:
    """The signed change of the loss when each gate opens, to first order.

    It is Σ gradient · (activation − held value), where the node is held at its mean or, in zero and
    resample ablation, at zero or at its activation on the partner of the prompt. For the method
    "attribution", the gradient is that of the full model. For all other methods these are
    integrated gradients: the gradient is averaged over four points on the line from all nodes at
    their held values to the full model.

    As final rankings, both are baselines, because learned gates find far smaller circuits (A.5). As
    the start of gate learning, integrated gradients save most of the steps.
    """
    data = data.first(config.ranking_pairs)
    batch_size = max(1, config.batch_size // 2)  # in pairs, of two prompts each
    batches = torch.arange(data.n_pairs).split(batch_size)
    # The midpoints of four equal parts of the line.
    openings = [1.0] if config.method == "attribution" else [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    total = torch.zeros_like(gates.tau)
    points = list(product(openings, batches))
    with phase("ranking nodes", progress, len(points), "step") as bar:
        for opening, pairs in points:
            batch = data.pairs(pairs)
            held_at = gates.means
            if config.ablation == "resample":
                held_at = resampled(model, batch, gates.index)
            opened = torch.full_like(gates.tau, opening).requires_grad_()
            batch = ready_for(config.objective, model, batch)
            norms = freezing_norms(config.freeze_norms, model, batch)
            with norms, mixing(model, gates.at_nodes(opened), held_at):
                loss = objective_loss(model, batch, config.objective) * len(pairs)
            total += torch.autograd.grad(loss, opened)[0]
            bar.update()
    return total / (len(openings) * data.n_pairs)
