"""OpenAI's model folders (FORMATS: `models/<name>/` on their public storage)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.checkpoints.network import Checkpoint, config_of
from tl_sparse.config import SparseConfig
from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.files import read_json, read_torch

# Keys that do not change what the network computes: training settings and choices of kernel.
_OPENAI_IGNORED = {
    "afrac_ste", "batch_size", "beta1", "beta2", "debug_nans", "dropout", "dropout_cat_pos_emb",
    "enable_sparse_kernels", "flash", "grad_checkpointing", "grad_clip", "learnable_bigram_table", "lr",
    "pfrac", "tokenizer_name", "weight_decay",
}  # fmt: skip
# Keys that change it in a way this package does not know, with the value at which they do not.
_OPENAI_UNSUPPORTED = {"bigram_table_rank": None, "use_tied_aux_matrix": False}


def openai_config(values: Mapping[str, Any], path: Path, logits_bias: bool, positions: bool) -> SparseConfig:
    """`beeg_config.json` → our configuration; what is not written there is seen from the tensors."""
    values = dict(values)
    for key, neutral in _OPENAI_UNSUPPORTED.items():
        if values.pop(key, neutral) != neutral:
            raise ConfigError(f"{path}: {key} must be {json_value(neutral)}; nothing else is supported")
    missing = [key for key in ("block_size", "vocab_size", "n_layer", "n_head", "d_model") if key not in values]
    if missing:
        raise ConfigError(f"{path}: missing keys {', '.join(missing)}")
    d_model, n_heads = values.pop("d_model"), values.pop("n_head")
    old_d_mlp = values.pop("n_mlp", None)
    d_head, d_mlp, d_pos = values.pop("d_head", None), values.pop("d_mlp", old_d_mlp), values.pop("d_pos_emb", None)
    for key, size in (("d_model", d_model), ("n_head", n_heads)):
        if type(size) is not int or size < 1:
            raise ConfigError(f"{path}: {key} = {size!r} is not possible; it must be an integer of at least 1")
    fraction, locations = values.pop("afrac", None), values.pop("afrac_loctypes", None)
    if not isinstance(locations, str | None):
        raise ConfigError(f"{path}: afrac_loctypes = {locations!r} must be names separated by commas")
    locations = "attn_in,attn_out,mlp_in,mlp_out" if locations is None else locations
    rms, sinusoidal = values.pop("rms_norm", False), values.pop("sinusoidal_cat_pos_emb", False)
    ln_bias = values.pop("ln_bias", True)
    for key, value in (("rms_norm", rms), ("sinusoidal_cat_pos_emb", sinusoidal), ("ln_bias", ln_bias)):
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {key} = {value!r} is not possible; it must be true or false")
    activation = values.pop("residual_activation_type", "identity")
    if activation not in ("identity", "relu"):
        raise ConfigError(f"{path}: residual_activation_type = {activation!r} must be 'identity' or 'relu'")
    fields = dict(
        n_layers=values.pop("n_layer"), d_model=d_model, n_heads=n_heads, n_ctx=values.pop("block_size"),
        d_head=d_model // n_heads if d_head is None else d_head, d_vocab=values.pop("vocab_size"),
        d_mlp=4 * d_model if d_mlp is None else d_mlp,
        normalization="rms" if rms else "layer", norm_bias=ln_bias and not rms,
        act_fn=values.pop("activation_type", "gelu"), resid_relu=activation == "relu",
        abs_topk={} if fraction is None else dict.fromkeys(filter(None, locations.split(",")), fraction),
        attn_sinks=values.pop("sink", False), bigram_table=values.pop("enable_bigram_table", False),
        logits_bias=logits_bias, d_pos=d_pos or 0, sinusoidal=bool(d_pos) and sinusoidal,
        positions="concatenated" if d_pos else "added" if positions else "none",
        biases=values.pop("bias", True), tied_unembed=values.pop("tied_unembed", True),
    )  # fmt: skip
    unknown = sorted(set(values) - _OPENAI_IGNORED)
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(unknown)}; they may change what the model computes")
    return config_of(path, fields)


def json_value(value: object) -> str:
    """A value as JSON spells it, for messages about JSON files."""
    return {None: "null", True: "true", False: "false"}[value] if value in (None, True, False) else repr(value)


def read_openai(folder: Path) -> Checkpoint:
    """OpenAI's model folder (FORMATS: `models/<name>/` on their public storage)."""
    path = folder / "beeg_config.json"
    values = read_json(path)
    weights = folder / "final_model.pt"
    raw = read_torch(weights)
    for name, tensor in raw.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{weights}: {name!r} is a {type(tensor).__name__}; expected names with tensors")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{weights}: {name} is not a dense tensor with values")
    wpe = raw.get("transformer.wpe.weight")
    # The published models without positions carry a table of zeros.
    positions = wpe is not None and bool(wpe.any())
    cfg = openai_config(values, path, "final_logits_bias" in raw, positions)
    if cfg.positions == "none":
        raw.pop("transformer.wpe.weight", None)
    if cfg.tied_unembed:
        head, wte = raw.pop("lm_head.weight", None), raw.get("transformer.wte.weight")
        if head is not None and wte is not None and not torch.equal(head, wte):
            raise CheckpointError(f"{weights}: tied_unembed is true, but lm_head.weight differs from wte.weight")
    state: dict[str, Tensor] = {}
    for name in list(raw):
        state.update(_from_openai(cfg, name, raw.pop(name), weights))
    return cfg, state


def _from_openai(cfg: SparseConfig, name: str, tensor: Tensor, path: Path) -> dict[str, Tensor]:
    """One tensor of OpenAI's under our names and in our shapes."""
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    prefix, leaf = (f"blocks.{match[1]}.", match[2]) if match else ("", name)
    convert = _OPENAI_TENSORS.get(leaf)
    if convert is None:
        raise CheckpointError(f"{path}: unknown tensor {name!r}")
    try:
        return {prefix + key: value.contiguous() for key, value in convert(cfg, tensor).items()}
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {name} of shape {list(tensor.shape)} does not fit the configuration") from error


def _qkv(cfg: SparseConfig, x: Tensor) -> dict[str, Tensor]:
    parts = x.view(3, cfg.n_heads, cfg.d_head, cfg.d_read).transpose(2, 3)
    named = {f"attn.W_{name}": part for name, part in zip("QKV", parts, strict=True)}
    return _split_positions(cfg, named, dim=1)


def _split_positions(cfg: SparseConfig, named: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """The rows of concatenated positional channels go to a parameter of their own."""
    if not cfg.d_pos:
        return named
    split = {}
    for name, tensor in named.items():
        split[name], split[f"{name}_pos"] = tensor.split([cfg.d_model, cfg.d_pos], dim=dim)
    return split


def _rename(name: str) -> Callable[[SparseConfig, Tensor], dict[str, Tensor]]:
    return lambda cfg, x: {name: x}


_OPENAI_TENSORS: dict[str, Callable[[SparseConfig, Tensor], dict[str, Tensor]]] = {
    "transformer.wte.weight": _rename("embed.W_E"),
    "transformer.wpe.weight": _rename("pos_embed.W_pos"),
    "attn.c_attn.weight": _qkv,
    "attn.c_attn.bias": lambda cfg, x: {
        f"attn.b_{name}": part for name, part in zip("QKV", x.view(3, cfg.n_heads, cfg.d_head), strict=True)
    },
    "attn.c_proj.weight": lambda cfg, x: {"attn.W_O": x.T.reshape(cfg.n_heads, cfg.d_head, cfg.d_model)},
    "attn.c_proj.bias": _rename("attn.b_O"),
    "attn.attn_imp.sink_logit": _rename("attn.sink"),
    "mlp.c_fc.weight": lambda cfg, x: _split_positions(cfg, {"mlp.W_in": x.T}, dim=0),
    "mlp.c_fc.bias": _rename("mlp.b_in"),
    "mlp.c_proj.weight": lambda cfg, x: {"mlp.W_out": x.T},
    "mlp.c_proj.bias": _rename("mlp.b_out"),
    "transformer.ln_f.weight": _rename("ln_final.w"),
    "transformer.ln_f.bias": _rename("ln_final.b"),
    "lm_head.weight": lambda cfg, x: {"unembed.W_U": x.T},
    "final_logits_bias": _rename("unembed.b_U"),
    "bigram_table": _rename("bigram.W_bigram"),
}
for _ours, _theirs in (("ln1", "ln_1"), ("ln2", "ln_2")):
    _OPENAI_TENSORS[f"{_theirs}.weight"] = _rename(f"{_ours}.w")
    _OPENAI_TENSORS[f"{_theirs}.bias"] = _rename(f"{_ours}.b")
    _OPENAI_TENSORS[f"{_theirs.replace('_', '_p')}.weight"] = _rename(f"{_ours}.w_pos")
    _OPENAI_TENSORS[f"{_theirs.replace('_', '_p')}.bias"] = _rename(f"{_ours}.b_pos")
