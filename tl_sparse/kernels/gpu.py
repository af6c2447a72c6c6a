"""Access to the Triton kernels, on GPUs: when they are used, and as operators that torch knows.

Triton comes with torch for NVIDIA's GPUs. The kernels are compiled on first use, and are then
checked against plain torch, once in each process. `TL_SPARSE_TRITON=0` in the environment switches
them off. With `TRITON_INTERPRET=1`, Triton interprets them on the CPU, very slowly: for tests.
"""

import functools
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tl_sparse.errors import warn_user
from tl_sparse.kernels.dispatch import in_torch_func
from tl_sparse.kernels.float_bits import FLOAT_BITS

#: AbsTopK of this many columns is computed by Triton: it reads and writes each entry once, where
#: plain torch writes and reads magnitudes, indices, a mask and the product. A program cannot hold a
#: longer row. How much is won was not measured yet, nor from how many columns on: `make gpu` writes
#: the table to examples/results/gpu.md.
MIN_COLUMNS, MAX_COLUMNS = 1024, 16_384
#: The weight top-k of matrices of this many entries is computed by Triton. Not measured yet either.
#: In larger ones, an index would need more than 32 bits.
MIN_WEIGHTS, MAX_WEIGHTS = 2**18, 2**30
#: The oldest Triton with which the kernels were compiled, that of torch 2.7.
OLDEST = (3, 3)


def _why_not() -> str | None:
    """Why Triton cannot be used in this process; None if it can."""
    if os.environ.get("TL_SPARSE_TRITON") == "0":
        return "switched off by TL_SPARSE_TRITON=0"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "not installed"
    numbers = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"{installed} is older than {oldest}, the oldest that can be used"
    return None


@dataclass
class _Triton:
    """Why the kernels are not used in this process; None if they are."""

    why_not: str | None


#: It is found at import, since `torch.compile` cannot see through the search for a package.
TRITON = _Triton(_why_not())
_DEVICES: tuple[str, ...] = ("cuda",)
if os.environ.get("TRITON_INTERPRET") == "1":
    _DEVICES = ("cuda", "cpu")


def _can_run(x: Tensor) -> bool:
    """Whether there are kernels for tensors like `x`, here and now."""
    if TRITON.why_not is not None or in_torch_func():
        return False
    # On "meta", where tensors have shapes alone, AbsTopK takes as much memory as on a GPU.
    return x.dtype in FLOAT_BITS and (x.device.type in _DEVICES or x.is_meta)


def selects_rows_by_triton(x: Tensor) -> bool:
    """Whether AbsTopK of the last dimension of `x` is computed by `abs_topk_by_triton`.

    It is so on a GPU where a new enough Triton is installed, for 1,024 to 16,384 columns, and not
    within `torch.func`. `torch.compile` can trace this function.
    """
    return _can_run(x) and MIN_COLUMNS <= x.shape[-1] <= MAX_COLUMNS


def abs_topk_by_triton(x: Tensor, k: int) -> Tensor:
    """AbsTopK, differentiable any number of times, and a single operator for `torch.compile`.

    Of equal magnitudes at the threshold those in the first columns are kept.
    """
    out, _ = torch.ops.tl_sparse.abs_topk(x.contiguous(), k)
    return out


def zero_all_but_by_triton(matrix: Tensor, k: int, minimum: int) -> bool:
    """Zero all but the `k` largest entries of a contiguous matrix, in place, if Triton does so.

    The `minimum` largest entries of each row are kept first; `k` counts them too. Of equal
    magnitudes at the threshold the first are kept.

    Returns:
        Whether it was done: it is so for large matrices on a GPU where a new enough Triton works.
    """
    has_size = MIN_WEIGHTS <= matrix.numel() <= MAX_WEIGHTS
    can_protect = minimum == 0 or matrix.shape[1] <= MAX_COLUMNS
    if matrix.is_meta or not (_can_run(matrix) and has_size and can_protect):
        return False
    launch = _working(matrix.device)
    if launch is None:
        return False
    launch.zero_all_but(matrix, k, minimum)
    return True


def triton_in_use(device: str | torch.device) -> str:
    """Which Triton computes AbsTopK and the weight top-k on a device, or why none does."""
    device = torch.device(device)
    if device.type not in _DEVICES:
        return f"none: there are no kernels for {device.type}"
    if TRITON.why_not is None:
        _working(device)
    return f"none: {TRITON.why_not}" if TRITON.why_not else version("triton")


@functools.cache
def _working(device: torch.device) -> Any:
    """The module that launches the kernels; None if they do not work, which a warning says."""
    try:
        # Only here, since Triton takes a second to import, and may be missing.
        from tl_sparse.kernels import launch

        _check(launch, device)
    except Exception as error:  # for example, if there is no compiler for C, or the GPU is too old
        TRITON.why_not = f"it does not work here: {error}"
        warn_user(f"Triton does not work here, so everything runs in plain torch: {error}")
        return None
    return launch


def _check(launch: Any, device: torch.device) -> None:
    """Raise `RuntimeError` unless the kernels do on `device` what plain torch does."""
    x = torch.arange(-20.0, 20.0, device=device).view(2, 20) / 4
    tied = x.round()
    out, mask = launch.abs_topk(tied, 3)
    expected_out, expected_mask = _abs_topk_in_torch(tied, 3)
    matrix = x.clone()
    launch.zero_all_but(matrix, 6, 2)
    # Both rows keep their two largest. Of the others, the two largest are in the first row: -4.5,
    # and -4.25, which comes before the 4.25 of the second row.
    expected = torch.stack([_abs_topk_in_torch(x[0], 4)[0], _abs_topk_in_torch(x[1], 2)[0]])
    is_sound = (
        torch.equal(out, expected_out)
        and torch.equal(mask, expected_mask)
        and torch.equal(launch.times(tied, mask), out)
        and torch.equal(matrix, expected)
    )
    if not is_sound:
        raise RuntimeError("what it compiles gives wrong results")


def _abs_topk_in_torch(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the operator of this name returns, by a stable sort."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(x, dtype=torch.uint8).scatter(-1, order[..., :k], 1)
    eights = torch.nn.functional.pad(kept, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bit = torch.arange(8, dtype=torch.uint8, device=x.device)
    return x * kept, (eights << bit).sum(-1, dtype=torch.uint8)


def _times_in_torch(x: Tensor, mask: Tensor) -> Tensor:
    """What the operator `times_mask` returns."""
    bit = torch.arange(8, dtype=torch.uint8, device=x.device)
    kept = ((mask.unsqueeze(-1) >> bit) & 1).flatten(-2)
    return x * kept[..., : x.shape[-1]]


def _abs_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    launch = _working(x.device)
    return _abs_topk_in_torch(x, k) if launch is None else launch.abs_topk(x, k)


def _times_mask(x: Tensor, mask: Tensor) -> Tensor:
    launch = _working(x.device)
    return _times_in_torch(x, mask) if launch is None else launch.times(x, mask)


# The operators are not defined by `torch.library.custom_op`, which imports torch's compiler at the
# first call; that takes seconds.
_library = torch.library.Library("tl_sparse", "DEF")
_library.define("abs_topk(Tensor x, SymInt k) -> (Tensor out, Tensor mask)")
_library.define("times_mask(Tensor x, Tensor mask) -> Tensor")
for _dispatch_key in ("CPU", "CUDA"):
    _library.impl("abs_topk", _abs_topk, _dispatch_key)
    _library.impl("times_mask", _times_mask, _dispatch_key)


@torch.library.register_fake("tl_sparse::abs_topk", lib=_library)
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n_bytes = (x.shape[-1] + 7) // 8
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], n_bytes), dtype=torch.uint8)


@torch.library.register_fake("tl_sparse::times_mask", lib=_library)
def _(x: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_mask_of_output(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _keep_mask_of_input(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return torch.ops.tl_sparse.times_mask(gradient.contiguous(), mask), None


torch.library.register_autograd(
    "tl_sparse::abs_topk", _backward, setup_context=_keep_mask_of_output, lib=_library
)
torch.library.register_autograd(
    "tl_sparse::times_mask", _backward, setup_context=_keep_mask_of_input, lib=_library
)
