"""Judging whether a circuit is sufficient and necessary (Gao et al. 2025, sections 2.2 and 3)."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, Edge, Node
from tl_sparse.config import check
from tl_sparse.errors import ArgumentError, DataError, TaskError, TokenizerError, counted
from tl_sparse.evaluation.baselines import random_circuits_like, without_nodes
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.objectives import divergences
from tl_sparse.evaluation.removal import effects
from tl_sparse.evaluation.running import RunContext, all_logits, all_next_token_logits
from tl_sparse.evaluation.scores import (
    ABLATIONS,
    OBJECTIVES,
    Ablation,
    Evaluation,
    Objective,
    SizedScore,
)
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import (
    TASKS,
    NextToken,
    Score,
    TaskData,
    make_task_data,
    right_minus_wrong,
    task_loss_and_accuracy,
)

#: `full_evaluation` ablates each node and edge separately to measure its effect, unless there are
#: more than this many: for larger circuits that would take hours.
MAX_EFFECTS = 4000


# --- scores of a model


@checked()
def score(
    model: TLModel,
    data: TaskData,
    batch_size: int = 256,
    run_context: RunContext | None = None,
    seed: int = 0,
) -> Score:
    """The loss and accuracy of `model` on the prompts of `data`.

    For the arguments and errors see `all_logits`.
    """
    return score_logits(all_logits(model, data, batch_size, run_context, seed), data)


def score_logits(logits: Float[Tensor, "prompt 2"], data: TaskData) -> Score:
    """The score of given logits of the two candidates."""
    losses, right = task_loss_and_accuracy(logits, data.correct)
    pair_losses = losses.view(-1, 2).mean(1)
    standard_error = None
    if len(pair_losses) > 1:
        standard_error = float(pair_losses.std() / len(pair_losses) ** 0.5)
    return Score(
        loss=float(losses.mean()),
        standard_error=standard_error,
        accuracy=float(right.float().mean()),
        logit_difference=float(right_minus_wrong(logits, data.correct).mean()),
    )


@checked()
def score_next_tokens(
    logits: Float[Tensor, "prompt d_vocab"],
    data: TaskData,
    full_logits: Float[Tensor, "prompt d_vocab"],
) -> Score:
    """The score of given logits of all tokens.

    Args:
        logits: the logits after the prompts of `data`; see `all_next_token_logits`.
        full_logits: those of the full model, from which the divergence is measured.

    Raises:
        ArgumentError: if these are not the logits of as many tokens after each prompt.
    """
    if logits.shape != full_logits.shape or len(logits) != len(data.prompts):
        raise ArgumentError(
            f"logits have the shape {list(logits.shape)}, full_logits {list(full_logits.shape)}; "
            f"both must be [prompt, d_vocab], with {counted(len(data.prompts), 'prompt')}"
        )
    answers = data.candidates.gather(1, data.correct[:, None])
    log_probabilities = logits.log_softmax(1)
    divergence = divergences(full_logits.log_softmax(1), log_probabilities).mean()
    of_answers = log_probabilities.gather(1, answers)
    next_token = NextToken(
        probability=float(of_answers.exp().mean()),
        top=float((logits.argmax(1) == answers[:, 0]).float().mean()),
        kl=float(divergence),
        loss=-float(of_answers.mean()),
    )
    between_answers = score_logits(logits.gather(1, data.candidates), data)
    return replace(between_answers, next_token=next_token)


@checked()
def task_scores(model: TLModel, n_pairs: int = 256, seed: int = 0) -> dict[str, Score | None]:
    """The score of `model` on each task of `TASKS`.

    It is None for a task whose prompts do not fit the model's tokenizer or its context length.

    Raises:
        ConfigError: if `n_pairs` is below 1.
        TokenizerError: if the model has no tokenizer.
    """
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    if model.tokenizer is None:
        raise TokenizerError(
            "the model has no tokenizer, which is needed to turn prompts into tokens"
        )
    device = next(model.parameters()).device
    scores: dict[str, Score | None] = dict.fromkeys(TASKS)
    for name, task in TASKS.items():
        with suppress(DataError, TaskError, TokenizerError):
            data = make_task_data(task, model.tokenizer, n_pairs, seed, model.cfg.n_ctx)
            scores[name] = score(model, data.to(device))
    return scores


# --- calibration


def calibration(logits: Float[Tensor, "prompt 2"], data: TaskData) -> tuple[float, float]:
    """The scale of the logits and the shift of the second candidate's logit that minimise the loss.

    They are fitted by 16 steps of L-BFGS (Gao et al. 2025, A.5).
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because nothing made in inference mode can take part in a gradient.
        logits = logits.detach().to(torch.float64, copy=True)
        correct = data.correct.clone()
        fitted = logits.new_tensor([1.0, 0.0]).requires_grad_()
        optimizer = torch.optim.LBFGS([fitted], max_iter=16, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            calibrated = _calibrated(logits, scale=fitted[0], shift=fitted[1])
            losses, _ = task_loss_and_accuracy(calibrated, correct)
            loss = losses.mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    scale, shift = fitted.detach().tolist()
    return scale, shift


def _calibrated(
    logits: Float[Tensor, "prompt 2"], scale: Float[Tensor, ""], shift: Float[Tensor, ""]
) -> Float[Tensor, "prompt 2"]:
    shifts = torch.stack([torch.zeros_like(shift), shift])
    return logits * scale + shifts.to(logits)


# --- judging a circuit


@checked()
def evaluate(
    circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256, seed: int = 0
) -> Evaluation:
    """Score the full model, the circuit alone, and the model without the circuit on `data`.

    Each is scored by its choice between the two answers, and by its distribution of the next token.

    Of a single pair, the score under resample ablation is None: there is no other pair to resample
    from.

    Args:
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: decides which other prompt each prompt is resampled from, if `data` has no partners
            yet; see `TaskData.with_partners`.

    Raises:
        CircuitError: if `model` is not the circuit's model.
    """
    n_edges = circuit.n_edges(model)
    full_logits = all_next_token_logits(model, data, batch_size)

    def held_score(circuit: Circuit, ablation: Ablation, inverted: bool = False) -> Score:
        run_context = holding_nodes(circuit, model, ablation, inverted)
        logits = all_next_token_logits(model, data, batch_size, run_context, seed)
        return score_next_tokens(logits, data, full_logits)

    resample = None
    if data.partners is not None or data.n_pairs > 1:
        resample = held_score(circuit, "resample")
    return Evaluation(
        circuit=held_score(circuit, "mean"),
        zero=held_score(circuit, "zero"),
        resample=resample,
        ablated=held_score(circuit, "mean", inverted=True),
        empty=held_score(without_nodes(circuit), "mean"),
        full=score_next_tokens(full_logits, data, full_logits),
        n_pairs=data.n_pairs,
        n_nodes=circuit.n_nodes,
        n_edges=n_edges,
        target_loss=_target_loss(circuit),
        objective=_objective(circuit),
        ablation=_ablation(circuit),
    )


def _setting(circuit: Circuit, name: str) -> Any:
    """A setting of the search that found the circuit; None if it is not recorded."""
    config = circuit.measured.get("config")
    return config.get(name) if isinstance(config, dict) else None


def _target_loss(circuit: Circuit) -> float | None:
    """The target loss of the search that found the circuit; None if it is not recorded."""
    target_loss = _setting(circuit, "target_loss")
    if isinstance(target_loss, bool) or not isinstance(target_loss, int | float):
        return None
    return float(target_loss)


def _objective(circuit: Circuit) -> Objective:
    """The objective of the search that found the circuit; the paper's if it is not recorded."""
    recorded = _setting(circuit, "objective")
    return recorded if recorded in OBJECTIVES else "candidates"


def _ablation(circuit: Circuit) -> Ablation:
    """The values at which the search held nodes; the paper's means if they are not recorded."""
    recorded = _setting(circuit, "ablation")
    return recorded if recorded in ABLATIONS else "mean"


@checked()
def judged(
    circuit: Circuit,
    model: TLModel,
    selection: TaskData,
    heldout: TaskData,
    batch_size: int,
    ablation: Ablation,
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a circuit on the held-out pairs, and collect the scores that its file records.

    The recorded scores are those on the selection pairs, on the held-out pairs, and on the held-out
    pairs after calibration on the selection pairs.

    Returns:
        What `evaluate` returns for the held-out pairs, and the recorded scores as JSON values.
    """
    evaluation = evaluate(circuit, model, heldout, batch_size)
    run_context = holding_nodes(circuit, model, ablation)
    selection_logits = all_logits(model, selection, batch_size, run_context)
    heldout_logits = all_logits(model, heldout, batch_size, run_context)
    scale, shift = calibration(selection_logits, selection)
    fitted_scale, fitted_shift = heldout_logits.new_tensor([scale, shift])
    calibrated = _calibrated(heldout_logits, fitted_scale, fitted_shift)
    return evaluation, {
        "selection": {"circuit": asdict(score_logits(selection_logits, selection))},
        "heldout": asdict(evaluation),
        "calibrated": {
            "scale": scale,
            "shift": shift,
            "heldout": asdict(score_logits(calibrated, heldout)),
        },
    }


@checked()
def sized_score(
    circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256
) -> SizedScore:
    """The size of the circuit and its score on `data`.

    Raises:
        CircuitError: if `model` is not the circuit's model.
    """
    n_edges = circuit.n_edges(model)
    circuit_score = score(model, data, batch_size, holding_nodes(circuit, model))
    return SizedScore(circuit.n_nodes, n_edges, circuit_score)


@checked()
def scaled_sizes(circuit: Circuit, half_octaves: Iterable[int]) -> list[int]:
    """The circuit's number of nodes times 2^(i/2) for each i in `half_octaves`, in rising order.

    Sizes are capped at the number of all nodes, and duplicates are removed.
    """
    sizes = set()
    for i in half_octaves:
        size = round(circuit.n_nodes * 2 ** (i / 2))
        sizes.add(min(size, circuit.n_candidates))
    return sorted(sizes)


@checked()
def faithfulness_curve(
    circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256
) -> list[SizedScore]:
    """The scores of circuits from an eighth of the circuit's size to eight times its size.

    Each consists of the nodes that the search ranked highest.

    Raises:
        CircuitError: if `model` is not the circuit's model, or the circuit has no `scores`.
    """
    sized_scores = []
    for n_nodes in scaled_sizes(circuit, range(-6, 7)):
        sized_scores.append(sized_score(circuit.of_size(n_nodes), model, data, batch_size))
    return sized_scores


@checked()
def random_circuits(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    n_circuits: int = 8,
    seed: int = 0,
    batch_size: int = 256,
) -> list[SizedScore]:
    """The scores of random circuits with as many nodes at each hook point as `circuit`.

    They show which score a circuit of this size has by chance.
    """
    sized_scores = []
    for random_circuit in random_circuits_like(circuit, n_circuits, seed):
        sized_scores.append(sized_score(random_circuit, model, data, batch_size))
    return sized_scores


@checked()
def full_evaluation(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """All measurements of a circuit that this module makes, as JSON values.

    The effects are empty if the circuit has more than `MAX_EFFECTS` nodes and edges, and the
    faithfulness curve (`ladder`) is empty if it has no `scores`.

    Args:
        seed: the seed of the random circuits, and of the prompts for resample ablation.
        progress: show a progress bar while the effects are measured.

    Raises:
        CircuitError: if `model` is not the circuit's model.
    """
    parts = _parts(circuit, model)
    effect_of: dict[Node | Edge, float] = {}
    if len(parts) <= MAX_EFFECTS:
        effect_of = effects(circuit, model, data, batch_size, progress)
    largest_first = sorted(effect_of.items(), key=itemgetter(1), reverse=True)
    curve: list[SizedScore] = []
    if circuit.scores:
        curve = faithfulness_curve(circuit, model, data, batch_size)
    random_scores = random_circuits(circuit, model, data, seed=seed, batch_size=batch_size)
    return {
        "model": circuit.model_name,
        "task": data.task,
        "kinds": dict(Counter(map(_kind, parts))),
        "evaluation": asdict(evaluate(circuit, model, data, batch_size, seed)),
        "ladder": list(map(asdict, curve)),
        "random": list(map(asdict, random_scores)),
        "effects": {str(part): effect for part, effect in largest_first},
    }


def _parts(circuit: Circuit, model: TLModel) -> list[Node | Edge]:
    return [*circuit.nodes, *circuit.edges(model)]


def _kind(part: Node | Edge) -> str:
    """The location of a node, or the two locations that an edge joins."""
    if isinstance(part, Node):
        return part.location
    return f"{part.source.location} → {part.target.location}"
