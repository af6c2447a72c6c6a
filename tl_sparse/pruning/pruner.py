"""Finding the circuit of a task: nodes ranked by learned gates, as few of them kept as the target
loss allows, then the edges between them.

Gao et al. 2025, sections 2.2 and A.5. Works through hook names alone; the model is not changed.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.circuits import EMBED_HOOK, Circuit, Edge, fingerprint, node_hooks
from tl_sparse.errors import PruneError
from tl_sparse.evaluation import Evaluation, judged, score
from tl_sparse.hooks import (
    NodeGates,
    NodeValues,
    TLModel,
    frozen,
    is_sparse_model,
    mean_activations,
)
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.gates import attribution, learn_gates
from tl_sparse.pruning.sizes import circuit_score, discretise, eliminate, is_circuit, representative
from tl_sparse.tasks import Task, TaskData, make_task_data


def prune(
    model: TLModel,
    task: Task,
    corpus: Int[Tensor, "seq pos"],
    config: PruneConfig | None = None,
    progress: bool = True,
    means: NodeValues | None = None,
) -> tuple[Circuit, Evaluation]:
    """Find the circuit of `task` in `model`, and judge it on held-out pairs.

    Args:
        model: a TransformerLens model with a tokenizer.
        corpus: tokens of the training distribution, over which the means are taken.
        progress: show a bar with the task loss and the number of open gates.
        means: those over `corpus`, if `corpus_means` has already given them.

    Raises:
        PruneError: if the model itself, or every set of its nodes, misses the target loss.
        TokenizerError: if the model has no tokenizer, or a candidate is not a single token of it.
        TaskError, DataError: if the prompts do not fit; HookNameError: if the model has no such
            nodes.
    """
    config = config or PruneConfig()
    train, selection, heldout = task_splits(model, task, config)
    with frozen(model):
        full = score(model, selection, config.batch_size)
        if full.loss > config.target_loss:
            raise PruneError(
                f"the full model's loss on {task.name} is {full.loss:.3f} (accuracy {full.accuracy:.0%}), above the "
                f"target loss {config.target_loss}: no circuit can be trusted to reach it. Train the model longer, or "
                f"give a larger target_loss"
            )
        if (
            config.means_over == "task"
        ):  # rows of one length at a time, since padding is not to count
            lengths = train.last.unique().tolist()
            means = _means(
                model, (train.tokens[train.last == n, : n + 1] for n in lengths), config.embed_gates
            )
        means = means or corpus_means(model, corpus, config.batch_size, config.embed_gates)
        hooks = [EMBED_HOOK] * config.embed_gates + list(node_hooks(model).values())
        nothing = {name: torch.zeros_like(means[name], dtype=torch.bool) for name in hooks}
        name = str(getattr(model.cfg, "model_name", None) or "")
        empty = Circuit(nothing, means, fingerprint(model), name, task.name)
        configs = [
            dataclasses.replace(config, seed=config.seed + i) for i in range(config.restarts)
        ]
        found = [_search(empty, model, train, selection, config, progress) for config in configs]
        circuit = min(found, key=lambda circuit: (len(circuit.edges(model)), circuit.n_nodes))
        return _judged(circuit, model, selection, heldout, config, corpus_tokens=corpus.numel())


def corpus_means(
    model: TLModel, corpus: Int[Tensor, "seq pos"], batch_size: int = 256, embed: bool = False
) -> NodeValues:
    """The means at which nodes are held, and of hook_z; `HookNameError` if the model has no such
    nodes.

    With `embed` the channels of the token embedding are nodes too.

    Warns if their standard error is large, seen by how far those of the two halves of the corpus
    are apart.
    """
    parts = [rows for rows in corpus.tensor_split(2) if len(rows)]
    means = [_means(model, rows.long().split(max(1, batch_size // 4)), embed) for rows in parts]
    flat = [torch.cat([mean.flatten() for mean in half.values()]) for half in means]
    error = (
        float((flat[0] - flat[-1]).norm() / (flat[0] + flat[-1]).norm())
        if len(parts) == 2
        else math.inf
    )
    if error > 0.1:
        warnings.warn(
            f"the means over {corpus.numel()} tokens have a standard error of about {error:.0%} of their size; a "
            "larger corpus makes them, and the circuit, more stable",
            stacklevel=3,
        )
    share = len(parts[0]) / len(corpus)
    return {name: torch.lerp(means[-1][name], mean, share) for name, mean in means[0].items()}


def _means(model: TLModel, batches: Iterable[Int[Tensor, "batch pos"]], embed: bool) -> NodeValues:
    hooks = [EMBED_HOOK] * embed + list(node_hooks(model).values())
    if is_sparse_model(model):  # for edges that leave heads; those of other models cannot be cut
        hooks += [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    with frozen(model):
        return mean_activations(model, hooks, batches)


def prune_edges(
    circuit: Circuit,
    model: TLModel,
    task: Task,
    config: PruneConfig | None = None,
    progress: bool = True,
) -> tuple[Circuit, Evaluation]:
    """Cut every edge of a circuit that its task does not need, and drop the nodes that are then
    without edges.

    The edge with the least effect is tried first. What comes back reaches the same target loss; its
    figures are not to be mixed with those of circuits that are pruned by nodes alone.

    Args:
        config: as for `prune`, whose selection and held-out pairs these are too.

    Raises:
        PruneError: if `model` is not one of ours, or the circuit itself misses the target loss.
        CircuitError: if `model` is not the circuit's.
    """
    config = config or PruneConfig()
    _, selection, heldout = task_splits(model, task, config)
    edges = circuit.edges(model)

    def without(gone: list[Edge]) -> Circuit:
        smaller = circuit.without(gone, model)
        useful = {
            node for edge in set(edges).difference(gone) for node in (edge.source, edge.target)
        }
        return smaller.without(
            {node for edge in gone for node in (edge.source, edge.target)} - useful, model
        )

    with frozen(model):
        if not is_circuit(circuit, model, selection, config):
            raise PruneError(
                f"the circuit misses the target loss {config.target_loss} before an edge is cut"
            )
        part = representative(circuit, model, selection, config)
        bar = tqdm(edges, desc="measuring edges", disable=not progress, unit="edge")
        effects = {edge: circuit_score(without([edge]), model, part, config).loss for edge in bar}
        gone = eliminate(
            sorted(edges, key=effects.__getitem__),
            lambda gone: is_circuit(without(gone), model, part, config),
            lambda gone: is_circuit(without(gone), model, selection, config),
        )
        return _judged(without(gone), model, selection, heldout, config)


def task_splits(
    model: TLModel, task: Task, config: PruneConfig
) -> tuple[TaskData, TaskData, TaskData]:
    """Disjoint pairs to train gates on, to choose the size on, and to judge on."""
    device, used = next(model.parameters()).device, set[str]()
    splits = []
    # Selection and held-out pairs first, so that they are the same whatever the number of training
    # pairs.
    for i, n_pairs in enumerate((config.selection_pairs, config.heldout_pairs, config.train_pairs)):
        data = make_task_data(
            task, model.tokenizer, n_pairs, 3 * config.seed + i, model.cfg.n_ctx, exclude=used
        )
        used.update(data.prompts)
        splits.append(data.to(device))
    selection, heldout, train = splits
    return train, selection, heldout


def _search(
    empty: Circuit,
    model: TLModel,
    train: TaskData,
    selection: TaskData,
    config: PruneConfig,
    progress: bool,
) -> Circuit:
    """One circuit: its nodes ranked, then as few of them as make a circuit."""
    start = ("init_bias", "init_scale", "temperature", "seed")
    hooks = node_hooks(model) if config.tied_qk else {}
    tied = {
        hook: hooks[layer, "attn_q"]
        for (layer, location), hook in hooks.items()
        if location == "attn_k"
    }
    for key, query in tied.items():
        if empty.means[key].shape != empty.means[query].shape:
            shapes = [list(empty.means[name].shape) for name in (query, key)]
            raise PruneError(
                f"tied_qk needs a key channel for each query channel; [heads, channels] are {shapes}"
            )
    means = {name: empty.means[name] for name in empty.kept}
    held = (
        {name: torch.zeros_like(mean) for name, mean in means.items()}
        if config.ablation == "zero"
        else means
    )
    gates = NodeGates(held, tied=tied, **{name: getattr(config, name) for name in start})
    if config.warm_start or config.method != "learned":
        noise = gates.tau.detach() - config.init_bias
        scores = (
            noise if config.method == "random" else attribution(model, gates, train, config).abs()
        )
        rank, size, n_gates = (
            scores.argsort(descending=True, stable=True).argsort(),
            32,
            len(scores),
        )
        part = selection.pairs(range(min(config.cleanup_pairs, selection.n_pairs)))
        while size < n_gates:
            ranked = dataclasses.replace(empty, kept=gates.at_nodes(rank < size))
            if circuit_score(ranked, model, part, config).loss <= config.target_loss:
                break
            size = math.ceil(1.5 * size)
        # Open from 1 down to 0 over the circuit of that size, and closed from there on.
        above, below = config.init_bias * (1 - rank / size), 0.3 * (size - rank) / n_gates
        gates.tau.data = torch.where(rank < size, above, below) + noise * (
            config.method == "learned"
        )
    if config.method == "learned":
        learn_gates(model, gates, train, config, progress)
    return discretise(empty, model, gates, selection, config)


def _judged(
    circuit: Circuit,
    model: TLModel,
    selection: TaskData,
    heldout: TaskData,
    config: PruneConfig,
    **measured: Any,
) -> tuple[Circuit, Evaluation]:
    """The circuit, on the CPU, with what was measured of it; and how it does on the held-out
    pairs.
    """
    tensors: dict[str, Any] = {
        name: {hook: values.cpu() for hook, values in getattr(circuit, name).items()}
        for name in ("kept", "means", "scores")
    }
    circuit = dataclasses.replace(circuit, **tensors)
    evaluation, found = judged(
        circuit, model, selection, heldout, config.batch_size, config.ablation
    )
    measured |= {"config": dataclasses.asdict(config)} | found
    return dataclasses.replace(circuit, measured=circuit.measured | measured), evaluation
