"""Reading and writing files so that nothing is ever lost and damage is named."""

import json
import pickle
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from tl_sparse.errors import CheckpointError, ConfigError


def check_new_folder(folder: str | Path) -> None:
    """Raise `ConfigError` unless `folder` is new or empty: results never overwrite others."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"out = {str(folder)!r} is not possible; it must be a new or an empty folder"
        )


@contextmanager
def naming(path: str | Path | None) -> Iterator[None]:
    """Errors in the configuration that is read in this block name its file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that becomes `path` when the block ends without an
    exception.

    `CheckpointError` if the folder cannot be written to, or `path` is itself a folder.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the umask leaves
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes a private file instead
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to `path`, atomically."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` if it is missing, not JSON, or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `ConfigError` if it is missing, not YAML, or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold a mapping of fields to values, not a {type(values).__name__}"
        )
    return values


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, atomically."""
    ours = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(ours, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; `CheckpointError` if it is missing or
    damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary in a `torch.save` file, read without running any code in it
    (`weights_only=True`).

    `CheckpointError` if the file is missing, damaged, holds code, or is not a dictionary.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        sizes = _record_sizes(path) if zipfile.is_zipfile(path) else None

        def on_cpu(storage: Any, location: str) -> Any:
            # Not every torch compares what the pickle says of a record's length with the record.
            if sizes is not None and storage.nbytes() not in sizes:
                raise ValueError("a tensor is not as long as its record")
            return storage

        # Read, not mapped: a mapped tensor is whatever is in the file where its record begins.
        values = torch.load(path, map_location=on_cpu, weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors, which could run code"
        ) from error
    except Exception as error:  # torch.load raises nearly anything on a damaged archive
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} must hold a dictionary of tensors, not a {type(values).__name__}"
        )
    return values


def _record_sizes(path: Path) -> set[int]:
    """The sizes of an archive's records, after checking what torch believes unseen: places, sizes,
    checksums.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        sizes, names = (
            [record.file_size for record in records],
            {record.filename for record in records},
        )
        # No record twice, nor two in one place: else a small file could stand for a large one.
        if (
            any(r.compress_type for r in records)
            or len(names) < len(records)
            or sum(sizes) > path.stat().st_size
        ):
            raise zipfile.BadZipFile("its records overlap or are compressed")
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {name} is wrong")
    return set(sizes)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a `torch.save` file, as `read_torch`; `CheckpointError` also for all but
    dense tensors.
    """
    values = read_torch(path)
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}; expected names with tensors"
            )
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if (
            not dense or tensor.nbytes > tensor.untyped_storage().nbytes()
        ):  # larger: one value seen many times
            raise CheckpointError(f"{path}: {name} is not a dense tensor with values")
    return values
