"""The same network in plain torch, without hooks: the measure of the faces' speed."""

import torch
import torch.nn.functional as F
from torch import nn


def topk_by_torch(x, k):
    """AbsTopK as public implementations write it."""
    kept = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


class PlainBlock(nn.Module):
    def __init__(self, cfg, topk):
        super().__init__()
        self.cfg = cfg
        self.topk = topk
        inner = cfg.n_heads * cfg.d_head
        self.ln_1 = nn.RMSNorm(cfg.d_model)
        self.ln_2 = nn.RMSNorm(cfg.d_model)
        self.c_attn = nn.Linear(cfg.d_model, 3 * inner)
        self.attn_proj = nn.Linear(inner, cfg.d_model)
        self.c_fc = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.mlp_proj = nn.Linear(cfg.d_mlp, cfg.d_model)
        self.sink = nn.Parameter(torch.zeros(cfg.n_heads)) if cfg.attn_sinks else None

    def sparse(self, x, location):
        k = self.cfg.topk(location)
        return x if k is None else self.topk(x, k)

    def attention(self, q, k, v):
        if self.sink is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # As the community's implementation has it: a key of zeros in front, its logit in an
        # additive mask.
        batch, heads, length, d_head = q.shape
        nothing = q.new_zeros(batch, heads, 1, d_head)
        mask = q.new_full((length, length), float("-inf")).triu(1)
        mask = torch.cat(
            [
                self.sink.view(1, heads, 1, 1).expand(1, heads, length, 1),
                mask.expand(1, heads, length, length),
            ],
            dim=-1,
        )
        k, v = torch.cat([nothing, k], dim=2), torch.cat([nothing, v], dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward(self, x):
        read = self.sparse(self.ln_1(x), "attn_in")
        parts = self.c_attn(read).split(self.cfg.n_heads * self.cfg.d_head, dim=-1)
        heads = [
            self.sparse(part, f"attn_{name}")
            .unflatten(-1, (self.cfg.n_heads, self.cfg.d_head))
            .transpose(1, 2)
            for part, name in zip(parts, "qkv", strict=True)
        ]
        z = self.attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.sparse(self.attn_proj(z), "attn_out")
        neurons = self.sparse(F.gelu(self.c_fc(self.sparse(self.ln_2(x), "mlp_in"))), "mlp_neuron")
        return x + self.sparse(self.mlp_proj(neurons), "mlp_out")


class PlainTransformer(nn.Module):
    """A network with RMSNorm, GELU, biases and no positions; `copy_weights` sets its weights."""

    def __init__(self, cfg, topk):
        super().__init__()
        self.wte = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(PlainBlock(cfg, topk) for _ in range(cfg.n_layers))
        self.ln_f = nn.RMSNorm(cfg.d_model)
        self.lm_head = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.bigram_table = nn.Embedding(cfg.d_vocab, cfg.d_vocab) if cfg.bigram_table else None

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits if self.bigram_table is None else logits + self.bigram_table(tokens)


@torch.no_grad()
def copy_weights(plain, model):
    """Give the plain program the weights of one of our models."""
    plain.wte.weight.copy_(model.W_E)
    plain.lm_head.weight.copy_(model.W_U.T)
    if plain.bigram_table is not None:
        plain.bigram_table.weight.copy_(model.bigram.W_bigram)
    for theirs, ours in zip(plain.blocks, model.blocks, strict=True):
        qkv = [getattr(ours.attn, f"W_{name}").transpose(1, 2).flatten(0, 1) for name in "QKV"]
        theirs.c_attn.weight.copy_(torch.cat(qkv))
        theirs.c_attn.bias.copy_(
            torch.cat([getattr(ours.attn, f"b_{name}").flatten() for name in "QKV"])
        )
        theirs.attn_proj.weight.copy_(ours.attn.W_O.flatten(0, 1).T)
        theirs.attn_proj.bias.copy_(ours.attn.b_O)
        theirs.c_fc.weight.copy_(ours.mlp.W_in.T)
        theirs.c_fc.bias.copy_(ours.mlp.b_in)
        theirs.mlp_proj.weight.copy_(ours.mlp.W_out.T)
        theirs.mlp_proj.bias.copy_(ours.mlp.b_out)
        if theirs.sink is not None:
            theirs.sink.copy_(ours.attn.sink)
