"""Whether the nodes of a circuit have the values under it that they have in the model.

A circuit may be right for wrong reasons: errors that holding the other nodes makes may cancel on
their way to the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, holding_reads
from tl_sparse.config import check
from tl_sparse.evaluation.agreement import Agreement, AgreementSums
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like
from tl_sparse.evaluation.estimates import Estimate, mean_of
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.patterns import HeadAttention, PatternSums, heads_of, pattern_hook
from tl_sparse.evaluation.running import PromptBatch, prompt_batches, sees_padding, task_logits
from tl_sparse.evaluation.scores import Ablation
from tl_sparse.hooks import TLModel, recording
from tl_sparse.tasks import TaskData

#: A node follows the model if its correlation is above this.
FOLLOWS = 0.9

Activations = Mapping[str, Float[Tensor, "prompt pos *node"]]


@dataclass(frozen=True)
class NodeInside:
    """How the value of a node under the circuit follows its value in the full model.

    Attributes:
        node: the name of the node.
        correlation: the Pearson correlation of the two values over prompts and positions. Those of
            a component are vectors, whose variances and covariance are summed over entries. None if
            one of them does not vary; see `remark`.
        error: the sum of (value under the circuit - value in the model)², over that of (value in
            the model - its mean)². 0 if both are equal, 1 for a node held at its mean on these
            prompts. None if the value does not vary in the model.
        model_mean: the mean of the value in the model; of a component, the norm of its mean.
        circuit_mean: the mean of the value under the circuit.
        remark: in words, if the value is constant in the model or under the circuit; else empty.
    """

    node: str
    correlation: Estimate | None
    error: Estimate | None
    model_mean: float
    circuit_mean: float
    remark: str = ""


@dataclass(frozen=True)
class Following:
    """How well the nodes of a circuit follow the model, all together.

    Nodes that are constant in the model do not count. Those that are constant only under the
    circuit count as correlation 0, since they say nothing of the model's value.

    Attributes:
        n_varying: the number of nodes that count.
        median_correlation: the median of their correlations; None if no node counts.
        share: the share of them with a correlation above 0.9; None if no node counts.
    """

    n_varying: int
    median_correlation: float | None
    share: float | None


@dataclass(frozen=True)
class Inside:
    """Whether a circuit is like its model inside.

    Attributes:
        nodes: each kept node, in the order of the forward pass.
        summary: all of them together.
        random_median_correlation: the mean, over random circuits with as many nodes at each hook
            point, of their median correlation. Reads of the first block follow the model in any
            circuit, since nothing before them is held: this is what a circuit has for free.
            None if no node of theirs varies.
        random_share: the mean of their shares of nodes with a correlation above 0.9, likewise.
        heads: each head with kept nodes.
        ablation: the values at which the other nodes were held.
        n_pairs: the number of pairs of prompts.
        n_samples: the number of values of each node: one at each position of each prompt, without
            padding and without the first token. That token is the same in all prompts, and its
            values, often far from all others, would alone make a high correlation.
        n_random: the number of random circuits.
        no_heads: why `heads` is empty; else empty.
    """

    nodes: list[NodeInside]
    summary: Following
    random_median_correlation: Estimate | None
    random_share: Estimate | None
    heads: list[HeadAttention]
    ablation: str
    n_pairs: int
    n_samples: int
    n_random: int
    no_heads: str = ""


@checked("ablation")
@torch.no_grad()
def inside(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    ablation: Ablation = "mean",
    n_random: int = 3,
    batch_size: int = 256,
    seed: int = 0,
) -> Inside:
    """Compare the values of a circuit's nodes, and where its heads attend, with the full model.

    Args:
        data: the prompts of the task.
        ablation: the values at which the other nodes are held.
        n_random: the number of random circuits that the nodes are compared with.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of the random circuits, and of partners in resample ablation.

    Raises:
        CircuitError: if `model` is not the circuit's model, or the circuit has no means or nodes.
        ConfigError: for an unknown `ablation`, or a negative `n_random`.
        TaskError: if there is a single pair, although `ablation` is "resample".
        UnsupportedError: if the model sees padding, and the prompts of a pair differ in length.
    """
    check_measurable(circuit, model)
    check(n_random >= 0, "n_random", n_random, "at least 0")
    circuits = [circuit, *random_circuits_like(circuit, n_random, seed)]
    contexts = [holding_nodes(each, model, ablation) for each in circuits]
    sums = [AgreementSums(_n_entries(each), data.n_pairs) for each in circuits]
    heads, no_heads = _heads(circuit, model)
    patterns = _pattern_sums(heads, int(data.last.max()) + 1)
    n_samples = 0
    for batch in prompt_batches(model, data, batch_size, seed):
        counted = counted_positions(batch.data)
        n_samples += int(counted.sum())
        names = [*circuit.kept, *map(pattern_hook, patterns)]
        of_model = _recorded(model, batch.data, names)
        for i, context in enumerate(contexts):
            with context(batch.data):
                of_circuit = _recorded(model, batch.data, names if i == 0 else circuit.kept)
            _add_values(sums[i], circuits[i], batch, (of_model, of_circuit), counted)
            if i == 0:
                _add_patterns(patterns, batch, (of_model, of_circuit), counted)
    agreements, *of_random = [each.agreements() for each in sums]
    nodes = map(str, circuit.nodes)
    followings = list(map(_following, of_random))
    return Inside(
        nodes=[_node(name, each) for name, each in zip(nodes, agreements, strict=True)],
        summary=_following(agreements),
        random_median_correlation=_mean([each.median_correlation for each in followings]),
        random_share=_mean([each.share for each in followings]),
        heads=_head_results(patterns, heads),
        ablation=ablation,
        n_pairs=data.n_pairs,
        n_samples=n_samples,
        n_random=n_random,
        no_heads=no_heads,
    )


def counted_positions(data: TaskData) -> Bool[Tensor, "prompt pos"]:
    """The positions of each prompt up to its last token, without the first token.

    The longest prompt decides the width. A prompt of one token has only that one.
    """
    positions = torch.arange(int(data.last.max()) + 1, device=data.last.device)
    last = data.last[:, None]
    return (positions <= last) & ((positions > 0) | (last == 0))


def _recorded(
    model: TLModel, data: TaskData, names: Sequence[str] | Mapping[str, object]
) -> Activations:
    """The activations at these hook points, at all positions of the longest prompt."""
    with holding_reads(model), recording(model, names) as activations:
        task_logits(model, data)
    return activations


# --- nodes


def _add_values(
    sums: AgreementSums,
    circuit: Circuit,
    batch: PromptBatch,
    runs: tuple[Activations, Activations],
    counted: Bool[Tensor, "prompt pos"],
) -> None:
    """Add the values of the kept nodes in the model and under the circuit."""
    values = []
    for activations in runs:
        at_hooks = []
        for name, mask in circuit.kept.items():
            of_nodes = mask.to(activations[name].device).expand(activations[name].shape[2:])
            at_hooks.append(activations[name][counted][:, of_nodes])
        values.append(torch.cat(at_hooks, dim=1))
    pairs = batch.pairs.repeat_interleave(2)[:, None].expand_as(counted)
    sums.add(values[0], values[1], pairs[counted])


def _n_entries(circuit: Circuit) -> list[int]:
    """The number of entries of each kept node: 1 for channels."""
    numbers = []
    for name, mask in circuit.kept.items():
        numbers += [circuit.means[name].numel() // mask.numel()] * int(mask.sum())
    return numbers


def _node(name: str, agreement: Agreement) -> NodeInside:
    return NodeInside(
        node=name,
        correlation=agreement.correlation,
        error=agreement.error,
        model_mean=agreement.reference_mean,
        circuit_mean=agreement.mean,
        remark=_node_remark(agreement),
    )


def _node_remark(agreement: Agreement) -> str:
    if not agreement.reference_varies and not agreement.varies:
        return "constant in the model and under the circuit"
    if not agreement.reference_varies:
        return "constant in the model, but not under the circuit"
    return "" if agreement.varies else "constant under the circuit, but not in the model"


def _following(agreements: Sequence[Agreement]) -> Following:
    correlations = []
    for agreement in agreements:
        if agreement.correlation is not None:
            correlations.append(agreement.correlation.value)
        elif agreement.reference_varies:
            correlations.append(0.0)
    if not correlations:
        return Following(0, None, None)
    n_following = sum(correlation > FOLLOWS for correlation in correlations)
    share = n_following / len(correlations)
    return Following(len(correlations), median(correlations), share)


def _mean(values: Sequence[float | None]) -> Estimate | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return mean_of(torch.tensor(known)) if known else None


# --- heads


def _heads(circuit: Circuit, model: TLModel) -> tuple[dict[tuple[int, int], list[str]], str]:
    """(layer, head) → the locations of its kept nodes; and, if there are none, why."""
    heads = heads_of(circuit, model)
    if not heads:
        return {}, "no head has kept nodes"
    if sees_padding(model):
        return {}, "patterns are compared only in models that attend to earlier positions alone"
    for layer, _ in heads:
        if pattern_hook(layer) not in model.hook_dict:
            return {}, f"the model has no hook point {pattern_hook(layer)}"
    return heads, ""


def _pattern_sums(
    heads: Mapping[tuple[int, int], list[str]], length: int
) -> dict[int, PatternSums]:
    """Layer → the sums of the patterns of its heads."""
    of_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        of_layer.setdefault(layer, []).append(head)
    return {layer: PatternSums(numbers, length) for layer, numbers in of_layer.items()}


def _add_patterns(
    patterns: Mapping[int, PatternSums],
    batch: PromptBatch,
    runs: tuple[Activations, Activations],
    counted: Bool[Tensor, "prompt pos"],
) -> None:
    first = 2 * batch.pairs
    rows = torch.stack((first, first + 1), dim=1).flatten()
    for layer, sums in patterns.items():
        of_model, of_circuit = [activations[pattern_hook(layer)] for activations in runs]
        sums.add(of_model, of_circuit, rows, counted.to(of_model.device).float())


def _head_results(
    patterns: Mapping[int, PatternSums], heads: Mapping[tuple[int, int], list[str]]
) -> list[HeadAttention]:
    found = []
    for layer, sums in patterns.items():
        found += sums.results(layer, {head: heads[layer, head] for head in sums.heads})
    return found
