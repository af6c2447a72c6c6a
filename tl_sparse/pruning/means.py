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

#: A warning is given if the standard error of the means is a larger part of their size.
LARGEST_ERROR = 0.1


def gated_hooks(model: TLModel, embed: bool) -> list[str]:
    """The hook points whose entries are nodes; with `embed`, the token embedding too."""
    hooks = list(node_hooks(model).values())
    return [EMBED_HOOK, *hooks] if embed else hooks


def corpus_means(
    model: TLModel, corpus: Int[Tensor, "seq pos"], batch_size: int = 256, embed: bool = False
) -> NodeValues:
    """The means over a corpus at which nodes are held, and those of hook_z.

    Warns if their standard error is large, judged by how far apart the means of the two halves of
    the corpus are.

    Args:
        model: any TransformerLens model.
        corpus: tokens of the training distribution.
        batch_size: prompts run at once; of the corpus, whose rows are longer, a quarter as many.
        embed: the channels of the token embedding are nodes too.

    Raises:
        HookNameError: if the model has no such nodes.
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
            "their size; a larger corpus makes them, and the circuit, more stable",
            stacklevel=3,
        )
    first_half = means[0]
    second_half = means[-1]  # the same if the corpus has only one row
    share = len(halves[0]) / len(corpus)
    return {name: torch.lerp(second_half[name], mean, share) for name, mean in first_half.items()}


def _standard_error(first_half: NodeValues, second_half: NodeValues) -> float:
    """The standard error of the mean of both halves, as a fraction of its size."""
    first = torch.cat(list(map(torch.flatten, first_half.values())))
    second = torch.cat(list(map(torch.flatten, second_half.values())))
    return float((first - second).norm() / (first + second).norm())


def task_means(model: TLModel, train: TaskData, embed: bool) -> NodeValues:
    """The means over a task's prompts."""
    batches = []
    # Prompts of one length at a time, because padding must not count.
    for last in train.last.unique().tolist():
        batches.append(train.tokens[train.last == last, : last + 1])
    return _means(model, batches, embed)


def _means(model: TLModel, batches: Iterable[Int[Tensor, "batch pos"]], embed: bool) -> NodeValues:
    hooks = gated_hooks(model, embed)
    if is_sparse_model(model):
        # Edges that leave heads need the means of hook_z. Those of other models cannot be cut.
        hooks += [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    with frozen(model):
        return mean_activations(model, hooks, batches)
