"""The kept channels at one location of a block, as a function of the values that lead to them."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.hooks import abs_topk


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

    Attributes:
        weight: the weights `[source, channel]` of kept and competing channels.
        bias: their biases, with all that constant sources contribute.
        rivals: constants that compete, `[rival]`.
        n_kept: the number of kept channels, which come first.
        k: the number of entries that AbsTopK keeps; None without AbsTopK.
        act_fn: the nonlinearity, "gelu" or "relu"; None without one.
    """

    def __init__(
        self,
        weight: Float[Tensor, "source channel"],
        bias: Float[Tensor, " channel"],
        rivals: Float[Tensor, " rival"],
        n_kept: int,
        k: int | None,
        act_fn: str | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias)
        self.rivals = nn.Buffer(rivals)
        self.n_kept = n_kept
        self.k = k
        self.act_fn = act_fn

    def forward(self, x: Float[Tensor, "batch pos source"]) -> Float[Tensor, "batch pos kept"]:
        values = activated(F.linear(x, self.weight.T, self.bias), self.act_fn)
        if self.k is None:
            return values
        rivals = self.rivals.expand(*values.shape[:-1], -1)
        row = torch.cat([values, rivals], dim=-1)
        return abs_topk(row, self.k, inplace=True)[..., : self.n_kept]


def activated(x: Float[Tensor, "*shape"], act_fn: str | None) -> Float[Tensor, "*shape"]:
    """`x` after the nonlinearity of this name; None is the identity."""
    if act_fn is None:
        return x
    return F.gelu(x) if act_fn == "gelu" else F.relu(x)


def fold_channels(
    weight: Float[Tensor, "source channel"],
    bias: Float[Tensor, " channel"],
    is_kept: Bool[Tensor, " channel"],
    k: int | None,
    act_fn: str | None = None,
) -> Channels:
    """The kept ones of all channels at a location.

    Args:
        weight: the weights from the sources that vary, to all channels.
        bias: the biases of all channels, with all that constant sources contribute.
        is_kept: which channels are in the circuit.
        k: the number of channels that AbsTopK keeps; None without AbsTopK.
        act_fn: the nonlinearity before AbsTopK.
    """
    if k is None or not bool(is_kept.any()):
        return Channels(
            weight[:, is_kept], bias[is_kept], bias[:0], int(is_kept.sum()), None, act_fn
        )
    varies = weight.ne(0).any(0)
    competes = varies & ~is_kept
    is_constant = ~varies & ~is_kept
    columns = torch.cat([is_kept.nonzero()[:, 0], competes.nonzero()[:, 0]])
    constants = activated(bias[is_constant], act_fn).abs().sort(descending=True).values
    n_always_kept, k_among = smaller_contest(k, len(columns))
    return Channels(
        weight[:, columns],
        bias[columns],
        constants[n_always_kept:k],
        int(is_kept.sum()),
        k_among,
        act_fn,
    )
