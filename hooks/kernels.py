"""Access to the compiled code of `compiled.py`, where numba is installed (`pip install tl-sparse[fast]`)."""

import functools
import os
import threading
from typing import Any

import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_one_at_a_time = threading.Lock()  # one of numba's threading layers aborts when two threads meet in it


@functools.cache
def _compiled(process: int) -> Any:
    if _compiled.cache_info().currsize > 0:
        return None  # forked from a process that has it: OpenMP would abort
    try:
        from tl_sparse.hooks import compiled
    except (ImportError, RuntimeError):  # RuntimeError: there is no folder where numba could keep what it compiles
        return None
    return compiled


def kernel(name: str, x: Tensor) -> Any:
    """The compiled function of this name, taking tensors; None if there is none for tensors like `x`."""
    if x.device.type != "cpu" or x.dtype not in _BITS or (compiled := _compiled(os.getpid())) is None:
        return None

    def run(*arguments: Tensor | int) -> Any:
        with _one_at_a_time:
            # As torch does: no second thread for few entries.
            compiled.set_threads(min(torch.get_num_threads(), 1 + x.numel() // 32768))
            return getattr(compiled, name)(*(a.numpy() if isinstance(a, Tensor) else a for a in arguments))

    return run


def bits(x: Tensor) -> Tensor:
    """The bits of floats as integers."""
    return x.view(_BITS[x.dtype])
