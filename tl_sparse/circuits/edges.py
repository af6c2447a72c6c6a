"""Edge pruning: which weights between the nodes of a circuit its task needs.

Gao et al. 2025 prune nodes only, and name leftover edges as a weakness (METHOD §5).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits.nodes import HEAD_LOCATIONS, LOCATION_HOOKS, MATRICES, Edge, Node
from tl_sparse.errors import PruneError
from tl_sparse.hooks import NodeValues, TLModel, is_sparse_model

#: Node location that edges lead to → module, and what is behind `W_` and `b_` in the names of its
#: weights and biases.
_INTO = {
    target: (part, weight.removeprefix("W_"))
    for part, weight, _, target in MATRICES
    if weight != "W_gate"
}


@contextmanager
@torch.no_grad()
def cutting(model: TLModel, edges: Iterable[Edge], means: NodeValues) -> Iterator[None]:
    """Within the context, each edge contributes its mean: its weight is zero, and weight · mean is
    in the bias.

    For what leaves a head that is the mean of `attn.hook_z`, or if it is not known that of the
    value, which is more where a sink takes a part of the attention. Afterwards the weights are bit
    for bit what they were. `PruneError` for a model that is not one of ours: others have their
    weights in other forms.
    """
    edges = list(edges)
    if edges and not is_sparse_model(model):
        raise PruneError(
            f"edges can be cut in models of tl_sparse only, not in a {type(model).__name__}"
        )
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        for edge in edges:
            weight, bias = _entries(model, edge)
            block = f"blocks.{edge.source.layer}."
            mean = means[block + LOCATION_HOOKS[edge.source.location][0]]
            if (
                edge.source.location == "attn_v"
            ):  # what leaves a head is the value as attention mixed it
                mean = means.get(block + "attn.hook_z", mean)
            mean = mean.flatten()[edge.source.index]
            for entry, value in ((weight, torch.zeros_like(weight)), (bias, bias + weight * mean)):
                undo.append((entry, entry.clone()))
                entry.copy_(value)
        yield
    finally:
        for entry, value in reversed(undo):
            entry.copy_(value)


def bias_at(model: TLModel, node: Node) -> Float[Tensor, ""] | None:
    """The bias of a node that edges lead to; None for others, and for models without one."""
    part, name = _INTO.get(node.location, ("", ""))
    bias = (
        getattr(getattr(model.blocks[node.layer], part, None), f"b_{name}", None) if part else None
    )
    return None if bias is None else bias.detach().flatten()[node.index]


def _entries(model: TLModel, edge: Edge) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Views of the weight of an edge, and of the bias at its target."""
    part, name = _INTO[edge.target.location]
    module, weight_name = getattr(model.blocks[edge.source.layer], part), f"W_{name}"
    source, target, d_head = edge.source.index, edge.target.index, model.cfg.d_head
    if edge.source.location.endswith("_in") and source >= model.cfg.d_model:  # a positional channel
        weight_name, source = f"{weight_name}_pos", source - model.cfg.d_model
    weight, bias = getattr(module, weight_name).detach(), getattr(module, f"b_{name}").detach()
    if edge.target.location in HEAD_LOCATIONS:
        head, channel = divmod(target, d_head)
        return weight[head, source, channel], bias[head, channel]
    if edge.target.location == "attn_out":
        return weight[source // d_head, source % d_head, target], bias[target]
    return weight[source, target], bias[target]
