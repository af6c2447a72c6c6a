"""Every configuration: the architecture, the data, how to train and how to prune. Frozen, checked,
light to import.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from tl_sparse.errors import ConfigError


def check(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise the `ConfigError` all configurations share: field, value, valid range."""
    if not valid:
        raise ConfigError(f"{name} = {value!r} is not possible; it must be {expected}")


def check_types(config: Any) -> None:
    """Reject values of another type than a config dataclass says: JSON easily has `"4"` or `true`
    for a number.
    """
    for f in fields(config):
        value, annotation = getattr(config, f.name), f.type
        if get_origin(annotation) is Literal:
            check(
                value in get_args(annotation),
                f.name,
                value,
                f"one of {', '.join(get_args(annotation))}",
            )
        elif annotation is float:
            check(
                isinstance(value, int | float) and not isinstance(value, bool),
                f.name,
                value,
                "a number",
            )
        elif annotation in (int, bool, str):
            check(type(value) is annotation, f.name, value, f"of type {annotation.__name__}")


def check_known_keys(config: Any, values: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(config)]
    for key in values:
        if key not in names:
            near = get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(names)}"
            raise ConfigError(f"unknown configuration key {key!r}; {hint}")


def merged(config: Any, values: Mapping[str, Any]) -> Any:
    """A config dataclass with the fields in `values` changed; mappings change the configurations
    inside it.

    Raises:
        ConfigError: for an unknown key (naming the nearest valid one) or a bad value.
    """
    check_known_keys(config, values)
    changes = {}
    for f in fields(config):
        if f.name in values:
            current, value = getattr(config, f.name), values[f.name]
            if is_dataclass(current):
                check(isinstance(value, Mapping), f.name, value, "a mapping of fields to values")
                value = merged(current, value)
            elif f.type is float and isinstance(value, str):  # YAML reads 1e-3 as text
                with suppress(ValueError):
                    value = float(value)
            changes[f.name] = value
    return replace(config, **changes)


def short_repr(config: Any, written: Mapping[str, str] = MappingProxyType({})) -> str:
    """The call that makes a config dataclass, without the fields that are at their defaults.

    Args:
        config: the configuration.
        written: field → how its value is written, where that is not its own repr.
    """
    shown = []
    for f in fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if value != default:
            shown.append(f"{f.name}={written.get(f.name, repr(value))}")
    return f"{type(config).__name__}({', '.join(shown)})"
