"""Measures of a model during training: its loss on held-out text, and its dead neurons."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.hooks import TLModel, hooked


@torch.no_grad()
def evaluate_loss(model: TLModel, tokens: Int[Tensor, "seq pos"], batch_size: int) -> float:
    """Mean next-token loss over the rows of `tokens`, in nats per token."""
    device = next(model.parameters()).device
    sums = []
    for rows in tokens.split(batch_size):
        loss = model(rows.long().to(device), return_type="loss")
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
