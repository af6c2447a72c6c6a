"""What all configurations share: the architecture, the data, how to train and how to prune.

They are frozen dataclasses that check their values, and are light to import.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from tl_sparse.errors import ConfigError


def check(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise the `ConfigError` all configurations share: field, value, valid range."""
    if not valid:
        raise ConfigError(f"{name} = {value!r} is not possible; it must be {expected}")


def check_types(config: Any) -> None:
    """Reject values of another type than a config dataclass declares.

    JSON easily has `"4"` or `true` where a number belongs. Fields of other types than the literals
    and the plain ones below are for the dataclass itself to check.
    """
    for field in fields(config):
        name = field.name
        value = getattr(config, name)
        declared = field.type
        if get_origin(declared) is Literal:
            choices = get_args(declared)
            check(value in choices, name, value, f"one of {', '.join(choices)}")
        elif declared is float:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            check(is_number, name, value, "a number")
        elif declared in (int, bool, str):
            # The exact type: True is an int, too.
            check(type(value) is declared, name, value, f"of type {declared.__name__}")


def check_known_keys(config: Any, values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a key that is no field of `config`, naming the nearest field."""
    names = [field.name for field in fields(config)]
    for key in values:
        if key in names:
            continue
        nearest = get_close_matches(str(key), names, n=1)
        if nearest:
            hint = f"did you mean {nearest[0]!r}?"
        else:
            hint = f"valid keys are {', '.join(names)}"
        raise ConfigError(f"unknown configuration key {key!r}; {hint}")


def merged(config: Any, values: Mapping[str, Any]) -> Any:
    """A config dataclass with the fields in `values` changed.

    A mapping changes fields of the configuration inside this one.

    Raises:
        ConfigError: for an unknown key (naming the nearest valid one) or a bad value.
    """
    check_known_keys(config, values)
    changes = {}
    for field in fields(config):
        if field.name in values:
            current = getattr(config, field.name)
            changes[field.name] = _changed(field, current, values[field.name])
    return replace(config, **changes)


def _changed(field: Field[Any], current: Any, value: Any) -> Any:
    """The new value of one field, which is `current` now."""
    if is_dataclass(current):
        check(isinstance(value, Mapping), field.name, value, "a mapping of fields to values")
        return merged(current, value)
    if field.type is float and isinstance(value, str):
        # YAML reads 1e-3, which has no decimal point, as text.
        try:
            return float(value)
        except ValueError:
            return value  # for `check_types` to name
    return value


def short_repr(config: Any, written: Mapping[str, str] = MappingProxyType({})) -> str:
    """The call that makes a config dataclass, without the fields that are at their defaults.

    Args:
        config: the configuration.
        written: field → how its value is written, where that is not its own repr.
    """
    arguments = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value != _default(field):
            text = written.get(field.name, repr(value))
            arguments.append(f"{field.name}={text}")
    return f"{type(config).__name__}({', '.join(arguments)})"


def _default(field: Field[Any]) -> Any:
    """The default of a field; `MISSING`, which equals no value, if it has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
