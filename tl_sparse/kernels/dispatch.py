"""Access to the compiled kernels, on CPUs where numba is installed (`pip install tl-sparse[fast]`).

The kernels take activations in torch's memory layout, with one row per token. The rows are divided
among at most as many threads as torch uses (`torch.set_num_threads`).
"""

import functools
import itertools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: The dtypes that numba's kernels support.
_DTYPES = (torch.float32, torch.float64)
#: A thread is woken only if it has at least this many numbers to read or write. Waking it takes as
#: long as reading or writing a few hundred thousand.
_WORTH_SHARING = 2_000_000


@functools.cache
def _compiled() -> dict[str, Callable[..., Any]] | None:
    """The compiled functions by name; None if numba is missing or does not work here."""
    try:
        from tl_sparse.kernels import products, topk

        # numba compiles a function on its first call, so this call shows whether numba works.
        products.checksum(np.zeros(1, np.uint32), 0, 1)
    except ImportError:
        return None
    except Exception as error:  # for example, if there is no folder for numba's cache
        message = f"numba does not work here, so everything runs in plain torch: {error}"
        warnings.warn(message, stacklevel=2)
        return None
    return {
        "abs_topk": topk.abs_topk,
        "keep": topk.keep,
        "times": topk.times,
        "zero_all_but": topk.zero_all_but,
        "checksum": products.checksum,
        "compress": products.compress,
        "transpose": products.transpose,
        "multiply": products.multiply,
        "sampled_product": products.sampled_product,
    }


def kernel(name: str, x: Tensor) -> Any:
    """The compiled function called `name`, wrapped to take tensors; None if there is none for `x`.

    There is none without numba, for devices other than the CPU, for dtypes other than float32 and
    float64, or within `torch.func`.
    """
    if x.device.type != "cpu" or x.dtype not in _DTYPES or in_torch_func():
        return None
    compiled = _compiled()
    if compiled is None:
        return None
    function = compiled[name]

    def call(*arguments: Any) -> Any:
        return function(*[a.numpy() if isinstance(a, Tensor) else a for a in arguments])

    return call


def in_torch_func() -> bool:
    """Whether a transformation of `torch.func` runs.

    It sees through neither compiled functions nor NumPy.
    """
    return torch._C._are_functorch_transforms_active()


def n_threads(size: int) -> int:
    """The number of threads to use for work that reads and writes `size` numbers."""
    return max(1, min(torch.get_num_threads(), size // _WORTH_SHARING))


def shared_out(run: Callable[..., Any], n: int, size: int, *arguments: Any) -> list[Any]:
    """Call `run(*arguments, first, last)` for ranges [first, last) that together make up [0, n).

    There is one range per thread, for at most `n_threads(size)` threads.

    Returns:
        The results in the order of the ranges.
    """
    threads = max(1, min(n, n_threads(size)))
    if threads == 1:
        return [run(*arguments, 0, n)]
    bounds = [n * i // threads for i in range(threads + 1)]
    *others, own = itertools.pairwise(bounds)
    pool = _pool(os.getpid())
    futures = [pool.submit(run, *arguments, first, last) for first, last in others]
    # The calling thread takes the last range, so that on two cores only one other is woken.
    own_result = run(*arguments, *own)
    return [future.result() for future in futures] + [own_result]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The thread pool of the process with this id; a forked process inherits no threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tl_sparse")
