"""A block of the network: attention, then an MLP; each reads and adds to the residual stream.

Parameters have HookedTransformer's names and shapes, and hook points have HookedTransformer's
names. Each AbsTopK is computed before its standard hook point, so that a hook sees, and may
replace, exactly the values that the next operation uses.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_sparse.hooks import MatrixLayout, is_overwritten
from tl_sparse.kernels import in_torch_func
from tl_sparse.network.config import SparseConfig
from tl_sparse.network.fused_attention import fused_attention
from tl_sparse.network.holder import WeightsHolder
from tl_sparse.network.layers import AbsTopK, Read, new_bias
from tl_sparse.network.products import Product
from tl_sparse.network.shapes import (
    Heads,
    PositionOfRow,
    Positions,
    Reads,
    Stream,
    Tokens,
    select_position,
)
from tl_sparse.precision import in_float32

#: W_Q, W_K and W_V are `[head, input, d_head]`; as a matrix, they are input by (head, d_head).
QKV_LAYOUT = MatrixLayout(rows=(1,), columns=(0, 2))
#: W_O is `[head, d_head, d_model]`; as a matrix, it is (head, d_head) by d_model.
O_LAYOUT = MatrixLayout(rows=(0, 1), columns=(2,))

_ACTIVATIONS: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu}
_ACTIVATIONS_IN_PLACE: dict[str, Any] = {"gelu": torch.ops.aten.gelu_, "relu": F.relu_}


@dataclass
class HookFlags:
    """TransformerLens' flags for hook points that cost memory; all are off by default.

    A model replaces these flags by its own TransformerLens configuration; see
    `SparseTransformer.follow`.
    """

    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False


def _is_used(hook_point: nn.Module) -> bool:
    """Whether anything may read or change the activation at this hook point."""
    if not isinstance(hook_point, HookPoint):
        return True  # a tool such as SAELens has replaced it by a module of its own
    if "forward" in vars(hook_point):
        return True  # a tool such as nnsight has replaced its forward method
    return bool(
        hook_point._forward_hooks
        or hook_point._forward_pre_hooks
        or hook_point._backward_hooks
        or hook_point._backward_pre_hooks
    )


class Attention(WeightsHolder):
    """Causal attention, with AbsTopK on q, k and v over all heads together, and optional sinks."""

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        n_heads = cfg.n_heads
        d_head = cfg.d_head
        self.scale = d_head**-0.5

        # The order of the parameters decides what `init_weights` draws for each from a seed.
        self.W_Q = nn.Parameter(torch.empty(n_heads, cfg.d_model, d_head))
        if cfg.d_pos:
            self.W_Q_pos = nn.Parameter(torch.empty(n_heads, cfg.d_pos, d_head))
        self.b_Q = new_bias(n_heads, d_head, learned=cfg.biases)
        self.W_K = nn.Parameter(torch.empty(n_heads, cfg.d_model, d_head))
        if cfg.d_pos:
            self.W_K_pos = nn.Parameter(torch.empty(n_heads, cfg.d_pos, d_head))
        self.b_K = new_bias(n_heads, d_head, learned=cfg.biases)
        self.W_V = nn.Parameter(torch.empty(n_heads, cfg.d_model, d_head))
        if cfg.d_pos:
            self.W_V_pos = nn.Parameter(torch.empty(n_heads, cfg.d_pos, d_head))
        self.b_V = new_bias(n_heads, d_head, learned=cfg.biases)
        self.W_O = nn.Parameter(torch.empty(n_heads, d_head, cfg.d_model))
        self.b_O = new_bias(cfg.d_model, learned=cfg.biases)
        self.sink = nn.Parameter(torch.zeros(n_heads)) if cfg.attn_sinks else None

        if cfg.d_pos:
            self.times_Q = Product(self, ["W_Q", "W_Q_pos"], QKV_LAYOUT)
            self.times_K = Product(self, ["W_K", "W_K_pos"], QKV_LAYOUT)
            self.times_V = Product(self, ["W_V", "W_V_pos"], QKV_LAYOUT)
        else:
            self.times_Q = Product(self, ["W_Q"], QKV_LAYOUT)
            self.times_K = Product(self, ["W_K"], QKV_LAYOUT)
            self.times_V = Product(self, ["W_V"], QKV_LAYOUT)
        self.times_O = Product(self, ["W_O"], O_LAYOUT)
        self.topk_q = AbsTopK(cfg, "attn_q", inplace=True)
        self.topk_k = AbsTopK(cfg, "attn_k", inplace=True)
        self.topk_v = AbsTopK(cfg, "attn_v", inplace=True)
        self.topk_out = AbsTopK(cfg, "attn_out", inplace=True)

        self.flags: Any = HookFlags()
        self.hook_q = HookPoint()  # [batch, pos, head, d_head], after AbsTopK; also for k and v
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query_pos, key_pos], without the sink
        self.hook_pattern = HookPoint()  # the same shape; with a sink, its rows sum to less than 1
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model], with cfg.use_attn_result

    def forward(
        self,
        q_read: Reads,
        k_read: Reads,
        v_read: Reads,
        mask: Tokens | None,
        last: PositionOfRow | None = None,
    ) -> Stream:
        """attn_out at every position or, if `last` gives one position of each row, only there."""
        q = self.hook_q(self._project(q_read, self.times_Q, self.b_Q, self.topk_q))
        k = self.hook_k(self._project(k_read, self.times_K, self.b_K, self.topk_k))
        v = self.hook_v(self._project(v_read, self.times_V, self.b_V, self.topk_v))
        needs_pattern = _is_used(self.hook_attn_scores) or _is_used(self.hook_pattern)
        # Not all transformations of torch.func know fused attention.
        if mask is not None or needs_pattern or in_torch_func():
            z = self._explicit_attention(q, k, v, mask)
        else:
            z = fused_attention(q, k, v, self.scale, self.sink)
            if z.requires_grad and _is_used(self.hook_z):
                z = z.clone()  # a hook may write into z, but the backward pass needs it unchanged
        if last is not None:
            z = select_position(z, last)
        z = self.hook_z(z)
        if self.flags.use_attn_result:
            # head_results has applied AbsTopK: in a dropped channel, results and bias add up to 0.
            _, bias = self.times_O.matrix_and_bias(self.b_O)
            return self.hook_result(self.head_results(z)).sum(2) + bias
        return self.topk_out(self.times_O(z.flatten(2), self.b_O))

    def _project(self, read: Reads, times: Product, bias: Tensor, topk: AbsTopK) -> Heads:
        """q, k or v, after AbsTopK."""
        each_head_reads_its_own = read.ndim == 4
        if each_head_reads_its_own:
            matrix, flat_bias = times.matrix_and_bias(bias.flatten())
            weight = matrix.unflatten(1, bias.shape)
            flat = torch.einsum("bphr,rhd->bphd", read, weight).flatten(2) + flat_bias
        else:
            flat = times(read, bias.flatten())
        return topk(flat).unflatten(-1, bias.shape)

    def _explicit_attention(self, q: Heads, k: Heads, v: Heads, mask: Tokens | None) -> Heads:
        """z from explicit scores and pattern, for hooks on them and for padding masks."""
        length = q.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        if mask is not None:
            hidden = hidden | (mask == 0)[:, None, None, :]
        # In float32, as in TransformerLens, and as fused attention does inside.
        scores = torch.einsum("bqhd,bkhd->bhqk", in_float32(q), in_float32(k)) * self.scale
        scores = self.hook_attn_scores(scores.masked_fill(hidden, float("-inf")))
        if self.sink is not None:
            sink = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            pattern = torch.cat([sink, scores], dim=-1).softmax(-1)[..., 1:]
        else:
            pattern = scores.softmax(-1)
            if mask is not None:
                # A padding token that can attend to nothing would have a pattern of NaN. (With a
                # sink, the softmax always has one finite entry.)
                pattern = pattern.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        pattern = self.hook_pattern(pattern).to(v.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", pattern, v)

    def head_results(
        self, z: Float[Tensor, "*batch head d_head"]
    ) -> Float[Tensor, "*batch head d_model"]:
        """What each head writes, for tools that work edge by edge: attn_out = Σ results + b_O.

        In a channel that AbsTopK drops, each head writes an equal share of `-b_O`, which cancels
        the bias.
        """
        matrix, bias = self.times_O.matrix_and_bias(self.b_O)
        results = torch.einsum("...hd,hdm->...hm", z, matrix.unflatten(0, z.shape[-2:]))
        if self.topk_out.k is None:
            return results
        attn_out = self.topk_out(results.detach().sum(-2) + bias)
        is_kept = attn_out.ne(0).unsqueeze(-2)
        return torch.where(is_kept, results, -bias / results.shape[-2])


class MLP(WeightsHolder):
    """One hidden layer of neurons, with AbsTopK after the nonlinearity."""

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        if cfg.d_pos:
            self.W_in_pos = nn.Parameter(torch.empty(cfg.d_pos, cfg.d_mlp))
        self.b_in = new_bias(cfg.d_mlp, learned=cfg.biases)
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.b_out = new_bias(cfg.d_model, learned=cfg.biases)
        if cfg.d_pos:
            self.times_in = Product(self, ["W_in", "W_in_pos"])
        else:
            self.times_in = Product(self, ["W_in"])
        self.times_out = Product(self, ["W_out"])
        self.act_fn = cfg.act_fn
        # AbsTopK is not in place after ReLU, because the backward pass of ReLU needs its output.
        self.topk = AbsTopK(cfg, "mlp_neuron", inplace=cfg.act_fn == "gelu")
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # the same shape, after the nonlinearity and AbsTopK

    def forward(self, read: Reads) -> Stream:
        pre = self.hook_pre(self.times_in(read, self.b_in))
        post = self.hook_post(self.topk(self._activation(pre)))
        return self.times_out(post, self.b_out)

    def _activation(self, pre: Tensor) -> Tensor:
        # In place if nothing else needs `pre`: allocation takes as long as the nonlinearity itself.
        if pre.requires_grad or _is_used(self.hook_pre) or torch.compiler.is_compiling():
            return _ACTIVATIONS[self.act_fn](pre)
        return _ACTIVATIONS_IN_PLACE[self.act_fn](pre)


class Block(nn.Module):
    """Attention, then an MLP; each reads the residual stream and adds to it."""

    #: TransformerLens 4's logit lens needs this attribute on every block.
    hook_out_is_single_residual_stream = True

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.ln1 = Read(cfg, "attn_in")
        self.ln2 = Read(cfg, "mlp_in")
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.resid_act = nn.ReLU() if cfg.resid_relu else nn.Identity()
        self.topk_mlp_out = AbsTopK(cfg, "mlp_out")
        self.topk_resid_pre = AbsTopK(cfg, "resid_pre")
        self.topk_resid_mid = AbsTopK(cfg, "resid_post_attn")
        self.topk_resid_post = AbsTopK(cfg, "resid_post_mlp")
        self.flags: Any = HookFlags()
        # The locations above have the names of the published configurations; attributes and hook
        # points have TransformerLens' names. All hook points are [batch, pos, d_model], unless
        # another shape is given. The resid_* and *_out hook points come after their AbsTopK. The
        # *_in and *_input hook points are the stream before the norm; what a block reads after
        # norm, positions and AbsTopK is at ln1.hook_read and ln2.hook_read.
        self.hook_resid_pre = HookPoint()
        self.hook_attn_in = HookPoint()  # [batch, pos, head, d_model], a copy for each head
        self.hook_q_input = HookPoint()  # the same shape; also for k and v
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()  # after the residual activation
        self.hook_mlp_in = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()  # after the residual activation

    def forward(
        self,
        resid_pre: Stream,
        pos: Positions | None,
        mask: Tokens | None,
        last: PositionOfRow | None = None,
    ) -> Stream:
        """resid_post at every position or, if `last` gives one position of each row, only there."""
        resid_pre = self.hook_resid_pre(self.topk_resid_pre(resid_pre))
        attn_out = self._attn_out(resid_pre, pos, mask, last)
        if last is not None:
            resid_pre = select_position(resid_pre, last)
            if pos is not None:
                pos = select_position(pos, last)
        resid_mid = self.topk_resid_mid(self.resid_act(resid_pre + attn_out))
        resid_mid = self.hook_resid_mid(resid_mid)

        mlp_in = resid_mid
        if self.flags.use_hook_mlp_in:
            mlp_in = self.hook_mlp_in(resid_mid.clone())
        resid_post = self.topk_resid_post(self.resid_act(resid_mid + self._mlp_out(mlp_in, pos)))
        return self.hook_resid_post(resid_post)

    def _attn_out(
        self,
        resid_pre: Stream,
        pos: Positions | None,
        mask: Tokens | None,
        last: PositionOfRow | None,
    ) -> Stream:
        """What attention adds to the stream; it is not computed if a hook replaces all of it."""
        if self._is_replaced(self.hook_attn_out, self.ln1, self.attn):
            stream = resid_pre if last is None else select_position(resid_pre, last)
            return self.hook_attn_out(_zeros_like(stream))
        q_read, k_read, v_read = self._attn_reads(resid_pre, pos)
        return self.hook_attn_out(self.attn(q_read, k_read, v_read, mask, last))

    def _mlp_out(self, mlp_in: Stream, pos: Positions | None) -> Stream:
        """What the MLP adds to the stream; it is not computed if a hook replaces all of it."""
        if self._is_replaced(self.hook_mlp_out, self.ln2, self.mlp, self.topk_mlp_out):
            return self.hook_mlp_out(_zeros_like(mlp_in))
        return self.hook_mlp_out(self.topk_mlp_out(self.mlp(self.ln2(mlp_in, pos))))

    def _is_replaced(self, hook_point: nn.Module, *made_by: nn.Module) -> bool:
        """Whether a hook replaces all of an activation, and nothing sees how it is computed."""
        if torch.compiler.is_compiling():
            return False  # in a context with such hooks, a compiled model runs uncompiled
        return is_overwritten(hook_point, made_by)

    def _attn_reads(self, resid_pre: Stream, pos: Positions | None) -> tuple[Reads, Reads, Reads]:
        """The inputs of q, k and v: the same one or, if a flag says so, a separate one for each."""
        flags = self.flags
        if not (flags.use_split_qkv_input or flags.use_attn_in):
            read = self.ln1(resid_pre, pos)
            return read, read, read
        # Each head gets a copy of the stream, not a view, because a hook may write into one head's.
        copies = resid_pre.unsqueeze(2).repeat(1, 1, self.n_heads, 1)
        if flags.use_split_qkv_input:
            q_read = self.ln1(self.hook_q_input(copies.clone()), pos)
            k_read = self.ln1(self.hook_k_input(copies.clone()), pos)
            v_read = self.ln1(self.hook_v_input(copies.clone()), pos)
            return q_read, k_read, v_read
        read = self.ln1(self.hook_attn_in(copies), pos)
        return read, read, read


def _zeros_like(stream: Stream) -> Stream:
    """Zeros of the same shape, which take no memory."""
    return stream.new_zeros(()).expand_as(stream)
