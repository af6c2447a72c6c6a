"""What a circuit is asked to do on the prompts of a task, and the loss that measures it.

The paper asks for the right one of two answers (Gao et al. 2025, section 2.2). A circuit that does
this perfectly can be further from the model, over the whole vocabulary, than no circuit at all. The
other objectives ask for what the model says there.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tl_sparse.arguments import checked
from tl_sparse.config import check
from tl_sparse.errors import ArgumentError
from tl_sparse.evaluation.running import (
    RunContext,
    all_next_token_logits,
    in_batches,
    next_token_logits,
)
from tl_sparse.evaluation.scores import OBJECTIVES, Objective
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData, task_loss_and_accuracy


@checked()
def ready_for(
    objective: Objective, model: TLModel, data: TaskData, batch_size: int = 256
) -> TaskData:
    """The same prompts, `with_reference` if the objective compares with the full model."""
    if objective != "model" or data.reference is not None:
        return data
    return with_reference(model, data, batch_size)


@checked()
def with_reference(model: TLModel, data: TaskData, batch_size: int = 256) -> TaskData:
    """The same prompts with the full model's distributions of the next token.

    The objective "model" needs them; see `ready_for`. The model runs as it is, so this must not be
    called while it runs under a circuit.
    """
    logits = all_next_token_logits(model, data, batch_size)
    return replace(data, reference=logits.log_softmax(1))


def objective_losses(
    logits: Float[Tensor, "prompt d_vocab"], data: TaskData, objective: Objective
) -> Float[Tensor, " prompt"]:
    """The loss of each prompt, in nats, through which gradients flow.

    Raises:
        ConfigError: for an unknown objective.
        ArgumentError: for the objective "model", if `data` has no `reference`.
    """
    check(objective in OBJECTIVES, "objective", objective, f"one of {', '.join(OBJECTIVES)}")
    candidates = data.candidates.to(logits.device)
    correct = data.correct.to(logits.device)
    if objective == "candidates":
        losses, _ = task_loss_and_accuracy(logits.gather(1, candidates), correct)
        return losses
    if objective == "next_token":
        answers = candidates.gather(1, correct[:, None])[:, 0]
        return F.cross_entropy(logits, answers, reduction="none")
    if data.reference is None:
        raise ArgumentError(
            'the objective "model" compares with the full model: with_reference(model, data) '
            "measures it first"
        )
    return divergences(data.reference.to(logits), logits.log_softmax(1))


def divergences(
    full_log_probabilities: Float[Tensor, "*sample d_vocab"],
    log_probabilities: Float[Tensor, "*sample d_vocab"],
) -> Float[Tensor, " *sample"]:
    """The divergence KL(full model ‖ run) of each distribution of the next token, in nats."""
    terms = F.kl_div(log_probabilities, full_log_probabilities, reduction="none", log_target=True)
    return terms.sum(-1)


@checked("objective")
def objective_loss(model: TLModel, data: TaskData, objective: Objective) -> Float[Tensor, ""]:
    """The mean loss of the prompts, through which gradients flow."""
    return objective_losses(next_token_logits(model, data), data, objective).mean()


@checked("objective")
@torch.no_grad()
def all_objective_losses(
    model: TLModel,
    data: TaskData,
    objective: Objective = "candidates",
    batch_size: int = 256,
    run_context: RunContext | None = None,
    seed: int = 0,
) -> Float[Tensor, " prompt"]:
    """The loss of each prompt, in the order of the prompts.

    For the other arguments and errors see `all_logits` and `objective_losses`.
    """
    losses = partial(_losses, objective=objective)
    return in_batches(losses, model, data, batch_size, run_context, seed)


def _losses(model: TLModel, data: TaskData, objective: Objective) -> Float[Tensor, " prompt"]:
    return objective_losses(next_token_logits(model, data), data, objective)
