"""The kept channels at one location of a block, as a function of the values that lead to them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.hooks import abs_topk
from tl_sparse.network import Tokens


def smaller_contest(k: int, n_varying: int) -> tuple[int, int]:
    """AbsTopK among constants and a few values that vary, as one among fewer of them.

    Let f₀ ≥ f₁ ≥ … be the magnitudes of the constants. At most `n_varying` values and the first
    k - n_varying - 1 constants precede f₍k-n_varying-1₎, fewer than k in all: the first
    k - n_varying constants are always among the k largest. Those from f₍k₎ on never are. Without
    both, the same others are kept if the first ones no longer count.

    Returns:
        The number of constants that are always kept, and how many of the varying values and the
        constants between these and the k-th are kept.
    """
    n_always_kept = max(0, k - n_varying)
    return n_always_kept, k - n_always_kept


class Channels(nn.Module):
    """act(x · weight + bias), then AbsTopK, of the kept channels at a location.

    Channels outside the circuit are held at their means after AbsTopK, but compete in it before.
    Those that depend on x have their columns here too, behind those of the kept channels. All
    others are constants, of which only magnitudes matter: `rivals`, reduced by `smaller_contest`.

    Most contests are decided without it. If `k` is the number of columns, the largest rival and all
    other columns are not enough to displace a channel that is larger than that rival; and a channel
    that is smaller than `k` rivals is never kept. The competing columns are computed only where
    neither is true.

    Attributes:
        weight: the weights `[source, channel]` of kept and competing channels.
        bias: their biases, with all that constant sources contribute: `[channel]`, or
            `[n_ctx, channel]` if that depends on the position.
        rivals: constants that compete, the largest first: `[rival]` or `[n_ctx, rival]`.
        k: the number of entries that AbsTopK keeps; None without AbsTopK.
        act_fn: the nonlinearity, "gelu" or "relu"; None without one.
        nodes: the names of the kept channels.
    """

    def __init__(
        self,
        weight: Float[Tensor, "source channel"],
        bias: Float[Tensor, "*n_ctx channel"],
        rivals: Float[Tensor, "*n_ctx rival"],
        k: int | None,
        act_fn: str | None,
        nodes: Sequence[str],
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias)
        self.rivals = nn.Buffer(rivals)
        self.k = k
        self.act_fn = act_fn
        self.nodes = list(nodes)

    @property
    def n_kept(self) -> int:
        """The number of kept channels, which come first."""
        return len(self.nodes)

    def forward(
        self, x: Float[Tensor, "batch pos source"], positions: Tokens
    ) -> Float[Tensor, "batch pos kept"]:
        """The kept channels.

        Args:
            x: what leads to them.
            positions: the positions of x in the context, `[1, pos]` if they are the same ones in
                each row.
        """
        bias: Tensor = self.bias
        rivals: Tensor = self.rivals
        if bias.ndim == 2:
            bias = F.embedding(positions, bias).expand(x.shape[0], -1, -1)
            rivals = F.embedding(positions, rivals).expand(x.shape[0], -1, -1)
        if self.k is not None and torch.compiler.is_exporting():
            # A graph has no branches, so it holds every contest.
            return self._contest(x, bias, rivals.expand(*x.shape[:-1], -1), self.k)
        kept = x @ self.weight[:, : self.n_kept] + bias[..., : self.n_kept]
        kept = activated(kept, self.act_fn)
        if self.k is None:
            return kept
        sizes = kept.abs()
        is_large = sizes > self._always_kept_above(rivals, self.k)
        is_open = ~is_large & (sizes >= _never_kept_below(rivals, self.k)) & (sizes > 0)
        kept = kept * is_large
        is_open = is_open.any(-1)
        if bool(is_open.any()):
            bias = bias.expand(*is_open.shape, -1)[is_open]
            rivals = rivals.expand(*is_open.shape, -1)[is_open]
            kept[is_open] = self._contest(x[is_open], bias, rivals, self.k)
        return kept

    def _always_kept_above(self, rivals: Tensor, k: int) -> Tensor | float:
        n_columns = self.weight.shape[1]
        if k != n_columns or rivals.shape[-1] == 0:
            return math.inf
        return rivals[..., :1]

    def _contest(
        self,
        x: Float[Tensor, "*row source"],
        bias: Float[Tensor, "*row channel"],
        rivals: Float[Tensor, "*row rival"],
        k: int,
    ) -> Float[Tensor, "*row kept"]:
        """The kept channels after AbsTopK among all that competes."""
        values = activated(x @ self.weight + bias, self.act_fn)
        competing = torch.cat([values, rivals], dim=-1)
        return abs_topk(competing, k, inplace=True)[..., : self.n_kept]


def _never_kept_below(rivals: Tensor, k: int) -> Tensor | float:
    if rivals.shape[-1] < k:
        return 0.0
    return rivals[..., k - 1 : k]


def activated(x: Float[Tensor, "*shape"], act_fn: str | None) -> Float[Tensor, "*shape"]:
    """`x` after the nonlinearity of this name; None is the identity."""
    if act_fn is None:
        return x
    return F.gelu(x) if act_fn == "gelu" else F.relu(x)


def fold_channels(
    weight: Float[Tensor, "source channel"],
    bias: Float[Tensor, "*n_ctx channel"],
    is_kept: Bool[Tensor, " channel"],
    k: int | None,
    act_fn: str | None,
    nodes: Sequence[str],
) -> Channels:
    """The kept ones of all channels at a location.

    Args:
        weight: the weights from the sources that vary, to all channels.
        bias: the biases of all channels, with all that constant sources contribute.
        is_kept: which channels are in the circuit.
        k: the number of channels that AbsTopK keeps; None without AbsTopK.
        act_fn: the nonlinearity before AbsTopK; None without one.
        nodes: the names of the channels that are in the circuit.
    """
    if k is None or len(nodes) == 0:
        none = bias[..., :0]
        return Channels(weight[:, is_kept], bias[..., is_kept], none, None, act_fn, nodes)
    varies = weight.ne(0).any(0)
    competes = varies & ~is_kept
    is_constant = ~varies & ~is_kept
    columns = torch.cat([is_kept.nonzero()[:, 0], competes.nonzero()[:, 0]])
    constants = activated(bias[..., is_constant], act_fn).abs().sort(descending=True).values
    n_always_kept, k_among = smaller_contest(k, len(columns))
    rivals = constants[..., n_always_kept:k].contiguous()
    return Channels(weight[:, columns], bias[..., columns], rivals, k_among, act_fn, nodes)
