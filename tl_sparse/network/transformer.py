"""The network, written once: every hook point, with HookedTransformer's parameter names and shapes.

Both faces (`hooked.py` for TransformerLens 3, `bridge.py` for 4) run these modules. Each AbsTopK is
computed before its standard hook fires, so a hook sees, and may replace, exactly what the next
operation uses.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_sparse.errors import DataError
from tl_sparse.network.attention import fused_attention
from tl_sparse.network.config import SparseConfig
from tl_sparse.network.layers import AbsTopK, Bigram, Embed, Norm, PosEmbed, Read, Unembed, set_bias
from tl_sparse.network.products import Product, WeightsHolder
from tl_sparse.network.shapes import Heads, Logits, Positions, Reads, Rows, Stream, Tokens, at

#: TransformerLens' flags for hook points that cost memory, all off. A face puts its own `cfg` in
#: their place.
_NO_FLAGS = SimpleNamespace(
    use_attn_result=False, use_split_qkv_input=False, use_attn_in=False, use_hook_mlp_in=False
)

#: Each out of place, and in place.
_ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "gelu": (F.gelu, torch.ops.aten.gelu_),
    "relu": (F.relu, F.relu_),
}


def _is_used(hook_point: nn.Module) -> bool:
    """Whether anything looks at this hook point; tools such as SAELens put modules of their own in
    its place.
    """
    hooks = hook_point._forward_hooks or hook_point._forward_pre_hooks or hook_point._backward_hooks
    return not isinstance(hook_point, HookPoint) or bool(hooks)


class Attention(WeightsHolder):
    """Causal attention with AbsTopK on q, k, v over all heads together, and an optional sink per
    head.
    """

    b_O: Tensor

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        heads, d_head, d_model = cfg.n_heads, cfg.d_head, cfg.d_model
        self.scale = d_head**-0.5
        rows = {"": d_model, "_pos": cfg.d_pos} if cfg.d_pos else {"": d_model}
        for name in "QKV":
            for part, n_rows in rows.items():
                self.register_parameter(
                    f"W_{name}{part}", nn.Parameter(torch.empty(heads, n_rows, d_head))
                )
            set_bias(self, f"b_{name}", (heads, d_head), cfg.biases)
        self.W_O = nn.Parameter(torch.empty(heads, d_head, d_model))
        set_bias(self, "b_O", (d_model,), cfg.biases)
        self.sink = nn.Parameter(torch.zeros(heads)) if cfg.attn_sinks else None
        for name in "QKV":
            names = [f"W_{name}{part}" for part in rows]
            setattr(
                self,
                f"times_{name}",
                Product(self, names, "head input channel -> input (head channel)"),
            )
        self.times_O = Product(self, ["W_O"], "head channel output -> (head channel) output")
        self.topk_q, self.topk_k, self.topk_v = (
            AbsTopK(cfg, f"attn_{c}", inplace=True) for c in "qkv"
        )
        self.topk_out = AbsTopK(cfg, "attn_out", inplace=True)
        self.flags: Any = _NO_FLAGS
        self.hook_q = HookPoint()  # [batch, pos, head, d_head], after AbsTopK, as k and v
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query_pos, key_pos], without the sink
        self.hook_pattern = HookPoint()  # the same; rows sum to less than 1 with a sink
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model], with cfg.use_attn_result

    def _project(self, read: Reads, name: str) -> Heads:
        parts = (f"b_{name}", f"times_{name}", f"topk_{name.lower()}")
        bias, times, topk = (getattr(self, part) for part in parts)
        if read.ndim == 4:
            per_head = times.matrix().unflatten(1, bias.shape)
            flat = (torch.einsum("bphr,rhd->bphd", read, per_head) + bias).flatten(2)
        else:
            flat = times(read, bias.flatten())
        return topk(flat).unflatten(-1, bias.shape)

    def forward(self, reads: list[Reads], mask: Tokens | None, last: Rows | None = None) -> Stream:
        q_read, k_read, v_read = reads
        q = self.hook_q(self._project(q_read, "Q"))
        k = self.hook_k(self._project(k_read, "K"))
        v = self.hook_v(self._project(v_read, "V"))
        fused = mask is None and not (
            _is_used(self.hook_attn_scores) or _is_used(self.hook_pattern)
        )
        if fused:
            z = fused_attention(q, k, v, self.scale, self.sink)
            if z.requires_grad and _is_used(self.hook_z):
                z = z.clone()  # a hook may write into it, but the backward needs it as it was
        else:
            z = self._explicit_attention(q, k, v, mask)
        z = self.hook_z(z if last is None else at(z, last))
        if self.flags.use_attn_result:
            return self.hook_result(self.head_results(z)).sum(2) + self.b_O
        return self.topk_out(self.times_O(z.flatten(2), self.b_O))

    def head_results(
        self, z: Float[Tensor, "*batch head d_head"]
    ) -> Float[Tensor, "*batch head d_model"]:
        """What each head writes, so that attn_out = Σ results + b_O, as tools that work edge by
        edge need it.

        Of a channel that AbsTopK drops each head writes nothing; its share of `-b_O` cancels the
        bias.
        """
        results = torch.einsum("...hd,hdm->...hm", z, self.W_O)
        if self.topk_out.k is None:
            return results
        kept = self.topk_out(results.detach().sum(-2) + self.b_O).ne(0).unsqueeze(-2)
        return torch.where(kept, results, -self.b_O / results.shape[-2])

    def _explicit_attention(self, q: Heads, k: Heads, v: Heads, mask: Tokens | None) -> Heads:
        scores, length = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale, q.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        if mask is not None:
            hidden = hidden | (mask == 0)[:, None, None, :]
        scores = self.hook_attn_scores(scores.masked_fill(hidden, float("-inf")))
        if self.sink is not None:
            sink = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            pattern = torch.cat([sink, scores], dim=-1).softmax(-1)[..., 1:]
        else:
            pattern = scores.softmax(-1)
            if mask is not None:  # a padding token that sees nothing at all
                pattern = pattern.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        return torch.einsum("bhqk,bkhd->bqhd", self.hook_pattern(pattern), v)


class MLP(WeightsHolder):
    """One hidden layer, AbsTopK after the nonlinearity."""

    b_in: Tensor
    b_out: Tensor

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        if cfg.d_pos:
            self.W_in_pos = nn.Parameter(torch.empty(cfg.d_pos, cfg.d_mlp))
        set_bias(self, "b_in", (cfg.d_mlp,), cfg.biases)
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        set_bias(self, "b_out", (cfg.d_model,), cfg.biases)
        self.times_in = Product(
            self, ["W_in", "W_in_pos"] if cfg.d_pos else ["W_in"], "input neuron -> input neuron"
        )
        self.times_out = Product(self, ["W_out"], "neuron output -> neuron output")
        self.act_fn = cfg.act_fn
        self.topk = AbsTopK(
            cfg, "mlp_neuron", inplace=cfg.act_fn == "gelu"
        )  # relu's backward needs its output
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # the same, after the nonlinearity and AbsTopK

    def forward(self, read: Reads) -> Stream:
        pre = self.hook_pre(self.times_in(read, self.b_in))
        # In place where nothing else sees it: the system takes as long to give memory as the
        # nonlinearity.
        unseen = not (pre.requires_grad or _is_used(self.hook_pre) or torch.compiler.is_compiling())
        post = self.hook_post(self.topk(_ACTIVATIONS[self.act_fn][unseen](pre)))
        return self.times_out(post, self.b_out)


class Block(nn.Module):
    """Attention, then MLP; each reads the residual stream and adds to it."""

    #: What TransformerLens 4's logit lens asks of a block.
    hook_out_is_single_residual_stream = True

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.ln1, self.ln2 = Read(cfg, "attn_in"), Read(cfg, "mlp_in")
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.resid_act = nn.ReLU() if cfg.resid_relu else nn.Identity()
        self.topk_mlp_out = AbsTopK(cfg, "mlp_out")
        self.topk_resid_pre = AbsTopK(cfg, "resid_pre")
        self.topk_resid_mid, self.topk_resid_post = (
            AbsTopK(cfg, "resid_post_attn"),
            AbsTopK(cfg, "resid_post_mlp"),
        )
        self.flags: Any = _NO_FLAGS
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model], after AbsTopK, as all below
        self.hook_attn_in = (
            HookPoint()
        )  # [batch, pos, head, d_model]: a copy of the stream for each head
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_mid = HookPoint()  # after the residual activation
        self.hook_mlp_in = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        resid_pre: Stream,
        pos: Positions | None,
        mask: Tokens | None,
        last: Rows | None = None,
    ) -> Stream:
        resid_pre = self.hook_resid_pre(self.topk_resid_pre(resid_pre))
        attn_out = self.hook_attn_out(self.attn(self._attn_reads(resid_pre, pos), mask, last))
        if last is not None:
            resid_pre, pos = at(resid_pre, last), None if pos is None else at(pos, last)
        resid_mid = self.hook_resid_mid(self.topk_resid_mid(self.resid_act(resid_pre + attn_out)))
        mlp_in = self.hook_mlp_in(resid_mid.clone()) if self.flags.use_hook_mlp_in else resid_mid
        mlp_out = self.hook_mlp_out(self.topk_mlp_out(self.mlp(self.ln2(mlp_in, pos))))
        return self.hook_resid_post(self.topk_resid_post(self.resid_act(resid_mid + mlp_out)))

    def _attn_reads(self, resid_pre: Stream, pos: Positions | None) -> list[Reads]:
        """What q, k and v are computed from: one read, or with TransformerLens' flags one for each
        head.
        """
        if not (self.flags.use_split_qkv_input or self.flags.use_attn_in):
            return [self.ln1(resid_pre, pos)] * 3
        # Copies, not views: a hook may write into one head's.
        copies = resid_pre.unsqueeze(2).repeat(1, 1, self.n_heads, 1)
        if self.flags.use_split_qkv_input:
            hooks = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
            return [self.ln1(hook(copies.clone()), pos) for hook in hooks]
        return [self.ln1(self.hook_attn_in(copies), pos)] * 3


class SparseTransformer(nn.Module):
    """The whole network, tokens → logits. Users meet it through a face; see `tl_sparse.load`."""

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        if cfg.positions != "none":
            self.pos_embed = PosEmbed(cfg)
            # TransformerLens' tools take hook_pos_embed for a part of the stream: only added
            # positions are.
            if cfg.positions == "added":
                self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]
            else:
                self.hook_pos = HookPoint()  # [batch, pos, d_pos]
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = Norm(cfg)
        self.unembed = Unembed(cfg, self.embed)
        if cfg.bigram_table:
            self.bigram = Bigram(cfg)
            self.hook_bigram = HookPoint()  # [batch, pos, d_vocab]

    def follow(self, flags: Any) -> None:
        """Let TransformerLens' configuration `flags` decide which optional hook points act."""
        block: Any
        for block in self.blocks:
            block.flags = block.attn.flags = flags

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter, and of what is held in the place of one."""
        yield from self.named_parameters()
        for path, module in self.named_modules():
            if isinstance(module, WeightsHolder):
                yield from ((f"{path}.{name}", weight) for name, weight in module.compact_weights())

    def check_input(
        self, tokens: Tensor, resid: Tensor | None, mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Raise `DataError` unless the parts of an input have the right kinds and shapes; see
        `forward`.
        """
        if (
            tokens.ndim != 2
            or tokens.is_floating_point()
            or tokens.is_complex()
            or tokens.dtype == torch.bool
        ):
            raise DataError(
                f"tokens must be integers [batch, pos], not {tokens.dtype} of {list(tokens.shape)}"
            )
        expected = [*tokens.shape, self.cfg.d_model]
        if resid is not None and list(resid.shape) != expected:
            raise DataError(
                f"the residual stream must be {expected} beside these tokens, not {list(resid.shape)}"
            )
        for name, given in (("attention_mask", mask), ("position_ids", position_ids)):
            if given is not None and given.shape != tokens.shape:
                raise DataError(
                    f"{name} must have the tokens' shape, {list(tokens.shape)}, not {list(given.shape)}"
                )
        if position_ids is not None and not bool(
            ((position_ids >= 0) & (position_ids < self.cfg.n_ctx)).all()
        ):
            raise DataError(f"position_ids must be in [0, {self.cfg.n_ctx}), the model's context")

    def position_ids(self, x: Tensor, mask: Tensor | None) -> Tokens:
        """0, 1, … for each real token of `x` [batch, pos, …]; padding before the first one has
        position 0.
        """
        mask = (
            torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
            if mask is None
            else mask.long()
        )
        return (mask.cumsum(1) - 1).clamp(min=0)

    def add_positions(self, embed: Stream, position_ids: Tokens) -> Stream:
        """The residual stream entering the first block."""
        return (
            embed + self.hook_pos_embed(self.pos_embed(position_ids))
            if self.cfg.positions == "added"
            else embed
        )

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tokens | None = None,
        position_ids: Tokens | None = None,
        *,
        resid: Stream | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        last: Rows | None = None,
    ) -> Logits | Stream:
        """Logits of every position; or of the blocks `[start_at_layer:stop_at_layer]` alone, the
        residual stream.

        Args:
            input_ids: tokens; the bigram table needs them also when `resid` is given.
            attention_mask: 1 for a real token, 0 for padding. Right padding needs none: attention
                is causal.
            position_ids: default 0, 1, …, counted over the real tokens of `attention_mask`.
            resid: the residual stream entering block `start_at_layer`, in place of the embedding.
            last: one position of each row. Only its logits are given, `[batch, 1, d_vocab]`, and
                past the last attention nothing is computed, nor seen at hook points, of the others.
        """
        if (length := input_ids.shape[1]) > (n_ctx := self.cfg.n_ctx):
            raise DataError(
                f"a sequence of {length} tokens does not fit the model's context of n_ctx = {n_ctx}"
            )
        if position_ids is None:
            position_ids = self.position_ids(input_ids, attention_mask)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # nothing is hidden: attention can be fused
        if resid is None:
            resid = self.add_positions(self.hook_embed(self.embed(input_ids)), position_ids)
        pos = (
            self.hook_pos(self.pos_embed(position_ids))
            if self.cfg.positions == "concatenated"
            else None
        )
        for block in self.blocks[start_at_layer:stop_at_layer]:
            resid = block(resid, pos, attention_mask, last if block is self.blocks[-1] else None)
        if stop_at_layer is not None:
            return resid
        logits = self.unembed(self.ln_final(resid))
        if self.cfg.bigram_table:
            logits = logits + self.hook_bigram(
                self.bigram(input_ids if last is None else at(input_ids, last))
            )
        return logits


@torch.no_grad()
def init_weights(network: SparseTransformer, seed: int) -> None:
    """Fresh weights from `seed`: normal with standard deviation 1/sqrt(inputs) for matrices, the
    writes further divided by sqrt(2·n_layers) (GPT-2's rule), the bigram table uniform in [0, 0.02)
    (A.1).
    """
    cfg, generator = network.cfg, torch.Generator().manual_seed(seed)
    inputs = {
        "W_O": cfg.n_heads * cfg.d_head,
        "W_out": cfg.d_mlp,
        "W_U": cfg.d_model,
    }  # of all others, d_read
    for name, parameter in network.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "W_bigram":
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.02)
        elif leaf.startswith("W_") and not (leaf == "W_pos" and cfg.sinusoidal):
            std = 0.02 if leaf in ("W_E", "W_pos") else inputs.get(leaf, cfg.d_read) ** -0.5
            if leaf in ("W_O", "W_out"):
                std /= math.sqrt(2 * cfg.n_layers)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
