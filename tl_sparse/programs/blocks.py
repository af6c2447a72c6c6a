"""A block of a compiled circuit: attention, then an MLP, each with the circuit's nodes alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.network import Tokens, select_position
from tl_sparse.programs.channels import Channels
from tl_sparse.programs.stream import Positioned, Read, Write, buffer
from tl_sparse.programs.token_read import TokenRead


class ByHead(nn.Module):
    """Kept query, key or value channels, sorted by head and completed by constants.

    Attributes:
        channels: the kept channels of all heads.
        place: where each kept channel goes, `[kept, head, channel]`, with a single 1 for each.
        constant: the constants at all other places, `[head, channel]`, and 0 at theirs.
    """

    def __init__(
        self,
        channels: Channels,
        place: Float[Tensor, "kept head channel"],
        constant: Float[Tensor, "head channel"],
    ) -> None:
        super().__init__()
        self.channels = channels
        self.place = nn.Buffer(place)
        self.constant = nn.Buffer(constant)

    def forward(
        self, read: Float[Tensor, "batch pos read"], positions: Tokens
    ) -> Float[Tensor, "batch pos head channel"]:
        kept = self.channels(read, positions)
        placed = kept @ self.place.flatten(1)
        return placed.unflatten(-1, self.constant.shape) + self.constant


class Heads(nn.Module):
    """z of the heads whose z depends on the tokens, in the channels that matter.

    The scores of a head are sums over the channels in which its query or its key is kept, and a
    constant for all others. It matters beside a sink, which takes a share of the pattern; so does
    the sum of the pattern, which a value channel of constant 1 turns into a channel of z.

    Attributes:
        read: the kept channels that attention reads.
        query, key, value: the channels of each head.
        scale: the factor of the scores.
        sink: the logit of each head's sink; None without sinks.
        indices: the numbers of the heads in their block.
    """

    def __init__(
        self,
        read: Read | TokenRead,
        query: ByHead,
        key: ByHead,
        value: ByHead,
        scale: float,
        sink: Float[Tensor, " head"] | None,
        indices: Sequence[int],
    ) -> None:
        super().__init__()
        self.read = read
        self.query = query
        self.key = key
        self.value = value
        self.scale = scale
        self.sink = buffer(sink)
        self.indices = list(indices)

    def forward(
        self, at: Positioned, last: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch query_pos z"]:
        """z at every position or, if `last` gives one position of each row, only there."""
        read = self.read(at)
        n_keys = read.shape[1]
        query_read = read
        positions = at.positions
        if last is not None:
            query_read = select_position(read, last)
            positions = last[:, None]
        query = self.query(query_read, positions)
        key = self.key(read, at.positions)
        value = self.value(read, at.positions)
        scores = torch.einsum("bqhc,bkhc->bhqk", query, key) * self.scale
        later = torch.arange(n_keys, device=read.device) > positions[:, None, :, None]
        scores = scores.masked_fill(later, float("-inf"))
        if self.sink is not None:
            sink = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            pattern = torch.cat([sink, scores], dim=-1).softmax(-1)[..., 1:]
        else:
            pattern = scores.softmax(-1)
        return torch.einsum("bhqk,bkhc->bqhc", pattern, value).flatten(2)


class Attention(nn.Module):
    """The kept writes of attention.

    Attributes:
        heads: the heads whose z depends on the tokens; None if there are none.
        out: the kept writes, as a function of z.
    """

    def __init__(self, heads: Heads | None, out: Channels) -> None:
        super().__init__()
        self.heads = heads
        self.out = out

    def forward(
        self, at: Positioned, last: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch query_pos kept"]:
        after = at if last is None else at.only(last)
        z = after.stream[..., :0] if self.heads is None else self.heads(at, last)
        out: Tensor = self.out(z, after.positions)
        return out


class MLP(nn.Module):
    """The kept writes of an MLP.

    Attributes:
        read: the kept channels that it reads.
        neurons: the kept neurons.
        out: the kept writes.
    """

    def __init__(self, read: Read | TokenRead, neurons: Channels, out: Channels) -> None:
        super().__init__()
        self.read = read
        self.neurons = neurons
        self.out = out

    def forward(self, at: Positioned) -> Float[Tensor, "batch pos kept"]:
        neurons = self.neurons(self.read(at), at.positions)
        out: Tensor = self.out(neurons, at.positions)
        return out


class Block(nn.Module):
    """A block of a compiled circuit.

    Attributes:
        start: what happens to the stream as it enters the block; None if nothing does.
        attention: None if no node of the circuit is a write of attention.
        after_attention: what attention adds to the stream.
        mlp: None if no node of the circuit is a write of the MLP.
        after_mlp: what the MLP adds to the stream.
    """

    def __init__(
        self,
        start: Write | None,
        attention: Attention | None,
        after_attention: Write,
        mlp: MLP | None,
        after_mlp: Write,
    ) -> None:
        super().__init__()
        self.start = start
        self.attention = attention
        self.after_attention = after_attention
        self.mlp = mlp
        self.after_mlp = after_mlp

    @property
    def looks_back(self) -> bool:
        """Whether anything in this block depends on earlier positions."""
        return self.attention is not None and self.attention.heads is not None

    def forward(self, at: Positioned, last: Int[Tensor, " batch"] | None) -> Positioned:
        """The stream after this block, everywhere or, with `last`, at one position of each row."""
        if self.start is not None:
            at = at.with_stream(self.start(at.stream, None))
        written = None if self.attention is None else self.attention(at, last)
        if last is not None:
            at = at.only(last)
        at = at.with_stream(self.after_attention(at.stream, written))
        written = None if self.mlp is None else self.mlp(at)
        return at.with_stream(self.after_mlp(at.stream, written))
