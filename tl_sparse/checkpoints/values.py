"""Checked values from the configurations that others wrote; for the readers of their formats."""

from collections.abc import Collection, Mapping
from typing import Any

from tl_sparse.config import check
from tl_sparse.errors import ConfigError


def take_flag(values: dict[str, Any], key: str, default: bool) -> bool:
    """Take a truth value out of `values`; `ConfigError` if it is anything else."""
    value = values.pop(key, default)
    check(isinstance(value, bool), key, value, "true or false")
    return bool(value)


def take_size(values: dict[str, Any], key: str) -> int:
    """Take a size out of `values`; `ConfigError` if it is not an integer of at least 1."""
    size = values.pop(key)
    check(type(size) is int and size >= 1, key, size, "an integer of at least 1")
    return int(size)


def check_keys(values: Mapping[str, Any], required: Collection[str]) -> None:
    """`ConfigError` unless all `required` keys are there."""
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(f"missing keys {', '.join(missing)}")


def check_known(unknown: Collection[str]) -> None:
    """`ConfigError` if keys are left over that no reader knows."""
    if unknown:
        raise ConfigError(
            f"unknown keys {', '.join(sorted(unknown))}; they may change what the model computes"
        )
