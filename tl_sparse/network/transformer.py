"""The whole network, written once, with HookedTransformer's parameter names and hook points.

Both model classes run these modules: `tl_sparse.faces.hooked` on TransformerLens 3 and
`tl_sparse.faces.bridge` on TransformerLens 4.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_sparse.arrays import as_tokens
from tl_sparse.config import check
from tl_sparse.errors import DataError
from tl_sparse.network.blocks import Block
from tl_sparse.network.config import SparseConfig
from tl_sparse.network.holder import WeightsHolder
from tl_sparse.network.layers import Bigram, Embed, Norm, PosEmbed, Unembed
from tl_sparse.network.shapes import (
    Logits,
    PositionOfRow,
    Positions,
    Stream,
    Tokens,
    select_position,
)


class SparseTransformer(nn.Module):
    """The network from tokens to logits. `tl_sparse.load` wraps it in a TransformerLens model."""

    #: What accelerate keeps together when it shards the network: the weights of one block at a time
    #: are made whole.
    _no_split_modules = ["Block"]

    def __init__(self, cfg: SparseConfig) -> None:
        super().__init__()
        check(isinstance(cfg, SparseConfig), "cfg", cfg, "a SparseConfig")
        self.cfg = cfg
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        if cfg.positions != "none":
            self.pos_embed = PosEmbed(cfg)
            # TransformerLens' tools take hook_pos_embed for a part of the residual stream, which
            # concatenated positions are not.
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

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tokens | None = None,
        position_ids: Tokens | None = None,
        *,
        resid: Stream | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        last: PositionOfRow | None = None,
    ) -> Logits | Stream:
        """Logits at every position; with `stop_at_layer`, the residual stream entering that block.

        Args:
            input_ids: the tokens, as any kind of array that `as_tokens` accepts. The bigram table
                needs them even if `resid` is given.
            attention_mask: 1 for a real token, 0 for padding. Padding on the right needs no mask,
                because attention is causal.
            position_ids: the position of each token; by default 0, 1, …, counted over the real
                tokens of `attention_mask`.
            resid: the residual stream entering block `start_at_layer`, instead of the embedding.
            start_at_layer: the first block to run; by default block 0.
            stop_at_layer: the block to stop before; by default all blocks run.
            last: one position in each row, usually that of its last token. Only the logits at these
                positions are returned, `[batch, 1, d_vocab]`, or the residual stream at these
                positions, `[batch, 1, d_model]`. From hook_z of the last block on, the other
                positions are not computed, and hook points do not see them.

        Raises:
            DataError: for tokens that are not integers, a sequence longer than the model's context,
                or a token outside its vocabulary.
        """
        input_ids = as_tokens(input_ids)
        length = input_ids.shape[1]
        if length > self.cfg.n_ctx:
            context = f"the model's context of n_ctx = {self.cfg.n_ctx}"
            raise DataError(f"a sequence of {length} tokens does not fit {context}")
        if position_ids is None:
            position_ids = self.position_ids(input_ids, attention_mask)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # there is no padding, so attention can be fused
        if resid is None:
            embed = self.hook_embed(self.embed(input_ids))
            resid = self.add_positions(embed, position_ids)
        pos = self._concatenated_positions(position_ids)
        selects_in_block = False
        for block in self.blocks[start_at_layer:stop_at_layer]:
            selects_in_block = last is not None and block is self.blocks[-1]
            resid = block(resid, pos, attention_mask, last if selects_in_block else None)
        if last is not None and not selects_in_block:
            resid = select_position(resid, last)
        if stop_at_layer is not None:
            return resid
        logits = self.unembed(self.ln_final(resid))
        if self.cfg.bigram_table:
            tokens = input_ids if last is None else select_position(input_ids, last)
            logits = logits + self.hook_bigram(self.bigram(tokens))
        return logits

    def position_ids(self, x: Tensor, mask: Tensor | None) -> Tokens:
        """0, 1, … for the real tokens of each row; padding before them has position 0.

        Args:
            x: tokens `[batch, pos]` or activations `[batch, pos, …]`.
            mask: 1 for a real token, 0 for padding; None if all tokens are real.
        """
        if mask is None:
            is_real = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        else:
            is_real = mask.long()
        return (is_real.cumsum(1) - 1).clamp(min=0)

    def add_positions(self, embed: Stream, position_ids: Tokens) -> Stream:
        """The residual stream entering block 0: token embeddings plus any added positions."""
        if self.cfg.positions != "added":
            return embed
        return embed + self.hook_pos_embed(self.pos_embed(position_ids))

    def _concatenated_positions(self, position_ids: Tokens) -> Positions | None:
        """The positional channels that every block reads; None if the network has none."""
        if self.cfg.positions != "concatenated":
            return None
        return self.hook_pos(self.pos_embed(position_ids))

    def check_input(
        self, tokens: Tensor, resid: Tensor | None, mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Check the shapes and dtypes of the arguments of `forward`, and the range of positions.

        The length is checked by `forward` itself, and token ids by `Embed`.

        Raises:
            DataError: if an argument does not fit the shape of `tokens` `[batch, pos]`, the
                residual stream has another dtype than the model, or a position is outside the
                context.
        """
        expected = [*tokens.shape, self.cfg.d_model]
        if resid is not None and list(resid.shape) != expected:
            shapes = f"{expected} to fit the tokens, not {list(resid.shape)}"
            raise DataError(f"the residual stream must have shape {shapes}")
        dtype = self.embed.W_E.dtype
        under_autocast = torch.is_autocast_enabled(self.embed.W_E.device.type)
        if resid is not None and resid.dtype != dtype and not under_autocast:
            raise DataError(f"the residual stream must be {dtype}, as the model, not {resid.dtype}")
        for name, given in (("attention_mask", mask), ("position_ids", position_ids)):
            if given is not None and given.shape != tokens.shape:
                shapes = f"{list(tokens.shape)}, not {list(given.shape)}"
                raise DataError(f"{name} must have the tokens' shape, {shapes}")
        if position_ids is not None:
            is_inside = (position_ids >= 0) & (position_ids < self.cfg.n_ctx)
            if not bool(is_inside.all()):
                raise DataError(
                    f"position_ids must be in [0, {self.cfg.n_ctx}), the model's context"
                )

    def follow(self, flags: Any) -> None:
        """Make `flags`, a TransformerLens configuration, control the optional hook points."""
        block: Any
        for block in self.blocks:
            block.flags = flags
            block.attn.flags = flags

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The name and value of every parameter and, as a dense copy, of every compact weight."""
        yield from self.named_parameters()
        for path, module in self.named_modules():
            if isinstance(module, WeightsHolder):
                for name, weight in module.dense_copies():
                    yield f"{path}.{name}", weight


@torch.no_grad()
def init_weights(network: SparseTransformer, seed: int) -> None:
    """Draw new weights from `seed`; biases, norms and sinks do not change.

    Weights are normal. Their standard deviation is 0.02 in the token and positional embeddings, and
    1/sqrt(number of inputs) in other matrices, further divided by sqrt(2 · n_layers) in those that
    write to the residual stream (GPT-2's rule). The bigram table is uniform in [0, 0.02) (Gao et
    al. 2025, A.1).

    Raises:
        ConfigError: if `seed` is not an integer of 64 bits.
    """
    is_seed = type(seed) is int and -(2**63) <= seed < 2**64
    check(is_seed, "seed", seed, "an integer of 64 bits")
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in network.named_parameters():
        name = path.rsplit(".", 1)[-1]
        is_fixed = name == "W_pos" and network.cfg.sinusoidal
        if name == "W_bigram":
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.02)
        elif name.startswith("W_") and not is_fixed:
            std = _initial_std(name, network.cfg)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _initial_std(name: str, cfg: SparseConfig) -> float:
    if name in ("W_E", "W_pos"):
        return 0.02
    if name == "W_U":
        return cfg.d_model**-0.5
    write_divisor = math.sqrt(2 * cfg.n_layers)
    if name == "W_O":
        return (cfg.n_heads * cfg.d_head) ** -0.5 / write_divisor
    if name == "W_out":
        return cfg.d_mlp**-0.5 / write_divisor
    # The others, W_Q, W_K, W_V, W_in and their positional rows, read d_read channels.
    return cfg.d_read**-0.5
