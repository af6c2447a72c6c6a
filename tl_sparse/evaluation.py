"""Judging a circuit: is it sufficient, and is it necessary (Gao et al. 2025, sections 2.2 and 3)?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuit import Circuit
from tl_sparse.errors import DataError, TaskError, TokenizerError
from tl_sparse.hooks.points import TLModel
from tl_sparse.tasks import TASKS, TaskData, candidate_logits, make_task_data, task_loss_and_accuracy


@dataclass(frozen=True)
class Score:
    """How well a task is done."""

    loss: float
    """Cross-entropy between the two candidates in nats, a mean over pairs and both sides."""
    standard_error: float
    """Of the loss, over pairs (the two sides of a pair are not independent)."""
    accuracy: float
    """Share of prompts at which the right candidate has the larger logit."""


@dataclass(frozen=True)
class Evaluation:
    """A circuit on one set of prompt pairs."""

    full: Score
    """The whole model."""
    circuit: Score
    """The circuit alone, all else at its mean: sufficient if this is good."""
    ablated: Score
    """The model with the circuit's nodes at their means: necessary if this is bad."""
    n_pairs: int
    n_nodes: int
    n_edges: int


@torch.no_grad()
def prompt_scores(
    model: TLModel, data: TaskData, batch_size: int = 256
) -> tuple[Float[Tensor, " prompt"], Bool[Tensor, " prompt"]]:
    """The loss of each prompt, and whether the model is right there; at most `batch_size` prompts at a time."""
    # Pairs of like length together, so that little is computed for padding.
    by_length = data.last.view(-1, 2).amax(1).argsort(stable=True)
    logits = []
    for pairs in by_length.split(max(1, batch_size // 2)):
        part = data.pairs(pairs)
        logits.append(candidate_logits(model(part.trimmed().tokens), part))
    in_order = torch.cat(logits).float().view(-1, 4)[by_length.argsort()].view(-1, 2)
    return task_loss_and_accuracy(in_order, data.correct)


def score(model: TLModel, data: TaskData, batch_size: int = 256) -> Score:
    """Loss and accuracy of `model`, as it now is, on the prompts of `data`."""
    losses, right = prompt_scores(model, data, batch_size)
    pairs = losses.view(-1, 2).mean(1)
    error = float(pairs.std() / len(pairs) ** 0.5) if len(pairs) > 1 else float("nan")
    return Score(float(losses.mean()), error, float(right.float().mean()))


def task_scores(model: TLModel, n_pairs: int = 256, seed: int = 0) -> dict[str, Score | None]:
    """How well `model` does each task of `TASKS`; None where its tokenizer or context does not allow the task.

    `TokenizerError` if it has no tokenizer.
    """
    if model.tokenizer is None:
        raise TokenizerError("the model has no tokenizer, so text cannot become tokens for it")
    device, scores = next(model.parameters()).device, dict[str, Score | None]()
    for name, task in TASKS.items():
        try:
            data = make_task_data(task, model.tokenizer, n_pairs, seed, model.cfg.n_ctx)
        except (DataError, TaskError, TokenizerError):
            scores[name] = None
        else:
            scores[name] = score(model, data.to(device))
    return scores


def evaluate(circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256) -> Evaluation:
    """The full model, the circuit alone, and the model without the circuit, on the same prompts.

    Raises:
        CircuitError: if `model` is not the circuit's.
    """
    full = score(model, data, batch_size)
    with circuit.applied(model):
        alone = score(model, data, batch_size)
    with circuit.ablated(model):
        without = score(model, data, batch_size)
    return Evaluation(full, alone, without, data.n_pairs, circuit.n_nodes, len(circuit.edges(model)))
