"""Models of the community's sparse_pretrain: `config.json` with a model_config, `pytorch_model.bin`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_sparse.checkpoints.network import Checkpoint, check_present, config_of, take_flag, take_size
from tl_sparse.checkpoints.openai import convert
from tl_sparse.config import PAPER_TOPK_LOCATIONS, SparseConfig
from tl_sparse.errors import ConfigError
from tl_sparse.files import read_state_dict, read_tensors

# Keys of the sparsity_config that act in training only.
_TRAINING = {
    "anneal_type", "enable_weight_sparsity", "min_weights_per_neuron", "sparsity_anneal_end_fraction",
    "sparsity_anneal_start_fraction", "target_l0_fraction",
}  # fmt: skip
#: Its AbsTopK locations → ours.
_LOCATIONS = {name: name for name in ("resid_pre", *PAPER_TOPK_LOCATIONS)} | {"resid_mid": "resid_post_attn"}


def read_sparse_pretrain(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """A folder of sparse_pretrain's, with the content of its config.json."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    cfg, flash = sparse_pretrain_config(values, path)
    if weights.is_file():
        raw = read_tensors(weights)
    else:
        weights = folder / "pytorch_model.bin"
        raw = read_state_dict(weights)
    if not flash:  # the original then keeps its causal mask in the file, and sinks that nothing reads
        raw = {name: x for name, x in raw.items() if not name.endswith(("attn.causal_mask", "attn_fn.sink_logit"))}
    return cfg, convert(cfg, raw, weights)


def sparse_pretrain_config(values: Mapping[str, Any], path: Path) -> tuple[SparseConfig, bool]:
    """`config.json` → our configuration, and whether its attention was the fused one."""
    model, sparsity = _section(values, "model_config", path), _section(values, "sparsity_config", path)
    check_present(model, ("n_layer", "d_model", "n_ctx", "d_head", "vocab_size"), path)
    d_model, d_head = take_size(model, "d_model", path), take_size(model, "d_head", path)
    if d_model % d_head:
        raise ConfigError(f"{path}: d_model = {d_model} must be a multiple of d_head = {d_head}")
    d_mlp, sinks = model.pop("d_mlp", None), take_flag(model, "use_attention_sinks", True, path)
    rms, flash = take_flag(model, "use_rms_norm", True, path), take_flag(model, "use_flash_attention", True, path)
    fields = dict(
        n_layers=model.pop("n_layer"), d_model=d_model, n_heads=d_model // d_head, d_head=d_head,
        n_ctx=model.pop("n_ctx"), d_vocab=model.pop("vocab_size"), d_mlp=4 * d_model if d_mlp is None else d_mlp,
        normalization="rms" if rms else "layer", norm_bias=not rms, act_fn=model.pop("activation", "gelu"),
        attn_sinks=sinks and flash, bigram_table=take_flag(model, "use_bigram_table", True, path),
        positions="added" if take_flag(model, "use_positional_embeddings", False, path) else "none",
        biases=take_flag(model, "use_bias", True, path), tied_unembed=take_flag(model, "tie_embeddings", False, path),
    )  # fmt: skip
    cfg = config_of(path, fields)
    # The defaults are those of its sparsity_config; without one there is no AbsTopK.
    enabled = take_flag(sparsity, "enable_activation_sparsity", "sparsity_config" in values, path)
    fraction = sparsity.pop("activation_topk_fraction", 0.25)
    locations = sparsity.pop("activation_sparsity_locations", ",".join(PAPER_TOPK_LOCATIONS))
    unknown = sorted(model.keys() - {"dropout"} | sparsity.keys() - _TRAINING)
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(unknown)}; they may change what the model computes")
    if not isinstance(fraction, float | int) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise ConfigError(f"{path}: activation_topk_fraction = {fraction!r} must be a fraction in [0, 1]")
    names = [name for name in locations.split(",") if name] if isinstance(locations, str) else [repr(locations)]
    if wrong := [name for name in names if name not in _LOCATIONS]:
        expected = f"of {', '.join(_LOCATIONS)}, separated by commas"
        raise ConfigError(f"{path}: activation_sparsity_locations has {wrong[0]!r}; it must be {expected}")
    if not enabled:
        return cfg, flash
    topk = {}
    for location in map(_LOCATIONS.__getitem__, names):
        size = cfg.location_size(location)
        topk[location] = fraction if int(fraction * size) else min(1.0, 1.5 / size)  # at least one entry is kept
    return config_of(path, fields | {"abs_topk": topk}), flash


def _section(values: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {name} must be a JSON object, not a {type(section).__name__}")
    return dict(section)
