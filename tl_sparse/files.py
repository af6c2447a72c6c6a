"""Reading and writing files: writes are atomic, damage is noticed, and errors name the file."""

import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from tl_sparse.checksums import (
    UNFILLED,
    check_tensor_file,
    fill_in_checksum,
    with_checksum,
    without_checksum,
)
from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.outputs import replacing
from tl_sparse.parsing import (
    MAX_JSON_BYTES,
    MAX_YAML_BYTES,
    check_is_file,
    parse_json,
    parse_yaml,
    read_text,
)
from tl_sparse.pickles import MAX_BYTES, check_pickle


@contextmanager
def errors_name_file(path: str | Path | None) -> Iterator[None]:
    """Put `path` in front of the message of a `ConfigError` that is raised in the block."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path to the same file, in a folder whose name is UTF-8, for libraries that need that."""
    try:
        str(path.parent).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as temporary:
            link = Path(temporary, "link")
            link.symlink_to(path.parent.resolve())
            yield link / path.name
    else:
        yield path


def printable_name(folder: Path) -> str:
    """The name of a folder, with a replacement for what is not UTF-8."""
    return os.fsencode(folder.resolve().name).decode("utf-8", "replace")


def write_text(path: str | Path, text: str, overwrite: bool = True) -> None:
    """Write a text file, atomically; for `overwrite` and the errors see `replacing`."""
    with replacing(path, overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Mapping[str, Any], overwrite: bool = True) -> None:
    """Write a JSON file with a checksum, atomically.

    Scalars of numpy and torch are written as plain numbers.

    Raises:
        CheckpointError: if JSON cannot hold a value, such as NaN, or as for `replacing`.
        ConfigError: as for `replacing`.
    """
    try:
        plain = _plain(values, "")
        text = json.dumps(with_checksum(plain), indent=2, ensure_ascii=False)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    write_text(path, text + "\n", overwrite)


def _plain(value: Any, place: str) -> Any:
    """A value of which JSON can hold every part.

    Args:
        place: where it is in the file, for messages.

    Raises:
        ValueError: if JSON cannot hold it.
    """
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, Mapping):
        return {_plain_key(key, place): _plain(x, f"{place}.{key}") for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x, f"{place}[{i}]") for i, x in enumerate(value)]
    place = place.removeprefix(".")
    if isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place} is {value}, which JSON cannot hold")
    elif not isinstance(value, int | None):
        raise ValueError(f"{place} is a {type(value).__name__}, which JSON cannot hold")
    return value


def _plain_key(key: object, place: str) -> str:
    if not isinstance(key, str | int):
        raise ValueError(f"{place.removeprefix('.')} has the key {key!r}, which is not text")
    _check_text(str(key), place)
    return str(key)


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} = {text!r} has half of a surrogate pair") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its checksum.

    Raises:
        CheckpointError: if the file is missing, is not JSON, does not hold an object, or its
            checksum is wrong; and for what `parsing` refuses.
    """
    try:
        values = parse_json(read_text(path, MAX_JSON_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return without_checksum(path, values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: if the file is missing, is not YAML, or does not hold a mapping; and for what
            `parsing` refuses.
    """
    try:
        values = parse_yaml(read_text(path, MAX_YAML_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold a mapping of fields to values, not a {type(values).__name__}"
        )
    return values


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a checksum, atomically."""
    writable = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(writable, temporary, metadata=UNFILLED)
        fill_in_checksum(temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: if the file is missing or damaged, or its checksum is wrong.
    """
    _check_is_file(path)
    check_tensor_file(path)
    try:
        with utf8_path(path) as readable:
            return safetensors.torch.load_file(readable)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error


def write_torch(path: Path, values: Mapping[str, Any], overwrite: bool = True) -> None:
    """Write a `torch.save` file, atomically; for `overwrite` and the errors see `replacing`."""
    # Not to the file itself, whose temporary name torch would store: equal values give equal bytes.
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    with replacing(path, overwrite) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary in a `torch.save` file, read without running any code in the file.

    Raises:
        CheckpointError: if the file is missing or damaged, holds objects that could run code, or
            does not hold a dictionary.
    """
    _check_is_file(path)
    _check_is_no_other_format(path)
    try:
        values = _load_torch(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: besides tensors it holds objects that could run code or take any "
            f"amount of memory: {error}"
        ) from error
    except Exception as error:  # torch.load raises nearly anything on a damaged archive
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} must hold a dictionary of tensors, not a {type(values).__name__}"
        )
    return values


def _check_is_no_other_format(path: Path) -> None:
    """Raise `CheckpointError` if the file is JSON or safetensors, and not of `torch.save`."""
    with open(path, "rb") as file:
        beginning = file.read(9)
    if beginning.lstrip()[:1] in (b"{", b"["):
        raise CheckpointError(f"{path} is a JSON file, not a *.pt file of torch.save")
    if beginning[8:] == b"{":  # after the length of its header
        raise CheckpointError(f"{path} is a safetensors file, not a *.pt file of torch.save")


def _check_is_file(path: Path) -> None:
    """Raise `CheckpointError` unless there is a file at `path`."""
    try:
        check_is_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _load_torch(path: Path) -> Any:
    """`torch.load` of tensors only, onto the CPU, with the checks that torch leaves out."""
    file_size = path.stat().st_size
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # torch decides by the same bytes
    if is_archive:
        storage_sizes = _check_archive(path)
    else:
        storage_sizes = range(file_size + 1)
        _check_old_file(path)

    def on_cpu(storage: Any, location: str) -> Any:
        # The pickle states the size of each tensor's record, but not every version of torch
        # compares it with the record itself.
        if storage.nbytes() not in storage_sizes:
            raise ValueError("the size of a tensor is not the size of its record")
        return storage

    # The file is not memory-mapped: torch would map a tensor to the bytes that follow the start of
    # its record without checking that they belong to it.
    return torch.load(path, map_location=on_cpu, weights_only=True, mmap=False)


def _check_archive(path: Path) -> Collection[int]:
    """Check the records and the pickle of an archive, and return the sizes of its records."""
    with zipfile.ZipFile(path) as archive:
        _check_records(archive, path.stat().st_size)
        records = archive.infolist()
        pickles = [record for record in records if record.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it has {len(pickles)} records called data.pkl, not one")
        size = pickles[0].file_size
        if size > MAX_BYTES:
            raise pickle.UnpicklingError(f"its data.pkl has {size:,} bytes, not only tensors")
        check_pickle(io.BytesIO(archive.read(pickles[0])), size)
        return {record.file_size for record in records}


def _check_records(archive: zipfile.ZipFile, file_size: int) -> None:
    """Raise `BadZipFile` for wrong offsets, sizes and checksums, which torch does not check."""
    records = archive.infolist()
    names = {record.filename.lower() for record in records}  # torch ignores case
    total_size = sum(record.file_size for record in records)
    # A record has two sizes. `zipfile` asks for as much memory as the compressed one says.
    is_compressed = any(
        record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size
        for record in records
    )
    # With records that share a name or bytes, a small file could unpack to a very large model.
    is_overlapping = len(names) < len(records) or total_size > file_size
    if is_compressed or is_overlapping:
        raise zipfile.BadZipFile("its records overlap or are compressed")
    # In an archive that follows other bytes, torch would look for the records at other places.
    if min((record.header_offset for record in records), default=0) != 0:
        raise zipfile.BadZipFile("its first record is not at the beginning")
    damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _check_old_file(path: Path) -> None:
    """Check the pickles of a file from before torch 1.6, which the bytes of the tensors follow."""
    with open(path, "rb") as file:
        beginning = io.BytesIO(file.read(MAX_BYTES))
    for _ in ("magic number", "version", "machine", "values", "names of the storages"):
        check_pickle(beginning, len(beginning.getvalue()))


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
