"""What is read from the residual stream before any node of the circuit has written to it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.hooks import abs_topk
from tl_sparse.network import Tokens
from tl_sparse.programs.stream import Positioned, buffer


class TokenRead(nn.Module):
    """The kept channels of a read that is a function of the token, and of the position.

    Before any kept write, the normalized stream is a function of the token, and concatenated
    positions are a function of the position. AbsTopK then keeps a channel if the number of larger
    ones in its own group, which is known beforehand, and of larger ones in the other group are
    together less than k. If r are larger in its own group, fewer than k - r may be in the other:
    the channel must be at least as large as the (k - r)-th largest there.

    Attributes:
        values: by token, the kept channels of the stream after the norm. Without positions, AbsTopK
            has acted on them already.
        limits: by token, k - r of each of them; None without AbsTopK or positions.
        by_position: by position, the n-th largest magnitude of a positional channel in column n. In
            column 0 it is infinite, and in the last one 0.
        positions: by position, the kept positional channels; None without positions.
        places: by position, the column of `by_token` for each of them: how many other positional
            channels are larger, r.
        by_token: by token, the (k - r)-th largest magnitude of a channel of the stream in column r.
        nodes: the names of the kept channels.
    """

    def __init__(
        self,
        values: Float[Tensor, "d_vocab kept"],
        limits: Int[Tensor, "d_vocab kept"] | None,
        by_position: Float[Tensor, "n_ctx limit"] | None,
        positions: Float[Tensor, "n_ctx positional"] | None,
        places: Int[Tensor, "n_ctx positional"] | None,
        by_token: Float[Tensor, "d_vocab place"] | None,
        nodes: Sequence[str],
    ) -> None:
        super().__init__()
        self.values = nn.Buffer(values)
        self.limits = buffer(limits)
        self.by_position = buffer(by_position)
        self.positions = buffer(positions)
        self.places = buffer(places)
        self.by_token = buffer(by_token)
        self.nodes = list(nodes)

    def forward(self, at: Positioned) -> Float[Tensor, "batch pos kept"]:
        values = F.embedding(at.tokens, self.values)
        if self.positions is None:
            return values
        positional = F.embedding(at.positions, self.positions).expand(values.shape[0], -1, -1)
        if self.limits is not None and self.by_position is not None:
            limits = F.embedding(at.tokens, self.limits)
            values = where_large(values, self.by_position, at.positions, limits)
        if self.places is not None and self.by_token is not None:
            places = F.embedding(at.positions, self.places)
            positional = where_large(positional, self.by_token, at.tokens, places)
        return torch.cat([values, positional], dim=-1)


def where_large(
    values: Float[Tensor, "batch pos channel"],
    least: Float[Tensor, "row column"],
    rows: Tokens,
    columns: Int[Tensor, "batch pos channel"],
) -> Float[Tensor, "batch pos channel"]:
    """The values where their magnitudes are at least the entries of `least`, elsewhere 0."""
    entries = rows.unsqueeze(-1) * least.shape[1] + columns
    return values * (values.abs() >= F.embedding(entries, least.view(-1, 1)).squeeze(-1))


def fold_token_read(
    stream: Float[Tensor, "d_vocab d_model"],
    positions: Float[Tensor, "n_ctx d_pos"] | None,
    is_kept: Bool[Tensor, " d_read"],
    k: int | None,
    nodes: Sequence[str],
) -> TokenRead:
    """A read of the normalized stream by token, and of the normalized positions.

    Args:
        stream: by token, the stream after the norm.
        positions: by position, the positional channels after theirs; None without any.
        is_kept: which channels of both are in the circuit.
        k: the number of entries that AbsTopK keeps; None without AbsTopK.
        nodes: the names of the kept channels.
    """
    d_model = stream.shape[1]
    in_stream = is_kept[:d_model].nonzero()[:, 0]
    if positions is None:
        read = stream if k is None else abs_topk(stream, k)
        return TokenRead(read[:, in_stream], None, None, None, None, None, nodes)
    in_positions = is_kept[d_model:].nonzero()[:, 0]
    values = stream[:, in_stream]
    positional = positions[:, in_positions]
    if k is None:
        return TokenRead(values, None, None, positional, None, None, nodes)
    d_pos = positions.shape[1]
    limits = k - ranks(stream)[:, in_stream]
    limits = limits.clamp(0, d_pos + 1)
    limits_of_positions = k - torch.arange(d_pos)
    limits_of_positions = limits_of_positions.clamp(0, d_model + 1)
    return TokenRead(
        values,
        limits.int(),
        with_ends(positions),
        positional,
        ranks(positions)[:, in_positions].int(),
        with_ends(stream)[:, limits_of_positions],
        nodes,
    )


def ranks(values: Float[Tensor, "row channel"]) -> Int[Tensor, "row channel"]:
    """How many channels of each row are larger in magnitude."""
    return values.abs().argsort(-1, descending=True).argsort(-1)


def with_ends(values: Float[Tensor, "row channel"]) -> Float[Tensor, "row limit"]:
    """The n-th largest magnitude of each row in column n, after infinity and before 0."""
    largest_first = values.abs().sort(-1, descending=True).values
    return F.pad(F.pad(largest_first, (1, 0), value=math.inf), (0, 1), value=0.0)
