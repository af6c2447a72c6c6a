"""Reading and writing files: writes are atomic, and errors name the file."""

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
    """Raise `ConfigError` unless `folder` is new or empty: results are never overwritten."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"out = {str(folder)!r} is not possible; it must be a new or an empty folder"
        )


@contextmanager
def errors_name_file(path: str | Path | None) -> Iterator[None]:
    """Put `path` in front of the message of a `ConfigError` that is raised in the block."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomically replace the file at `path` by the file that the block writes.

    The block writes to the path that the context yields, a temporary file in the same folder. That
    file becomes `path` if the block ends without an exception.

    Raises:
        CheckpointError: if the folder cannot be written to, or `path` is itself a folder.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # the permissions that the umask allows
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes a file that only its owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: if the file is missing, is not JSON, or does not hold an object.
    """
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
    """The mapping in a YAML file.

    Raises:
        ConfigError: if the file is missing, is not YAML, or does not hold a mapping.
    """
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
    writable = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(writable, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary in a `torch.save` file, read without running any code in the file.

    Raises:
        CheckpointError: if the file is missing or damaged, holds objects that could run code, or
            does not hold a dictionary.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        values = _load_torch(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: besides tensors it holds objects that could run code"
        ) from error
    except Exception as error:  # torch.load raises nearly anything on a damaged archive
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} must hold a dictionary of tensors, not a {type(values).__name__}"
        )
    return values


def _load_torch(path: Path) -> Any:
    """`torch.load` of tensors only, onto the CPU, with the checks that torch leaves out."""
    record_sizes: set[int] | None = None
    if zipfile.is_zipfile(path):  # files from before torch 1.6 are not archives
        with zipfile.ZipFile(path) as archive:
            _check_records(archive, path.stat().st_size)
            record_sizes = {record.file_size for record in archive.infolist()}

    def on_cpu(storage: Any, location: str) -> Any:
        # The pickle states the size of each tensor's record, but not every version of torch
        # compares it with the record itself.
        if record_sizes is not None and storage.nbytes() not in record_sizes:
            raise ValueError("the size of a tensor is not the size of its record")
        return storage

    # The file is not memory-mapped: torch would map a tensor to the bytes that follow the start of
    # its record without checking that they belong to it.
    return torch.load(path, map_location=on_cpu, weights_only=True, mmap=False)


def _check_records(archive: zipfile.ZipFile, file_size: int) -> None:
    """Raise `BadZipFile` for wrong offsets, sizes and checksums, which torch does not check."""
    records = archive.infolist()
    names = {record.filename for record in records}
    total_size = sum(record.file_size for record in records)
    is_compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    # With records that share a name or bytes, a small file could unpack to a very large model.
    is_overlapping = len(names) < len(records) or total_size > file_size
    if is_compressed or is_overlapping:
        raise zipfile.BadZipFile("its records overlap or are compressed")
    damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a `torch.save` file, read by `read_torch`.

    Raises:
        CheckpointError: as in `read_torch`, and for entries that are not dense tensors.
    """
    values = read_torch(path)
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}; each entry must be a named tensor"
            )
        if not _is_dense(tensor):
            raise CheckpointError(f"{path}: {name} is not a dense tensor with values")
    return values


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    # An expanded tensor is larger than its storage, because it repeats the same values.
    return tensor.nbytes <= tensor.untyped_storage().nbytes()
