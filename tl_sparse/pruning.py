"""Finding the circuit of a task: learned node gates, then bisection to a target loss.

Gao et al. 2025, sections 2.2 and A.5. Works through hook names alone; the model is not changed.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.circuit import Circuit
from tl_sparse.config import PruneConfig
from tl_sparse.errors import PruneError, TokenizerError
from tl_sparse.evaluation import Evaluation, Score, evaluate, score
from tl_sparse.fingerprint import fingerprint
from tl_sparse.hooks.ablation import ablating
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.hooks.means import mean_activations
from tl_sparse.hooks.points import NodeMasks, NodeValues, TLModel, frozen
from tl_sparse.nodes import node_hooks
from tl_sparse.tasks import Task, TaskData, candidate_logits, make_task_data, task_loss_and_accuracy


def prune(
    model: TLModel, task: Task, corpus: Int[Tensor, "seq pos"], config: PruneConfig | None = None, progress: bool = True
) -> tuple[Circuit, Evaluation]:
    """Find the circuit of `task` in `model`, and judge it on held-out pairs.

    Args:
        model: a TransformerLens model with a tokenizer.
        corpus: tokens of the training distribution, over which the means are taken.
        progress: show a bar with the task loss and the number of open gates.

    Raises:
        PruneError: if the model itself, or every set of its nodes, misses the target loss.
        TokenizerError: if the model has no tokenizer, or a candidate is not a single token of it.
        TaskError, DataError: if the prompts do not fit; HookNameError: if the model has no such nodes.
    """
    config = config or PruneConfig()
    hooks = list(node_hooks(model).values())
    train, selection, heldout = task_splits(model, task, config)
    with frozen(model):
        full = score(model, selection, config.batch_size)
        if full.loss > config.target_loss:
            raise PruneError(
                f"the full model's loss on {task.name} is {full.loss:.3f} (accuracy {full.accuracy:.0%}), above the "
                f"target loss {config.target_loss}: no circuit can be trusted to reach it. Train the model longer, or "
                f"give a larger target_loss"
            )
        means = mean_activations(model, hooks, corpus.long().split(max(1, config.batch_size // 4)))
        gates = learn_gates(model, means, train, config, progress)
        kept = discretise(model, gates, selection, config)
        name = str(getattr(model.cfg, "model_name", None) or "")
        circuit = Circuit(kept, {k: v.cpu() for k, v in means.items()}, fingerprint(model), name, task.name)
        on_selection = evaluate(circuit, model, selection, config.batch_size)
        on_heldout = evaluate(circuit, model, heldout, config.batch_size)
    measured = {
        "config": dataclasses.asdict(config), "ablation": "mean over the corpus", "corpus_tokens": corpus.numel(),
        "selection": dataclasses.asdict(on_selection), "heldout": dataclasses.asdict(on_heldout),
    }  # fmt: skip
    return dataclasses.replace(circuit, measured=measured), on_heldout


def task_splits(model: TLModel, task: Task, config: PruneConfig) -> tuple[TaskData, TaskData, TaskData]:
    """Disjoint pairs to train gates on, to choose the size on, and to judge on."""
    if getattr(model, "tokenizer", None) is None:
        raise TokenizerError("pruning needs the model's tokenizer, to make the task's prompts")
    device, used = next(model.parameters()).device, set[str]()
    splits = []
    # Selection and held-out pairs first, so that they are the same whatever the number of training pairs.
    for i, n_pairs in enumerate((config.selection_pairs, config.heldout_pairs, config.train_pairs)):
        data = make_task_data(task, model.tokenizer, n_pairs, 3 * config.seed + i, model.cfg.n_ctx, exclude=used)
        used.update(data.prompts)
        splits.append(data.to(device))
    selection, heldout, train = splits
    return train, selection, heldout


def learn_gates(model: TLModel, means: NodeValues, data: TaskData, config: PruneConfig, progress: bool) -> NodeGates:
    """Minimise task loss + k_coef · open gates over the gates alone (A.5), k_coef steered by the task loss."""
    start = {name: getattr(config, name) for name in ("init_bias", "init_scale", "temperature", "seed")}
    gates, betas = NodeGates(means, **start), (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW([gates.tau], lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    goal, smoothed, log_k = config.steer_to * config.target_loss, None, math.log(config.k_coef)
    lowest, highest = log_k - math.log(100), log_k + math.log(100)
    bar = tqdm(range(config.steps), desc="learning gates", disable=not progress, unit="step")
    for step in bar:
        batch = data.pairs(torch.randint(data.n_pairs, (config.pairs_per_step,), generator=generator))
        with gates.attached(model):
            loss = _task_loss(model, batch)
        smoothed = loss.item() if smoothed is None else 0.9 * smoothed + 0.1 * loss.item()
        steer = config.steer_rate * max(-1.0, min(1.0, (goal - smoothed) / config.target_loss))
        log_k = max(lowest, min(highest, log_k + steer))
        objective = loss + math.exp(log_k) * gates.expected_size()
        if config.necessity > 0:
            with gates.attached(model, inverted=True):
                without = _task_loss(model, batch.pairs(range(max(1, config.pairs_per_step // 2))))
            objective = objective + config.necessity * (math.log(2) - without).clamp(min=0)
        optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_([gates.tau], config.grad_clip)
        optimizer.step()
        schedule.step()
        gates.clamp()
        if step % 20 == 19:
            bar.set_postfix_str(f"task loss {smoothed:.3f}, {int((gates.tau > 0).sum())} nodes")
    return gates


def _task_loss(model: TLModel, data: TaskData) -> Float[Tensor, ""]:
    logits = candidate_logits(model(data.trimmed().tokens), data)
    return task_loss_and_accuracy(logits, data.correct)[0].mean()


def _is_circuit(
    kept: Bool[Tensor, " node"], data: TaskData, model: TLModel, gates: NodeGates, config: PruneConfig
) -> bool:
    """Sufficient: the circuit reaches the target loss. Necessary: the model without it loses the task."""

    def scored(ablated: Bool[Tensor, " node"]) -> Score:
        with ablating(model, gates.split(ablated), gates.split(gates.means)):
            return score(model, data, config.batch_size)

    if scored(~kept).loss > config.target_loss:
        return False
    return config.ablated_accuracy == 1 or scored(kept).accuracy <= config.ablated_accuracy


def discretise(model: TLModel, gates: NodeGates, selection: TaskData, config: PruneConfig) -> NodeMasks:
    """The smallest number of top-ranked nodes that make a circuit on the selection pairs (A.5), and of these
    only the ones that it needs.

    Bisection between a size that is too small and one that is enough, both found by going outwards from the
    learned size: the loss is not monotonic over the whole ranking, but nearly so around there.

    Raises:
        PruneError: if not even all nodes make a circuit.
    """
    is_circuit = partial(_is_circuit, model=model, gates=gates, config=config)
    order = gates.tau.detach().argsort(descending=True, stable=True)
    rank = order.argsort()
    enough, too_small = max(1, int((gates.tau > 0).sum())), 0
    while not is_circuit(rank < enough, selection):
        if enough == len(order):
            raise PruneError(
                f"no set of nodes reaches the target loss {config.target_loss} such that the model without it has an "
                f"accuracy of at most {config.ablated_accuracy}, not even all {len(order)} nodes"
            )
        too_small, enough = enough, min(len(order), math.ceil(enough * 1.3))
    while enough - too_small > 1:  # down from the learned size until it is too small, then bisection
        size = (enough + too_small) // 2 if too_small else int(enough / 1.3)
        enough, too_small = (size, too_small) if is_circuit(rank < size, selection) else (enough, size)
    kept, removed = rank < enough, []
    # Gates learn all at once: some stay open that nothing kept reads, or whose part another node took over.
    # Tried on a part of the pairs, for speed, the lowest-ranked node first.
    part = selection.pairs(range(min(config.cleanup_pairs, selection.n_pairs)))
    for node in order[:enough].flip(0):
        kept[node] = False
        if is_circuit(kept, part):
            removed.append(node)
        else:
            kept[node] = True
    while removed and not is_circuit(kept, selection):  # on all pairs, the last removals may have been too many
        kept[removed.pop()] = True
    return {name: mask.cpu() for name, mask in gates.split(kept).items()}
