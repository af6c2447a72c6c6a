"""Holding the scales of a model's norms.

A norm divides by a scale that all channels of the residual stream decide together. With the scales
of the full model, a circuit cannot gain from the scale that its held nodes happen to give.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks.points import TLModel, hooked

#: The norms before attention, MLPs and the unembedding.
_NORMS = ("ln1.hook_scale", "ln2.hook_scale", "ln_final.hook_scale")


@checked()
def norm_scale_hooks(model: TLModel) -> list[str]:
    """The hook points that carry the scales of the norms before attention, MLPs and unembedding.

    Raises:
        UnsupportedError: if the model has no such hook points.
    """
    names = [name for name in model.hook_dict if name.endswith(_NORMS)]
    if not names:
        raise UnsupportedError(
            f"{type(model).__name__} has no hook points with the scales of its norms "
            "(ln_final.hook_scale), so they cannot be held"
        )
    return names


@checked()
@torch.no_grad()
def check_norms_can_be_held(model: TLModel) -> None:
    """Check in a short run that the model reads the scales of its norms from its hook points.

    Raises:
        UnsupportedError: if it does not, or has no such hook points.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(2, device=device)[None]
    as_it_is = model(tokens)
    double = {name: lambda scale, hook: 2 * scale for name in norm_scale_hooks(model)}
    with hooked(model, double):
        doubled = model(tokens)
    if torch.equal(doubled, as_it_is):
        raise UnsupportedError(
            f"{type(model).__name__} does not read the scales of its norms from its hook points, "
            "so they cannot be held"
        )


@checked()
def holding_norms(
    model: TLModel, scales: Mapping[str, Float[Tensor, "batch pos 1"]]
) -> AbstractContextManager[None]:
    """Within the context, norms divide by the given scales.

    Args:
        scales: hook name → the scale at each position, such as `norm_scale_hooks` and `recording`
            give them.

    Raises:
        HookNameError: if `model` has no hook point of such a name.
    """
    return hooked(model, {name: partial(_replace, scale) for name, scale in scales.items()})


def _replace(scale: Tensor, activation: Tensor, hook: object) -> Tensor:
    return scale.to(activation)
