"""Records: dataclasses that are read from JSON, with the type of each value checked."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from tl_sparse.errors import DataError

R = TypeVar("R")
#: The largest number that is accepted. Larger whole numbers are not exact as floats.
LARGEST = 2**53


def record_from(record: type[R], values: object) -> R:
    """A dataclass from the JSON values of its fields.

    A field is declared as a bool, int, float, str, another dataclass, `list[…]`, `dict[str, …]`,
    `… | None` or Any. A missing entry takes the default of its field, if that has one. Other
    entries are ignored, since a later version may have added them.

    Args:
        record: the dataclass.
        values: what `json.loads` returned.

    Raises:
        DataError: if an entry is missing or has the wrong type; the message begins with its name,
            such as 'circuit.loss', and the caller puts the name of the file in front.
    """
    read: R = _read(values, record, "")
    return read


def _read(value: Any, declared: Any, name: str) -> Any:
    """The value of the entry called `name`, checked to be of the declared type."""
    origin = get_origin(declared)
    if is_dataclass(declared):
        return _read_fields(value, declared, name)
    if origin is list:
        _check(isinstance(value, list), name, value, "a list")
        (inner,) = get_args(declared)
        return [_read(item, inner, f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _check(isinstance(value, dict), name, value, "an object")
        _, inner = get_args(declared)
        return {key: _read(item, inner, _joined(name, key)) for key, item in value.items()}
    if origin is UnionType:
        inner, _ = get_args(declared)
        return None if value is None else _read(value, inner, name)
    return _read_scalar(value, declared, name)


def _read_fields(value: Any, record: Any, name: str) -> Any:
    _check(isinstance(value, dict), name, value, "an object")
    types = _types(record)
    found = {}
    for field in fields(record):
        inner_name = _joined(name, field.name)
        if field.name in value:
            found[field.name] = _read(value[field.name], types[field.name], inner_name)
        elif not _has_default(field):
            raise DataError(f"{inner_name!r} is missing")
    return record(**found)


@cache
def _types(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _read_scalar(value: Any, declared: Any, name: str) -> Any:
    # The types must match exactly, because True is also an int.
    if declared is bool:
        _check(type(value) is bool, name, value, "true or false")
    elif declared is int:
        is_exact = type(value) is int and abs(value) <= LARGEST
        _check(is_exact, name, value, "a whole number")
    elif declared is float:
        # NaN and infinities are results of a model whose logits overflow.
        is_whole = type(value) is int and abs(value) <= LARGEST
        is_small = type(value) is float and not LARGEST < abs(value) < float("inf")
        _check(is_whole or is_small, name, value, "a number")
    elif declared is str:
        _check(isinstance(value, str), name, value, "text")
    return value


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _check(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        shown = ascii(value)
        if len(shown) > 60:
            shown = shown[:60] + "…"
        raise DataError(f"{name or 'the whole'!r} is {shown}, which must be {expected}")


def check_finite(values: Any, name: str = "") -> None:
    """Check that every number of a record is finite.

    Raises:
        DataError: if one is not: the model diverges under the circuit.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            check_finite(value, f"{name}[{i}]")
    elif isinstance(values, float) and not math.isfinite(values):
        raise DataError(f"{name} is {values}: the model diverges, so this cannot be measured")
