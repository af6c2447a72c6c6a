"""The shapes of what flows through the network."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Positions = Float[Tensor, "batch pos d_pos"]
#: With TransformerLens' flags, each head reads its own copy of the stream.
Stream = Float[Tensor, "batch pos *head d_model"]
Reads = Float[Tensor, "batch pos *head d_read"]
Heads = Float[Tensor, "batch pos head d_head"]
Logits = Float[Tensor, "batch pos d_vocab"]
#: One position in each row of a batch.
PositionOfRow = Int[Tensor, " batch"]


def select_position(
    x: Float[Tensor, "batch pos *rest"], position: PositionOfRow
) -> Float[Tensor, "batch 1 *rest"]:
    """`x` at one position of each row."""
    rows = torch.arange(len(position), device=x.device)
    return x[rows, position].unsqueeze(1)
