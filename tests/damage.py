"""Odd values for the entries of JSON files."""

import copy

#: What takes the place of an entry; MISSING removes it.
MISSING = object()
ODD = [None, True, -1, 10**400, float("nan"), 1e300, "", "1", "\udc80", [], [[]], {}, {"a": 1}]
ODD.append(MISSING)


def entries(values, place=()):
    """The place of every entry of nested JSON values."""
    if isinstance(values, dict):
        inner = values.items()
    elif isinstance(values, list):
        inner = enumerate(values)
    else:
        return
    for key, value in inner:
        yield (*place, key)
        yield from entries(value, (*place, key))


def changed(values, place, odd):
    """Nested JSON values with one entry replaced."""
    values = copy.deepcopy(values)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if odd is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = odd
    return values
