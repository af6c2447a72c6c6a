"""The means at which nodes outside a circuit are held."""

import math
import warnings
from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.circuits import EMBED_HOOK, node_hooks
from tl_sparse.hooks import NodeValues, TLModel, frozen, is_sparse_model, mean_activations
from tl_sparse.tasks import TaskData

#: A warning is given if the standard error of the means is a larger fraction of their norm than
#: this.
LARGEST_ERROR = 0.1


def gated_hooks(model: TLModel, embed: bool) -> list[str]:
    """The hook points whose entries are nodes, including the token embedding if `embed` is set."""
    hooks = list(node_hooks(model).values())
    return [EMBED_HOOK, *hooks] if embed else hooks


def corpus_means(
    model: TLModel, corpus: Int[Tensor, "seq pos"], batch_size: int = 256, embed: bool = False
) -> NodeValues:
    """The mean activations over a corpus at all node locations and, for tl_sparse models, hook_z.

    Warns if their standard error is large. It is estimated from the difference between the means of
    the two halves of the corpus.

    Args:
        model: any TransformerLens model.
        corpus: tokens of the training distribution.
        batch_size: the number of prompts to run at once. A quarter as many rows of the corpus are
            run at once, because they are longer.
        embed: whether the channels of the token embedding are nodes too.

    Raises:
        HookNameError: if the hook points of the model do not carry nodes.
    """
    halves = [rows for rows in corpus.tensor_split(2) if len(rows)]
    means = []
    for rows in halves:
        batches = rows.long().split(max(1, batch_size // 4))
        means.append(_means(model, batches, embed))
    error = _standard_error(*means) if len(means) == 2 else math.inf
    if error > LARGEST_ERROR:
        warnings.warn(
            f"the means over {corpus.numel()} tokens have a standard error of about {error:.0%} of "
            "their size; a larger corpus makes the means, and the circuit, more stable",
            stacklevel=3,
        )
    first_half = means[0]
    second_half = means[-1]  # both are the same if the corpus has only one row
    share = len(halves[0]) / len(corpus)
    return {name: torch.lerp(second_half[name], mean, share) for name, mean in first_half.items()}


def _standard_error(first_half: NodeValues, second_half: NodeValues) -> float:
    """The standard error of the mean over both halves, as a fraction of the mean's norm."""
    first = torch.cat(list(map(torch.flatten, first_half.values())))
    second = torch.cat(list(map(torch.flatten, second_half.values())))
    return float((first - second).norm() / (first + second).norm())


def task_means(model: TLModel, train: TaskData, embed: bool) -> NodeValues:
    """The mean activations over the prompts of a task."""
    batches = []
    # Each batch has prompts of one length, because padding must not contribute to the means.
    for last in train.last.unique().tolist():
        batches.append(train.tokens[train.last == last, : last + 1])
    return _means(model, batches, embed)


def _means(model: TLModel, batches: Iterable[Int[Tensor, "batch pos"]], embed: bool) -> NodeValues:
    hooks = gated_hooks(model, embed)
    if is_sparse_model(model):
        # Cutting edges that leave heads needs the means of hook_z. Edges of other models cannot be
        # cut.
        hooks += [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    with frozen(model):
        return mean_activations(model, hooks, batches)
