"""Which channels of the residual stream a compiled circuit computes."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.network import SparseTransformer
from tl_sparse.programs.nodes_held import precise


def normalized_positions(network: SparseTransformer, norm: Any) -> Float[Tensor, "n_ctx d_pos"]:
    """By position, the positional channels as a block reads them after this norm."""
    cfg = network.cfg
    positions = precise(network.pos_embed.W_pos)
    if cfg.normalization == "layer":
        positions = positions - positions.mean(-1, keepdim=True)
    scale = (positions.square().mean(-1, keepdim=True) + cfg.eps).sqrt()
    return positions / scale * precise(norm.w_pos) + precise(norm.b_pos)


def varying_channels(
    circuit: Circuit, network: SparseTransformer, tokens: Int[Tensor, " logit"] | None
) -> Int[Tensor, " varying"]:
    """The channels of the residual stream that a compiled circuit computes.

    They are those to which the circuit writes, and all of them where the others are not a function
    of the present token, or where the magnitudes of what is read do not have the same order
    whatever the norm divides by:

    - LayerNorm subtracts a mean of all channels;
    - added positions make the others depend on the position;
    - AbsTopK on the stream itself makes them depend on the circuit's writes;
    - equal magnitudes of positional channels: which of them AbsTopK then keeps depends on their
      places among all channels.

    They are all of them too if there are more logits than channels, since a table by token would
    then be larger than the unembedding.
    """
    cfg = network.cfg
    everything = torch.arange(cfg.d_model)
    if tokens is None or len(tokens) > cfg.d_model:
        return everything
    has_topk = any(location.startswith("resid") for location in cfg.abs_topk)
    if cfg.normalization == "layer" or cfg.positions == "added" or has_topk:
        return everything
    if cfg.positions == "concatenated" and _has_ties(network):
        return everything
    is_written = torch.zeros(cfg.d_model, dtype=torch.bool)
    for layer in range(cfg.n_layers):
        for location in ("attn_out", "mlp_out"):
            hook_name = circuit.hooks.get((layer, location))
            if hook_name is None:  # the circuit says nothing of this location, so all nodes run
                return everything
            is_written |= circuit.kept[hook_name].cpu()
    return is_written.nonzero()[:, 0]


def _has_ties(network: SparseTransformer) -> bool:
    """Whether two positional channels are equally large somewhere, and not zero."""
    block: Any
    for block in network.blocks:
        for norm in (block.ln1, block.ln2):
            ordered = normalized_positions(network, norm).abs().sort(-1).values
            if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any()):
                return True
    return False
