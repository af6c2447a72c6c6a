"""OpenAI's models: the folders on their public storage, and the one packaged for the Hugging Face
hub.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tl_sparse.checkpoints.network import (
    DTYPES,
    Checkpoint,
    check_keys,
    check_known,
    take_flag,
    take_size,
)
from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.files import naming, read_json, read_state_dict, read_tensors
from tl_sparse.network import SparseConfig

# Keys that do not change what the network computes: training settings and choices of kernel.
_IGNORED = {
    "afrac_ste",
    "batch_size",
    "beta1",
    "beta2",
    "debug_nans",
    "dropout",
    "dropout_cat_pos_emb",
    "enable_sparse_kernels",
    "grad_checkpointing",
    "grad_clip",
    "learnable_bigram_table",
    "lr",
    "pfrac",
    "tokenizer_name",
    "weight_decay",
}
# Keys that change it in a way this package does not know, with the value at which they do not.
_UNSUPPORTED = {
    "afrac_approx": False,
    "afrac_ste_only_non_neurons": False,
    "bigram_table_rank": None,
    "enable_fp8_linear": False,
    "mup": False,
    "mup_width_multiplier": None,
    "rtopk": False,
    "scale_invariance": False,
    "unembed_rank": None,
    "use_tied_aux_matrix": False,
}
# In the packaged model's config.json: transformers' bookkeeping, and its own names for what is
# there already.
_BOOKKEEPING = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_ALIASES = {
    "head_dim": "d_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "block_size",
    "n_ctx": "block_size",
    "n_embd": "d_model",
    "n_positions": "block_size",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "tie_word_embeddings": "tied_unembed",
}
_NULL_IS_ABSENT = {"afrac", "afrac_loctypes", "d_head", "d_mlp", "d_pos_emb", "n_mlp"}
_PREFIX = "circuit_model."


def openai_config(values: Mapping[str, Any], logits_bias: bool, positions: bool) -> SparseConfig:
    """`beeg_config.json` → our configuration; what is not written there is seen from the
    tensors.
    """
    values = {
        key: value
        for key, value in values.items()
        if value is not None or key not in _NULL_IS_ABSENT
    }
    for key, neutral in _UNSUPPORTED.items():
        if values.pop(key, neutral) != neutral:
            raise ConfigError(f"{key} must be {json.dumps(neutral)}; nothing else is supported")
    check_keys(values, ("block_size", "vocab_size", "n_layer", "n_head", "d_model"))
    d_model, n_heads = take_size(values, "d_model"), take_size(values, "n_head")
    d_pos, d_mlp = (
        values.pop("d_pos_emb", 0),
        [values.pop(key) for key in ("d_mlp", "n_mlp") if key in values],
    )
    if len(d_mlp) == 2 and d_mlp[0] != d_mlp[1]:
        raise ConfigError(
            f"d_mlp = {d_mlp[0]!r} and n_mlp = {d_mlp[1]!r} are two names of one size"
        )
    fraction, locations = (
        values.pop("afrac", None),
        values.pop("afrac_loctypes", "attn_in,attn_out,mlp_in,mlp_out"),
    )
    if not isinstance(locations, str):
        raise ConfigError(f"afrac_loctypes = {locations!r} must be names separated by commas")
    rms, ln_bias = take_flag(values, "rms_norm", False), take_flag(values, "ln_bias", True)
    sinusoidal, flash = (
        take_flag(values, "sinusoidal_cat_pos_emb", False),
        take_flag(values, "flash", True),
    )
    activation = values.pop("residual_activation_type", "identity")
    if activation not in ("identity", "relu"):
        raise ConfigError(f"residual_activation_type = {activation!r} must be 'identity' or 'relu'")
    sinks = values.pop("sink", False)
    fields = dict(  # without `flash` the original has no sinks, whatever `sink` says
        n_layers=values.pop("n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        n_ctx=values.pop("block_size"),
        d_vocab=values.pop("vocab_size"),
        d_head=values.pop("d_head", d_model // n_heads),
        d_mlp=d_mlp[0] if d_mlp else 4 * d_model,
        normalization="rms" if rms else "layer",
        norm_bias=ln_bias and not rms,
        act_fn=values.pop("activation_type", "gelu"),
        resid_relu=activation == "relu",
        abs_topk={}
        if fraction is None
        else dict.fromkeys(filter(None, locations.split(",")), fraction),
        attn_sinks=sinks if flash else False,
        bigram_table=values.pop("enable_bigram_table", False),
        logits_bias=logits_bias,
        d_pos=d_pos,
        sinusoidal=bool(d_pos) and sinusoidal,
        positions="concatenated" if d_pos else "added" if positions else "none",
        biases=values.pop("bias", True),
        tied_unembed=values.pop("tied_unembed", True),
    )
    check_known(values.keys() - _IGNORED)
    return SparseConfig.from_dict(fields)


def read_openai(folder: Path) -> Checkpoint:
    """OpenAI's model folder (FORMATS: `models/<name>/` on their public storage)."""
    path, weights = folder / "beeg_config.json", folder / "final_model.pt"
    return _read(read_json(path), path, read_state_dict(weights), weights)


def read_circuitgpt(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """The model as packaged for the hub (`openai/circuit-sparsity`), with the content of its
    config.json.
    """
    path, weights = folder / "config.json", folder / "model.safetensors"
    for alias, key in _ALIASES.items():
        if alias in values and values.get(key) not in (None, values[alias]):
            raise ConfigError(
                f"{path}: {alias} = {values[alias]!r} must be {key} = {values[key]!r}, its other name"
            )
    values = {
        key: value for key, value in values.items() if key not in _BOOKKEEPING | _ALIASES.keys()
    }
    raw = read_tensors(weights)
    if other := [name for name in raw if not name.startswith(_PREFIX)]:
        raise CheckpointError(
            f"{weights}: unknown tensor {other[0]!r}; the names start with {_PREFIX!r}"
        )
    return _read(
        values, path, {name.removeprefix(_PREFIX): tensor for name, tensor in raw.items()}, weights
    )


def _read(
    values: Mapping[str, Any], path: Path, raw: dict[str, Tensor], weights: Path
) -> Checkpoint:
    wpe = raw.get("transformer.wpe.weight")
    # The published models without positions carry a table of zeros.
    zeros = wpe is not None and wpe.dtype in DTYPES and not wpe.any()
    with naming(path):
        cfg = openai_config(values, "final_logits_bias" in raw, wpe is not None and not zeros)
    if cfg.positions == "none":
        raw.pop("transformer.wpe.weight", None)
    if values.get("flash") is False:
        raw = {
            name: tensor for name, tensor in raw.items() if not name.endswith(".attn.bias")
        }  # the causal mask
    return cfg, {**convert(cfg, raw, weights)}


def convert(cfg: SparseConfig, raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A state dict in the original's names → ours, in our shapes: views, which `build_network`
    checks and copies.

    `CheckpointError` for an unknown tensor, one that cannot have our shape, or an unembedding that
    is not tied.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        match = re.fullmatch(r"(?:transformer\.)?(?:(?:h|blocks)\.(\d+)\.)?(.+)", name)
        try:
            ours = _ours(cfg, match[2], tensor) if match else {}
        except (RuntimeError, IndexError) as error:
            shape = list(tensor.shape)
            raise CheckpointError(
                f"{path}: {name} of shape {shape} does not fit the configuration"
            ) from error
        if match is None or not ours:
            raise CheckpointError(f"{path}: unknown tensor {name!r}")
        for key, value in ours.items():
            place = f"blocks.{match[1]}.{key}" if match[1] else key
            if place in state:
                raise CheckpointError(f"{path}: {name} is there twice, under two names")
            state[place] = value
    head, wte = state.get("unembed.W_U"), state.get("embed.W_E")
    if cfg.tied_unembed and head is not None and wte is not None:
        del state["unembed.W_U"]
        if not (head.dtype == wte.dtype and wte.dtype in DTYPES and torch.equal(head.T, wte)):
            raise CheckpointError(
                f"{path}: tied_unembed is true, but lm_head.weight differs from wte.weight"
            )
    return state


#: What only has another name in the original.
_RENAMED = {
    "wte.weight": "embed.W_E",
    "wpe.weight": "pos_embed.W_pos",
    "bigram_table": "bigram.W_bigram",
    "attn.c_proj.bias": "attn.b_O",
    "attn.attn_imp.sink_logit": "attn.sink",
    "attn.attn_fn.sink_logit": "attn.sink",
    "mlp.c_fc.bias": "mlp.b_in",
    "mlp.c_proj.bias": "mlp.b_out",
    "final_logits_bias": "unembed.b_U",
    "ln_1.weight": "ln1.w",
    "ln_1.bias": "ln1.b",
    "ln_p1.weight": "ln1.w_pos",
    "ln_p1.bias": "ln1.b_pos",
    "ln_2.weight": "ln2.w",
    "ln_2.bias": "ln2.b",
    "ln_p2.weight": "ln2.w_pos",
    "ln_p2.bias": "ln2.b_pos",
    "ln_f.weight": "ln_final.w",
    "ln_f.bias": "ln_final.b",
}


def _ours(cfg: SparseConfig, name: str, x: Tensor) -> dict[str, Tensor]:
    """The tensor of this name in a block, or outside of them, as ours; none if the original has no
    such tensor.
    """
    heads = dict(h=cfg.n_heads, d=cfg.d_head)
    match name:
        case "attn.c_attn.weight":
            matrices = rearrange(x, "(qkv h d) m -> qkv h m d", qkv=3, **heads)
            reads = {
                f"attn.W_{letter}": matrix for letter, matrix in zip("QKV", matrices, strict=True)
            }
        case "mlp.c_fc.weight":
            reads = {"mlp.W_in": x.T}
        case "attn.c_attn.bias":
            biases = rearrange(x, "(qkv h d) -> qkv h d", qkv=3, **heads)
            return {f"attn.b_{letter}": bias for letter, bias in zip("QKV", biases, strict=True)}
        case "attn.c_proj.weight":
            return {"attn.W_O": rearrange(x, "m (h d) -> h d m", **heads)}
        case "mlp.c_proj.weight":
            return {"mlp.W_out": x.T}
        case "lm_head.weight":
            return {"unembed.W_U": x.T}
        case _:
            return {_RENAMED[name]: x} if name in _RENAMED else {}
    # The rows that read positional channels are parameters of their own.
    split = {key: matrix.split([cfg.d_model, cfg.d_pos], dim=-2) for key, matrix in reads.items()}
    positional = {f"{key}_pos": rows for key, (_, rows) in split.items() if cfg.d_pos}
    return {key: rows for key, (rows, _) in split.items()} | positional
