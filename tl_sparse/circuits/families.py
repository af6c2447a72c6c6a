"""The node locations that a model has, by the family of its architecture."""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_sparse.circuits.nodes import HEAD_LOCATIONS, LOCATION_HOOKS, MATRICES, weight_matrices
from tl_sparse.errors import HookNameError
from tl_sparse.hooks import TLModel, frozen, hooked, is_sparse_model


def node_hooks(model: TLModel, locations: list[str] | None = None) -> dict[tuple[int, str], str]:
    """(layer, location) → hook name, for every layer, in the order of the forward pass.

    A model without MLPs has no nodes there. In parallel blocks attention and MLP have a read each,
    also where one norm makes both. If the model is not ours, a short run shows whether its hook
    points carry the nodes.

    Raises:
        HookNameError: for an unknown location, and for a model that lacks one, or in which it is
            something else.
    """
    for location in locations or ():
        if location not in LOCATION_HOOKS:
            raise HookNameError(
                f"unknown node location {location!r}; the locations are {', '.join(LOCATION_HOOKS)}"
            )
    existing, hooks = model.hook_dict, dict[tuple[int, str], str]()
    for layer, (location, points) in itertools.product(
        range(model.cfg.n_layers), LOCATION_HOOKS.items()
    ):
        if location.startswith("mlp") and getattr(model.cfg, "attn_only", False):
            continue
        names = [f"blocks.{layer}.{point}" for point in points]
        if not (found := [name for name in names if name in existing]):
            raise _refusal(model, f"it has no hook point {' or '.join(names)}")
        hooks[layer, location] = found[0]
    if not is_sparse_model(model):
        _check(model, hooks)
    return {
        place: hook for place, hook in hooks.items() if locations is None or place[1] in locations
    }


def _refusal(model: TLModel, why: str) -> HookNameError:
    names = (
        getattr(model.cfg, name, None)
        for name in ("architecture", "original_architecture", "model_name")
    )
    return HookNameError(
        f"nodes of {next(filter(None, names), 'a')} ({type(model).__name__}) cannot be gated: {why}"
    )


@torch.no_grad()
def _check(model: TLModel, hooks: Mapping[tuple[int, str], str]) -> None:
    """Raise `HookNameError` unless the hook points of a stock model carry nodes (METHOD §4): with
    values of ours put in at all of them, each is what the weights alone make of those before it,
    and the stream gets what is written.
    """
    if re.search("solu|_ln$", str(model.cfg.act_fn)):
        raise _refusal(model, f"{model.cfg.act_fn} mixes MLP neurons")
    seen, put = dict[tuple[int, str], Tensor](), dict[tuple[int, str], Tensor]()
    generator, size, weight = (
        torch.Generator().manual_seed(0),
        (3, min(4, model.cfg.n_ctx)),
        next(model.parameters()),
    )

    def probe(place: tuple[int, str], x: Tensor, hook: object) -> Tensor | None:
        if x.shape[:2] != size or x.ndim != 3 + (place[1] in HEAD_LOCATIONS):
            raise _refusal(
                model,
                f"the activation at {points[place]} is {list(x.shape)}, not [batch, pos, node]",
            )
        seen[place] = x.flatten(2).to(
            "cpu", torch.float32, copy=True
        )  # a copy, since models add in place
        width = seen[place].shape[-1]
        if (
            place[1] == "attn_in"
        ):  # one entry at each position but the first: it shows its row of the weights
            values = F.one_hot(torch.randint(width, size, generator=generator), width).float()
            values[:, 0] = 0.0
        else:  # the same at all positions, in sizes that a norm would make equal; equal attention
            values = torch.randn(3, 1, width, generator=generator).repeat(1, size[1], 1)
            values *= torch.tensor([0.0, 1.0, 3.0])[:, None, None] * (
                place[1] not in ("attn_q", "attn_k")
            )
        return put.setdefault(place, values).view(x.shape).to(x) if place in hooks else None

    points = {
        (i, at): f"blocks.{i}.hook_{at}" for i, _ in hooks for at in ("resid_pre", "resid_post")
    } | dict(hooks)
    with (
        frozen(model),
        hooked(model, {name: partial(probe, place) for place, name in points.items()}),
    ):
        model((torch.arange(size[1]) + model.cfg.d_vocab // 2).expand(size).to(weight.device))
    if silent := [name for place, name in points.items() if place not in seen]:
        raise _refusal(model, f"nothing passes {silent[0]}")
    for layer in range(model.cfg.n_layers):
        x, given = (
            {at: v for (i, at), v in values.items() if i == layer} for values in (seen, put)
        )
        joined = defaultdict[tuple[str, str], Any](float)
        for source, target, matrix in weight_matrices(model, layer):
            if matrix.shape != (x[source].shape[-1], x[target].shape[-1]):
                raise _refusal(
                    model, f"the weights from {source} to {target} are {list(matrix.shape)}"
                )
            joined[source, target] += matrix
        if (
            missing := {(source, target) for *_, source, target in MATRICES if source in x}
            - joined.keys()
        ):
            raise _refusal(
                model,
                f"no one matrix leads from {' to '.join(min(missing))}, as with a mixture of experts",
            )
        for (source, target), weights in joined.items():
            change = x[target] - (x[target][:, :1] if source.endswith("in") else x[target][:1])
            sound = change.norm() <= 0.01 * x[target].norm()
            if (
                target != "mlp_neuron"
            ):  # rows one by one, since a norm's weights scale them; writes all together
                pair = torch.stack([change, (given[source].to(weights) @ weights).to(change)])
                a, b = pair.flatten(1, 2 if source == "attn_in" else 3)
                sound = ((a * b).sum(-1).abs() >= 0.99 * a.norm(dim=-1) * b.norm(dim=-1)).all()
            if not sound:
                raise _refusal(
                    model,
                    f"in layer {layer}, {target} is not what the weights alone make of {source}",
                )
        wrong = x["resid_post"] - x["resid_pre"] - given["attn_out"] - given.get("mlp_out", 0)
        rounding = 2 * torch.finfo(weight.dtype).eps * x["resid_post"].norm()
        if not wrong.norm() <= 0.01 * given["attn_out"].norm() + rounding:
            raise _refusal(
                model,
                f"in layer {layer}, the residual stream gets more or less than what is written",
            )
