"""The parts of the network around its blocks: AbsTopK, norms, embeddings, unembedding, bigram
table.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_sparse.errors import DataError
from tl_sparse.hooks import abs_topk
from tl_sparse.network.config import SparseConfig
from tl_sparse.network.products import Product
from tl_sparse.network.shapes import Logits, Positions, Reads, Stream, Tokens


class AbsTopK(nn.Module):
    """AbsTopK at a location of the configuration; the identity where it does not act.

    It works in place where nothing else holds its input, also not autograd.
    """

    def __init__(self, cfg: SparseConfig, location: str, inplace: bool = False) -> None:
        super().__init__()
        self.k, self.dim, self.inplace = cfg.topk(location), cfg.location_size(location), inplace

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return x if self.k is None else abs_topk(x, self.k, self.inplace)

    def extra_repr(self) -> str:
        return f"k={self.k}"


def set_bias(module: nn.Module, name: str, shape: tuple[int, ...], learned: bool) -> None:
    """A bias; where the network has none, the zeros that TransformerLens' tools expect to find
    there.
    """
    if learned:
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    else:
        module.register_buffer(name, torch.zeros(shape), persistent=False)


class Norm(nn.Module):
    """RMSNorm or LayerNorm; `hook_normalized` is before the weight."""

    b: Tensor

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.centered = cfg.normalization == "layer"
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        set_bias(self, "b", (cfg.d_model,), cfg.norm_bias)
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def _scale(self, x: Tensor) -> Tensor:
        # RMSNorm adds the dtype's machine epsilon, so that zero keeps its meaning in the stream
        # (A.1).
        eps = 1e-5 if self.centered else torch.finfo(x.dtype).eps
        return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def _center(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centered else x

    def forward(self, x: Stream) -> Stream:
        x = self._center(x)
        x = self.hook_normalized(x / self.hook_scale(self._scale(x)))
        return torch.addcmul(self.b, x, self.w)


class Read(Norm):
    """What a block reads: the normalised stream, beside it any positional channels, then
    AbsTopK.
    """

    b_pos: Tensor

    def __init__(self, cfg: SparseConfig, location: str) -> None:
        super().__init__(cfg)
        if cfg.d_pos:
            self.w_pos = nn.Parameter(torch.ones(cfg.d_pos))
            set_bias(self, "b_pos", (cfg.d_pos,), cfg.norm_bias)
        self.topk = AbsTopK(cfg, location, inplace=True)
        self.hook_read = HookPoint()  # [batch, pos, d_read]

    def forward(self, x: Stream, pos: Positions | None) -> Reads:  # type: ignore[override]
        read = super().forward(x)
        if pos is not None:
            if x.ndim == 4:  # a copy of the stream for each head
                pos = pos.unsqueeze(2).expand(-1, -1, x.shape[2], -1)
            pos = self._center(pos)
            read = torch.cat([read, pos / self._scale(pos) * self.w_pos + self.b_pos], dim=-1)
        return self.hook_read(self.topk(read))


class Embed(nn.Module):
    """Token embedding; `DataError` for ids outside the vocabulary (on a GPU torch itself stops
    there).
    """

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))

    def forward(self, tokens: Tokens) -> Stream:
        try:  # not W_E[tokens]: its backward differs from run to run on several threads
            return F.embedding(tokens, self.W_E)
        except IndexError as error:
            raise DataError(
                f"token ids must be in [0, {len(self.W_E)}), the model's vocabulary"
            ) from error


class PosEmbed(nn.Module):
    """Learned or sinusoidal positions: added to the token embedding, or concatenated channels."""

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        d_pos = cfg.d_pos or cfg.d_model
        table = _sinusoids(cfg.n_ctx, d_pos) if cfg.sinusoidal else torch.empty(cfg.n_ctx, d_pos)
        self.W_pos = nn.Parameter(table, requires_grad=not cfg.sinusoidal)

    def forward(self, positions: Tokens) -> Positions:
        return F.embedding(positions, self.W_pos)


def _sinusoids(n_ctx: int, d_pos: int) -> Float[Tensor, "n_ctx d_pos"]:
    """Sines in the even channels, cosines in the odd ones, wavelengths from 2π to 10000·2π."""
    frequencies = torch.exp(torch.arange(0, d_pos, 2) * (-math.log(10000.0) / d_pos))
    angles = torch.arange(n_ctx)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_pos]


class Unembed(nn.Module):
    """Residual stream → logits, with the logits' bias."""

    W_U: Tensor
    b_U: Tensor

    def __init__(self, cfg: SparseConfig, embed: Embed) -> None:
        super().__init__()
        # Tied: a reference that is no submodule, so that the weight stays one parameter with one
        # name.
        self.__dict__["tied_to"] = embed if cfg.tied_unembed else None
        if not cfg.tied_unembed:
            self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab))
        set_bias(self, "b_U", (cfg.d_vocab,), cfg.logits_bias)
        self.times = Product(self, ["W_U"], "input token -> input token")

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "W_U" and self.__dict__["tied_to"] is not None:
            return self.__dict__["tied_to"].W_E.T
        return super().__getattr__(name)

    def forward(self, resid: Stream) -> Logits:
        return self.times(resid, self.b_U)


class Bigram(nn.Module):
    """The dense table whose row of the current token is added to the logits, off the residual
    path.
    """

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.W_bigram = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_vocab))

    def forward(self, tokens: Tokens) -> Logits:
        return F.embedding(tokens, self.W_bigram)
