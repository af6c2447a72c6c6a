"""OpenAI's models: those in their public storage, and the one packaged for Hugging Face's hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tl_sparse.checkpoints.network import DTYPES, Checkpoint
from tl_sparse.checkpoints.values import check_keys, check_known, take_flag, take_size
from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.files import errors_name_file, read_json, read_state_dict, read_tensors
from tl_sparse.network import SparseConfig

#: Keys that do not affect the output of the network: training settings and kernel choices.
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
#: Keys of features that this package does not support → the value that switches the feature off.
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
#: Keys of transformers itself in the config.json of the packaged model.
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
#: Second names of keys in the config.json of the packaged model → the keys.
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
#: Keys whose value null stands for their default.
_NULL_IS_ABSENT = {"afrac", "afrac_loctypes", "d_head", "d_mlp", "d_pos_emb", "n_mlp"}
#: The prefix of all tensor names of the packaged model.
_PREFIX = "circuit_model."
#: In `transformer.h.3.attn.c_proj.weight`, the layer is "3" and the name "attn.c_proj.weight".
#: sparse_pretrain writes `blocks.3.attn.c_proj.weight` instead.
_TENSOR_NAME = re.compile(r"(?:transformer\.)?(?:(?:h|blocks)\.(?P<layer>\d+)\.)?(?P<name>.+)")


def read_openai_model(folder: Path) -> Checkpoint:
    """Read a model folder from OpenAI's public storage (`models/<name>/`)."""
    path = folder / "beeg_config.json"
    weights = folder / "final_model.pt"
    values = read_json(path)
    return _checkpoint(values, path, read_state_dict(weights), weights)


def read_circuitgpt_model(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """Read the model that OpenAI packaged for the hub (`openai/circuit-sparsity`).

    `values` are the contents of its config.json.
    """
    path = folder / "config.json"
    weights = folder / "model.safetensors"
    for alias, key in _ALIASES.items():
        if alias in values and values.get(key) not in (None, values[alias]):
            raise ConfigError(
                f"{path}: {alias} = {values[alias]!r} must be {key} = {values[key]!r}, "
                "because both name the same value"
            )
    other_keys = _BOOKKEEPING | _ALIASES.keys()
    values = {key: value for key, value in values.items() if key not in other_keys}
    tensors = {}
    for name, tensor in read_tensors(weights).items():
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{weights}: unknown tensor {name!r}; all names must start with {_PREFIX!r}"
            )
        tensors[name.removeprefix(_PREFIX)] = tensor
    return _checkpoint(values, path, tensors, weights)


def _checkpoint(
    values: Mapping[str, Any], path: Path, tensors: dict[str, Tensor], weights: Path
) -> Checkpoint:
    """The checkpoint of the configuration `values` in `path` and the `tensors` in `weights`."""
    positions = tensors.get("transformer.wpe.weight")
    # The published models without positional embeddings have a table of zeros.
    is_zero = positions is not None and positions.dtype in DTYPES and not positions.any()
    has_positions = positions is not None and not is_zero
    has_logits_bias = "final_logits_bias" in tensors
    with errors_name_file(path):
        config = openai_config(values, has_logits_bias, has_positions)
    if config.positions == "none":
        tensors.pop("transformer.wpe.weight", None)
    if values.get("flash") is False:
        tensors = without_buffers(tensors, (".attn.bias",))  # the causal mask
    return convert(config, tensors, weights)


def openai_config(values: Mapping[str, Any], logits_bias: bool, positions: bool) -> SparseConfig:
    """The architecture that a `beeg_config.json` describes.

    Args:
        values: the contents of the file.
        logits_bias: whether the file of weights has a logit bias, which the configuration does not
            record.
        positions: whether the file of weights has nonzero positional embeddings, which the
            configuration does not record either.

    Raises:
        ConfigError: for a missing, unknown, impossible or unsupported value.
    """
    values = _without_nulls(values)
    _take_unsupported(values)
    check_keys(values, ("block_size", "vocab_size", "n_layer", "n_head", "d_model"))
    d_model = take_size(values, "d_model")
    n_heads = take_size(values, "n_head")
    d_pos = values.pop("d_pos_emb", 0)
    d_mlp = _take_d_mlp(values, default=4 * d_model)
    abs_topk = _take_abs_topk(values)
    has_rms_norm = take_flag(values, "rms_norm", False)
    has_norm_bias = take_flag(values, "ln_bias", True)
    is_sinusoidal = take_flag(values, "sinusoidal_cat_pos_emb", False)
    has_sinks = values.pop("sink", False)
    if not take_flag(values, "flash", True):
        has_sinks = False  # the original model then ignores `sink`
    fields = dict(
        n_layers=values.pop("n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        n_ctx=values.pop("block_size"),
        d_vocab=values.pop("vocab_size"),
        d_head=values.pop("d_head", d_model // n_heads),
        d_mlp=d_mlp,
        normalization="rms" if has_rms_norm else "layer",
        norm_bias=has_norm_bias and not has_rms_norm,
        act_fn=values.pop("activation_type", "gelu"),
        resid_relu=_take_resid_relu(values),
        abs_topk=abs_topk,
        attn_sinks=has_sinks,
        bigram_table=values.pop("enable_bigram_table", False),
        logits_bias=logits_bias,
        d_pos=d_pos,
        sinusoidal=bool(d_pos) and is_sinusoidal,
        positions=_positions(bool(d_pos), positions),
        biases=values.pop("bias", True),
        tied_unembed=values.pop("tied_unembed", True),
    )
    check_known(values.keys() - _IGNORED)
    return SparseConfig.from_dict(fields)


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if value is not None or key not in _NULL_IS_ABSENT:
            kept[key] = value
    return kept


def _take_unsupported(values: dict[str, Any]) -> None:
    for key, neutral in _UNSUPPORTED.items():
        if values.pop(key, neutral) != neutral:
            raise ConfigError(f"{key} must be {json.dumps(neutral)}; no other value is supported")


def _take_d_mlp(values: dict[str, Any], default: int) -> Any:
    sizes = [values.pop(key) for key in ("d_mlp", "n_mlp") if key in values]
    if not sizes:
        return default
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        raise ConfigError(
            f"d_mlp = {sizes[0]!r} and n_mlp = {sizes[1]!r} must be equal: they name the same size"
        )
    return sizes[0]


def _take_abs_topk(values: dict[str, Any]) -> dict[str, Any]:
    fraction = values.pop("afrac", None)
    locations = values.pop("afrac_loctypes", "attn_in,attn_out,mlp_in,mlp_out")
    if not isinstance(locations, str):
        raise ConfigError(f"afrac_loctypes = {locations!r} must be names separated by commas")
    if fraction is None:
        return {}
    return {name: fraction for name in locations.split(",") if name}


def _take_resid_relu(values: dict[str, Any]) -> bool:
    activation = values.pop("residual_activation_type", "identity")
    if activation not in ("identity", "relu"):
        raise ConfigError(f"residual_activation_type = {activation!r} must be 'identity' or 'relu'")
    return bool(activation == "relu")


def _positions(is_concatenated: bool, is_in_file: bool) -> str:
    if is_concatenated:
        return "concatenated"
    if is_in_file:
        return "added"
    return "none"


def without_buffers(tensors: Mapping[str, Tensor], endings: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors without buffers: those whose names end in `endings`, which we do not need."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


def convert(config: SparseConfig, tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """A checkpoint from tensors in OpenAI's names and shapes; its tensors are views of those.

    Args:
        config: the architecture.
        tensors: the state dict in the file.
        path: the file, for error messages.

    Raises:
        CheckpointError: for an unknown tensor, a tensor that cannot be converted to our shape, or
            an unembedding that should be tied and is not.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for our_name, converted in _convert_tensor(config, name, tensor, path).items():
            if our_name in state:
                raise CheckpointError(f"{path}: {name} is in the file twice, under two names")
            state[our_name] = converted
    if config.tied_unembed:
        _drop_tied_unembedding(state, path)
    return Checkpoint(config, dict(state))


def _convert_tensor(
    config: SparseConfig, full_name: str, tensor: Tensor, path: Path
) -> dict[str, Tensor]:
    """One tensor of OpenAI's, converted to one or more entries of our state dict."""
    match = _TENSOR_NAME.fullmatch(full_name)
    if match is None:
        raise CheckpointError(f"{path}: unknown tensor {full_name!r}")
    try:
        converted = _convert_by_name(config, match["name"], tensor)
    except (RuntimeError, IndexError) as error:
        shape = list(tensor.shape)
        raise CheckpointError(
            f"{path}: {full_name} of shape {shape} does not fit the configuration"
        ) from error
    if not converted:
        raise CheckpointError(f"{path}: unknown tensor {full_name!r}")
    block = f"blocks.{match['layer']}." if match["layer"] else ""
    return {block + name: value for name, value in converted.items()}


def _drop_tied_unembedding(state: dict[str, Tensor], path: Path) -> None:
    """Remove any W_U from `state`, after a check that it is the transposed embedding."""
    unembedding = state.get("unembed.W_U")
    embedding = state.get("embed.W_E")
    if unembedding is None or embedding is None:
        return
    is_float = unembedding.dtype == embedding.dtype and embedding.dtype in DTYPES
    if not is_float or not torch.equal(unembedding.T, embedding):
        raise CheckpointError(
            f"{path}: tied_unembed is true, but lm_head.weight differs from wte.weight"
        )
    del state["unembed.W_U"]


#: OpenAI's name → our name, for tensors that differ only in their name.
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


def _convert_by_name(config: SparseConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Like `_convert_tensor`, for names without the block; empty if the name is unknown."""
    heads = dict(h=config.n_heads, d=config.d_head)
    match name:
        case "attn.c_attn.weight":
            q, k, v = rearrange(tensor, "(qkv h d) m -> qkv h m d", qkv=3, **heads)
            return _split_read({"attn.W_Q": q, "attn.W_K": k, "attn.W_V": v}, config)
        case "attn.c_attn.bias":
            q, k, v = rearrange(tensor, "(qkv h d) -> qkv h d", qkv=3, **heads)
            return {"attn.b_Q": q, "attn.b_K": k, "attn.b_V": v}
        case "attn.c_proj.weight":
            return {"attn.W_O": rearrange(tensor, "m (h d) -> h d m", **heads)}
        case "mlp.c_fc.weight":
            return _split_read({"mlp.W_in": tensor.T}, config)
        case "mlp.c_proj.weight":
            return {"mlp.W_out": tensor.T}
        case "lm_head.weight":
            return {"unembed.W_U": tensor.T}
    if name in _RENAMED:
        return {_RENAMED[name]: tensor}
    return {}


def _split_read(matrices: Mapping[str, Tensor], config: SparseConfig) -> dict[str, Tensor]:
    """Split input matrices into the rows for the residual stream and those for positional channels.

    In our state dict, the latter are parameters of their own, with names that end in `_pos`.
    """
    split = {}
    for name, matrix in matrices.items():
        stream_rows, position_rows = matrix.split([config.d_model, config.d_pos], dim=-2)
        split[name] = stream_rows
        if config.d_pos:
            split[f"{name}_pos"] = position_rows
    return split
