"""The activations of a circuit's nodes, and the passages of the corpus where they are strongest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Circuit, Node
from tl_sparse.hooks import TLModel, recording
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.writing import Vocabulary, activation_levels, four_digits


@dataclass(frozen=True)
class NodePoint:
    """Where the activation of a node is found.

    Attributes:
        hook: the name of the hook point.
        index: the index of the node there.
        is_component: whether the node is a component, whose activation is a vector.
        mean: the mean of a component; None if the circuit has no means, and for channels.
    """

    hook: str
    index: int
    is_component: bool = False
    mean: Float[Tensor, " entry"] | None = None

    def values(self, activation: Float[Tensor, "batch pos *node"]) -> Float[Tensor, "batch pos"]:
        """The value of the node at each position: of a channel, its activation; of a component, how
        far its output is from its mean or, if that is not known, from zero.
        """
        if not self.is_component:
            return activation.flatten(2)[..., self.index]
        outputs = activation
        if activation.ndim == 4:  # with an axis for heads
            outputs = activation[:, :, self.index]
        if self.mean is not None:
            outputs = outputs - self.mean.to(outputs)
        return outputs.norm(dim=-1)


@dataclass(frozen=True)
class NodeRun:
    """The recorded activations of a model on a batch of prompts.

    They are the logits, the activations of the nodes, and the attention patterns of some heads,
    with keys of the form "layer.head".
    """

    logits: Float[Tensor, "batch pos vocab"]
    values: Float[Tensor, "batch pos node"]
    patterns: dict[str, Float[Tensor, "batch query key"]]


def node_points(circuit: Circuit, nodes: Iterable[Node]) -> list[NodePoint]:
    """Where the activations of `nodes` are found."""
    hooks = circuit.hooks
    points = []
    for node in nodes:
        hook = hooks[node.layer, node.location]
        mean = None
        if node.is_component and circuit.means:
            mean = circuit.means[hook].view(circuit.kept[hook].numel(), -1)[node.index]
        points.append(NodePoint(hook, node.index, node.is_component, mean))
    return points


def run_nodes(
    model: TLModel,
    tokens: Int[Tensor, "batch pos"],
    points: Sequence[NodePoint],
    heads: Iterable[tuple[int, int]] = (),
) -> NodeRun:
    """Run the model without changing it, and record nodes and attention patterns.

    Args:
        points: where the activations of the nodes are found.
        heads: the layer and number of each head whose attention pattern is recorded.
    """
    hooks = {point.hook for point in points}
    for layer, _ in heads:
        hooks.add(_pattern_hook(layer))
    with recording(model, hooks) as activations:
        logits = model(tokens)
    values = []
    for point in points:
        values.append(point.values(activations[point.hook]))
    patterns = {}
    for layer, head in heads:
        patterns[f"{layer}.{head}"] = activations[_pattern_hook(layer)][:, head].float()
    return NodeRun(logits, torch.stack(values, dim=-1).float(), patterns)


def part_of_corpus(
    corpus: Int[Tensor, "seq pos"], points: Sequence[NodePoint]
) -> Int[Tensor, "row pos"]:
    """The first rows of the corpus, as many as `LIMITS.corpus_values` allows."""
    values_per_row = len(points) * corpus.shape[1]
    n_rows = max(1, LIMITS.corpus_values // values_per_row)
    return corpus[:n_rows].long()


def corpus_values(
    model: TLModel, corpus: Int[Tensor, "seq pos"], points: Sequence[NodePoint]
) -> Float[Tensor, "seq pos node"]:
    """The activations of the nodes on the corpus."""
    device = next(model.parameters()).device
    values = []
    for rows in corpus.split(16):
        values.append(run_nodes(model, rows.to(device), points).values)
    return torch.cat(values)


def node_scales(
    runs: Sequence[Float[Tensor, "batch pos node"]], n_nodes: int
) -> Float[Tensor, " node"]:
    """The largest absolute activation of each node; 1 for nodes that were zero or did not run."""
    scales = torch.zeros(n_nodes)
    for values in runs:
        scales = torch.maximum(scales.to(values), values.abs().amax((0, 1)))
    scales[scales == 0] = 1.0
    return scales


def histogram(values: Float[Tensor, "seq pos"]) -> dict[str, Any]:
    """A histogram of a node's activations.

    It consists of the smallest and the largest activation, and the counts in bins of equal width
    between them.
    """
    low = float(values.min())
    high = float(values.max())
    counts = [values.numel()]
    if high > low:
        counts = torch.histc(values, LIMITS.histogram_bins, low, high).int().tolist()
    return {"low": four_digits(low), "high": four_digits(high), "counts": counts}


def strongest_passages(
    tokens: Int[Tensor, "seq pos"],
    values: Float[Tensor, "seq pos"],
    sign: int,
    scale: Float[Tensor, ""],
    vocabulary: Vocabulary,
) -> list[list[Any]]:
    """The passages in which a node's activation is strongest, the strongest first.

    Each passage consists of its tokens, the node's activation at each token, and the position of
    the peak among them.

    Args:
        sign: 1 for the most positive activations, -1 for the most negative.
        scale: the activation that is written as `LIMITS.activation_levels`.
    """
    peaks, positions = (sign * values).max(1)
    strongest_first = peaks.argsort(descending=True, stable=True)
    passages = []
    for row in strongest_first[: LIMITS.passages].tolist():
        if peaks[row] <= 0:
            continue
        peak = int(positions[row])
        start = max(0, peak - LIMITS.tokens_before_peak)
        stop = peak + LIMITS.tokens_from_peak
        ids = tokens[row, start:stop].tolist()
        vocabulary.add(ids)
        levels = activation_levels(values[row, start:stop], scale)
        passages.append([ids, levels.tolist(), peak - start])
    return passages


def _pattern_hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"
