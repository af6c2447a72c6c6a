"""The shapes of what flows through the network, and one position of each row of it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Positions = Float[Tensor, "batch pos d_pos"]
#: With TransformerLens' flags each head reads a copy of the stream of its own.
Stream = Float[Tensor, "batch pos *head d_model"]
Reads = Float[Tensor, "batch pos *head d_read"]
Heads = Float[Tensor, "batch pos head d_head"]
Logits = Float[Tensor, "batch pos d_vocab"]
#: One position of each row.
Rows = Int[Tensor, " batch"]


def at(x: Tensor, last: Rows) -> Tensor:
    """`x` `[batch, pos, …]` at one position of each row, `[batch, 1, …]`."""
    return x[torch.arange(len(last), device=x.device), last].unsqueeze(1)
