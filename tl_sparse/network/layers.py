"""The layers around and within the blocks.

These are AbsTopK, biases, norms, embeddings, the unembedding and the bigram table.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_sparse.arrays import outside_vocabulary
from tl_sparse.hooks import abs_topk
from tl_sparse.network.config import SparseConfig
from tl_sparse.network.products import Product
from tl_sparse.network.shapes import Logits, Positions, Reads, Stream, Tokens
from tl_sparse.precision import in_float32


class AbsTopK(nn.Module):
    """AbsTopK at a location; the identity if the configuration has no AbsTopK at this location.

    With `inplace`, it may overwrite its input, so nothing else may need the input, including
    autograd.
    """

    def __init__(self, cfg: SparseConfig, location: str, inplace: bool = False) -> None:
        super().__init__()
        self.location = location
        self.k = cfg.topk(location)
        self.dim = cfg.location_size(location)
        self.inplace = inplace

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        if self.k is None:
            return x
        return abs_topk(x, self.k, self.inplace)

    def extra_repr(self) -> str:
        return f"k={self.k}"


def new_bias(*shape: int, learned: bool) -> nn.Parameter | nn.Buffer:
    """A bias that is initialised to zero.

    TransformerLens' tools expect every bias to exist. Biases that a network does not learn are zero
    buffers that are not saved.
    """
    zeros = torch.zeros(shape)
    if learned:
        return nn.Parameter(zeros)
    return nn.Buffer(zeros, persistent=False)


class Norm(nn.Module):
    """RMSNorm or LayerNorm. `hook_normalized` precedes the weight w, as in TransformerLens.

    In half precision, scale and quotient are computed in float32. `hook_scale` then is float32.
    """

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.centered = cfg.normalization == "layer"
        # In RMSNorm it is tiny, so that zero keeps its meaning in the residual stream (A.1).
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.b = new_bias(cfg.d_model, learned=cfg.norm_bias)
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def _center(self, x: Tensor) -> Tensor:
        if not self.centered:
            return x
        return x - x.mean(-1, keepdim=True)

    def _scale(self, x: Tensor) -> Tensor:
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def forward(self, x: Stream) -> Stream:
        precise = self._center(in_float32(x))
        normalized = (precise / self.hook_scale(self._scale(precise))).to(x.dtype)
        return torch.addcmul(self.b, self.hook_normalized(normalized), self.w)


class Read(Norm):
    """The input of attention or an MLP.

    The residual stream is normalized, any positional channels are concatenated to it, and AbsTopK
    is applied.
    """

    def __init__(self, cfg: SparseConfig, location: str) -> None:
        super().__init__(cfg)
        if cfg.d_pos:
            self.w_pos = nn.Parameter(torch.ones(cfg.d_pos))
            self.b_pos = new_bias(cfg.d_pos, learned=cfg.norm_bias)
        self.topk = AbsTopK(cfg, location, inplace=True)
        self.hook_read = HookPoint()  # [batch, pos, d_read]

    def forward(self, x: Stream, pos: Positions | None) -> Reads:  # type: ignore[override]
        read = super().forward(x)
        if pos is not None:
            each_head_reads_its_own = x.ndim == 4
            if each_head_reads_its_own:
                pos = pos.unsqueeze(2).expand(-1, -1, x.shape[2], -1)
            read = torch.cat([read, self._normalized_positions(pos)], dim=-1)
        return self.hook_read(self.topk(read))

    def _normalized_positions(self, pos: Tensor) -> Tensor:
        precise = self._center(in_float32(pos))
        normalized = (precise / self._scale(precise)).to(pos.dtype)
        return normalized * self.w_pos + self.b_pos


class Embed(nn.Module):
    """Token embedding.

    Raises:
        DataError: for token ids outside the vocabulary. On a GPU, torch aborts the process instead.
    """

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))

    def forward(self, tokens: Tokens) -> Stream:
        # With several threads, the backward pass of W_E[tokens] would not be deterministic.
        try:
            return F.embedding(tokens, self.W_E)
        except IndexError as error:
            raise outside_vocabulary(len(self.W_E)) from error


class PosEmbed(nn.Module):
    """Learned or sinusoidal positional embeddings.

    They are added to the token embedding or concatenated as channels of their own.
    """

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        d_pos = cfg.d_pos or cfg.d_model
        if cfg.sinusoidal:
            table = _sinusoids(cfg.n_ctx, d_pos)
        else:
            table = torch.empty(cfg.n_ctx, d_pos)
        self.W_pos = nn.Parameter(table, requires_grad=not cfg.sinusoidal)

    def forward(self, positions: Tokens) -> Positions:
        return F.embedding(positions, self.W_pos)


def _sinusoids(n_ctx: int, d_pos: int) -> Float[Tensor, "n_ctx d_pos"]:
    """Sines in even channels, cosines in odd ones, with wavelengths from 2π to 10000·2π."""
    frequencies = torch.exp(torch.arange(0, d_pos, 2) * (-math.log(10000.0) / d_pos))
    angles = torch.arange(n_ctx)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_pos]


class Unembed(nn.Module):
    """The map from the residual stream to the logits, with the logit bias b_U."""

    W_U: Tensor

    def __init__(self, cfg: SparseConfig, embed: Embed) -> None:
        super().__init__()
        # An ordinary attribute would register the embedding as a submodule, and W_E would become a
        # parameter with two names.
        self.__dict__["tied_to"] = embed if cfg.tied_unembed else None
        if not cfg.tied_unembed:
            self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab))
        self.b_U = new_bias(cfg.d_vocab, learned=cfg.logits_bias)
        self.times = Product(self, ["W_U"])

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "W_U" and self.__dict__["tied_to"] is not None:
            return self.__dict__["tied_to"].W_E.T
        return super().__getattr__(name)

    def forward(self, resid: Stream) -> Logits:
        return self.times(resid, self.b_U)


class Bigram(nn.Module):
    """The dense bigram table.

    The row of the current token is added to the logits and bypasses the residual stream.
    """

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.W_bigram = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_vocab))

    def forward(self, tokens: Tokens) -> Logits:
        return F.embedding(tokens, self.W_bigram)
