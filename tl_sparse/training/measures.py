"""Measures of a model during training: its loss on held-out text, and its dead neurons."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.config import check
from tl_sparse.hooks import TLModel, hooked
from tl_sparse.training.tokens import training_tokens


@torch.no_grad()
def evaluate_loss(model: TLModel, tokens: Int[Tensor, "seq pos"], batch_size: int) -> float:
    """Mean next-token loss over the rows of `tokens`, in nats per token.

    Args:
        model: any TransformerLens model.
        tokens: rows of at least two tokens, in any integer dtype.
        batch_size: the number of rows that are computed at once.

    Raises:
        ConfigError: if `model` is not a model, or `batch_size` not an integer of at least 1.
        DataError: if there are no tokens, or they are not integers of the model's vocabulary.
    """
    check(isinstance(model, torch.nn.Module), "model", model, "a TransformerLens model")
    is_positive = type(batch_size) is int and batch_size >= 1
    check(is_positive, "batch_size", batch_size, "an integer of at least 1")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        tokens = training_tokens(tokens)
    device = next(model.parameters()).device
    sums = []
    # The rows may be memory-mapped, so only a batch at a time is converted.
    for rows in map(training_tokens, tokens.split(batch_size)):
        loss = model(rows.to(device), return_type="loss")
        sums.append(loss * len(rows))
    return float(torch.stack(sums).sum() / len(tokens))


@torch.no_grad()
def dead_neurons(model: TLModel, tokens: Int[Tensor, "seq pos"]) -> float:
    """The share of MLP neurons whose activation, after AbsTopK, is zero at every token."""
    device = next(model.parameters()).device
    active: list[Tensor] = []  # for each layer, whether each neuron is ever nonzero

    def record(post: Tensor, hook: Any) -> None:
        active.append(post.detach().ne(0).flatten(0, 1).any(0))

    records = {f"blocks.{layer}.mlp.hook_post": record for layer in range(model.cfg.n_layers)}
    with hooked(model, records):
        model(tokens.long().to(device), return_type=None)
    return 1 - float(torch.cat(active).float().mean())
