"""The shapes of what flows through the network."""

from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Positions = Float[Tensor, "batch pos d_pos"]
#: With TransformerLens' flags each head reads a copy of the stream of its own.
Stream = Float[Tensor, "batch pos *head d_model"]
Reads = Float[Tensor, "batch pos *head d_read"]
Heads = Float[Tensor, "batch pos head d_head"]
Logits = Float[Tensor, "batch pos d_vocab"]
