"""Checks that masks and values have the shape of the nodes at their hook points.

Some hook points have a shape that follows from the configuration of the model, and these are
checked when a context is entered. The shapes at all others are known only in a run, and are checked
in each.

Where the last axis of a mask has the size 1, each node is a whole vector: the output of a head, for
example, in a mask `[n_heads, 1]` of an activation `[batch, pos, n_heads, d_head]`. The values of
such nodes have the full last axis.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_sparse.arguments import described
from tl_sparse.errors import ArgumentError
from tl_sparse.hooks.points import TLModel, is_sparse_model

_Shape = tuple[int, ...]
#: The end of a hook name → the entries of the configuration with the sizes of its nodes.
_SIZES = {
    ".attn.hook_q": ("n_heads", "d_head"),
    ".attn.hook_k": ("n_key_value_heads", "d_head"),
    ".attn.hook_v": ("n_key_value_heads", "d_head"),
    ".attn.hook_z": ("n_heads", "d_head"),
    ".mlp.hook_pre": ("d_mlp",),
    ".mlp.hook_post": ("d_mlp",),
    ".hook_resid_pre": ("d_model",),
    ".hook_resid_mid": ("d_model",),
    ".hook_resid_post": ("d_model",),
    ".hook_attn_out": ("d_model",),
    ".hook_mlp_out": ("d_model",),
}
#: The nodes of a read are those of its last axis. With TransformerLens' flags `use_split_qkv_input`
#: and `use_attn_in`, there is one read for each head.
_READS = (".ln1.hook_read", ".ln1.hook_normalized")


def known_shape(model: TLModel, hook_name: str) -> _Shape | None:
    """The shape of the nodes at a hook point, without a run; None if it is not known.

    It is known for models of this package and for `HookedTransformer`. The hook points of other
    models depend on their family.
    """
    class_names = [cls.__name__ for cls in type(model).__mro__]
    if not is_sparse_model(model) and "HookedTransformer" not in class_names:
        return None
    for ending, fields in _SIZES.items():
        if hook_name.endswith(ending):
            sizes = [_size(model.cfg, field) for field in fields]
            return tuple(sizes)
    return None


def _size(cfg: Any, field: str) -> int:
    size = getattr(cfg, field, None)
    if size is None and field == "n_key_value_heads":  # each query head has its own
        size = cfg.n_heads
    return int(size or 0)


def check_mask(model: TLModel, hook_name: str, mask: Tensor) -> None:
    """Raise `ArgumentError` unless this can be a mask of the nodes at the hook point."""
    wanted = known_shape(model, hook_name)
    has_shape = wanted is None or are_nodes_of(mask.shape, wanted)
    if mask.dtype != torch.bool or not has_shape:
        of_shape = "" if wanted is None else f" of {list(wanted)}"
        raise ArgumentError(
            f"the mask at {hook_name} must be a boolean tensor{of_shape}, not {described(mask)}"
        )


def check_values(model: TLModel, hook_name: str, values: Tensor, nodes: torch.Size) -> None:
    """Raise `ArgumentError` unless these can be values of nodes of the shape `nodes`."""
    found = _shape_of_values(hook_name, values, nodes)
    wanted = known_shape(model, hook_name)
    if wanted is None:
        wanted = tuple(nodes)
        fits = are_nodes_of(nodes, found)
    else:
        fits = found == wanted
    if not values.is_floating_point() or not fits:
        by_position = ", ".join(["batch", "pos", *map(str, wanted)])
        raise ArgumentError(
            f"the values at {hook_name} must be floats of {list(wanted)} or [{by_position}], not "
            f"{described(values)}"
        )


def check_no_nan(hook_name: str, values: Tensor) -> None:
    """Raise `ArgumentError` if one of these values is NaN."""
    if bool(values.isnan().any()):
        raise ArgumentError(f"the values at {hook_name} must be numbers, and some are NaN")


def check_activation(hook_name: str, activation: Tensor, values: Tensor, nodes: torch.Size) -> None:
    """Raise `ArgumentError` if nodes and values do not have the shape of this run's activation."""
    found = _node_shape(hook_name, activation)
    if not are_nodes_of(nodes, found) or _shape_of_values(hook_name, values, nodes) != found:
        raise ArgumentError(
            f"the activation of the nodes at {hook_name} is of {list(found)}, but the mask or the "
            f"values are of {list(nodes)}"
        )
    if values.ndim != len(nodes) and values.shape[:2] != activation.shape[:2]:
        raise ArgumentError(
            f"the values at {hook_name} are of {list(values.shape)}, but the activation of this "
            f"run is of {list(activation.shape)}"
        )


def are_nodes_of(nodes: Sequence[int], activation: Sequence[int]) -> bool:
    """Whether nodes of one shape are those of an activation without batch and position: its
    entries, or its vectors along the last axis.
    """
    if tuple(nodes) == tuple(activation):
        return True
    are_vectors = len(nodes) == len(activation) > 0 and nodes[-1] == 1
    return are_vectors and tuple(nodes[:-1]) == tuple(activation[:-1])


def _shape_of_values(hook_name: str, values: Tensor, nodes: torch.Size) -> _Shape:
    """The shape of values without batch and position, which they may or may not have."""
    return tuple(values.shape) if values.ndim == len(nodes) else _node_shape(hook_name, values)


def _node_shape(hook_name: str, activation: Tensor) -> _Shape:
    """The shape of an activation without batch and position, nor head if each has its own read."""
    return tuple(activation.shape[-1:] if hook_name.endswith(_READS) else activation.shape[2:])
