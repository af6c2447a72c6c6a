"""Activation sparsity: AbsTopK as a function, and at the hook points of any TransformerLens model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import ConfigError
from tl_sparse.hooks.kernels import bits, kernel
from tl_sparse.hooks.points import HookFn, TLModel, hooked


def abs_topk(x: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    """Keep the `k` entries of largest magnitude in the last dimension, zero the rest (Gao et al. 2025, A.1).

    Exactly `k` are kept, also among equal magnitudes. Gradients pass through the kept entries only.
    """
    if k >= x.shape[-1]:
        return x
    if x.device.type != "cpu":
        return x * _largest_by_sorting(x.detach().abs(), k)
    # There is nothing to trace in compiled code. (Always to disable tracing would import it, which takes a second.)
    return (torch.compiler.disable(_on_cpu) if torch.compiler.is_compiling() else _on_cpu)(x, k)


def _on_cpu(x: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    return _AbsTopK.apply(x.contiguous(), k) if kernel("abs_topk", x) else x * _largest(x.detach().abs(), k)


class _AbsTopK(torch.autograd.Function):
    """AbsTopK by the compiled kernels; `x` is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        x = x.detach()
        out, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        rows, out_rows, mask_rows = (t.view(-1, t.shape[-1]) for t in (x, out, mask))
        if kernel("abs_topk", x)(rows, bits(rows), k, out_rows, mask_rows) > 0:
            tied = mask_rows.sum(-1) != k
            mask_rows[tied] = _largest_by_sorting(rows[tied].abs(), k).bool()
            out_rows[tied] = rows[tied] * mask_rows[tied]
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for gradients of gradients
            return grad * mask, None
        out = torch.empty_like(mask, dtype=grad.dtype)
        kernel("times", grad)(grad.contiguous().view(-1), mask.view(-1), out.view(-1))
        return out, None


def _largest(magnitudes: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    """1 for the `k` largest entries of each row, 0 for the rest."""
    if magnitudes.dtype not in (torch.float32, torch.float64):
        return _largest_by_sorting(magnitudes, k)
    # NumPy's vectorised quickselect finds the k-th largest several times faster than torch.topk on a CPU, and
    # a mask of the activation's own dtype multiplies several times faster than a boolean one.
    dim = magnitudes.shape[-1]
    threshold = torch.from_numpy(np.partition(magnitudes.numpy(), dim - k, axis=-1)[..., dim - k, None])
    mask = torch.ge(magnitudes, threshold, out=torch.empty_like(magnitudes))
    uneven = mask.sum(-1) != k
    if bool(uneven.any()):  # equal magnitudes at the threshold, or NaN
        mask[uneven] = _largest_by_sorting(magnitudes[uneven], k)
    return mask


def _largest_by_sorting(magnitudes: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    kept = magnitudes.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(magnitudes).scatter(-1, kept, 1.0)


@contextmanager
def sparse_activations(model: TLModel, fractions: Mapping[str, float]) -> Iterator[None]:
    """Within the context, AbsTopK acts at hook points of any TransformerLens model.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        fractions: hook name → fraction kept of the node dimensions; those of `[batch, pos, head, d_head]`
            activations are taken together, as in the paper's models.

    Raises:
        HookNameError: for a hook name that the model does not have.
        ConfigError: for a fraction outside (0, 1].
    """
    for name, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction {fraction!r} at {name} is not possible; it must be in (0, 1]")

    def sparsifier(fraction: float) -> HookFn:
        def hook_fn(activation: Tensor, hook: object) -> Tensor:
            flat = activation.flatten(2)
            return abs_topk(flat, max(1, int(fraction * flat.shape[-1]))).view_as(activation)

        return hook_fn

    with hooked(model, {name: sparsifier(fraction) for name, fraction in fractions.items()}):
        yield
