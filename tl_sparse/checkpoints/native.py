"""Our own format: `config.json`, `model.safetensors` and, if there is one, the tokenizer."""

from pathlib import Path
from typing import Any

from tl_sparse.checkpoints.network import Checkpoint
from tl_sparse.errors import CheckpointError
from tl_sparse.faces import SparseModel
from tl_sparse.files import naming, read_json, read_tensors, write_json, write_tensors
from tl_sparse.network import SparseConfig, pack, unpack

FORMAT_VERSION = 1
_ABOUT = {"model_type": "tl_sparse", "architectures": ["SparseTransformer"], "format_version": FORMAT_VERSION}
_OTHER_FORMATS = ("beeg_config.json", "final_model.pt", "pytorch_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def save_model(model: SparseModel, folder: Path, dense: bool = False) -> None:
    """Write our format, zeros at no cost (`compact.py`) unless `dense`; the configuration comes last.

    `CheckpointError` if the folder cannot be written to, or a model of another format is there, which would be what
    is read.
    """
    config = folder / "config.json"
    others = [name for name in _OTHER_FORMATS if (folder / name).exists()]
    if config.exists() and read_json(config).get("model_type") != "tl_sparse":
        others.append(config.name)
    if others:
        raise CheckpointError(f"cannot write {folder}: a model of another format is there, with {', '.join(others)}")
    if model.tokenizer is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            model.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"cannot write the tokenizer to {folder}: {error}") from error
    state, about = model.state_dict(), _ABOUT | {"storage": "dense" if dense else "compact"}
    write_tensors(folder / "model.safetensors", state if dense else pack(state))
    write_json(config, about | model.sparse_cfg.to_dict())
    if model.tokenizer is None:
        for name in _TOKENIZER:  # that of an earlier model
            (folder / name).unlink(missing_ok=True)


def read_ours(folder: Path, values: dict[str, Any]) -> Checkpoint:
    """Our own folder, with the content of its config.json; see `save_model`."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version is not {FORMAT_VERSION}; a newer tl_sparse wrote it")
    storage = values.pop("storage", "dense")  # older files do not say
    if storage not in ("compact", "dense"):
        raise CheckpointError(f"{path}: storage = {storage!r} must be 'compact' or 'dense'")
    with naming(path):
        cfg = SparseConfig.from_dict({key: value for key, value in values.items() if key not in _ABOUT})
    tensors = read_tensors(weights)
    return cfg, unpack(tensors, weights) if storage == "compact" else dict(tensors)
