"""OpenAI's models: the folders on their public storage, and the one packaged for the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.checkpoints.network import DTYPES, Checkpoint, check_keys, check_known, naming, take_flag, take_size
from tl_sparse.config import SparseConfig
from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.files import read_json, read_state_dict, read_tensors

# Keys that do not change what the network computes: training settings and choices of kernel.
_IGNORED = {
    "afrac_ste", "batch_size", "beta1", "beta2", "debug_nans", "dropout", "dropout_cat_pos_emb",
    "enable_sparse_kernels", "grad_checkpointing", "grad_clip", "learnable_bigram_table", "lr",
    "pfrac", "tokenizer_name", "weight_decay",
}  # fmt: skip
# Keys that change it in a way this package does not know, with the value at which they do not.
_UNSUPPORTED = {
    "afrac_approx": False, "afrac_ste_only_non_neurons": False, "bigram_table_rank": None, "enable_fp8_linear": False,
    "mup": False, "mup_width_multiplier": None, "rtopk": False, "scale_invariance": False, "unembed_rank": None,
    "use_tied_aux_matrix": False,
}  # fmt: skip
# In the packaged model's config.json: transformers' bookkeeping, and its own names for what is there already.
_BOOKKEEPING = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_ALIASES = {
    "head_dim": "d_head", "hidden_size": "d_model", "intermediate_size": "d_mlp",
    "max_position_embeddings": "block_size", "n_ctx": "block_size", "n_embd": "d_model", "n_positions": "block_size",
    "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "tie_word_embeddings": "tied_unembed",
}  # fmt: skip
_PREFIX = "circuit_model."


def openai_config(values: Mapping[str, Any], logits_bias: bool, positions: bool) -> SparseConfig:
    """`beeg_config.json` → our configuration; what is not written there is seen from the tensors."""
    values = dict(values)
    for key, neutral in _UNSUPPORTED.items():
        if values.pop(key, neutral) != neutral:
            raise ConfigError(f"{key} must be {json.dumps(neutral)}; nothing else is supported")
    check_keys(values, ("block_size", "vocab_size", "n_layer", "n_head", "d_model"))
    d_model, n_heads = take_size(values, "d_model"), take_size(values, "n_head")
    d_head, d_pos = values.pop("d_head", None), values.pop("d_pos_emb", None)
    d_mlp, old_d_mlp = values.pop("d_mlp", None), values.pop("n_mlp", None)
    if None not in (d_mlp, old_d_mlp) and d_mlp != old_d_mlp:
        raise ConfigError(f"d_mlp = {d_mlp!r} and n_mlp = {old_d_mlp!r} are two names of one size")
    d_mlp = old_d_mlp if d_mlp is None else d_mlp
    fraction, locations = values.pop("afrac", None), values.pop("afrac_loctypes", None)
    locations = "attn_in,attn_out,mlp_in,mlp_out" if locations is None else locations
    if not isinstance(locations, str):
        raise ConfigError(f"afrac_loctypes = {locations!r} must be names separated by commas")
    rms, ln_bias = take_flag(values, "rms_norm", False), take_flag(values, "ln_bias", True)
    sinusoidal, flash = take_flag(values, "sinusoidal_cat_pos_emb", False), take_flag(values, "flash", True)
    activation = values.pop("residual_activation_type", "identity")
    if activation not in ("identity", "relu"):
        raise ConfigError(f"residual_activation_type = {activation!r} must be 'identity' or 'relu'")
    sinks = values.pop("sink", False)
    fields = dict(  # without `flash` the original has no sinks, whatever `sink` says
        n_layers=values.pop("n_layer"), d_model=d_model, n_heads=n_heads, n_ctx=values.pop("block_size"),
        d_vocab=values.pop("vocab_size"), d_head=d_model // n_heads if d_head is None else d_head,
        d_mlp=4 * d_model if d_mlp is None else d_mlp,
        normalization="rms" if rms else "layer", norm_bias=ln_bias and not rms,
        act_fn=values.pop("activation_type", "gelu"), resid_relu=activation == "relu",
        abs_topk={} if fraction is None else dict.fromkeys(filter(None, locations.split(",")), fraction),
        attn_sinks=sinks if flash else False, bigram_table=values.pop("enable_bigram_table", False),
        logits_bias=logits_bias, d_pos=d_pos or 0, sinusoidal=bool(d_pos) and sinusoidal,
        positions="concatenated" if d_pos else "added" if positions else "none",
        biases=values.pop("bias", True), tied_unembed=values.pop("tied_unembed", True),
    )  # fmt: skip
    check_known(values.keys() - _IGNORED)
    return SparseConfig.from_dict(fields)


def read_openai(folder: Path) -> Checkpoint:
    """OpenAI's model folder (FORMATS: `models/<name>/` on their public storage)."""
    path, weights = folder / "beeg_config.json", folder / "final_model.pt"
    return _read(read_json(path), path, read_state_dict(weights), weights)


def read_circuitgpt(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """The model as packaged for the hub (`openai/circuit-sparsity`), with the content of its config.json."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    for alias, key in _ALIASES.items():
        if alias in values and values.get(key) not in (None, values[alias]):
            raise ConfigError(f"{path}: {alias} = {values[alias]!r} must be {key} = {values[key]!r}, its other name")
    values = {key: value for key, value in values.items() if key not in _BOOKKEEPING | _ALIASES.keys()}
    raw = read_tensors(weights)
    if other := [name for name in raw if not name.startswith(_PREFIX)]:
        raise CheckpointError(f"{weights}: unknown tensor {other[0]!r}; the names start with {_PREFIX!r}")
    return _read(values, path, {name.removeprefix(_PREFIX): tensor for name, tensor in raw.items()}, weights)


def _read(values: Mapping[str, Any], path: Path, raw: dict[str, Tensor], weights: Path) -> Checkpoint:
    wpe = raw.get("transformer.wpe.weight")
    # The published models without positions carry a table of zeros.
    zeros = wpe is not None and wpe.dtype in DTYPES and not wpe.any()
    with naming(path):
        cfg = openai_config(values, "final_logits_bias" in raw, wpe is not None and not zeros)
    if cfg.positions == "none":
        raw.pop("transformer.wpe.weight", None)
    if values.get("flash") is False:
        raw = {name: tensor for name, tensor in raw.items() if not name.endswith(".attn.bias")}  # the causal mask
    return cfg, {**convert(cfg, raw, weights)}


def convert(cfg: SparseConfig, raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A state dict in the original's names → ours, in our shapes: views, which `build_network` checks and copies.

    Raises:
        CheckpointError: for an unknown tensor, one that cannot have our shape, or an unembedding that is not tied.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        match = re.fullmatch(r"(?:transformer\.)?(?:(?:h|blocks)\.(\d+)\.)?(.+)", name)
        change = _TENSORS.get(match[2]) if match else None
        if match is None or change is None:
            raise CheckpointError(f"{path}: unknown tensor {name!r}")
        prefix = f"blocks.{match[1]}." if match[1] else ""
        try:
            ours = {prefix + key: value for key, value in change(cfg, tensor).items()}
        except (RuntimeError, IndexError) as error:
            shape = list(tensor.shape)
            raise CheckpointError(f"{path}: {name} of shape {shape} does not fit the configuration") from error
        if ours.keys() & state.keys():
            raise CheckpointError(f"{path}: {name} is there twice, under two names")
        state |= ours
    head, wte = state.get("unembed.W_U"), state.get("embed.W_E")
    if cfg.tied_unembed and head is not None and wte is not None:
        del state["unembed.W_U"]
        if not (head.dtype == wte.dtype and wte.dtype in DTYPES and torch.equal(head.T, wte)):
            raise CheckpointError(f"{path}: tied_unembed is true, but lm_head.weight differs from wte.weight")
    return state


def _qkv(cfg: SparseConfig, x: Tensor) -> dict[str, Tensor]:
    parts = x.unflatten(0, (3, cfg.n_heads, cfg.d_head)).transpose(2, 3)
    named = {f"attn.W_{name}": part for name, part in zip("QKV", parts, strict=True)}
    return _split_positions(cfg, named, dim=1)


def _split_positions(cfg: SparseConfig, named: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """The rows of concatenated positional channels go to a parameter of their own."""
    split = {}
    for name, tensor in named.items():
        split[name], rows = tensor.split([cfg.d_model, cfg.d_pos], dim=dim)
        if cfg.d_pos:
            split[f"{name}_pos"] = rows
    return split


def _rename(name: str) -> Callable[[SparseConfig, Tensor], dict[str, Tensor]]:
    return lambda cfg, x: {name: x}


_TENSORS: dict[str, Callable[[SparseConfig, Tensor], dict[str, Tensor]]] = {
    "wte.weight": _rename("embed.W_E"),
    "wpe.weight": _rename("pos_embed.W_pos"),
    "attn.c_attn.weight": _qkv,
    "attn.c_attn.bias": lambda cfg, x: {
        f"attn.b_{name}": part for name, part in zip("QKV", x.unflatten(0, (3, cfg.n_heads, cfg.d_head)), strict=True)
    },
    "attn.c_proj.weight": lambda cfg, x: {"attn.W_O": x.T.unflatten(0, (cfg.n_heads, cfg.d_head))},
    "attn.c_proj.bias": _rename("attn.b_O"),
    "attn.attn_imp.sink_logit": _rename("attn.sink"),
    "attn.attn_fn.sink_logit": _rename("attn.sink"),
    "mlp.c_fc.weight": lambda cfg, x: _split_positions(cfg, {"mlp.W_in": x.T}, dim=0),
    "mlp.c_fc.bias": _rename("mlp.b_in"),
    "mlp.c_proj.weight": lambda cfg, x: {"mlp.W_out": x.T},
    "mlp.c_proj.bias": _rename("mlp.b_out"),
    "ln_f.weight": _rename("ln_final.w"),
    "ln_f.bias": _rename("ln_final.b"),
    "lm_head.weight": lambda cfg, x: {"unembed.W_U": x.T},
    "final_logits_bias": _rename("unembed.b_U"),
    "bigram_table": _rename("bigram.W_bigram"),
}
for _ours, _theirs in (("ln1", "ln_1"), ("ln2", "ln_2")):
    _TENSORS[f"{_theirs}.weight"] = _rename(f"{_ours}.w")
    _TENSORS[f"{_theirs}.bias"] = _rename(f"{_ours}.b")
    _TENSORS[f"{_theirs.replace('_', '_p')}.weight"] = _rename(f"{_ours}.w_pos")
    _TENSORS[f"{_theirs.replace('_', '_p')}.bias"] = _rename(f"{_ours}.b_pos")
