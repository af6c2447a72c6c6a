"""Finding the circuit of a task: nodes ranked by learned gates, as few of them kept as the target loss allows, then
the edges between them.

Gao et al. 2025, sections 2.2 and A.5. Works through hook names alone; the model is not changed.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.circuits import EMBED_HOOK, Circuit, Edge, fingerprint, node_hooks
from tl_sparse.configs import PruneConfig
from tl_sparse.errors import PruneError
from tl_sparse.evaluation import Evaluation, all_logits, holding_circuit, judged, resampled, score, task_loss
from tl_sparse.hooks import NodeGates, NodeValues, TLModel, frozen, hooked, mean_activations
from tl_sparse.tasks import Score, Task, TaskData, make_task_data, task_loss_and_accuracy

T = TypeVar("T")


def prune(
    model: TLModel, task: Task, corpus: Int[Tensor, "seq pos"], config: PruneConfig | None = None,
    progress: bool = True, means: NodeValues | None = None,
) -> tuple[Circuit, Evaluation]:  # fmt: skip
    """Find the circuit of `task` in `model`, and judge it on held-out pairs.

    Args:
        model: a TransformerLens model with a tokenizer.
        corpus: tokens of the training distribution, over which the means are taken.
        progress: show a bar with the task loss and the number of open gates.
        means: those over `corpus`, if `corpus_means` has already given them.

    Raises:
        PruneError: if the model itself, or every set of its nodes, misses the target loss.
        TokenizerError: if the model has no tokenizer, or a candidate is not a single token of it.
        TaskError, DataError: if the prompts do not fit; HookNameError: if the model has no such nodes.
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
        if config.means_over == "task":  # rows of one length at a time, since padding is not to count
            lengths = train.last.unique().tolist()
            means = _means(model, (train.tokens[train.last == n, : n + 1] for n in lengths), config.embed_gates)
        means = means or corpus_means(model, corpus, config.batch_size, config.embed_gates)
        hooks = [EMBED_HOOK] * config.embed_gates + list(node_hooks(model).values())
        nothing = {name: torch.zeros_like(means[name], dtype=torch.bool) for name in hooks}
        name = str(getattr(model.cfg, "model_name", None) or "")
        empty = Circuit(nothing, means, fingerprint(model), name, task.name)
        configs = [dataclasses.replace(config, seed=config.seed + i) for i in range(config.restarts)]
        found = [_search(empty, model, train, selection, config, progress) for config in configs]
        circuit = min(found, key=lambda circuit: (len(circuit.edges(model)), circuit.n_nodes))
        return _judged(circuit, model, selection, heldout, config, corpus_tokens=corpus.numel())


def corpus_means(
    model: TLModel, corpus: Int[Tensor, "seq pos"], batch_size: int = 256, embed: bool = False
) -> NodeValues:
    """The means at which nodes are held, and of hook_z; `HookNameError` if the model has no such nodes.

    With `embed` the channels of the token embedding are nodes too.

    Warns if their standard error is large, seen by how far those of the two halves of the corpus are apart.
    """
    parts = [rows for rows in corpus.tensor_split(2) if len(rows)]
    means = [_means(model, rows.long().split(max(1, batch_size // 4)), embed) for rows in parts]
    flat = [torch.cat([mean.flatten() for mean in half.values()]) for half in means]
    error = float((flat[0] - flat[-1]).norm() / (flat[0] + flat[-1]).norm()) if len(parts) == 2 else math.inf
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
    if hasattr(model, "sparse_cfg"):  # for edges that leave heads; those of other models cannot be cut
        hooks += [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    with frozen(model):
        return mean_activations(model, hooks, batches)


def prune_edges(
    circuit: Circuit, model: TLModel, task: Task, config: PruneConfig | None = None, progress: bool = True
) -> tuple[Circuit, Evaluation]:
    """Cut every edge of a circuit that its task does not need, and drop the nodes that are then without edges.

    The edge with the least effect is tried first. What comes back reaches the same target loss; its figures are not to
    be mixed with those of circuits that are pruned by nodes alone.

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
        useful = {node for edge in set(edges).difference(gone) for node in (edge.source, edge.target)}
        return smaller.without({node for edge in gone for node in (edge.source, edge.target)} - useful, model)

    with frozen(model):
        if not is_circuit(circuit, model, selection, config):
            raise PruneError(f"the circuit misses the target loss {config.target_loss} before an edge is cut")
        part = representative(circuit, model, selection, config)
        bar = tqdm(edges, desc="measuring edges", disable=not progress, unit="edge")
        effects = {edge: circuit_score(without([edge]), model, part, config).loss for edge in bar}
        gone = eliminate(
            sorted(edges, key=effects.__getitem__),
            lambda gone: is_circuit(without(gone), model, part, config),
            lambda gone: is_circuit(without(gone), model, selection, config),
        )
        return _judged(without(gone), model, selection, heldout, config)


def task_splits(model: TLModel, task: Task, config: PruneConfig) -> tuple[TaskData, TaskData, TaskData]:
    """Disjoint pairs to train gates on, to choose the size on, and to judge on."""
    device, used = next(model.parameters()).device, set[str]()
    splits = []
    # Selection and held-out pairs first, so that they are the same whatever the number of training pairs.
    for i, n_pairs in enumerate((config.selection_pairs, config.heldout_pairs, config.train_pairs)):
        data = make_task_data(task, model.tokenizer, n_pairs, 3 * config.seed + i, model.cfg.n_ctx, exclude=used)
        used.update(data.prompts)
        splits.append(data.to(device))
    selection, heldout, train = splits
    return train, selection, heldout


def is_circuit(circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig) -> bool:
    """Sufficient: the circuit reaches the target loss. Necessary: the model without it loses the task."""
    if circuit_score(circuit, model, data, config).loss > config.target_loss:
        return False
    if config.ablated_accuracy == 1:
        return True
    return circuit_score(circuit, model, data, config, inverted=True).accuracy <= config.ablated_accuracy


def circuit_score(
    circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig, inverted: bool = False
) -> Score:
    under = holding_circuit(circuit, model, config.ablation, inverted)
    return score(model, data, config.batch_size, under)


def _search(
    empty: Circuit, model: TLModel, train: TaskData, selection: TaskData, config: PruneConfig, progress: bool
) -> Circuit:
    """One circuit: its nodes ranked, then as few of them as make a circuit."""
    start = ("init_bias", "init_scale", "temperature", "seed")
    hooks = node_hooks(model) if config.tied_qk else {}
    tied = {hook: hooks[layer, "attn_q"] for (layer, location), hook in hooks.items() if location == "attn_k"}
    for key, query in tied.items():
        if empty.means[key].shape != empty.means[query].shape:
            shapes = [list(empty.means[name].shape) for name in (query, key)]
            raise PruneError(f"tied_qk needs a key channel for each query channel; [heads, channels] are {shapes}")
    means = {name: empty.means[name] for name in empty.kept}
    held = {name: torch.zeros_like(mean) for name, mean in means.items()} if config.ablation == "zero" else means
    gates = NodeGates(held, tied=tied, **{name: getattr(config, name) for name in start})
    if config.warm_start or config.method != "learned":
        noise = gates.tau.detach() - config.init_bias
        scores = noise if config.method == "random" else attribution(model, gates, train, config).abs()
        rank, size, n_gates = scores.argsort(descending=True, stable=True).argsort(), 32, len(scores)
        part = selection.pairs(range(min(config.cleanup_pairs, selection.n_pairs)))
        while size < n_gates:
            ranked = dataclasses.replace(empty, kept=gates.at_nodes(rank < size))
            if circuit_score(ranked, model, part, config).loss <= config.target_loss:
                break
            size = math.ceil(1.5 * size)
        # Open from 1 down to 0 over the circuit of that size, and closed from there on.
        above, below = config.init_bias * (1 - rank / size), 0.3 * (size - rank) / n_gates
        gates.tau.data = torch.where(rank < size, above, below) + noise * (config.method == "learned")
    if config.method == "learned":
        learn_gates(model, gates, train, config, progress)
    return discretise(empty, model, gates, selection, config)


def attribution(model: TLModel, gates: NodeGates, data: TaskData, config: PruneConfig) -> Float[Tensor, " gate"]:
    """By how much opening each gate changes the task loss, to first order: Σ gradient · (activation − mean).

    For `attribution` the gradient is that of the model as it is, else (integrated gradients) a mean over points on the
    way from the model with all nodes at their means, all of them going together. As rankings these are baselines:
    learned masks find far smaller circuits (A.5). As a start of learning they save most of its steps.
    """
    data = data.pairs(range(min(config.ranking_pairs, data.n_pairs)))
    points = torch.ones(1) if config.method == "attribution" else torch.arange(1, 8, 2) / 8
    total = torch.zeros_like(gates.tau)
    for point in points.tolist():
        for pairs in torch.arange(data.n_pairs).split(max(1, config.batch_size // 2)):
            strength = torch.full_like(gates.tau, point).requires_grad_()
            parts = gates.at_nodes(strength)

            def mixed(name: str, parts: dict[str, Tensor], activation: Tensor, hook: object) -> Tensor:
                return torch.lerp(gates.means[name].expand_as(activation), activation, parts[name])

            with hooked(model, {name: partial(mixed, name, parts) for name in parts}):
                loss = task_loss(model, data.pairs(pairs)) * len(pairs)
            total += torch.autograd.grad(loss, strength)[0]
    return total / (len(points) * data.n_pairs)


def learn_gates(model: TLModel, gates: NodeGates, data: TaskData, config: PruneConfig, progress: bool) -> None:
    """Minimise task loss + k_coef · open gates over the gates alone (A.5), k_coef steered by the task loss."""
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW([gates.tau], lr=config.lr, betas=betas, weight_decay=config.weight_decay)
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
    """Random pairs, without end; those of like length together, so that little is computed for padding."""
    generator, size = torch.Generator().manual_seed(config.seed), min(config.pairs_per_step, data.n_pairs)
    lengths = data.last.view(-1, 2).amax(1).cpu()
    while True:
        drawn = torch.randperm(data.n_pairs, generator=generator)[: 16 * size]
        batches = drawn[lengths[drawn].argsort()].split(size)
        yield from (data.pairs(batches[i]) for i in torch.randperm(len(batches), generator=generator).tolist())


def discretise(empty: Circuit, model: TLModel, gates: NodeGates, selection: TaskData, config: PruneConfig) -> Circuit:
    """The smallest number of top-ranked nodes that make a circuit on the selection pairs (A.5), and of these
    only the ones that it needs.

    Bisection between a size that is too small and one that is enough, both found by going outwards from the
    learned size: the loss is not monotonic over the whole ranking, but nearly so around there.

    Raises:
        PruneError: if not even all nodes make a circuit.
    """
    order = gates.tau.detach().argsort(descending=True, stable=True)
    rank = order.argsort()

    def circuit(kept: Bool[Tensor, " gate"]) -> Circuit:
        return dataclasses.replace(empty, kept=gates.at_nodes(kept))

    enough, too_small = max(1, int((gates.tau > 0).sum())), 0
    while not is_circuit(circuit(rank < enough), model, selection, config):
        if enough == len(order):
            raise PruneError(
                f"no set of nodes reaches the target loss {config.target_loss} such that the model without it has an "
                f"accuracy of at most {config.ablated_accuracy}, not even all {len(order)} nodes"
            )
        too_small, enough = enough, min(len(order), math.ceil(enough * 1.3))
    part = representative(circuit(rank < enough), model, selection, config)
    while enough - too_small > 1:  # down from the learned size until it is too small, then bisection
        size = (enough + too_small) // 2 if too_small else int(enough / 1.3)
        holds = is_circuit(circuit(rank < size), model, part, config)
        enough, too_small = (size, too_small) if holds else (enough, size)
    while enough < len(order) and not is_circuit(circuit(rank < enough), model, selection, config):
        enough += math.ceil(enough / 20)  # the part was too kind
    part = representative(circuit(rank < enough), model, selection, config)

    def without(gone: list[int]) -> Circuit:
        return circuit((rank < enough).index_fill(0, torch.tensor(gone, dtype=torch.long), False))

    # Gates learn all at once: some stay open that nothing kept reads, or whose part another node took over.
    gone = eliminate(
        order[:enough].flip(0).tolist() if config.method == "learned" else [],
        lambda gone: is_circuit(without(gone), model, part, config),
        lambda gone: is_circuit(without(gone), model, selection, config),
    )
    found = without(gone)
    scores = {name: tau + 2 * found.kept[name] for name, tau in gates.at_nodes(gates.tau.detach()).items()}
    return dataclasses.replace(found, scores=scores)


def representative(circuit: Circuit, model: TLModel, data: TaskData, config: PruneConfig) -> TaskData:
    """`cleanup_pairs` of the pairs, with which much is tried: evenly spaced in the order of the circuit's loss on them,
    so that its mean over them is nearly that over all."""
    logits = all_logits(model, data, config.batch_size, holding_circuit(circuit, model, config.ablation))
    order = task_loss_and_accuracy(logits, data.correct)[0].view(-1, 2).mean(1).argsort()
    size = min(config.cleanup_pairs, data.n_pairs)
    return data.pairs(order[((torch.arange(size) + 0.5) * data.n_pairs / size).long()])


def eliminate(candidates: Sequence[T], holds: Callable[[list[T]], bool], decides: Callable[[list[T]], bool]) -> list[T]:
    """What can be taken away, tried in order by a quick test: more and more at once as long as that works, less and
    less when not. If the last of them were too many by the test that decides, they come back."""
    gone: list[T] = []
    first, size = 0, 1
    while first < len(candidates):
        some = list(candidates[first : first + size])
        if holds([*gone, *some]):
            gone, first, size = [*gone, *some], first + len(some), 2 * size
        elif len(some) > 1:
            size = len(some) // 2
        else:
            first += 1
    enough, too_many, size = 0, len(gone) + 1, len(gone)
    while too_many - enough > 1:
        enough, too_many = (size, too_many) if decides(gone[:size]) else (enough, size)
        size = (enough + too_many) // 2
    return gone[:enough]


def _judged(
    circuit: Circuit, model: TLModel, selection: TaskData, heldout: TaskData, config: PruneConfig, **measured: Any
) -> tuple[Circuit, Evaluation]:
    """The circuit, on the CPU, with what was measured of it; and how it does on the held-out pairs."""
    tensors: dict[str, Any] = {
        name: {hook: values.cpu() for hook, values in getattr(circuit, name).items()}
        for name in ("kept", "means", "scores")
    }
    circuit = dataclasses.replace(circuit, **tensors)
    evaluation, found = judged(circuit, model, selection, heldout, config.batch_size, config.ablation)
    measured |= {"config": dataclasses.asdict(config)} | found
    return dataclasses.replace(circuit, measured=circuit.measured | measured), evaluation
