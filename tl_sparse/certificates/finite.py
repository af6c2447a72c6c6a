"""Numbers that are not finite, which neither JSON nor a reader can use."""

import math
from collections.abc import Mapping
from typing import Any

from tl_sparse.errors import DataError


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
