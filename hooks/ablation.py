"""Ablation: hold chosen nodes of any TransformerLens model at given values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import HookNameError
from tl_sparse.hooks.points import NodeMasks, TLModel, check_hook_names, hooked
from tl_sparse.hooks.shapes import check_activation, check_mask, check_no_nan, check_values


@checked()
@contextmanager
def ablating(
    model: TLModel,
    nodes: NodeMasks,
    values: Mapping[str, Float[Tensor, " *node"] | Float[Tensor, "batch pos *node"]],
) -> Iterator[None]:
    """Within the context, hold the chosen nodes at the given values, at every position.

    Args:
        model: any TransformerLens model.
        nodes: hook name → mask of the nodes to ablate, with the shape of an activation without
            batch and position. With 1 as the size of its last axis, each node is a whole vector.
        values: hook name → the values that replace the activations of the ablated nodes, for
            example their means, zeros, or their activations in another run.

    Raises:
        HookNameError: if `model` has no hook point of such a name, or `values` lacks the name.
        ArgumentError: if a mask or values do not have the dtype or shape of the nodes there, or a
            value is NaN. At hook points whose shape only a run shows, a wrong shape is raised in
            the run.
    """
    check_hook_names(model, nodes)
    if missing := nodes.keys() - values.keys():
        raise HookNameError(f"no values to ablate with at {', '.join(sorted(missing))}")
    functions = {}
    overwritten = set()
    for name, ablated in nodes.items():
        check_mask(model, name, ablated)
        check_values(model, name, values[name], ablated.shape)
        check_no_nan(name, values[name])
        # Where all nodes are kept, no hook is attached, so that the model runs exactly as without
        # ablation.
        if ablated.any():
            functions[name] = partial(_ablate, name, ablated, values[name])
        if ablated.all():
            overwritten.add(name)
    # A value for each node holds it alike at every position; values `[batch, pos, *node]` do not.
    alike = all(values[name].ndim == nodes[name].ndim for name in functions)
    with hooked(model, functions, positions_alike=alike, overwriting=overwritten):
        yield


def _ablate(name: str, ablated: Tensor, value: Tensor, activation: Tensor, hook: object) -> Tensor:
    check_activation(name, activation, value, ablated.shape)
    return torch.where(ablated.to(activation.device), value.to(activation), activation)
