"""Our own format: `config.json`, `model.safetensors` and, if there is one, the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tl_sparse.checkpoints.network import Checkpoint, config_of
from tl_sparse.errors import CheckpointError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from tl_sparse.faces import SparseModel

FORMAT_VERSION = 1


def save_model(model: SparseModel, folder: Path) -> None:
    """Write our format; each file is complete or not there, and the configuration comes last."""
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", model.state_dict())
    about = {
        "model_type": "tl_sparse",
        "architectures": ["SparseTransformer"],
        "format_version": FORMAT_VERSION,
    }
    write_json(folder / "config.json", about | model.sparse_cfg.to_dict())


def read_ours(folder: Path) -> Checkpoint:
    """Our own folder; see `save_model`."""
    path = folder / "config.json"
    values = read_json(path)
    if values.pop("model_type", None) != "tl_sparse":
        raise CheckpointError(f"{path}: model_type is not 'tl_sparse': this is not a tl_sparse model")
    if values.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version is not {FORMAT_VERSION}; a newer tl_sparse wrote it")
    values.pop("architectures", None)
    return config_of(path, values), read_tensors(folder / "model.safetensors")
