"""Ranking nodes: by gates that are learned, or by attribution."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.evaluation import resampled, task_loss
from tl_sparse.hooks import NodeGates, TLModel, hooked
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.tasks import TaskData


def attribution(
    model: TLModel, gates: NodeGates, data: TaskData, config: PruneConfig
) -> Float[Tensor, " gate"]:
    """By how much opening each gate changes the task loss, to first order: Σ gradient · (activation
    − mean).

    For `attribution` the gradient is that of the model as it is, else (integrated gradients) a mean
    over points on the way from the model with all nodes at their means, all of them going together.
    As rankings these are baselines: learned masks find far smaller circuits (A.5). As a start of
        learning they save most of its steps.
    """
    data = data.pairs(range(min(config.ranking_pairs, data.n_pairs)))
    points = torch.ones(1) if config.method == "attribution" else torch.arange(1, 8, 2) / 8
    total = torch.zeros_like(gates.tau)
    for point in points.tolist():
        for pairs in torch.arange(data.n_pairs).split(max(1, config.batch_size // 2)):
            strength = torch.full_like(gates.tau, point).requires_grad_()
            parts = gates.at_nodes(strength)

            def mixed(
                name: str, parts: dict[str, Tensor], activation: Tensor, hook: object
            ) -> Tensor:
                return torch.lerp(gates.means[name].expand_as(activation), activation, parts[name])

            with hooked(model, {name: partial(mixed, name, parts) for name in parts}):
                loss = task_loss(model, data.pairs(pairs)) * len(pairs)
            total += torch.autograd.grad(loss, strength)[0]
    return total / (len(points) * data.n_pairs)


def learn_gates(
    model: TLModel, gates: NodeGates, data: TaskData, config: PruneConfig, progress: bool
) -> None:
    """Minimise task loss + k_coef · open gates over the gates alone (A.5), k_coef steered by the
    task loss.
    """
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(
        [gates.tau], lr=config.lr, betas=betas, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    goal, smoothed, log_k = config.steer_to * config.target_loss, None, math.log(config.k_coef)
    lowest, highest = log_k - math.log(100), log_k + math.log(100)
    batches = _batches(data, config)
    bar = tqdm(range(config.steps), desc="learning gates", disable=not progress, unit="step")
    for step in bar:
        batch = next(batches)
        values = resampled(model, batch, gates.index) if config.ablation == "resample" else None
        with gates.attached(model, values=values):
            loss = task_loss(model, batch)
        smoothed = loss.item() if smoothed is None else 0.9 * smoothed + 0.1 * loss.item()
        error = max(-1.0, min(1.0, (goal - smoothed) / config.target_loss))
        log_k = max(lowest, min(highest, log_k + config.steer_rate * error))
        objective = loss + math.exp(log_k + config.steer_now * error) * gates.expected_size()
        if config.necessity > 0:
            half = batch.pairs(range(max(1, batch.n_pairs // 2)))
            values = resampled(model, half, gates.index) if config.ablation == "resample" else None
            with gates.attached(model, inverted=True, values=values):
                without = task_loss(model, half)
            objective = objective + config.necessity * (math.log(2) - without).clamp(min=0)
        optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_([gates.tau], config.grad_clip)
        optimizer.step()
        schedule.step()
        gates.clamp()
        if step % 20 == 19:
            bar.set_postfix_str(f"task loss {smoothed:.3f}, {int((gates.tau > 0).sum())} nodes")


def _batches(data: TaskData, config: PruneConfig) -> Iterator[TaskData]:
    """Random pairs, without end; those of like length together, so that little is computed for
    padding.
    """
    generator, size = (
        torch.Generator().manual_seed(config.seed),
        min(config.pairs_per_step, data.n_pairs),
    )
    lengths = data.last.view(-1, 2).amax(1).cpu()
    while True:
        drawn = torch.randperm(data.n_pairs, generator=generator)[: 16 * size]
        batches = drawn[lengths[drawn].argsort()].split(size)
        yield from (
            data.pairs(batches[i])
            for i in torch.randperm(len(batches), generator=generator).tolist()
        )
