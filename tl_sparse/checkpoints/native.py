"""Our own format: `config.json`, `model.safetensors` and optionally the tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.checkpoints.network import Checkpoint
from tl_sparse.errors import CheckpointError
from tl_sparse.files import (
    errors_name_file,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from tl_sparse.network import SparseConfig, pack, unpack

FORMAT_VERSION = 1
#: The entries of config.json other than the fields of `SparseConfig` and the storage of zeros.
_FORMAT_KEYS = {
    "model_type": "tl_sparse",
    "architectures": ["SparseTransformer"],
    "format_version": FORMAT_VERSION,
}
_FILES_OF_OTHER_FORMATS = ("beeg_config.json", "final_model.pt", "pytorch_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: SparseConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    dense: bool = False,
) -> None:
    """Write a model in our format; config.json is written last, once the weights are complete.

    Args:
        folder: created if it does not exist; a model in our format in it is replaced.
        state: the state dict of the network.
        config: the architecture.
        tokenizer: the tokenizer to write; None removes the tokenizer of an earlier model.
        dense: whether zeros are stored too; if not, they take no space (`network/compact.py`).

    Raises:
        CheckpointError: if the folder cannot be written to, or if it holds a model of another
            format, which a reader would read instead.
    """
    _check_no_other_format(folder)
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer)
    if dense:
        storage = "dense"
        tensors = dict(state)
    else:
        storage = "compact"
        tensors = pack(state)
    write_tensors(folder / "model.safetensors", tensors)
    values = {**_FORMAT_KEYS, "storage": storage, **config.to_dict()}
    write_json(folder / "config.json", values)
    if tokenizer is None:
        for name in _TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)


def _check_no_other_format(folder: Path) -> None:
    config_path = folder / "config.json"
    others = [name for name in _FILES_OF_OTHER_FORMATS if (folder / name).exists()]
    if config_path.exists() and read_json(config_path).get("model_type") != "tl_sparse":
        others.append(config_path.name)
    if others:
        raise CheckpointError(
            f"cannot write {folder}: a model of another format is in it, with {', '.join(others)}"
        )


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write the tokenizer to {folder}: {error}") from error


def read_native_model(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """Read a folder that `save_model` wrote; `values` are the contents of its config.json."""
    path = folder / "config.json"
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is not {FORMAT_VERSION}; a newer tl_sparse wrote it"
        )
    storage = values.get("storage", "dense")  # older files do not have this key
    if storage not in ("compact", "dense"):
        raise CheckpointError(f"{path}: storage = {storage!r} must be 'compact' or 'dense'")
    other_keys = {*_FORMAT_KEYS, "storage"}
    fields = {key: value for key, value in values.items() if key not in other_keys}
    with errors_name_file(path):
        config = SparseConfig.from_dict(fields)
    weights = folder / "model.safetensors"
    tensors = read_tensors(weights)
    if storage == "compact":
        return Checkpoint(config, unpack(tensors, weights))
    return Checkpoint(config, dict(tensors))
