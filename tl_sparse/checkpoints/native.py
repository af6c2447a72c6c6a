"""Our own format: `config.json`, `model.safetensors` and optionally the tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.checkpoints.network import Checkpoint
from tl_sparse.checksums import FILES, check_files, checksums_of
from tl_sparse.errors import CheckpointError
from tl_sparse.files import (
    errors_name_file,
    read_json,
    read_tensors,
    utf8_path,
    write_json,
    write_tensors,
)
from tl_sparse.network import SparseConfig, pack, unpack
from tl_sparse.outputs import FileSet, replacing_together

FORMAT_VERSION = 1
#: The entries of config.json other than the fields of `SparseConfig` and the storage of zeros.
_FORMAT_KEYS = {
    "model_type": "tl_sparse",
    "architectures": ["SparseTransformer"],
    "format_version": FORMAT_VERSION,
}
_FILES_OF_OTHER_FORMATS = ("beeg_config.json", "final_model.pt", "pytorch_model.bin")
MODEL_FILES = FileSet(
    what="model",
    described_by="config.json",
    required=("model.safetensors",),
    optional=(  # those of the tokenizer
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
)


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: SparseConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    dense: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model in our format: all of its files, or none.

    Args:
        folder: created if it does not exist. Files in it that are not of a model stay.
        state: the state dict of the network.
        config: the architecture.
        tokenizer: the tokenizer to write; None removes the tokenizer of an earlier model.
        dense: whether zeros are stored too; if not, they take no space (`network/compact.py`).
        overwrite: whether another model in our format that is in the folder is replaced.

    Raises:
        CheckpointError: if the folder cannot be written to, or if it holds a model of another
            format, which a reader would read instead.
        ConfigError: if it holds another model in our format, and `overwrite` is False.
    """
    _check_no_other_format(folder)
    if dense:
        storage = "dense"
        tensors = dict(state)
    else:
        storage = "compact"
        tensors = pack(state)
    values = {**_FORMAT_KEYS, "storage": storage, **config.to_dict()}
    with replacing_together(MODEL_FILES, folder, overwrite) as new:
        if tokenizer is not None:
            _write_tokenizer(new, tokenizer)
        write_tensors(new / "model.safetensors", tensors)
        write_json(new / "config.json", {**values, FILES: checksums_of(new)})


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
        with utf8_path(folder / "tokenizer.json") as path:
            tokenizer.save_pretrained(path.parent)
    except Exception as error:  # the tokenizers library raises plain `Exception`s
        raise CheckpointError(f"cannot write the tokenizer: {error}") from error


def read_native_model(folder: Path, values: Mapping[str, Any]) -> Checkpoint:
    """Read a folder that `save_model` wrote; `values` are the contents of its config.json."""
    path = folder / "config.json"
    check_files(path, values, folder / "model.safetensors")
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is not {FORMAT_VERSION}; a newer tl_sparse wrote it"
        )
    storage = values.get("storage", "dense")  # older files do not have this key
    if storage not in ("compact", "dense"):
        raise CheckpointError(f"{path}: storage = {storage!r} must be 'compact' or 'dense'")
    other_keys = {*_FORMAT_KEYS, "storage", FILES}
    fields = {key: value for key, value in values.items() if key not in other_keys}
    with errors_name_file(path):
        config = SparseConfig.from_dict(fields)
    weights = folder / "model.safetensors"
    tensors = read_tensors(weights)
    if storage == "compact":
        return Checkpoint(config, unpack(tensors, weights))
    return Checkpoint(config, dict(tensors))
