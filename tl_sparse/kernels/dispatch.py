"""Access to compiled code, on CPUs where numba is installed (`pip install tl-sparse[fast]`).

Activations stay as torch has them, a row for each token; the work is shared out by rows among as
many threads as torch uses (`torch.set_num_threads`).
"""

import functools
import itertools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@functools.cache
def _compiled() -> Any:
    try:
        from tl_sparse.kernels import products, topk

        products.checksum(np.zeros(1, np.uint32), 0, 1)  # can it compile?
    except ImportError:
        return None
    except (
        Exception
    ) as error:  # for one, there is no folder where numba could keep what it compiles
        warnings.warn(
            f"numba does not work here, so everything runs in plain torch: {error}", stacklevel=2
        )
        return None
    return SimpleNamespace(**vars(products) | vars(topk))


def kernel(name: str, x: Tensor) -> Any:
    """The compiled function of this name, taking tensors; None if there is none for tensors like
    `x`.
    """
    if x.device.type != "cpu" or x.dtype not in _BITS or (compiled := _compiled()) is None:
        return None
    function = getattr(compiled, name)
    return lambda *arguments: function(
        *(a.numpy() if isinstance(a, Tensor) else a for a in arguments)
    )


def bits(x: Tensor) -> Tensor:
    """The bits of floats as integers."""
    return x.view(_BITS[x.dtype])


#: Numbers to read or write that are worth a second thread: to wake it takes as long as a few
#: hundred thousand.
_WORTH_SHARING = 2_000_000


def n_threads(size: int) -> int:
    """How many threads share work that reads and writes so many numbers."""
    return max(1, min(torch.get_num_threads(), size // _WORTH_SHARING))


def shared_out(run: Callable[..., Any], n: int, size: int, *arguments: Any) -> list[Any]:
    """`run(*arguments, first, last)` for ranges that make up [0, n), one for each of
    `n_threads(size)`.
    """
    threads = max(1, min(n, n_threads(size)))
    bounds = [n * i // threads for i in range(threads + 1)]
    ranges = list(itertools.pairwise(bounds))
    # This thread takes the last range: on two cores one other is enough.
    pool = _pool(os.getpid()) if threads > 1 else None
    others = [pool.submit(run, *arguments, *ends) for ends in ranges[:-1]] if pool else []
    own = run(*arguments, *ranges[-1])
    return [other.result() for other in others] + [own]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """A forked process needs threads of its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tl_sparse")
