"""Checks of the arguments of `run_suite` and `search`, before anything is read or written."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tl_sparse.config import check
from tl_sparse.errors import ConfigError
from tl_sparse.outputs import is_unfinished, listing
from tl_sparse.pruning import PruneConfig

#: A name, file or folder, or several.
Names = str | Path | Iterable[str | Path]
#: A whole number, or several.
Numbers = int | Iterable[int]


def names(field: str, given: Any) -> list[str]:
    """The names, files or folders in `given`, which may also be a single one.

    Raises:
        ConfigError: if anything else is given, or nothing.
    """
    items = _items(given, (str, os.PathLike))
    is_valid = bool(items) and all(isinstance(item, str | os.PathLike) for item in items)
    check(is_valid, field, given, "one or more names, files or folders")
    return [os.fspath(item) for item in items]


def whole_numbers(field: str, given: Any) -> list[int]:
    """The whole numbers in `given`, which may also be a single one.

    Raises:
        ConfigError: if anything else is given, or nothing.
    """
    items = _items(given, int)
    # The type must match exactly, because True is also an int.
    is_valid = bool(items) and all(type(item) is int for item in items)
    check(is_valid, field, given, "one or more whole numbers")
    return items


def _items(given: Any, single: Any) -> list[Any]:
    if isinstance(given, single):
        return [given]
    return list(given) if isinstance(given, Iterable) else []


def folder(field: str, given: Any) -> Path:
    """The path of a folder.

    Raises:
        ConfigError: if it is not a path, or is empty.
    """
    is_valid = isinstance(given, str | os.PathLike) and bool(os.fspath(given))
    check(is_valid, field, given, "a folder")
    return Path(given)


def check_own_folder(folder: Path, marks: Sequence[str], what: str) -> None:
    """Check that a folder is new or empty, or that of an earlier suite or search.

    Args:
        folder: the folder for the results.
        marks: glob patterns of files; one of them is in any folder of this kind.
        what: "a suite" or "a search", for the message.

    Raises:
        ConfigError: if it holds anything else.
    """
    if not folder.is_dir():
        return  # a file is refused when the folder is made
    is_empty = all(is_unfinished(path) for path in folder.iterdir())
    if not is_empty and not any(mark and next(folder.glob(mark), None) for mark in marks):
        raise ConfigError(
            f"out = {str(folder)!r} is not the folder of {what}: it holds {listing(folder)}; give "
            "a new or an empty folder"
        )


def name(field: str, given: Any) -> str:
    """A name or a path, as text.

    Raises:
        ConfigError: if it is anything else.
    """
    check(isinstance(given, str | os.PathLike), field, given, "a name or a path")
    return os.fspath(given)


def optional_name(field: str, given: Any) -> str | None:
    """A name or a path, as text, or None.

    Raises:
        ConfigError: if it is anything else.
    """
    return None if given is None else name(field, given)


def device_name(given: Any) -> str | None:
    """The name of a device, or None.

    Raises:
        ConfigError: if it is anything else.
    """
    is_valid = given is None or isinstance(given, str | torch.device)
    check(is_valid, "device", given, "a device, such as 'cpu' or 'cuda'")
    return None if given is None else str(given)


def at_least_one(field: str, given: Any) -> int:
    """A whole number from 1 upwards.

    Raises:
        ConfigError: if it is anything else.
    """
    check(type(given) is int and given >= 1, field, given, "at least 1")
    number: int = given
    return number


def seeds(given: Any, config: PruneConfig) -> list[int]:
    """The seeds of searches with these settings, all different.

    Raises:
        ConfigError: if they are anything else, or one is impossible.
    """
    numbers = whole_numbers("seeds", given)
    check(len(set(numbers)) == len(numbers), "seeds", numbers, "all different")
    for seed in numbers:
        dataclasses.replace(config, seed=seed)  # raises if it is impossible
    return numbers


def pruning(given: Any) -> PruneConfig:
    """The configuration of pruning, by default `PruneConfig()`.

    Raises:
        ConfigError: if it is anything else.
    """
    check(given is None or isinstance(given, PruneConfig), "config", given, "a PruneConfig")
    return given or PruneConfig()
