"""Models of the community project sparse_pretrain.

Their folders hold a `config.json` with a model_config, and `model.safetensors` or
`pytorch_model.bin`. The folder of a sparse model with bridges to a dense one holds
`sparse_model.bin` instead, and usually `training_config.yaml`, the whole configuration of its
training. A checkpoint of such a training has that configuration in the folder above.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.checkpoints.network import Checkpoint
from tl_sparse.checkpoints.openai import convert, without_buffers
from tl_sparse.checkpoints.values import check_keys, check_known, take_flag, take_size
from tl_sparse.config import check
from tl_sparse.errors import CheckpointError
from tl_sparse.files import (
    errors_name_file,
    read_json,
    read_state_dict,
    read_tensors,
    read_yaml,
)
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


#: The keys of a sparsity_config that say where AbsTopK is.
_TOPK_KEYS = (
    "enable_activation_sparsity",
    "activation_topk_fraction",
    "activation_sparsity_locations",
)
#: The weights of a sparse model that was trained with bridges.
BRIDGED_WEIGHTS = "sparse_model.bin"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", BRIDGED_WEIGHTS)
_TRAINING_CONFIG = "training_config.yaml"
#: The file that has the whole configuration, in the folder above a checkpoint.
_RUN_CONFIGS = ("config.yaml", _TRAINING_CONFIG)
_CAUSAL_MASK = "attn.causal_mask"


@dataclass(frozen=True)
class SparsePretrainSettings:
    """What the files of a model say about it.

    Attributes:
        file: the file with the architecture, for messages.
        model: its section model_config.
        sparsity: its section sparsity_config; None if there is none.
        bridges: its section bridges_config; empty for a model without bridges.
        dense: the name of the dense model that the bridges lead to; "" if it is not known.
        remark: which of two files that contradict each other was followed; "" if none do.
    """

    file: Path
    model: Mapping[str, Any]
    sparsity: Mapping[str, Any] | None
    bridges: Mapping[str, Any]
    dense: str = ""
    remark: str = ""


def sparse_pretrain_settings(folder: Path) -> SparsePretrainSettings:
    """Read the settings of a model folder, or of a checkpoint of a training with bridges.

    The `config.json` of published models with bridges leaves out at which locations AbsTopK was in
    training, so that `training_config.yaml` decides where both are there.

    Raises:
        CheckpointError, ConfigError: if a file is missing or damaged, or a section is not a
            mapping.
    """
    path = folder / "config.json"
    if not path.is_file():
        return _settings_of_run(folder)
    values = read_json(path)
    with errors_name_file(path):
        settings = SparsePretrainSettings(
            path,
            _section(values, "model_config"),
            _section(values, "sparsity_config") if "sparsity_config" in values else None,
            _section(values, "bridges_config"),
        )
    name = settings.bridges.get("d_dense")
    if isinstance(name, str):
        settings = replace(settings, dense=name)
    training = folder / _TRAINING_CONFIG
    if training.is_file():
        settings = _as_trained(settings, training)
    return settings


def _settings_of_run(folder: Path) -> SparsePretrainSettings:
    """The settings of a checkpoint, whose run has them in the folder above."""
    for name in _RUN_CONFIGS:
        path = folder.parent / name
        if path.is_file():
            return _run_settings(path)
    names = " or ".join(_RUN_CONFIGS)
    raise CheckpointError(
        f"{folder} has no config.json, and the folder above, in which a run keeps its "
        f"configuration, has no {names}"
    )


def _run_settings(path: Path) -> SparsePretrainSettings:
    values = read_yaml(path)
    with errors_name_file(path):
        dense = _section(values, "dense_model")
        name = dense.get("local_path") or dense.get("repo_id") or ""
        check(isinstance(name, str), "dense_model", dense, "the name or path of a model")
        return SparsePretrainSettings(
            path,
            _section(values, "sparse_model"),
            _section(values, "sparsity"),
            _section(values, "bridges"),
            name,
        )


def _as_trained(settings: SparsePretrainSettings, path: Path) -> SparsePretrainSettings:
    """The settings, with the AbsTopK and the kind of bridges of the run whose file `path` is."""
    trained = _run_settings(path)
    trained_sparsity = trained.sparsity or {}
    sparsity = dict(settings.sparsity or {})
    for key in _TOPK_KEYS:
        sparsity.pop(key, None)
        if key in trained_sparsity:
            sparsity[key] = trained_sparsity[key]
    followed = replace(settings, sparsity=sparsity, bridges={**trained.bridges, **settings.bridges})
    if not settings.dense:
        followed = replace(followed, dense=trained.dense)
    now = _config_of(followed).abs_topk
    before = _config_of(settings).abs_topk
    if now == before:
        return followed
    remark = (
        f"{path} and {settings.file.name} disagree about where AbsTopK is; the model is opened "
        f"as it was trained, with AbsTopK at {_listed(now)}, not at {_listed(before)} "
        "(abs_topk=… chooses other locations)"
    )
    return replace(followed, remark=remark)


def _listed(abs_topk: Mapping[str, float]) -> str:
    return ", ".join(abs_topk) or "no location"


def read_sparse_pretrain_model(folder: Path) -> Checkpoint:
    """Read a folder of sparse_pretrain, or a checkpoint of one of its trainings with bridges."""
    settings = sparse_pretrain_settings(folder)
    config = _config_of(settings)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has no weights: none of {', '.join(_WEIGHTS)}")
    if weights.suffix == ".safetensors":
        tensors = read_tensors(weights)
    else:
        tensors = read_state_dict(weights)
    tensors = _without_causal_masks(tensors, config.n_ctx, weights)
    if not settings.model.get("use_flash_attention", True):
        # sparse_pretrain then saves sinks that it does not use.
        tensors = without_buffers(tensors, ("attn_fn.sink_logit",))
    checkpoint = convert(config, tensors, weights)
    return replace(checkpoint, remark=settings.remark)


def _without_causal_masks(
    tensors: Mapping[str, Tensor], n_ctx: int, path: Path
) -> dict[str, Tensor]:
    """The tensors without the causal masks that models with explicit attention save.

    Raises:
        CheckpointError: if such a buffer is something else, since the model would then attend
            otherwise than ours does.
    """
    for name, mask in tensors.items():
        if not name.endswith(_CAUSAL_MASK):
            continue
        is_causal = mask.shape[-2:] == (n_ctx, n_ctx) and mask.numel() == n_ctx**2
        if is_causal:
            causal = torch.ones(n_ctx, n_ctx, dtype=torch.bool).tril()
            is_causal = torch.equal(mask.reshape(n_ctx, n_ctx) != 0, causal)
        if not is_causal:
            raise CheckpointError(
                f"{path}: {name} is not the causal mask [{n_ctx}, {n_ctx}], ones on and below the "
                "diagonal; no other attention is supported"
            )
    return without_buffers(tensors, (_CAUSAL_MASK,))


def _config_of(settings: SparsePretrainSettings) -> SparseConfig:
    """The architecture that the settings describe; errors name the file."""
    values: dict[str, Any] = {"model_config": settings.model}
    if settings.sparsity is not None:
        values["sparsity_config"] = settings.sparsity
    with errors_name_file(settings.file):
        return sparse_pretrain_config(values)


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
