"""Activation sparsity by AbsTopK, as a function and at hook points of any TransformerLens model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import ArgumentError, ConfigError
from tl_sparse.hooks.points import TLModel, hooked
from tl_sparse.kernels import (
    abs_topk_by_triton,
    bits,
    in_torch_func,
    kernel,
    selects_rows_by_triton,
    shared_out,
)


def abs_topk(
    x: Float[Tensor, "*batch dim"], k: int, inplace: bool = False
) -> Float[Tensor, "*batch dim"]:
    """Keep the `k` entries of largest magnitude in the last dimension, and zero the rest.

    This is AbsTopK of Gao et al. 2025, A.1. Exactly `k` entries are kept, even when magnitudes are
    tied. Gradients pass through the kept entries only.
    With `inplace`, `x` may be overwritten, which saves memory.
    """
    # By hand, since this is called several times in each layer of each run.
    is_sound = isinstance(x, Tensor) and x.is_floating_point() and type(k) is int and k >= 0
    if not is_sound or not isinstance(inplace, bool):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(
            "abs_topk takes a tensor of floats, an integer k of at least 0, and whether it may be "
            f"overwritten; these are {kind}, {k!r} and {inplace!r}"
        )
    if x.ndim == 0 or k >= x.shape[-1]:
        return x
    if torch.compiler.is_exporting():
        return x * _largest_by_sorting(x.detach().abs(), k)
    if selects_rows_by_triton(x):
        return abs_topk_by_triton(x, k)
    if x.device.type != "cpu":
        return x * _largest(x.detach().abs(), k)
    if torch.compiler.is_compiling():
        # torch.compile cannot trace the kernels. This call imports the compiler, which takes a
        # second, so it is made only here.
        return torch.compiler.disable(_on_cpu)(x, k, inplace)
    return _on_cpu(x, k, inplace)


def _on_cpu(x: Float[Tensor, "*batch dim"], k: int, inplace: bool) -> Float[Tensor, "*batch dim"]:
    if kernel("abs_topk", x) is None:
        return x * _largest(x.detach().abs(), k)
    if inplace:
        return _AbsTopK.apply(x.contiguous(), k)
    return _AbsTopK.apply(x.clone(memory_format=torch.contiguous_format), k)


class _AbsTopK(torch.autograd.Function):
    """AbsTopK in place on a contiguous `x`, by the compiled kernels.

    For the backward pass, a mask stores one bit per entry, which says whether the entry was kept.
    Each byte of the mask packs the bits of one column in eight rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        rows = x.detach().view(-1, x.shape[-1])
        n_eights = (len(rows) + 7) // 8
        mask = rows.new_zeros(
            n_eights if ctx.needs_input_grad[0] else 0, rows.shape[1], dtype=torch.uint8
        )
        tied = rows.new_empty(len(rows), dtype=torch.bool)
        arguments = bits(rows), k, mask, tied
        if any(shared_out(kernel("abs_topk", x), n_eights, rows.numel(), *arguments)):
            # The kernel does not change rows with a tie at the threshold, so ties are broken here.
            kept = rows[tied].abs().topk(k, sorted=False).indices
            kernel("keep", x)(bits(rows), tied.nonzero()[:, 0], kept, mask)
        ctx.mark_dirty(x)
        ctx.save_for_backward(mask)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        rows = grad.contiguous().view(-1, grad.shape[-1])
        if torch.is_grad_enabled():  # differentiable, for second derivatives
            bit = torch.arange(8, dtype=torch.uint8, device=mask.device)[:, None]
            kept = mask[:, None].bitwise_right_shift(bit).bitwise_and(1).flatten(0, 1)
            return (rows * kept[: len(rows)]).view_as(grad), None
        out = torch.empty_like(rows)
        shared_out(kernel("times", rows), len(mask), rows.numel(), rows, mask, out)
        return out.view_as(grad), None


def _largest(magnitudes: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    """A mask in the dtype of `magnitudes`: 1 at the `k` largest entries of each row, else 0."""
    has_numpy_dtype = magnitudes.dtype in (torch.float32, torch.float64)
    if magnitudes.device.type != "cpu" or not has_numpy_dtype or in_torch_func():
        return _largest_by_sorting(magnitudes, k)
    # On a CPU, NumPy's vectorised quickselect finds the k-th largest several times faster than
    # torch.topk.
    position = magnitudes.shape[-1] - k
    partitioned = np.partition(magnitudes.numpy(), position, axis=-1)
    threshold = torch.from_numpy(partitioned[..., position, None])
    # Multiplying by a mask of the activation's dtype is several times faster than by a boolean one.
    mask = torch.ge(magnitudes, threshold, out=torch.empty_like(magnitudes))
    # NaN is the largest magnitude, as in torch.topk and the kernels, but it compares as smaller.
    has_nan = magnitudes.sum(-1).isnan()
    # Equal magnitudes at the threshold also make a row wrong.
    is_wrong = (mask.sum(-1) != k) | has_nan
    if bool(is_wrong.any()):
        mask[is_wrong] = _largest_by_sorting(magnitudes[is_wrong], k)
    return mask


def _largest_by_sorting(
    magnitudes: Float[Tensor, "*batch dim"], k: int
) -> Float[Tensor, "*batch dim"]:
    kept = magnitudes.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(magnitudes).scatter(-1, kept, 1.0)


@checked()
@contextmanager
def sparse_activations(model: TLModel, fractions: Mapping[str, float]) -> Iterator[None]:
    """Within the context, AbsTopK acts at hook points of any TransformerLens model.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        fractions: hook name → fraction of the entries kept at each position. In an activation
            `[batch, pos, head, d_head]`, the entries of all heads compete together, as in the
            paper's models.

    Raises:
        HookNameError: for a hook name that the model does not have.
        ConfigError: for a fraction outside (0, 1].
    """
    for name, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"fraction {fraction!r} at {name} is not possible; it must be in (0, 1]"
            )

    functions = {name: partial(_sparsify, fraction) for name, fraction in fractions.items()}
    with hooked(model, functions):
        yield


def _sparsify(fraction: float, activation: Tensor, hook: object) -> Tensor:
    flat = activation.flatten(2)
    k = max(1, int(fraction * flat.shape[-1]))
    return abs_topk(flat, k).view_as(activation)
