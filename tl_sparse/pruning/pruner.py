"""Finding the circuit of a task (Gao et al. 2025, sections 2.2 and A.5).

Learned gates rank the nodes, and as few of them are kept as the target loss allows. Edges can then
be pruned too. Node pruning uses hooks alone; edge pruning changes weights, and restores them.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import (
    Circuit,
    check_channels,
    circuit_task,
    fingerprint,
    shared_reads,
)
from tl_sparse.errors import ArgumentError, CircuitError, PruneError, counted, warn_user
from tl_sparse.evaluation import (
    Evaluation,
    all_objective_losses,
    judged,
    ready_for,
    score,
)
from tl_sparse.hooks import (
    NodeValues,
    TLModel,
    check_norms_can_be_held,
    differentiating,
    frozen,
    without_inference,
)
from tl_sparse.pruning.config import PruneConfig, as_config
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.edges import without_superfluous_edges
from tl_sparse.pruning.fixed import FixedGates
from tl_sparse.pruning.gates import LOSS_OF_A_COIN, learn_gates
from tl_sparse.pruning.means import as_corpus, corpus_means, gated_hooks, task_means
from tl_sparse.pruning.phases import phase, say_reached
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.sizes import discretise
from tl_sparse.pruning.splits import encoded_splits, split_pairs
from tl_sparse.pruning.start import initial_gates, start_from_ranking
from tl_sparse.tasks import Task, TaskData, TaskPairs, as_task, is_built_in

#: On fewer pairs than this, a loss can differ much from that on other pairs.
_FEW_PAIRS = 50
#: How far a search goes: until it has chosen a size, removed nodes, or cut edges too.
Stage = Literal["size", "nodes", "edges"]


@checked("task", "corpus", "config")
def prune(
    model: TLModel,
    task: Task | str,
    corpus: Int[Tensor, "seq pos"] | None = None,
    config: PruneConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
    means: NodeValues | None = None,
) -> tuple[Circuit, Evaluation]:
    """Find the circuit of `task` in `model`, and evaluate it on held-out pairs.

    Args:
        model: a TransformerLens model with a tokenizer.
        task: the task that the circuit must do, or its name; see `get_task`.
        corpus: tokens of the training distribution, over which the means are taken. None means the
            sample in the folder that the model was loaded from; see `load_corpus`.
        config: the settings of pruning, or the fields in which they differ from `PruneConfig()`.
        progress: show a progress bar for each phase, which ends with what the phase has reached.
        means: the means over `corpus`, if `corpus_means` has already computed them.

    Returns:
        The circuit, and its scores on the held-out pairs.

    Raises:
        PruneError: if the full model misses the target loss, or no set of nodes that the search
            tries is a circuit.
        TokenizerError: if the model has no tokenizer, or a candidate is not a single token of it.
        ConfigError: for an unknown or impossible setting, such as more pairs than the task has.
        TaskError, DataError: if there is no such task, if it has fewer than 12 pairs to divide, if
            its prompts do not fit the model, or if the corpus is missing, malformed or looks padded
            (then give the `means`).
        UnsupportedError: if the model was made in `torch.inference_mode`, or sees padding.
        HookNameError: if the hook points of the model do not carry nodes.
    """
    task = as_task(task)
    config = as_config(config)
    corpus = _given_corpus(corpus, model)
    with differentiating(model), frozen(model), shared_reads(model):
        _check_can_be_held(model, config)
        pairs = split_pairs(task, config)
        train, selection, heldout = encoded_splits(model, task, pairs, config)
        _check_full_model(model, task, selection, config)
        measured: dict[str, Any] = {}
        if config.means_over == "task":
            means = task_means(model, train, config.embed_gates, config.nodes, config.batch_size)
            corpus = None
        elif not means:
            corpus = as_corpus(corpus, model)
            means = corpus_means(
                model,
                corpus,
                config.batch_size,
                config.embed_gates,
                progress=progress,
                kind=config.nodes,
            )
        if corpus is not None:
            measured["corpus_tokens"] = corpus.numel()
        empty = _empty_circuit(model, task, without_inference(means), config)
        selection = ready_for(config.objective, model, selection, config.batch_size)
        smallest = _smallest(empty, model, train, selection, config, progress)
        smallest = dataclasses.replace(smallest, pairs=_pairs_to_keep(task, pairs))
        return _judged(smallest, model, selection, heldout, config, measured, progress)


@checked("task", "config")
def find_circuit(
    model: TLModel,
    task: Task | str,
    means: NodeValues,
    config: PruneConfig | Mapping[str, Any] | None = None,
    stage: Stage = "nodes",
) -> Circuit:
    """Find the circuit of a task without judging it, to save time.

    It is the one that `prune` finds, or `prune_edges` after it. It has no scores on held-out pairs,
    and the full model is not asked whether it reaches the target loss.

    Args:
        model: a TransformerLens model with a tokenizer.
        task: the task that the circuit must do, or its name.
        means: the means over the corpus; see `corpus_means`.
        config: the settings of pruning, or the fields in which they differ from `PruneConfig()`.
        stage: where to stop. After "size", the circuit is as many of the highest-ranked nodes as
            are needed to pass, of which many are superfluous; after "nodes", these are removed;
            after "edges", superfluous edges are cut too.

    Raises:
        PruneError: if no set of nodes that the search tries is a circuit, or edges are to be cut in
            a model that is not of this package.
        UnsupportedError: if edges are to be cut between components.
        ArgumentError: for an unknown stage.
        CircuitError: if the means of a hook point are missing.
        TokenizerError, ConfigError, TaskError, DataError, UnsupportedError, HookNameError: as for
            `prune`.
    """
    task = as_task(task)
    config = as_config(config)
    with differentiating(model), frozen(model), shared_reads(model):
        _check_can_be_held(model, config)
        train, selection, _ = encoded_splits(model, task, split_pairs(task, config), config)
        if config.means_over == "task":
            means = task_means(model, train, config.embed_gates, config.nodes, config.batch_size)
        empty = _empty_circuit(model, task, without_inference(means), config)
        selection = ready_for(config.objective, model, selection, config.batch_size)
        circuit = _smallest(empty, model, train, selection, config, stage=stage)
        if stage == "edges":
            _check_edges_can_be_cut(circuit)
            criterion = Criterion.of_config(circuit, model, config)
            circuit = without_superfluous_edges(
                circuit, criterion, train, selection, progress=False
            )
        return _recorded(circuit, config)


def _check_can_be_held(model: TLModel, config: PruneConfig) -> None:
    """Raise an error if the model's nodes or, where that is asked for, its norms cannot be held."""
    gated_hooks(model, config.embed_gates, config.nodes)
    if config.freeze_norms:
        check_norms_can_be_held(model)


def _given_corpus(corpus: object, model: TLModel) -> Int[Tensor, "seq pos"] | None:
    """The tokens of the corpus, if one is given."""
    if isinstance(corpus, Mapping | PruneConfig):
        raise ArgumentError(
            "prune: corpus must be tokens [seq, pos]; this looks like settings: pass them as "
            "config=…"
        )
    return None if corpus is None else as_corpus(corpus, model)


def _pairs_to_keep(task: Task, pairs: TaskPairs) -> TaskPairs | None:
    """The pairs that a circuit keeps: none of a built-in task, which draws the same ones again."""
    return None if is_built_in(task) else pairs


def _check_full_model(model: TLModel, task: Task, selection: TaskData, config: PruneConfig) -> None:
    """Raise `PruneError` if the full model misses the target loss.

    Warns if that loss is no better than chance.
    """
    if config.objective == "candidates" and config.target_loss >= LOSS_OF_A_COIN:
        warn_user(
            f"target_loss = {config.target_loss:g} is not below chance ({LOSS_OF_A_COIN:.3f} "
            "nats): a circuit that knows nothing can reach it"
        )
    if config.allow_failing_model or config.objective == "model":
        return
    losses = all_objective_losses(model, selection, config.objective, config.batch_size)
    loss = float(losses.mean())
    if not loss <= config.target_loss:  # also if it is no number
        accuracy = score(model, selection, config.batch_size).accuracy
        advice = "Train the model longer, or give a larger target_loss"
        if config.objective == "candidates" and loss >= LOSS_OF_A_COIN:
            advice = "That is no better than guessing, so the model does not do this task"
        n_pairs = selection.n_pairs
        if n_pairs < _FEW_PAIRS:
            advice += (
                ". So few pairs can mislead: give the task more of them, or give selection_pairs "
                "(--selection-pairs) a larger share of those it has"
            )
        raise PruneError(
            f"the full model's loss on {task.name} is {loss:.3f} (accuracy {accuracy:.0%}, on "
            f"{counted(n_pairs, 'selection pair')}), above the target loss {config.target_loss}: "
            f"no circuit can be trusted to reach it. {advice}"
        )


def _empty_circuit(model: TLModel, task: Task, means: NodeValues, config: PruneConfig) -> Circuit:
    """A circuit that keeps no node; its masks cover all nodes that pruning can keep."""
    nothing_kept = {}
    names = gated_hooks(model, config.embed_gates, config.nodes)
    missing = [name for name in names if name not in means]
    if missing:
        raise CircuitError(
            f"no means at {', '.join(missing)}; corpus_means(…, kind={config.nodes!r}) gives all"
        )
    if config.nodes == "components":
        means = {name: means[name] for name in names}
    for name in names:
        like_nodes = means[name][..., :1] if config.nodes == "components" else means[name]
        nothing_kept[name] = torch.zeros_like(like_nodes, dtype=torch.bool)
    model_name = str(getattr(model.cfg, "model_name", None) or "")
    return Circuit(
        nothing_kept,
        means,
        fingerprint(model),
        model_name,
        task.name,
        frozen_norms=config.freeze_norms,
    )


def _smallest(
    empty: Circuit,
    model: TLModel,
    train: TaskData,
    selection: TaskData,
    config: PruneConfig,
    progress: bool = False,
    stage: Stage = "nodes",
) -> Circuit:
    """The circuit with the fewest edges, then nodes, of those that the restarts find.

    Raises:
        PruneError: if none of them finds one.
    """
    circuits = []
    failures = []
    for restart in range(config.restarts):
        restarted = dataclasses.replace(config, seed=config.seed + restart)
        try:
            # All restarts are tried under the same subsets, as is what `prune_edges` is given.
            criterion = Criterion.of_config(empty, model, config)
            circuits.append(_search(empty, criterion, train, selection, restarted, progress, stage))
        except PruneError as error:
            failures.append(error)
    if not circuits:
        raise failures[0]
    return min(circuits, key=lambda circuit: (circuit.n_edges(model), circuit.n_nodes))


def _search(
    empty: Circuit,
    criterion: Criterion,
    train: TaskData,
    selection: TaskData,
    config: PruneConfig,
    progress: bool,
    stage: Stage,
) -> Circuit:
    """Rank the nodes, and find the smallest circuit of those ranked highest."""
    model = criterion.model
    gates = initial_gates(empty, model, config)
    fixed = FixedGates.of_config(empty, gates, config)
    fixed.apply(gates)
    are_learned = config.method in ("learned", "any_size")
    if config.warm_start or not are_learned:
        start_from_ranking(gates, empty, model, train, selection, config, fixed, progress)
    if are_learned:
        learn_gates(model, gates, train, config, fixed, progress)
    ranking = Ranking(empty, gates, fixed, config.max_nodes)
    is_refined = stage != "size"
    return discretise(ranking, criterion, train, selection, progress, is_refined)


@checked("task", "config")
def prune_edges(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    config: PruneConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Circuit, Evaluation]:
    """Cut every edge of a circuit that its task does not need.

    Nodes whose edges are all cut are removed too. The edge with the least effect is tried first.
    The new circuit reaches the same target loss. Its numbers of nodes and edges must not be mixed
    with those of circuits from which only nodes are pruned.

    Args:
        circuit: a circuit that `prune` found, or any other circuit of the task.
        model: the circuit's model, which must be a model of this package.
        task: the task of the circuit, or its name; by default that of the circuit.
        config: the settings that `prune` was given, or the fields in which they differ from
            `PruneConfig()`, so that the selection and held-out pairs are the same.
        progress: show a progress bar for each phase, which ends with what the phase has reached.

    Returns:
        The new circuit, and its scores on the held-out pairs.

    Raises:
        PruneError: if `model` is not a model of this package, or the given circuit misses the
            target loss, under a subset too if `robust` asks for that, or is not necessary.
        UnsupportedError: if the circuit's nodes are components.
        CircuitError: if `model` is not the circuit's model; or if no task is given, and the
            circuit's own is not known.
    """
    _check_edges_can_be_cut(circuit)
    config = as_config(config)
    task = circuit_task(circuit, task)
    pairs = split_pairs(task, config)
    train, selection, heldout = encoded_splits(model, task, pairs, config)
    with torch.inference_mode(False), frozen(model), shared_reads(model):
        selection = ready_for(config.objective, model, selection, config.batch_size)
        criterion = Criterion.of_config(circuit, model, config)
        if not criterion.passes(circuit, selection, n_others=0):
            under = "" if config.robust == "none" else ", perhaps under a subset alone"
            raise PruneError(
                f"before any edge is cut, the circuit misses the target loss {config.target_loss}"
                f"{under}, or the accuracy of the model without it exceeds "
                f"{config.ablated_accuracy}"
            )
        smaller = without_superfluous_edges(circuit, criterion, train, selection, progress)
        smaller = dataclasses.replace(smaller, pairs=_pairs_to_keep(task, pairs))
        return _judged(smaller, model, selection, heldout, config, {}, progress)


def _check_edges_can_be_cut(circuit: Circuit) -> None:
    check_channels(circuit, "edges between components are no single weights and cannot be cut")


def _judged(
    circuit: Circuit,
    model: TLModel,
    selection: TaskData,
    heldout: TaskData,
    config: PruneConfig,
    measured: dict[str, Any],
    progress: bool,
) -> tuple[Circuit, Evaluation]:
    """Evaluate the circuit on the held-out pairs.

    Returns:
        The circuit, moved to the CPU and with its measurements, and the evaluation.
    """
    circuit = _recorded(circuit, config, measured)
    with phase("judging", progress, total=1) as bar:
        evaluation, scores = judged(
            circuit, model, selection, heldout, config.batch_size, config.ablation
        )
        bar.update()
        say_reached(bar, circuit.n_nodes, evaluation.circuit.loss, "held-out")
    return dataclasses.replace(circuit, measured={**circuit.measured, **scores}), evaluation


def _recorded(
    circuit: Circuit, config: PruneConfig, measured: Mapping[str, Any] = MappingProxyType({})
) -> Circuit:
    """The circuit on the CPU, with what was measured and the settings of its search."""
    return dataclasses.replace(
        circuit,
        kept=_on_cpu(circuit.kept),
        means=_on_cpu(circuit.means),
        scores=_on_cpu(circuit.scores),
        measured={**circuit.measured, **measured, "config": config.to_json()},
    )


def _on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {hook: tensor.cpu() for hook, tensor in values.items()}
