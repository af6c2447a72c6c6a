"""Judging a circuit: is it sufficient, and is it necessary (Gao et al. 2025, sections 2.2 and
3)?
"""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import Circuit, Edge, Node
from tl_sparse.errors import DataError, TaskError, TokenizerError
from tl_sparse.evaluation.scores import Ablation, Evaluation, SizedScore
from tl_sparse.hooks import TLModel, recording
from tl_sparse.tasks import (
    TASKS,
    Score,
    TaskData,
    candidate_logits,
    make_task_data,
    task_loss_and_accuracy,
)

#: Each node and edge is cut by itself to see its effect: in larger circuits that takes hours.
MAX_EFFECTS = 4000


#: What puts a model into the state in which it is to be scored on some prompts.
Under = Callable[[TaskData], AbstractContextManager[None]]


def task_logits(model: TLModel, data: TaskData) -> Float[Tensor, "prompt 2"]:
    """The logits of the two candidates after each prompt; our own models compute no others."""
    data = data.trimmed()
    if hasattr(model, "network"):
        logits = model.network(data.tokens, last=data.last)
        return candidate_logits(logits, replace(data, last=torch.zeros_like(data.last)))
    return candidate_logits(model(data.tokens), data)


def task_loss(model: TLModel, data: TaskData) -> Float[Tensor, ""]:
    """The loss of the task, with gradients."""
    return task_loss_and_accuracy(task_logits(model, data), data.correct)[0].mean()


@torch.no_grad()
def all_logits(
    model: TLModel, data: TaskData, batch_size: int = 256, under: Under | None = None
) -> Float[Tensor, "prompt 2"]:
    """The candidates' logits of every prompt, in their order; at most `batch_size` prompts at a
    time.
    """
    # Pairs of like length together, so that little is computed for padding.
    by_length = data.last.view(-1, 2).amax(1).argsort(stable=True)
    logits = []
    for pairs in by_length.split(max(1, batch_size // 2)):
        part = data.pairs(pairs)
        with under(part) if under else nullcontext():
            logits.append(task_logits(model, part))
    return torch.cat(logits).float().view(-1, 4)[by_length.argsort()].view(-1, 2)


def score(
    model: TLModel, data: TaskData, batch_size: int = 256, under: Under | None = None
) -> Score:
    """Loss and accuracy of `model`, as it now is or `under` something, on the prompts of `data`."""
    return score_logits(all_logits(model, data, batch_size, under), data)


def score_logits(logits: Float[Tensor, "prompt 2"], data: TaskData) -> Score:
    """Loss and accuracy of these logits of the candidates."""
    losses, right = task_loss_and_accuracy(logits, data.correct)
    pairs = losses.view(-1, 2).mean(1)
    error = float(pairs.std() / len(pairs) ** 0.5) if len(pairs) > 1 else float("nan")
    return Score(float(losses.mean()), error, float(right.float().mean()))


def calibration(logits: Float[Tensor, "prompt 2"], data: TaskData) -> tuple[float, float]:
    """The scale of the logits, and the shift of the second one, with the least loss: 16 steps of
    L-BFGS (A.5).
    """
    with torch.enable_grad():
        logits, fitted = (
            logits.detach().double(),
            torch.tensor([1.0, 0.0], dtype=torch.double, requires_grad=True),
        )
        optimizer = torch.optim.LBFGS([fitted], max_iter=16, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            shifted = logits * fitted[0] + torch.stack([torch.zeros_like(fitted[1]), fitted[1]]).to(
                logits
            )
            loss = task_loss_and_accuracy(shifted, data.correct)[0].mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    scale, shift = fitted.detach().tolist()
    return scale, shift


def task_scores(model: TLModel, n_pairs: int = 256, seed: int = 0) -> dict[str, Score | None]:
    """How well `model` does each task of `TASKS`; None where its tokenizer or context does not
    allow the task.

    `TokenizerError` if it has no tokenizer.
    """
    if model.tokenizer is None:
        raise TokenizerError("the model has no tokenizer, so text cannot become tokens for it")
    device, scores = next(model.parameters()).device, dict[str, Score | None].fromkeys(TASKS)
    for name, task in TASKS.items():
        with suppress(DataError, TaskError, TokenizerError):
            data = make_task_data(task, model.tokenizer, n_pairs, seed, model.cfg.n_ctx)
            scores[name] = score(model, data.to(device))
    return scores


@torch.no_grad()
def resampled(model: TLModel, data: TaskData, names: Collection[str]) -> dict[str, Tensor]:
    """What each prompt's nodes are held at when they are resampled: the activations at hook points,
    position by position, of another of the prompts, drawn at random."""
    order = torch.randperm(len(data.last), generator=torch.Generator().manual_seed(0)).to(
        data.last.device
    )
    partner = torch.empty_like(order).scatter_(0, order, order.roll(1))
    others = replace(data.trimmed(), tokens=data.trimmed().tokens[partner], last=data.last[partner])
    with recording(model, names) as found:
        task_logits(model, others)
    return found


def holding_circuit(
    circuit: Circuit, model: TLModel, ablation: str = "mean", inverted: bool = False
) -> Under:
    """`model` under the circuit, with all other nodes at their means, at zero, or resampled; or,
    inverted, without it.

    `CircuitError` if `model` is not the circuit's.
    """
    nodes = circuit.kept if inverted else circuit.dropped
    zeros = {name: torch.zeros_like(mean) for name, mean in circuit.means.items()}
    constant = {"mean": circuit.means, "zero": zeros}.get(ablation)
    cut = () if inverted else circuit.cut_edges(model)

    def under(part: TaskData) -> AbstractContextManager[None]:
        values = resampled(model, part, circuit.kept) if constant is None else constant
        return circuit.holding(model, nodes, values, cut)

    return under


def evaluate(circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256) -> Evaluation:
    """The full model, the circuit alone, and the model without the circuit, on the same prompts.

    Raises:
        CircuitError: if `model` is not the circuit's.
    """
    sizes = data.n_pairs, circuit.n_nodes, len(circuit.edges(model))
    alone = {
        how: score(model, data, batch_size, holding_circuit(circuit, model, how))
        for how in get_args(Ablation)
    }
    without = score(model, data, batch_size, holding_circuit(circuit, model, inverted=True))
    return Evaluation(
        score(model, data, batch_size),
        alone["mean"],
        without,
        alone["zero"],
        alone["resample"],
        *sizes,
    )


def sized_score(
    circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256
) -> SizedScore:
    """The circuit's size and score. `CircuitError` if `model` is not the circuit's."""
    under = holding_circuit(circuit, model)
    return SizedScore(
        circuit.n_nodes, len(circuit.edges(model)), score(model, data, batch_size, under)
    )


def judged(
    circuit: Circuit,
    model: TLModel,
    selection: TaskData,
    heldout: TaskData,
    batch_size: int,
    ablation: str,
) -> tuple[Evaluation, dict[str, Any]]:
    """`evaluate` on the held-out pairs; and what is written of a circuit, also calibrated on the
    selection pairs.
    """
    evaluation, under = (
        evaluate(circuit, model, heldout, batch_size),
        holding_circuit(circuit, model, ablation),
    )
    logits = [all_logits(model, data, batch_size, under) for data in (selection, heldout)]
    scale, shift = calibration(logits[0], selection)
    calibrated = score_logits(logits[1] * scale + torch.tensor([0.0, shift]).to(logits[1]), heldout)
    return evaluation, {
        "selection": {"circuit": asdict(score_logits(logits[0], selection))},
        "heldout": asdict(evaluation),
        "calibrated": {"scale": scale, "shift": shift, "heldout": asdict(calibrated)},
    }


def faithfulness_curve(
    circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256
) -> list[SizedScore]:
    """The faithfulness curve: circuits of an eighth to eight times the size, of the nodes that the
    search ranked highest. `CircuitError` if `model` is not the circuit's, or the circuit has no
    scores.
    """
    sizes = {min(circuit.n_candidates, round(circuit.n_nodes * 2 ** (i / 2))) for i in range(-6, 7)}
    return [sized_score(circuit.of_size(size), model, data, batch_size) for size in sorted(sizes)]


def random_circuits(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    n_circuits: int = 8,
    seed: int = 0,
    batch_size: int = 256,
) -> list[SizedScore]:
    """Circuits of as many nodes at each hook point, drawn at random: what the circuit's size alone
    does.
    """
    generator, sized_scores = torch.Generator().manual_seed(seed), []
    for _ in range(n_circuits):
        kept = {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
            for name, mask in circuit.kept.items()
        }
        drawn = replace(circuit, kept=kept, edge_set=None, measured={}, scores={})
        sized_scores.append(sized_score(drawn, model, data, batch_size))
    return sized_scores


def effects(
    circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256
) -> dict[Node | Edge, float]:
    """By how much the loss of the circuit rises when one of its nodes is held at its mean, or one
    edge is cut.
    """
    parts: list[Node | Edge] = [*circuit.nodes, *circuit.edges(model)]
    smaller = [circuit, *(circuit.without([part], model) for part in parts)]
    losses = [score(model, data, batch_size, holding_circuit(c, model)).loss for c in smaller]
    return {part: loss - losses[0] for part, loss in zip(parts, losses[1:], strict=True)}


def full_evaluation(
    circuit: Circuit, model: TLModel, data: TaskData, batch_size: int = 256, seed: int = 0
) -> dict[str, Any]:
    """All that this module measures of a circuit, as JSON values; effects if it has at most
    `MAX_EFFECTS` nodes and edges. `CircuitError` if `model` is not the circuit's."""
    parts: list[Node | Edge] = [*circuit.nodes, *circuit.edges(model)]
    kinds = Counter(
        p.location if isinstance(p, Node) else f"{p.source.location} → {p.target.location}"
        for p in parts
    )
    found = effects(circuit, model, data, batch_size) if len(parts) <= MAX_EFFECTS else {}
    sized_scores = faithfulness_curve(circuit, model, data, batch_size) if circuit.scores else []
    drawn = random_circuits(circuit, model, data, seed=seed, batch_size=batch_size)
    return {
        "model": circuit.model_name,
        "task": data.task,
        "kinds": dict(kinds),
        "evaluation": asdict(evaluate(circuit, model, data, batch_size)),
        "ladder": [asdict(sized) for sized in sized_scores],
        "random": [asdict(sized) for sized in drawn],
        "effects": {
            str(part): found[part] for part in sorted(found, key=found.__getitem__, reverse=True)
        },
    }
