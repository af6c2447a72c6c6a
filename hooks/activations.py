"""Activation sparsity: AbsTopK as a function, and at the hook points of any TransformerLens
model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import ConfigError
from tl_sparse.hooks.points import TLModel, hooked
from tl_sparse.kernels import bits, kernel, shared_out


def abs_topk(
    x: Float[Tensor, "*batch dim"], k: int, inplace: bool = False
) -> Float[Tensor, "*batch dim"]:
    """Keep the `k` entries of largest magnitude in the last dimension, zero the rest (Gao et al.
    2025, A.1).

    Exactly `k` are kept, also among equal magnitudes. Gradients pass through the kept entries only.
    With `inplace`, `x` may be overwritten, which saves memory.
    """
    if k >= x.shape[-1]:
        return x
    if x.device.type != "cpu":
        return x * _largest(x.detach().abs(), k)
    # There is nothing to trace in compiled code. (Always to disable tracing would import it, which
    # takes a second.)
    return (torch.compiler.disable(_on_cpu) if torch.compiler.is_compiling() else _on_cpu)(
        x, k, inplace
    )


def _on_cpu(x: Float[Tensor, "*batch dim"], k: int, inplace: bool) -> Float[Tensor, "*batch dim"]:
    if kernel("abs_topk", x) is None:
        return x * _largest(x.detach().abs(), k)
    return _AbsTopK.apply(
        x.contiguous() if inplace else x.clone(memory_format=torch.contiguous_format), k
    )


class _AbsTopK(torch.autograd.Function):
    """AbsTopK in place by the compiled kernels; `x` is contiguous. A bit for each entry is kept for
    its backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        rows = x.detach().view(-1, x.shape[-1])
        needed = (len(rows) + 7) // 8 if ctx.needs_input_grad[0] else 0
        mask = rows.new_zeros(needed, rows.shape[1], dtype=torch.uint8)
        tied = rows.new_empty(len(rows), dtype=torch.bool)
        eights = (len(rows) + 7) // 8
        if any(shared_out(kernel("abs_topk", x), eights, rows.numel(), bits(rows), k, mask, tied)):
            kernel("keep", x)(
                bits(rows),
                tied.nonzero()[:, 0],
                rows[tied].abs().topk(k, sorted=False).indices,
                mask,
            )
        ctx.mark_dirty(x)
        ctx.save_for_backward(mask)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        rows = grad.contiguous().view(-1, grad.shape[-1])
        if torch.is_grad_enabled():  # for gradients of gradients
            bit = torch.arange(8, dtype=torch.uint8, device=mask.device)[:, None]
            kept = mask[:, None].bitwise_right_shift(bit).bitwise_and(1).flatten(0, 1)
            return (rows * kept[: len(rows)]).view_as(grad), None
        out = torch.empty_like(rows)
        shared_out(kernel("times", rows), len(mask), rows.numel(), rows, mask, out)
        return out.view_as(grad), None


def _largest(magnitudes: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    """1 for the `k` largest entries of each row, 0 for the rest."""
    if magnitudes.device.type != "cpu" or magnitudes.dtype not in (torch.float32, torch.float64):
        return _largest_by_sorting(magnitudes, k)
    # NumPy's vectorised quickselect finds the k-th largest several times faster than torch.topk on
    # a CPU, and a mask of the activation's own dtype multiplies several times faster than a boolean
    # one.
    dim = magnitudes.shape[-1]
    threshold = torch.from_numpy(
        np.partition(magnitudes.numpy(), dim - k, axis=-1)[..., dim - k, None]
    )
    mask = torch.ge(magnitudes, threshold, out=torch.empty_like(magnitudes))
    uneven = mask.sum(-1) != k
    if bool(uneven.any()):  # equal magnitudes at the threshold, or NaN
        mask[uneven] = _largest_by_sorting(magnitudes[uneven], k)
    return mask


def _largest_by_sorting(
    magnitudes: Float[Tensor, "*batch dim"], k: int
) -> Float[Tensor, "*batch dim"]:
    kept = magnitudes.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(magnitudes).scatter(-1, kept, 1.0)


@contextmanager
def sparse_activations(model: TLModel, fractions: Mapping[str, float]) -> Iterator[None]:
    """Within the context, AbsTopK acts at hook points of any TransformerLens model.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        fractions: hook name → fraction kept of the node dimensions; those of `[batch, pos, head,
            d_head]` activations are taken together, as in the paper's models.

    Raises:
        HookNameError: for a hook name that the model does not have.
        ConfigError: for a fraction outside (0, 1].
    """
    for name, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"fraction {fraction!r} at {name} is not possible; it must be in (0, 1]"
            )

    def sparsify(fraction: float, activation: Tensor, hook: object) -> Tensor:
        flat = activation.flatten(2)
        return abs_topk(flat, max(1, int(fraction * flat.shape[-1]))).view_as(activation)

    with hooked(model, {name: partial(sparsify, fraction) for name, fraction in fractions.items()}):
        yield
