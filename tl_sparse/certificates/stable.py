"""Whether a circuit is stable: over seeds of its search, samples of prompts, and contexts.

A search that finds other nodes with another seed has found one circuit of many (Méloux et al. 2025,
arXiv 2510.00845), and circuits change with the wording of the prompts on which they are searched
(arXiv 2606.16920).
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.certificates.again import Found, Search, search_of
from tl_sparse.circuits import Circuit, circuit_task
from tl_sparse.config import check
from tl_sparse.errors import DataError, PruneError, TaskError, TokenizerError
from tl_sparse.evaluation import (
    LEAST_ACCURACY,
    Estimate,
    Runs,
    jaccard,
    mean_of_pairs,
    without_nodes,
)
from tl_sparse.hooks import TLModel
from tl_sparse.pruning import heldout_pairs, split_pairs
from tl_sparse.tasks import (
    Pair,
    Task,
    TaskData,
    TaskPairs,
    draw_pairs,
    encode_pairs,
    held_out_contexts,
    make_task_data,
    prompts_of,
    too_few_pairs,
)

#: Bootstrap resamples of the held-out pairs, and the quantiles of their losses that are reported.
_N_RESAMPLES = 2000
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class SearchedAgain:
    """What the search found with another seed, or on other pairs.

    Attributes:
        seed: the seed of the search, or that of the pairs.
        found: what it found, measured on the held-out pairs of the first circuit.
        overlap: the Jaccard overlap of its nodes with those of the first circuit: the number of
            nodes in both, divided by that of nodes in either. None if it found no circuit.
        withstands: whether it reaches the target loss on the held-out pairs, and under the worst of
            the subsets too, each if the first circuit does. None if it found no circuit.
    """

    seed: int
    found: Found
    overlap: float | None = None
    withstands: bool | None = None


@dataclass(frozen=True)
class InContext:
    """A task in contexts that the search has not seen. Losses are between its two answers, in nats.

    Attributes:
        full_loss, full_accuracy: those of the full model.
        loss, accuracy: those of the circuit.
        empty_loss, empty_accuracy: those if no node is kept.
        model_can: whether the full model can do the task in these contexts: it reaches the target
            loss or, if that is not one of the two answers, an accuracy of 90 %. If not, the scores
            say nothing about the circuit.
        n_pairs: the number of pairs.
    """

    full_loss: Estimate
    full_accuracy: Estimate
    loss: Estimate
    accuracy: Estimate
    empty_loss: Estimate
    empty_accuracy: Estimate
    model_can: bool
    n_pairs: int


@dataclass(frozen=True)
class Stability:
    """Whether a circuit is stable.

    Attributes:
        first: the circuit itself.
        seeds: the same search on the same pairs with other seeds, which decide the initial gates,
            the order of training and the subsets of a robust search.
        samples: the same search with the same seed, on other training and selection pairs.
        loss_interval: the 2.5 % and 97.5 % quantiles of the circuit's loss on bootstrap resamples
            of the held-out pairs; empty for a single pair.
        fresh_losses: its loss on pairs that neither found nor judged it, for each draw.
        contexts: kind of context that the search has not seen → how the circuit does there.
        left_out: what was not measured ("samples", "fresh_losses", "contexts" or the kind of
            context) → why.
        target_loss: the loss that each search had to reach, in nats.
        n_pairs: the number of held-out pairs on which losses are measured.
        n_subsets: the number of random subsets of which the worst is reported.
        objective: what the losses measure, except those in contexts; see `Objective`.
    """

    first: Found
    seeds: list[SearchedAgain]
    samples: list[SearchedAgain]
    loss_interval: list[float]
    fresh_losses: list[Estimate]
    contexts: dict[str, InContext]
    left_out: dict[str, str]
    target_loss: float
    n_pairs: int
    n_subsets: int
    objective: str = "candidates"


@checked("task")
def stability(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    n_seeds: int = 1,
    n_samples: int = 1,
    n_draws: int = 3,
    n_pairs: int = 128,
    n_subsets: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Stability:
    """Measure whether a circuit is stable over seeds, samples of prompts, and unseen contexts.

    The searches have the settings that the circuit records, and its means. The seed of a search
    decides its pairs too, so a search with another seed is given the pairs of the first.

    Args:
        circuit: a circuit that `prune` or `prune_edges` found.
        model: its model.
        task: its task, or the name of that; by default the circuit's own.
        n_seeds: the number of searches with other seeds.
        n_samples: the number of searches on other pairs.
        n_draws: the number of fresh draws of pairs on which the circuit's loss is measured.
        n_pairs: the number of pairs on which each loss is measured.
        n_subsets: the number of random subsets of which the worst is reported.
        batch_size: the number of prompts to run at once.
        seed: the seed of fresh pairs, resamples and subsets.
        progress: show a progress bar.

    Raises:
        CircuitError: if the circuit is of another model, has no means or no nodes, or does not
            record the settings of its search; or if its task is not known.
        ConfigError: if a number is out of range.
        TaskError, DataError, TokenizerError: if the task does not fit the model.
    """
    for name, number in (("n_seeds", n_seeds), ("n_samples", n_samples), ("n_draws", n_draws)):
        check(number >= 0, name, number, "at least 0")
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    search = search_of(circuit, model, n_subsets, batch_size, seed)
    task = circuit_task(circuit, task)
    data = heldout_pairs(circuit, model, task).first(n_pairs)
    first = search.measured(circuit, model, data)
    subject = _Subject(circuit, model, task, data, search, first)
    left_out: dict[str, str] = {}
    with tqdm(total=n_seeds + n_samples, desc="searching again", disable=not progress) as bar:
        seeds = _other_seeds(subject, n_seeds, bar)
        samples = _other_samples(subject, n_samples, left_out, bar)
    return Stability(
        first=first,
        seeds=seeds,
        samples=samples,
        loss_interval=_loss_interval(subject),
        fresh_losses=_fresh_losses(subject, n_draws, n_pairs, left_out),
        contexts=_contexts(subject, n_pairs, left_out),
        left_out=left_out,
        target_loss=search.config.target_loss,
        n_pairs=data.n_pairs,
        n_subsets=n_subsets,
        objective=search.config.objective,
    )


@dataclass(frozen=True)
class _Subject:
    """The circuit whose stability is measured, and what is the same in all measurements."""

    circuit: Circuit
    model: TLModel
    task: Task
    data: TaskData
    search: Search
    first: Found

    @cached_property
    def pairs(self) -> TaskPairs:
        """The pairs that found and judged the circuit."""
        return split_pairs(self.task, self.search.config)

    def losses(self, data: TaskData) -> Float[Tensor, " prompt"]:
        """The circuit's loss on each prompt, by the objective of its search."""
        return self.search.losses(self.circuit, self.model, data)


# --- searching again


def _other_seeds(subject: _Subject, n_seeds: int, bar: Any) -> list[SearchedAgain]:
    """The same search on the same pairs, with other seeds."""
    config = subject.search.config
    if n_seeds == 0:
        return []
    same_pairs = Task.from_pairs(subject.pairs)
    results = []
    for i in range(n_seeds):
        # The restarts of a search have seeds that follow each other.
        seed = config.seed + (i + 1) * config.restarts
        results.append(_searched(subject, same_pairs, seed, seed))
        bar.update()
    return results


def _other_samples(
    subject: _Subject, n_samples: int, left_out: dict[str, str], bar: Any
) -> list[SearchedAgain]:
    """The same search with the same seed, on other pairs."""
    results: list[SearchedAgain] = []
    for i in range(n_samples):
        seed = subject.search.seed + i
        try:
            pairs = _other_pairs(subject, seed)
        except TaskError as error:
            left_out["samples"] = str(error)
            break
        own_seed = subject.search.config.seed
        results.append(_searched(subject, Task.from_pairs(pairs), own_seed, seed))
        bar.update()
    return results


def _other_pairs(subject: _Subject, seed: int) -> TaskPairs:
    """As many other training and selection pairs, and the same held-out pairs.

    Raises:
        TaskError: if the task has too few pairs for that.
    """
    first = subject.pairs
    n_training, n_selection = len(first.training), len(first.selection)
    drawn = _new_pairs(subject, n_training + n_selection, seed)
    return dataclasses.replace(
        first, training=tuple(drawn[:n_training]), selection=tuple(drawn[n_training:])
    )


def _new_pairs(subject: _Subject, n_pairs: int, seed: int) -> list[Pair]:
    """Pairs of the task that neither found the circuit nor judged it.

    Raises:
        TaskError: if the task has too few pairs for that.
    """
    task = subject.task
    if task.split is not None:
        raise TaskError(
            f"of task {task.name} only the pairs are known with which the circuit was found; give "
            "the task itself as the argument task to draw other pairs"
        )
    used = subject.pairs.searched_prompts | prompts_of(subject.pairs.heldout)
    drawn = draw_pairs(task, n_pairs, seed, used)
    if len(drawn) < n_pairs:
        raise too_few_pairs(task, len(drawn), n_pairs, len(used))
    return drawn


def _searched(subject: _Subject, task: Task, search_seed: int, seed: int) -> SearchedAgain:
    """What the search with `search_seed` finds, beside the first circuit."""
    config = dataclasses.replace(subject.search.config, seed=search_seed)
    search = dataclasses.replace(subject.search, config=config)
    try:
        circuit = search.run(subject.model, task, subject.circuit.means)
    except PruneError as error:
        not_found = Found(subject.first.full_loss, not_found=str(error))
        return SearchedAgain(seed, not_found)
    found = search.measured(circuit, subject.model, subject.data)
    overlap = jaccard(circuit.node_names, subject.circuit.node_names)
    withstands = _withstands(found, subject.first, config.target_loss)
    return SearchedAgain(seed, found, overlap, withstands)


def _withstands(found: Found, first: Found, target_loss: float) -> bool:
    """Whether a circuit reaches the target loss wherever the first one does."""
    for loss, first_loss in ((found.loss, first.loss), (found.worst_loss, first.worst_loss)):
        assert loss is not None
        assert first_loss is not None
        if first_loss.value <= target_loss < loss.value:
            return False
    return True


# --- the same circuit on other prompts


def _loss_interval(subject: _Subject) -> list[float]:
    """Quantiles of the circuit's mean loss over pairs that are drawn with replacement."""
    pair_losses = subject.losses(subject.data).view(-1, 2).mean(1).double().cpu()
    n = len(pair_losses)
    if n == 1:
        return []
    generator = torch.Generator().manual_seed(subject.search.seed)
    chosen = torch.randint(n, (_N_RESAMPLES, n), generator=generator, device=generator.device)
    quantiles = torch.tensor(_QUANTILES, dtype=torch.float64)
    interval: list[float] = pair_losses[chosen].mean(1).quantile(quantiles).tolist()
    return interval


def _fresh_losses(
    subject: _Subject, n_draws: int, n_pairs: int, left_out: dict[str, str]
) -> list[Estimate]:
    """The circuit's loss on each of several draws of pairs that are neither searched nor judged."""
    model, task = subject.model, subject.task
    found: list[Estimate] = []
    for i in range(n_draws):
        seed = subject.search.seed + i
        try:
            pairs = _new_pairs(subject, n_pairs, seed)
        except TaskError as error:
            left_out["fresh_losses"] = str(error)
            break
        data = encode_pairs(task, pairs, model.tokenizer, model.cfg.n_ctx)
        data = data.to(next(model.parameters()).device)
        found.append(mean_of_pairs(subject.losses(data)))
    return found


def _contexts(subject: _Subject, n_pairs: int, left_out: dict[str, str]) -> dict[str, InContext]:
    """How the circuit does in contexts that the search has not seen."""
    try:
        kinds = held_out_contexts(subject.task)
    except TaskError as error:
        left_out["contexts"] = str(error)
        return {}
    model = subject.model
    found: dict[str, InContext] = {}
    for kind, task in kinds.items():
        seed = subject.search.seed
        try:
            data = make_task_data(task, model.tokenizer, n_pairs, seed, model.cfg.n_ctx)
        except (DataError, TaskError, TokenizerError) as error:
            left_out[kind] = str(error)
            continue
        found[kind] = _in_context(subject, data.to(next(model.parameters()).device))
    return found


def _in_context(subject: _Subject, data: TaskData) -> InContext:
    search = subject.search
    config = search.config
    runs = Runs(subject.model, data, search.batch_size, config.ablation, search.seed)
    full, alone = runs.full(), runs.alone(subject.circuit)
    empty = runs.alone(without_nodes(subject.circuit))
    model_can = full.accuracy.value >= LEAST_ACCURACY
    if config.objective == "candidates":
        model_can = full.loss.value <= config.target_loss
    return InContext(
        full_loss=full.loss,
        full_accuracy=full.accuracy,
        loss=alone.loss,
        accuracy=alone.accuracy,
        empty_loss=empty.loss,
        empty_accuracy=empty.accuracy,
        model_can=model_can,
        n_pairs=data.n_pairs,
    )
