"""Models of the community's sparse_pretrain: `config.json` with a model_config,
`pytorch_model.bin`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_sparse.checkpoints.network import Checkpoint, check_keys, check_known, take_flag, take_size
from tl_sparse.checkpoints.openai import convert
from tl_sparse.config import check
from tl_sparse.files import naming, read_state_dict, read_tensors
from tl_sparse.network import PAPER_TOPK_LOCATIONS, SparseConfig

# Keys of the sparsity_config that act in training only.
_TRAINING = {
    "anneal_type",
    "enable_weight_sparsity",
    "min_weights_per_neuron",
    "sparsity_anneal_end_fraction",
    "sparsity_anneal_start_fraction",
    "target_l0_fraction",
}
#: Its AbsTopK locations → ours.
_LOCATIONS = {name: name for name in ("resid_pre", *PAPER_TOPK_LOCATIONS)} | {
    "resid_mid": "resid_post_attn"
}


def read_sparse_pretrain(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """A folder of sparse_pretrain's, with the content of its config.json."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    with naming(path):
        cfg, flash = sparse_pretrain_config(values)
    weights = weights if weights.is_file() else folder / "pytorch_model.bin"
    raw = read_tensors(weights) if weights.suffix == ".safetensors" else read_state_dict(weights)
    if (
        not flash
    ):  # the original then keeps its causal mask in the file, and sinks that nothing reads
        raw = {
            name: x
            for name, x in raw.items()
            if not name.endswith(("attn.causal_mask", "attn_fn.sink_logit"))
        }
    return cfg, {**convert(cfg, raw, weights)}


def sparse_pretrain_config(values: Mapping[str, Any]) -> tuple[SparseConfig, bool]:
    """`config.json` → our configuration, and whether its attention was the fused one."""
    model, sparsity = _section(values, "model_config"), _section(values, "sparsity_config")
    check_keys(model, ("n_layer", "d_model", "n_ctx", "d_head", "vocab_size"))
    d_model, d_head = take_size(model, "d_model"), take_size(model, "d_head")
    check(d_model % d_head == 0, "d_model", d_model, f"a multiple of d_head = {d_head}")
    d_mlp, sinks = model.pop("d_mlp", None), take_flag(model, "use_attention_sinks", True)
    rms, flash = (
        take_flag(model, "use_rms_norm", True),
        take_flag(model, "use_flash_attention", True),
    )
    fields = dict(
        n_layers=model.pop("n_layer"),
        d_model=d_model,
        n_heads=d_model // d_head,
        d_head=d_head,
        n_ctx=model.pop("n_ctx"),
        d_vocab=model.pop("vocab_size"),
        d_mlp=4 * d_model if d_mlp is None else d_mlp,
        normalization="rms" if rms else "layer",
        norm_bias=not rms,
        act_fn=model.pop("activation", "gelu"),
        attn_sinks=sinks and flash,
        bigram_table=take_flag(model, "use_bigram_table", True),
        positions="added" if take_flag(model, "use_positional_embeddings", False) else "none",
        biases=take_flag(model, "use_bias", True),
        tied_unembed=take_flag(model, "tie_embeddings", False),
    )
    cfg = SparseConfig.from_dict(fields)
    # The defaults are those of its sparsity_config; without one there is no AbsTopK.
    enabled = take_flag(sparsity, "enable_activation_sparsity", "sparsity_config" in values)
    fraction = sparsity.pop("activation_topk_fraction", 0.25)
    locations = sparsity.pop("activation_sparsity_locations", ",".join(PAPER_TOPK_LOCATIONS))
    check_known(model.keys() - {"dropout"} | sparsity.keys() - _TRAINING)
    number = isinstance(fraction, float | int) and not isinstance(fraction, bool)
    check(
        number and 0 <= fraction <= 1, "activation_topk_fraction", fraction, "a fraction in [0, 1]"
    )
    names = list(filter(None, str(locations).split(",")))
    expected = f"of {', '.join(_LOCATIONS)}, separated by commas"
    check(_LOCATIONS.keys() >= set(names), "activation_sparsity_locations", locations, expected)
    sizes = {_LOCATIONS[name]: cfg.location_size(_LOCATIONS[name]) for name in names if enabled}
    # At least one entry is kept.
    topk = {
        where: fraction if int(fraction * size) else min(1.0, 1.5 / size)
        for where, size in sizes.items()
    }
    return SparseConfig.from_dict(fields | {"abs_topk": topk}), flash


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    check(isinstance(section, dict), name, section, "a JSON object")
    return dict(section)
