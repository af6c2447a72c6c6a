"""Whether a circuit is specific: what other tasks lose without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.errors import CircuitError, DataError, TaskError, TokenizerError
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like
from tl_sparse.evaluation.estimates import Estimate, mean_of, mean_of_pairs
from tl_sparse.evaluation.prompt_runs import PromptScores, Runs
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TASKS, Task, TaskData, as_task, make_task_data

#: A model can do a task if its accuracy is at least this.
LEAST_ACCURACY = 0.9


@dataclass(frozen=True)
class TaskLoss:
    """What a task loses without a circuit.

    Attributes:
        full_loss: the task loss of the full model, in nats.
        full_accuracy: the accuracy of the full model.
        loss: the task loss without the circuit: its nodes are held at their means.
        accuracy: the accuracy without the circuit.
        rise: by how much the loss is higher without the circuit, compared pair by pair.
        drop: by how much the accuracy is lower.
        random_rise: the mean rise without as many random nodes, with its error over the draws.
        random_drop: the mean drop of the accuracy without as many random nodes.
    """

    full_loss: Estimate
    full_accuracy: Estimate
    loss: Estimate
    accuracy: Estimate
    rise: Estimate
    drop: Estimate
    random_rise: Estimate
    random_drop: Estimate


@dataclass(frozen=True)
class Specificity:
    """What the circuit's own task and all others lose without it.

    Attributes:
        own: what the circuit's own task loses.
        others: task → what it loses.
        mean_rise: the mean rise of the others' losses, with its standard error over tasks; None if
            there are no others.
        mean_random_rise: the same without random nodes.
        left_out: task → why it is not measured: the model cannot do it, or has no prompts of it.
        n_pairs: the number of pairs of each task, at most.
        n_random: the number of draws of random nodes, as many at each hook point as the circuit's.
    """

    own: TaskLoss
    others: dict[str, TaskLoss]
    mean_rise: Estimate | None
    mean_random_rise: Estimate | None
    left_out: dict[str, str]
    n_pairs: int
    n_random: int


@dataclass(frozen=True)
class SpecificityMatrix:
    """What each task loses without the circuit of each task.

    Attributes:
        losses: the name of a circuit → task → what the task loses without the circuit.
        own_tasks: the name of a circuit → its own task.
        left_out: task → why it is not measured.
        n_pairs: the number of pairs of each task.
        n_random: the number of draws of random nodes for each circuit.
    """

    losses: dict[str, dict[str, TaskLoss]]
    own_tasks: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    n_pairs: int = 0
    n_random: int = 0


@checked()
def specificity(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    tasks: Sequence[Task | str] | None = None,
    n_pairs: int = 32,
    n_random: int = 4,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Specificity:
    """Measure what other tasks lose when the circuit's nodes are held at their means.

    A specific circuit costs its own task much, and the others no more than random nodes do.

    Args:
        data: pairs of the circuit's own task.
        tasks: the other tasks, or their names; by default all built-in ones. Of these, the
            circuit's own and those that the model cannot do are left out.
        n_pairs: the number of pairs of each task; of `data`, the first ones.
        n_random: how often as many random nodes are drawn, as the baseline.
        batch_size: the largest number of prompts to run at a time.
        seed: the seed of the pairs of the other tasks and of the random nodes.
        progress: show a progress bar over the tasks.

    Raises:
        ConfigError: if a number is below its least value.
        CircuitError: if the circuit is of another model, or has no means or no nodes.
        TokenizerError: if the model has no tokenizer, which other tasks need.
        TaskError: if a task is unknown.
    """
    _check_numbers(n_pairs, n_random)
    check_measurable(circuit, model)
    chosen = [as_task(task) for task in (TASKS if tasks is None else tasks)]
    others = [task for task in chosen if task.name != data.task]
    prompts, left_out = _prompts(model, others, n_pairs, batch_size, seed)
    own = data.first(n_pairs)
    measured = {data.task: _Prompts(own, Runs(model, own, batch_size).full())} | prompts
    losses = _task_losses(circuit, model, measured, n_random, batch_size, seed, progress)
    own_loss = losses.pop(data.task)
    return Specificity(
        own=own_loss,
        others=losses,
        mean_rise=_mean([loss.rise.value for loss in losses.values()]),
        mean_random_rise=_mean([loss.random_rise.value for loss in losses.values()]),
        left_out=left_out,
        n_pairs=n_pairs,
        n_random=n_random,
    )


@checked()
def specificity_matrix(
    circuits: Mapping[str, Circuit],
    model: TLModel,
    tasks: Sequence[Task | str] | None = None,
    n_pairs: int = 32,
    n_random: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> SpecificityMatrix:
    """Measure what each task loses without each circuit, for example those of a suite.

    Args:
        circuits: a name, such as that of its task → the circuit.
        tasks: the tasks, or their names; by default all built-in ones. Those that the model cannot
            do are left out.
        progress: show a progress bar over the tasks of each circuit.

    Other arguments and errors are those of `specificity`.

    Raises:
        CircuitError: if there are no circuits.
    """
    _check_numbers(n_pairs, n_random)
    if not circuits:
        raise CircuitError("no circuits are given, so there is nothing to measure")
    for circuit in circuits.values():
        check_measurable(circuit, model)
    chosen = [as_task(task) for task in (TASKS if tasks is None else tasks)]
    prompts, left_out = _prompts(model, chosen, n_pairs, batch_size, seed)
    losses = {}
    for name, circuit in circuits.items():
        losses[name] = _task_losses(circuit, model, prompts, n_random, batch_size, seed, progress)
    own_tasks = {name: circuit.task for name, circuit in circuits.items()}
    return SpecificityMatrix(losses, own_tasks, left_out, n_pairs, n_random)


def _check_numbers(n_pairs: int, n_random: int) -> None:
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    check(n_random >= 1, "n_random", n_random, "at least 1")


@dataclass(frozen=True, eq=False)
class _Prompts:
    """The prompts of a task, and what the full model answers."""

    data: TaskData
    full: PromptScores


def _prompts(
    model: TLModel, tasks: Sequence[Task], n_pairs: int, batch_size: int, seed: int
) -> tuple[dict[str, _Prompts], dict[str, str]]:
    """The prompts of each task that the model can do, and why the others are left out."""
    if tasks and model.tokenizer is None:
        raise TokenizerError(
            "the model has no tokenizer, which is needed to turn the prompts of tasks into tokens"
        )
    device = next(model.parameters()).device
    prompts = {}
    left_out = {}
    for task in tasks:
        try:
            data = make_task_data(task, model.tokenizer, n_pairs, seed, model.cfg.n_ctx)
        except (DataError, TaskError, TokenizerError) as error:
            left_out[task.name] = str(error)
            continue
        data = data.to(device)
        full = Runs(model, data, batch_size).full()
        if full.accuracy.value >= LEAST_ACCURACY:
            prompts[task.name] = _Prompts(data, full)
        else:
            left_out[task.name] = f"the model's accuracy is {full.accuracy.value:.0%}"
    return prompts, left_out


def _task_losses(
    circuit: Circuit,
    model: TLModel,
    prompts: Mapping[str, _Prompts],
    n_random: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> dict[str, TaskLoss]:
    """What each task loses without the circuit, and without random nodes."""
    random = random_circuits_like(circuit, n_random, seed)
    losses = {}
    for name, task in tqdm(prompts.items(), "measuring tasks", disable=not progress):
        runs = Runs(model, task.data, batch_size)
        without_random = [runs.without(each) for each in random]
        losses[name] = _task_loss(task.full, runs.without(circuit), without_random)
    return losses


def _task_loss(
    full: PromptScores, without: PromptScores, random: Sequence[PromptScores]
) -> TaskLoss:
    random_rises = [each.loss.value - full.loss.value for each in random]
    random_drops = [full.accuracy.value - each.accuracy.value for each in random]
    return TaskLoss(
        full_loss=full.loss,
        full_accuracy=full.accuracy,
        loss=without.loss,
        accuracy=without.accuracy,
        rise=mean_of_pairs(without.losses - full.losses),
        drop=mean_of_pairs(full.right.float() - without.right.float()),
        random_rise=mean_of(torch.tensor(random_rises)),
        random_drop=mean_of(torch.tensor(random_drops)),
    )


def _mean(values: Sequence[float]) -> Estimate | None:
    return mean_of(torch.tensor(values)) if values else None
