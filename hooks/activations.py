"""Activation sparsity: AbsTopK as a function, and at the hook points of any TransformerLens model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import ConfigError
from tl_sparse.hooks.points import HookFn, TLModel, hooked


def abs_topk(x: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    """Keep the `k` entries of largest magnitude in the last dimension, zero the rest (Gao et al. 2025, A.1).

    Exactly `k` are kept, also among equal magnitudes. Gradients pass through the kept entries only.
    """
    if k >= x.shape[-1]:
        return x
    return x * _largest(x.detach().abs(), k)


def _largest(magnitudes: Float[Tensor, "*batch dim"], k: int) -> Float[Tensor, "*batch dim"]:
    """1 for the `k` largest entries of each row, 0 for the rest."""
    if magnitudes.device.type != "cpu" or magnitudes.dtype not in (torch.float32, torch.float64):
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
