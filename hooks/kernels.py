"""Access to the compiled code of `compiled.py`, where numba is installed (`pip install tl-sparse[fast]`)."""

import functools
from typing import Any

import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@functools.cache
def _compiled() -> Any:
    try:
        from tl_sparse.hooks import compiled
    except (ImportError, RuntimeError):  # RuntimeError: there is no folder where numba could keep what it compiles
        return None
    return compiled


def kernel(name: str, x: Tensor) -> Any:
    """The compiled function of this name, taking tensors; None if there is none for tensors like `x`."""
    if x.device.type != "cpu" or x.dtype not in _BITS or (compiled := _compiled()) is None:
        return None
    function = getattr(compiled, name)
    return lambda *arguments: function(*(a.numpy() if isinstance(a, Tensor) else a for a in arguments))


def bits(x: Tensor) -> Tensor:
    """The bits of floats as integers."""
    return x.view(_BITS[x.dtype])
