"""The residual stream of a compiled circuit: what is written to it, read from it, and its end.

The stream of a compiled circuit has only its *varying* channels: those that depend on more than the
present token, because nodes of the circuit write to them. In all others, the stream is a table by
token, which is folded into what reads it. Where this cannot be exact, all channels are in the
stream; see `varying_channels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.hooks import abs_topk
from tl_sparse.network import Tokens, select_position

#: The varying channels of the residual stream.
Varying = Float[Tensor, "batch pos varying"]


@dataclass(frozen=True, eq=False)
class Positioned:
    """The state of a run: tokens, their positions in the context, and the residual stream there."""

    tokens: Tokens
    positions: Tokens
    stream: Varying

    def with_stream(self, stream: Varying) -> "Positioned":
        return Positioned(self.tokens, self.positions, stream)

    def only(self, last: Int[Tensor, " batch"]) -> "Positioned":
        """The same at one position of each row."""
        return Positioned(
            select_position(self.tokens, last),
            last[:, None],
            select_position(self.stream, last),
        )


class NormScale(nn.Module):
    """What a norm divides by: the square root of the mean square of all channels, plus epsilon.

    Σ x² is a sum over the varying channels, and one over all others, which is a table by token.
    LayerNorm first subtracts the mean, which only works where all channels are in the stream.

    Attributes:
        d_model: the number of all channels.
        eps: the epsilon of the norm.
        centered: whether the mean is subtracted (LayerNorm).
    """

    def __init__(self, d_model: int, eps: float, centered: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self.eps = eps
        self.centered = centered

    def center(self, stream: Varying) -> Varying:
        """The stream as the norm divides it."""
        return stream - stream.mean(-1, keepdim=True) if self.centered else stream

    def forward(self, centered: Varying, others: Tensor | float) -> Float[Tensor, "batch pos 1"]:
        """The scale; `others` is Σ x² over the channels that are not in the stream."""
        squares = centered.square().sum(-1, keepdim=True) + others
        return (squares / self.d_model + self.eps).sqrt()


class Read(nn.Module):
    """The kept channels of what attention or an MLP reads: norm, positions, AbsTopK.

    AbsTopK acts on all channels. The scale of the norm changes all of them alike, so which of the
    unvarying channels are the largest depends on the token alone, and `smaller_contest` says which
    of them matter. This holds for RMSNorm, which has no bias.

    Attributes:
        scale: the scale of the norm.
        table: by token, Σ x² over the channels that are not in the stream; then, times the weight
            of the norm, the kept ones of these channels, and those that compete with kept ones.
            None if all channels are in the stream.
        weight: the weight of the norm in the varying channels.
        bias: its bias there; None without one.
        positions: by position, the normalized positional channels; None without them.
        k: the number of entries that AbsTopK keeps among those that are left; None without AbsTopK.
        chosen: where the kept channels are among the table's, the varying and the positional ones.
        nodes: the names of the kept channels.
    """

    def __init__(
        self,
        scale: NormScale,
        table: Float[Tensor, "d_vocab column"] | None,
        weight: Float[Tensor, " varying"],
        bias: Float[Tensor, " varying"] | None,
        positions: Float[Tensor, "n_ctx d_pos"] | None,
        k: int | None,
        chosen: Int[Tensor, " kept"],
        nodes: Sequence[str],
    ) -> None:
        super().__init__()
        self.scale = scale
        self.table = buffer(table)
        self.weight = nn.Buffer(weight)
        self.bias = buffer(bias)
        self.positions = buffer(positions)
        self.k = k
        self.chosen = nn.Buffer(chosen)
        self.nodes = list(nodes)

    def forward(self, at: Positioned) -> Float[Tensor, "batch pos kept"]:
        centered = self.scale.center(at.stream)
        values = centered * self.weight
        others: Tensor | float = 0.0
        if self.table is not None:
            rows = F.embedding(at.tokens, self.table)
            others = rows[..., :1]
            values = torch.cat([rows[..., 1:], values], dim=-1)
        values = values / self.scale(centered, others)
        if self.bias is not None:
            values = values + self.bias
        if self.positions is not None:
            positions = F.embedding(at.positions, self.positions)
            positions = positions.expand(values.shape[0], -1, -1)
            values = torch.cat([values, positions], dim=-1)
        if self.k is not None:
            values = abs_topk(values, self.k, inplace=True)
        return values.index_select(-1, self.chosen)


class Write(nn.Module):
    """What attention or an MLP adds to the varying channels, and what happens to them then.

    Attributes:
        constant: the means of the writes outside the circuit, `[varying]`; None if they are 0.
        channels: the varying channels to which the kept writes go.
        relu: whether ReLU follows.
        k: the number of entries that AbsTopK keeps after that; None without AbsTopK.
    """

    def __init__(
        self,
        constant: Float[Tensor, " varying"] | None,
        channels: Int[Tensor, " kept"],
        relu: bool,
        k: int | None,
    ) -> None:
        super().__init__()
        self.constant = buffer(constant)
        self.channels = nn.Buffer(channels)
        self.relu = relu
        self.k = k

    def forward(self, stream: Varying, written: Float[Tensor, "batch pos kept"] | None) -> Varying:
        if self.constant is not None:
            stream = stream + self.constant
        if written is not None:
            stream = stream.index_add(-1, self.channels, written)
        if self.relu:
            stream = F.relu(stream)
        return stream if self.k is None else abs_topk(stream, self.k)


class Logits(nn.Module):
    """The final norm, the unembedding, and the bigram table.

    Attributes:
        scale: the scale of the norm.
        table: by token, Σ x² over the channels that are not in the stream, and what these
            contribute to each logit before the scale. None if all channels are in the stream.
        weight: the unembedding of the varying channels, times the weight of the norm.
        bias: the bias of each logit, with what the bias of the norm contributes.
        bigram: by token, what the bigram table adds to each logit; None without it.
    """

    def __init__(
        self,
        scale: NormScale,
        table: Float[Tensor, "d_vocab column"] | None,
        weight: Float[Tensor, "varying logit"],
        bias: Float[Tensor, " logit"],
        bigram: Float[Tensor, "d_vocab logit"] | None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.table = buffer(table)
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias)
        self.bigram = buffer(bigram)

    def forward(self, at: Positioned) -> Float[Tensor, "batch pos logit"]:
        centered = self.scale.center(at.stream)
        values = centered @ self.weight
        others: Tensor | float = 0.0
        if self.table is not None:
            rows = F.embedding(at.tokens, self.table)
            others = rows[..., :1]
            values = values + rows[..., 1:]
        logits = values / self.scale(centered, others) + self.bias
        if self.bigram is not None:
            logits = logits + F.embedding(at.tokens, self.bigram)
        return logits


def buffer(values: Tensor | None) -> Tensor | None:
    """A buffer of a module; None if there are no values."""
    return None if values is None else nn.Buffer(values)
