"""Checks of values in the configurations of other formats."""

from collections.abc import Collection, Mapping
from typing import Any

from tl_sparse.config import check
from tl_sparse.errors import ConfigError


def take_flag(values: dict[str, Any], key: str, default: bool) -> bool:
    """Remove a boolean from `values` and return it; `ConfigError` if it is not a boolean."""
    value = values.pop(key, default)
    check(isinstance(value, bool), key, value, "true or false")
    return bool(value)


def take_size(values: dict[str, Any], key: str) -> int:
    """Remove a size from `values` and return it; `ConfigError` if it is not an int ≥ 1."""
    size = values.pop(key)
    check(type(size) is int and size >= 1, key, size, "an integer of at least 1")
    return int(size)


def check_keys(values: Mapping[str, Any], required: Collection[str]) -> None:
    """Raise `ConfigError` unless `values` has all `required` keys."""
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(f"missing keys {', '.join(missing)}")


def check_known(unknown: Collection[str]) -> None:
    """Raise `ConfigError` if there are `unknown` keys, which no reader has taken."""
    if unknown:
        raise ConfigError(
            f"unknown keys {', '.join(sorted(unknown))}; they may change what the model computes"
        )
