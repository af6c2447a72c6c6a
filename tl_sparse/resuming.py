"""Whether unfinished work can be continued: it must have had the same settings and contents."""

from collections.abc import Mapping
from typing import Any


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """For an error message: each setting that has another value now, with both values.

    Args:
        before: the stored settings. The fields of a mapping among them count as settings.
        now: the current settings.
    """
    old = _flat(before)
    changes = []
    for name, value in _flat(now).items():
        if old.get(name) != value:
            changes.append(f"{name} = {old.get(name)!r}, now {value!r}")
    return changes


def other_contents(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """For an error message: what has other contents now, of all that is in both.

    Args:
        before: what the work began with → the hash of its contents.
        now: the same, now.
    """
    changes = []
    for name in before:
        if name in now and before[name] != now[name]:
            changes.append(f"other contents of the {name}")
    return changes


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of an inner mapping, such as `config`, at the top level."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= value
        else:
            flat[name] = value
    # JSON, in which settings are stored, has no tuples.
    return {name: list(x) if isinstance(x, tuple) else x for name, x in flat.items()}
