"""The fields of TransformerLens' configuration classes that describe the network."""

from typing import Any

from tl_sparse.network import SparseTransformer

#: `SparseConfig.normalization` → TransformerLens' name for it.
_NORMALIZATION_TYPES = {"rms": "RMS", "layer": "LN"}


def tl_config_fields(network: SparseTransformer) -> dict[str, Any]:
    """The fields that describe the network, on both versions of TransformerLens."""
    cfg = network.cfg
    return dict(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        d_vocab_out=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        act_fn=cfg.act_fn,
        normalization_type=_NORMALIZATION_TYPES[cfg.normalization],
        eps=cfg.eps,
        positional_embedding_type="standard" if cfg.positions == "added" else "none",
        model_name="tl_sparse",
        init_weights=False,
        **tensor_config_fields(network),
    )


def tensor_config_fields(network: SparseTransformer) -> dict[str, Any]:
    """The fields that depend on the device and the dtype of the weights."""
    weight = network.embed.W_E
    return dict(dtype=weight.dtype, device=str(weight.device))
