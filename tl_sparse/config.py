"""Helpers for the configurations of the architecture, the data, training and pruning.

Configurations are frozen dataclasses that check their values, and they import quickly.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

from tl_sparse.errors import ConfigError

#: The largest seed; torch takes no larger one after the numbers of restarts and trials are added.
MAX_SEED = 2**62
#: A config dataclass.
C = TypeVar("C")


def check(valid: bool, name: str, value: object, expected: str) -> None:
    """Unless `valid`, raise a `ConfigError` with the field, its value and the valid range."""
    if not valid:
        raise ConfigError(f"{name} = {value!r} is not possible; it must be {expected}")


def check_types(config: Any) -> None:
    """Raise `ConfigError` for a value that is not of the type that a config dataclass declares.

    JSON easily has `"4"` or `true` where a number belongs. Only fields declared as a Literal, a
    float, an int, a bool or a str are checked here; the dataclass itself must check all others.
    """
    for field in fields(config):
        name = field.name
        value = getattr(config, name)
        declared = field.type
        if get_origin(declared) is Literal:
            choices = get_args(declared)
            check(value in choices, name, value, f"one of {', '.join(choices)}")
        elif declared is float:
            check(is_number(value), name, value, "a number")
        elif declared in (int, bool, str):
            # The type must match exactly, because True is also an int.
            check(type(value) is declared, name, value, f"of type {declared.__name__}")


def as_config(value: Any, kind: type[C]) -> C:
    """`value` if it is a configuration of this kind, or one with the fields in the mapping `value`.

    Raises:
        ConfigError: if `value` is neither, or has an unknown key or a bad value.
    """
    if isinstance(value, kind):
        return value
    expected = f"a {kind.__name__}, or a mapping of its fields to values"
    check(isinstance(value, Mapping), "config", value, expected)
    config: C = merged(kind(), value)
    return config


def is_number(value: object) -> bool:
    """Whether `value` is a number that a float can hold, and not a boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def check_known_keys(config: Any, values: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, naming the nearest field, for a key that is not a field of `config`."""
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
    """A copy of a config dataclass with the fields in `values` changed.

    Where a field is itself a configuration, its value is a mapping of the fields to change in it.

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
    """The new value of one field whose value is now `current`."""
    if is_dataclass(current):
        check(isinstance(value, Mapping), field.name, value, "a mapping of fields to values")
        return merged(current, value)
    if field.type is float and isinstance(value, str):
        # YAML reads 1e-3, which has no decimal point, as text.
        try:
            return float(value)
        except ValueError:
            return value  # `check_types` will reject it with the name of the field
    return value


def short_repr(config: Any, written: Mapping[str, str] = MappingProxyType({})) -> str:
    """The constructor call that makes `config`, without the fields that have their default value.

    Args:
        config: the configuration.
        written: field → the text for its value, if that is not the repr of the value.
    """
    arguments = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value != _default(field):
            text = written.get(field.name, repr(value))
            arguments.append(f"{field.name}={text}")
    return f"{type(config).__name__}({', '.join(arguments)})"


def _default(field: Field[Any]) -> Any:
    """The default of a field; `MISSING`, which no value equals, if it has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
