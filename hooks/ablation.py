"""Ablation: nodes of any TransformerLens model are held at given values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import HookNameError
from tl_sparse.hooks.points import NodeMasks, TLModel, check_hook_names, hooked


@contextmanager
def ablating(
    model: TLModel,
    nodes: NodeMasks,
    values: Mapping[str, Float[Tensor, " *node"] | Float[Tensor, "batch pos *node"]],
) -> Iterator[None]:
    """Within the context, the chosen nodes have the given values at all positions.

    Args:
        model: any TransformerLens model.
        nodes: hook name → which nodes are ablated, in the shape of an activation without batch and
            position.
        values: hook name → what they are set to: their means, zeros, or activations of another run.

    Raises:
        HookNameError: for a hook name that the model, or `values`, does not have.
    """
    check_hook_names(model, nodes)
    if missing := nodes.keys() - values.keys():
        raise HookNameError(f"no values to ablate with at {', '.join(sorted(missing))}")
    functions = {}
    for name, ablated in nodes.items():
        if ablated.any():  # without a hook, a model that keeps all nodes is exactly the model
            functions[name] = partial(_ablate, ablated, values[name])
    with hooked(model, functions):
        yield


def _ablate(ablated: Tensor, value: Tensor, activation: Tensor, hook: object) -> Tensor:
    return torch.where(ablated.to(activation.device), value.to(activation), activation)
