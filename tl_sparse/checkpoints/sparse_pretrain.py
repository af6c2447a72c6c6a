"""Models of the community project sparse_pretrain.

Their folders hold a `config.json` with a model_config, and `model.safetensors` or
`pytorch_model.bin`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_sparse.checkpoints.network import Checkpoint
from tl_sparse.checkpoints.openai import convert, without_buffers
from tl_sparse.checkpoints.values import check_keys, check_known, take_flag, take_size
from tl_sparse.config import check
from tl_sparse.files import errors_name_file, read_state_dict, read_tensors
from tl_sparse.network import PAPER_TOPK_LOCATIONS, SparseConfig

#: Keys of the sparsity_config that affect only training.
_TRAINING_KEYS = {
    "anneal_type",
    "enable_weight_sparsity",
    "min_weights_per_neuron",
    "sparsity_anneal_end_fraction",
    "sparsity_anneal_start_fraction",
    "target_l0_fraction",
}
#: sparse_pretrain's name of an AbsTopK location → our name.
_LOCATIONS = {
    "resid_pre": "resid_pre",
    **{name: name for name in PAPER_TOPK_LOCATIONS},
    "resid_mid": "resid_post_attn",
}


def read_sparse_pretrain_model(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """Read a folder of sparse_pretrain; `values` are the contents of its config.json."""
    with errors_name_file(folder / "config.json"):
        config = sparse_pretrain_config(values)
    weights = folder / "model.safetensors"
    if weights.is_file():
        tensors = read_tensors(weights)
    else:
        weights = folder / "pytorch_model.bin"
        tensors = read_state_dict(weights)
    if not values["model_config"].get("use_flash_attention", True):
        # sparse_pretrain then saves its causal mask too, and sinks that it does not use.
        tensors = without_buffers(tensors, ("attn.causal_mask", "attn_fn.sink_logit"))
    return convert(config, tensors, weights)


def sparse_pretrain_config(values: Mapping[str, Any]) -> SparseConfig:
    """The architecture that a config.json describes.

    Raises:
        ConfigError: for a missing, unknown or impossible value.
    """
    model = _section(values, "model_config")
    sparsity = _section(values, "sparsity_config")
    config = _take_architecture(model)
    # The defaults are those of sparse_pretrain. Without a sparsity_config, there is no AbsTopK.
    has_topk = take_flag(sparsity, "enable_activation_sparsity", "sparsity_config" in values)
    fraction = sparsity.pop("activation_topk_fraction", 0.25)
    locations = sparsity.pop("activation_sparsity_locations", ",".join(PAPER_TOPK_LOCATIONS))
    check_known(model.keys() - {"dropout"} | sparsity.keys() - _TRAINING_KEYS)
    abs_topk = _abs_topk(config, fraction, locations)
    if has_topk:
        config = replace(config, abs_topk=abs_topk)
    return config


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    check(isinstance(section, dict), name, section, "a JSON object")
    return dict(section)


def _take_architecture(model: dict[str, Any]) -> SparseConfig:
    """Remove the architecture, all but AbsTopK, from the model_config and return it."""
    check_keys(model, ("n_layer", "d_model", "n_ctx", "d_head", "vocab_size"))
    d_model = take_size(model, "d_model")
    d_head = take_size(model, "d_head")
    check(d_model % d_head == 0, "d_model", d_model, f"a multiple of d_head = {d_head}")
    d_mlp = model.pop("d_mlp", None)
    if d_mlp is None:
        d_mlp = 4 * d_model
    has_sinks = take_flag(model, "use_attention_sinks", True)
    has_rms_norm = take_flag(model, "use_rms_norm", True)
    has_flash_attention = take_flag(model, "use_flash_attention", True)
    has_positions = take_flag(model, "use_positional_embeddings", False)
    return SparseConfig(
        n_layers=model.pop("n_layer"),
        d_model=d_model,
        n_heads=d_model // d_head,
        d_head=d_head,
        n_ctx=model.pop("n_ctx"),
        d_vocab=model.pop("vocab_size"),
        d_mlp=d_mlp,
        normalization="rms" if has_rms_norm else "layer",
        norm_bias=not has_rms_norm,
        act_fn=model.pop("activation", "gelu"),
        attn_sinks=has_sinks and has_flash_attention,
        bigram_table=take_flag(model, "use_bigram_table", True),
        positions="added" if has_positions else "none",
        biases=take_flag(model, "use_bias", True),
        tied_unembed=take_flag(model, "tie_embeddings", False),
    )


def _abs_topk(config: SparseConfig, fraction: Any, locations: Any) -> dict[str, float]:
    """`SparseConfig.abs_topk` for one `fraction` at all `locations`, given as "name,name,…"."""
    is_number = isinstance(fraction, float | int) and not isinstance(fraction, bool)
    is_fraction = is_number and 0 <= fraction <= 1
    check(is_fraction, "activation_topk_fraction", fraction, "a fraction in [0, 1]")
    names = [name for name in str(locations).split(",") if name]
    is_known = _LOCATIONS.keys() >= set(names)
    expected = f"of {', '.join(_LOCATIONS)}, separated by commas"
    check(is_known, "activation_sparsity_locations", locations, expected)
    abs_topk = {}
    for name in names:
        location = _LOCATIONS[name]
        size = config.location_size(location)
        abs_topk[location] = fraction
        if int(fraction * size) == 0:
            # sparse_pretrain keeps at least one entry; 1.5 / size keeps exactly one.
            abs_topk[location] = min(1.0, 1.5 / size)
    return abs_topk
