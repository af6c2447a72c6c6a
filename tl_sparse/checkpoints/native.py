"""Our own format: `config.json`, `model.safetensors` and, if there is one, the tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.checkpoints.network import Checkpoint
from tl_sparse.errors import CheckpointError
from tl_sparse.files import naming, read_json, read_tensors, write_json, write_tensors
from tl_sparse.network import SparseConfig, pack, unpack

FORMAT_VERSION = 1
_ABOUT = {
    "model_type": "tl_sparse",
    "architectures": ["SparseTransformer"],
    "format_version": FORMAT_VERSION,
}
_OTHER_FORMATS = ("beeg_config.json", "final_model.pt", "pytorch_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: SparseConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    dense: bool = False,
) -> None:
    """Write a model in our format, zeros at no cost (`network/compact.py`) unless `dense`; the
    configuration comes last.

    `CheckpointError` if the folder cannot be written to, or a model of another format is there,
    which would be what is read.
    """
    path = folder / "config.json"
    others = [name for name in _OTHER_FORMATS if (folder / name).exists()]
    if path.exists() and read_json(path).get("model_type") != "tl_sparse":
        others.append(path.name)
    if others:
        raise CheckpointError(
            f"cannot write {folder}: a model of another format is there, with {', '.join(others)}"
        )
    if tokenizer is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"cannot write the tokenizer to {folder}: {error}") from error
    about = _ABOUT | {"storage": "dense" if dense else "compact"}
    write_tensors(folder / "model.safetensors", dict(state) if dense else pack(state))
    write_json(path, about | config.to_dict())
    if tokenizer is None:
        for name in _TOKENIZER:  # that of an earlier model
            (folder / name).unlink(missing_ok=True)


def read_ours(folder: Path, values: dict[str, Any]) -> Checkpoint:
    """Our own folder, with the content of its config.json; see `save_model`."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is not {FORMAT_VERSION}; a newer tl_sparse wrote it"
        )
    storage = values.pop("storage", "dense")  # older files do not say
    if storage not in ("compact", "dense"):
        raise CheckpointError(f"{path}: storage = {storage!r} must be 'compact' or 'dense'")
    with naming(path):
        cfg = SparseConfig.from_dict(
            {key: value for key, value in values.items() if key not in _ABOUT}
        )
    tensors = read_tensors(weights)
    return cfg, unpack(tensors, weights) if storage == "compact" else dict(tensors)
