"""The means at which nodes outside a circuit are held."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.checkpoints import load_corpus
from tl_sparse.circuits import EMBED_HOOK, NodeKind, node_hooks, shared_reads
from tl_sparse.config import check
from tl_sparse.errors import DataError, counted, warn_user
from tl_sparse.hooks import (
    NodeValues,
    TLModel,
    check_not_padded,
    frozen,
    is_sparse_model,
    mask_of,
    mean_activations,
    tokens_for,
)
from tl_sparse.precision import at_least_float32
from tl_sparse.pruning.phases import phase
from tl_sparse.tasks import TaskData

#: A warning is given if the standard error of the means is a larger fraction of their norm than
#: this.
LARGEST_ERROR = 0.1


def gated_hooks(model: TLModel, embed: bool, kind: NodeKind = "channels") -> list[str]:
    """The hook points with nodes of a kind, including the token embedding if `embed` is set."""
    hooks = list(node_hooks(model, kind=kind).values())
    return [EMBED_HOOK, *hooks] if embed else hooks


@checked("corpus")
def as_corpus(corpus: object, model: TLModel) -> Int[Tensor, "seq pos"]:
    """The tokens of a corpus; if it is None, the sample in the folder the model was loaded from.

    Raises:
        DataError: if the corpus is not token ids of the model, or is None and there is no sample.
    """
    if corpus is not None:
        return tokens_for(model, corpus, "the corpus")
    folder = getattr(model, "folder", None)
    if folder is None:
        raise DataError(
            "a corpus is needed: tokens [seq, pos] of the model's training distribution, over "
            "which means are taken. It may be left out only for a model that was loaded from a "
            "folder with a sample"
        )
    return load_corpus(folder, model.tokenizer, model.cfg.n_ctx).long()


@checked("corpus", "mask", "batch_size", "kind")
def corpus_means(
    model: TLModel,
    corpus: Int[Tensor, "seq pos"] | None = None,
    batch_size: int = 256,
    embed: bool = False,
    mask: Bool[Tensor, "seq pos"] | Int[Tensor, "seq pos"] | None = None,
    progress: bool = False,
    kind: NodeKind = "channels",
) -> NodeValues:
    """The mean activations over a corpus at all node locations and, for tl_sparse models, hook_z.

    In tl_sparse models, the means for channels thus include those for components.

    Warns if their standard error is large. It is estimated from the difference between the means of
    the two halves of the corpus.

    Args:
        model: any TransformerLens model.
        corpus: tokens of the training distribution, at least two rows. None means the sample in the
            folder that the model was loaded from; see `load_corpus`.
        batch_size: the number of prompts to run at once. A quarter as many rows of the corpus are
            run at once, because they are longer.
        embed: whether the channels of the token embedding are nodes too.
        mask: 1 (or True) for each real token and 0 for padding, which does not count. None means
            that all tokens are real.
        progress: show a progress bar.
        kind: whether the nodes are channels or components, as in `PruneConfig.nodes`.

    Raises:
        HookNameError: if the hook points of the model do not carry nodes.
        DataError: if the corpus has fewer than two rows or is not token ids of the model, if it
            looks padded and no mask is given, or if the mask leaves out all of a half.
    """
    check(type(batch_size) is int and batch_size > 0, "batch_size", batch_size, "at least 1")
    corpus = as_corpus(corpus, model)
    if len(corpus) < 2:
        raise DataError(
            f"a corpus needs at least 2 rows of tokens [seq, pos], because the error of its means "
            f"is estimated from its halves; this one is {list(corpus.shape)}"
        )
    if mask is None:
        check_not_padded(corpus, model)
        is_real = torch.ones_like(corpus, dtype=torch.bool)
    else:
        is_real = mask_of(mask, corpus)
    n_rows = max(1, batch_size // 4)
    means = []
    n_tokens = []
    with phase("means over the corpus", progress, len(corpus), "row") as bar:
        for rows, real in zip(corpus.tensor_split(2), is_real.tensor_split(2), strict=True):
            masks = None if mask is None else real.split(n_rows)
            batches = _counted_by(bar, rows.split(n_rows))
            means.append(_means(model, batches, embed, masks, kind))
            n_tokens.append(int(real.sum()))
    error = _standard_error(*means)
    if error > LARGEST_ERROR:
        tokens = counted(sum(n_tokens), "token")
        warn_user(
            f"the means over {tokens} have a standard error of about {error:.0%} of "
            "their size; a larger corpus makes the means, and the circuit, more stable"
        )
    share = n_tokens[1] / sum(n_tokens)
    dtype = at_least_float32(next(model.parameters()).dtype)
    first, second = means
    return {name: torch.lerp(mean, second[name], share).to(dtype) for name, mean in first.items()}


def _counted_by(bar: Any, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, whose rows a progress bar counts."""
    for batch in batches:
        yield batch
        bar.update(len(batch))


def _standard_error(first_half: NodeValues, second_half: NodeValues) -> float:
    """The standard error of the mean over both halves, as a fraction of the mean's norm."""
    first = torch.cat(list(map(torch.flatten, first_half.values())))
    second = torch.cat(list(map(torch.flatten, second_half.values())))
    size = (first + second).norm().clamp(min=torch.finfo(first.dtype).tiny)
    return float((first - second).norm() / size)


def task_means(
    model: TLModel,
    train: TaskData,
    embed: bool,
    kind: NodeKind = "channels",
    batch_size: int = 256,
) -> NodeValues:
    """The mean activations over the prompts of a task."""
    batches = []
    masks = []
    # Each batch has prompts of one length, because padding must not contribute to the means.
    for last in train.last.unique().tolist():
        of_one_length = train.tokens[train.last == last, : last + 1]
        for tokens in of_one_length.split(batch_size):
            batches.append(tokens)
            masks.append(torch.ones_like(tokens))
    means = _means(model, batches, embed, masks, kind)
    dtype = at_least_float32(next(model.parameters()).dtype)
    return {name: mean.to(dtype) for name, mean in means.items()}


def _means(
    model: TLModel,
    batches: Iterable[Int[Tensor, "batch pos"]],
    embed: bool,
    masks: Iterable[Tensor] | None,
    kind: NodeKind,
) -> NodeValues:
    """The means in float64, or in the widest dtype of the device."""
    with frozen(model), shared_reads(model):
        hooks = gated_hooks(model, embed, kind)
        if is_sparse_model(model) and kind == "channels":
            # Cutting edges that leave heads needs the means of hook_z. Edges of other models cannot
            # be cut.
            hooks += [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
        return mean_activations(model, hooks, batches, masks, torch.float64)
