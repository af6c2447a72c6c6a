"""Mixing the activations of nodes with the values at which they can be held, for attribution."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import HookNameError
from tl_sparse.hooks.points import NodeValues, TLModel, check_hook_names, hooked
from tl_sparse.hooks.shapes import check_activation, check_values
from tl_sparse.precision import in_float32


@checked()
@contextmanager
def mixing(
    model: TLModel,
    openings: NodeValues,
    values: Mapping[str, Float[Tensor, " *node"] | Float[Tensor, "batch pos *node"]],
) -> Iterator[None]:
    """Within the context, each node has its activation to the extent that it is opened.

    It has its value where the opening is 0, its activation where it is 1, else a mixture of both.
    Gradients flow to the openings.

    Args:
        model: any TransformerLens model.
        openings: hook name → how far each node is opened. With 1 as the size of the last axis, each
            node is a whole vector.
        values: hook name → the values of nodes that are not opened.

    Raises:
        HookNameError: if `model` has no hook point of such a name, or `values` lacks the name.
        ArgumentError: if the values do not have the shape of the nodes there.
    """
    check_hook_names(model, openings)
    if missing := openings.keys() - values.keys():
        raise HookNameError(f"no values to mix with at {', '.join(sorted(missing))}")
    functions = {}
    for name, opened in openings.items():
        check_values(model, name, values[name], opened.shape)
        functions[name] = partial(_mix, name, values[name], opened)
    alike = all(values[name].ndim == opened.ndim for name, opened in openings.items())
    with hooked(model, functions, positions_alike=alike):
        yield


def _mix(name: str, value: Tensor, opened: Tensor, activation: Tensor, hook: object) -> Tensor:
    check_activation(name, activation, value, opened.shape)
    precise = in_float32(activation)
    mixed = torch.lerp(value.to(precise).expand_as(precise), precise, opened)
    return mixed.to(activation.dtype)
