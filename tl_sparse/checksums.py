"""Checksums in the files that we write, so that damage is noticed when they are read.

A safetensors file carries its checksum in the metadata of its header. It covers every byte of the
file; the digits of the checksum itself count as zeros. A JSON file carries the checksum of its
values in an entry of its own. Where several files belong together, one of them is a JSON file that
lists the checksums of the others (`checksums_of`), and its reader compares them (`check_files`).

Files without checksums, which older versions or other programs wrote, are accepted.

The hash is BLAKE2b of 256 bits. Unlike SHA-256, it needs no special instructions of the processor
to be fast: about 0.6 to 1 GB per second.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tl_sparse.errors import CheckpointError

#: The entry with the checksum, in the metadata of a safetensors file and in a JSON object.
ENTRY = "tl_sparse_checksum"
#: The entry of a JSON file with the checksums of the files that belong to it.
FILES = "files"
_PREFIX = "blake2b:"
_ZEROS = b"0" * 64
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_CHUNK = 1 << 20

#: The metadata of a safetensors file until `fill_in_checksum` has computed the checksum.
UNFILLED = {ENTRY: _PREFIX + _ZEROS.decode()}


# --- any file


def file_checksum(path: Path) -> str:
    """The checksum of the bytes of a file.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    digest = _new_hash()
    try:
        with open(path, "rb") as file:
            _hash_rest(file, digest)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return _PREFIX + digest.hexdigest()


# --- safetensors files


def fill_in_checksum(path: Path) -> None:
    """Compute the checksum of a safetensors file with the metadata `UNFILLED`, and write it there.

    Raises:
        OSError: if the file cannot be written to.
    """
    with open(path, "r+b") as file:
        start = _header(file).index(_ZEROS)
        digest = _hash_with_zeros(file, start)
        file.seek(start)
        file.write(digest.encode())


def stored_checksum(path: Path) -> str | None:
    """The checksum that a safetensors file carries; None if it has none.

    Raises:
        CheckpointError: if the header of the file, or the entry with the checksum, is damaged.
    """
    try:
        with open(path, "rb") as file:
            metadata = json.loads(_header(file)[_LENGTH_BYTES:]).get("__metadata__", {})
            entries = dict(metadata)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    for name, value in entries.items():
        has_name = name == ENTRY
        has_value = str(value).startswith(_PREFIX)
        if has_name and has_value:
            return str(value)
        if has_name or has_value:  # one of the two is damaged, and the file is not an older one
            raise CheckpointError(f"{path} is damaged: the entry {name!r} is not a checksum")
    return None


def check_tensor_file(path: Path) -> None:
    """Check that the checksum of a safetensors file, if it has one, is that of its bytes.

    Raises:
        CheckpointError: if it is not, or the file cannot be read.
    """
    stored = stored_checksum(path)
    if stored is None:
        return
    digits = stored.removeprefix(_PREFIX)
    with open(path, "rb") as file:
        start = _header(file).find(digits.encode())
        if len(digits) != len(_ZEROS) or start < 0 or digits != _hash_with_zeros(file, start):
            raise CheckpointError(f"{path} is truncated or damaged: its checksum is wrong")


def _header(file: IO[bytes]) -> bytes:
    """The header of a safetensors file, with the length before it.

    Raises:
        ValueError: if the length is more than that of the file, or than the library reads.
    """
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = file.read(_LENGTH_BYTES)
    n_bytes = int.from_bytes(length, "little")
    if n_bytes > _MAX_HEADER:
        raise ValueError("the header is too long")
    # `read` asks for as much memory as it is told to read, even where the file has less.
    if _LENGTH_BYTES + n_bytes > file_size:
        raise ValueError("the header is longer than the file")
    return length + file.read(n_bytes)


def _hash_with_zeros(file: IO[bytes], start: int) -> str:
    """The digits of the hash of the file in which those of the checksum, at `start`, are zeros."""
    digest = _new_hash()
    file.seek(0)
    digest.update(file.read(start))
    digest.update(_ZEROS)
    file.seek(start + len(_ZEROS))
    _hash_rest(file, digest)
    return digest.hexdigest()


def _new_hash() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=len(_ZEROS) // 2)


def _hash_rest(file: IO[bytes], digest: "hashlib.blake2b") -> None:
    while chunk := file.read(_CHUNK):
        digest.update(chunk)


# --- JSON files


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values, followed by the entry with their checksum."""
    contents = {name: value for name, value in values.items() if name != ENTRY}
    return {**contents, ENTRY: values_checksum(contents)}


def without_checksum(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON file without the entry with their checksum, which is checked.

    Raises:
        CheckpointError: if the checksum is not that of the values.
    """
    contents = dict(values)
    stored = contents.pop(ENTRY, None)
    if stored is None:
        return contents
    try:
        found = values_checksum(contents)
    except (RecursionError, ValueError) as error:  # no file that we wrote is nested so deeply
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if found != stored:
        raise CheckpointError(
            f"{path} is damaged, or was edited after it was saved; to accept it as it is, remove "
            f"its entry {ENTRY!r}"
        )
    return contents


def values_checksum(values: Mapping[str, Any]) -> str:
    """The checksum of JSON values, in whatever order and layout they are written."""
    # Only after a round trip do keys and numbers have the types that a reader will find.
    plain = json.loads(json.dumps(values))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    digest = _new_hash()
    digest.update(text.encode())
    return _PREFIX + digest.hexdigest()


# --- files that belong together


def checksums_of(folder: Path) -> dict[str, str]:
    """File name → checksum, of all files in a folder.

    That of a safetensors file is the one that it carries itself.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: _identity(path) for path in paths}


def check_files(described_by: Path, values: Mapping[str, Any], tensors: Path) -> None:
    """Check that files are the ones that were saved together with a JSON file.

    Safetensors files are compared by the checksum that they carry, which is checked against their
    bytes when they are read.

    Args:
        described_by: the JSON file; the others are in the same folder.
        values: its values. Their entry `FILES` has the checksums of the others; older files do not
            have it.
        tensors: the safetensors file that belongs to it.

    Raises:
        CheckpointError: if a file is missing, or is not the one that was saved with the JSON file.
    """
    checksums = values.get(FILES)
    if checksums is None:
        if tensors.is_file() and stored_checksum(tensors) is not None:
            raise _different_saves(tensors, described_by)
        return
    if not isinstance(checksums, dict):
        raise CheckpointError(f"{described_by}: {FILES} must be an object of names and checksums")
    for name, expected in checksums.items():
        path = described_by.parent / name
        if path.parent != described_by.parent or path.name != name:
            raise CheckpointError(f"{described_by}: {name!r} is not the name of a file beside it")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; it was saved together with {described_by}")
        if _identity(path) != expected:
            raise _different_saves(path, described_by)


def _different_saves(path: Path, described_by: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} does not belong to {described_by}: they come from two different saves, or "
        f"{path.name} was changed after it was saved"
    )


def _identity(path: Path) -> str:
    if path.suffix == ".safetensors":
        stored = stored_checksum(path)
        if stored is not None:
            return stored
    return file_checksum(path)
