"""The shapes of the tensors in the network."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Positions = Float[Tensor, "batch pos d_pos"]
#: The head axis exists if TransformerLens' flags give each head a copy of the residual stream.
Stream = Float[Tensor, "batch pos *head d_model"]
Reads = Float[Tensor, "batch pos *head d_read"]
Heads = Float[Tensor, "batch pos head d_head"]
Logits = Float[Tensor, "batch pos d_vocab"]
#: One position for each row of a batch.
PositionOfRow = Int[Tensor, " batch"]


def select_position(
    x: Float[Tensor, "batch pos *rest"], position: PositionOfRow
) -> Float[Tensor, "batch 1 *rest"]:
    """`x` at one position in each row of the batch."""
    rows = torch.arange(position.shape[0], device=x.device)
    return x[rows, position].unsqueeze(1)
