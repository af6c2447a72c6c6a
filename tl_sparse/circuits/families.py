"""The hook points that carry the nodes of a model, by the family of its architecture."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_sparse.circuits.nodes import (
    BLOCK_LOCATIONS,
    LOCATIONS,
    MATRICES,
    NodeLocation,
    weight_matrices,
)
from tl_sparse.errors import HookNameError
from tl_sparse.hooks import TLModel, frozen, hooked, is_sparse_model


def node_hooks(model: TLModel, locations: list[str] | None = None) -> dict[tuple[int, str], str]:
    """(layer, location) → hook name, for every layer, in the order of the forward pass.

    A model without MLPs has no nodes there. In parallel blocks attention and MLP have a read each,
    even where one norm makes both. For a model that is not of this package, a short run shows
    whether its hook points carry the nodes.

    Args:
        locations: the names of those that are wanted; by default, all.

    Raises:
        HookNameError: for an unknown location, and for a model that lacks a location or has
            something else there.
    """
    known = [location.name for location in BLOCK_LOCATIONS]
    for location_name in locations or ():
        if location_name not in known:
            raise HookNameError(
                f"unknown node location {location_name!r}; the locations are {', '.join(known)}"
            )
    has_mlps = not getattr(model.cfg, "attn_only", False)
    hooks = {}
    for layer in range(model.cfg.n_layers):
        for location in BLOCK_LOCATIONS:
            if has_mlps or not location.name.startswith("mlp"):
                hooks[layer, location.name] = _hook_name(model, layer, location)
    if not is_sparse_model(model):
        _check_nodes(model, hooks)
    if locations is None:
        return hooks
    return {place: hook for place, hook in hooks.items() if place[1] in locations}


def _hook_name(model: TLModel, layer: int, location: NodeLocation) -> str:
    """The first of a location's hook points that the model has."""
    names = [f"blocks.{layer}.{point}" for point in location.hook_points]
    for name in names:
        if name in model.hook_dict:
            return name
    raise _refusal(model, f"it has no hook point {' or '.join(names)}")


def _refusal(model: TLModel, reason: str) -> HookNameError:
    """The error for a model whose hook points do not carry nodes."""
    family = "a"
    for field_name in ("architecture", "original_architecture", "model_name"):
        value = getattr(model.cfg, field_name, None)
        if value:
            family = value
            break
    return HookNameError(f"nodes of {family} ({type(model).__name__}) cannot be gated: {reason}")


# Do the hook points of a model that is not of this package carry nodes?


@dataclass(frozen=True)
class _ProbedLayer:
    """What a run showed of one layer, in which we put values of our own in at all node locations.

    Both map a location, or `resid_pre` or `resid_post`, to values of shape [batch, pos, node].
    """

    #: What the layer computed there, from what was put in before.
    computed: dict[str, Tensor] = field(default_factory=dict)
    #: What was put in instead. (The residual stream has an entry, but is left as it is.)
    put_in: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def _check_nodes(model: TLModel, hooks: Mapping[tuple[int, str], str]) -> None:
    """Raise `HookNameError` unless the hook points of a model carry nodes.

    They do if, with values of our own put in at all of them, each location is what the weights
    alone make of the locations before it, and the residual stream gets exactly what is written.
    """
    if re.search("solu|_ln$", str(model.cfg.act_fn)):
        raise _refusal(model, f"{model.cfg.act_fn} mixes MLP neurons")
    for layer, probed in enumerate(_probe(model, hooks)):
        for (source, target), weights in _joined_locations(model, layer, probed).items():
            if target == "mlp_neuron":
                is_sound = _is_equal_at_all_positions(probed.computed[target])
            else:
                is_sound = _is_product(probed, source, target, weights)
            if not is_sound:
                raise _refusal(
                    model,
                    f"in layer {layer}, {target} is not what the weights alone make of {source}",
                )
        _check_residual_stream(model, layer, probed)


def _probe(model: TLModel, hooks: Mapping[tuple[int, str], str]) -> list[_ProbedLayer]:
    """Run the model on three short sequences, with values of our own put in at `hooks`."""
    size = (3, min(4, model.cfg.n_ctx))
    generator = torch.Generator().manual_seed(0)
    layers = [_ProbedLayer() for _ in range(model.cfg.n_layers)]
    points = {}
    for layer, _ in hooks:
        points[layer, "resid_pre"] = f"blocks.{layer}.hook_resid_pre"
        points[layer, "resid_post"] = f"blocks.{layer}.hook_resid_post"
    points.update(hooks)

    def probe(place: tuple[int, str], x: Tensor, hook: object) -> Tensor | None:
        layer, location = place
        is_by_head = place in hooks and LOCATIONS[location].is_by_head
        n_axes = 4 if is_by_head else 3
        if tuple(x.shape[:2]) != size or x.ndim != n_axes:
            raise _refusal(
                model,
                f"the activation at {points[place]} is {list(x.shape)}, not [batch, pos, node]",
            )
        # A copy, since models add in place.
        computed = x.flatten(2).to("cpu", torch.float32, copy=True)
        layers[layer].computed[location] = computed
        values = _probe_values(location, size, computed.shape[-1], generator)
        values = layers[layer].put_in.setdefault(location, values)
        return values.view(x.shape).to(x) if place in hooks else None

    tokens = torch.arange(size[1]) + model.cfg.d_vocab // 2
    tokens = tokens.expand(size).to(next(model.parameters()).device)
    probes = {name: partial(probe, place) for place, name in points.items()}
    with frozen(model), hooked(model, probes):
        model(tokens)
    for (layer, location), name in points.items():
        if location not in layers[layer].computed:
            raise _refusal(model, f"nothing passes {name}")
    return layers


def _probe_values(
    location: str, size: tuple[int, int], width: int, generator: torch.Generator
) -> Tensor:
    """What is put in at a location: values of shape [batch, pos, node]."""
    if location == "attn_in":
        # One entry at each position but the first: it shows its row of the weights.
        values = F.one_hot(torch.randint(width, size, generator=generator), width).float()
        values[:, 0] = 0.0
        return values
    # The same at all positions, so that attention, which is equal everywhere, changes nothing; and
    # in sizes that a norm would make equal.
    n_sequences, n_pos = size
    values = torch.randn(n_sequences, 1, width, generator=generator).repeat(1, n_pos, 1)
    factors = torch.tensor([0.0, 1.0, 3.0])
    if location in ("attn_q", "attn_k"):
        factors = torch.zeros(n_sequences)
    return values * factors[:, None, None]


def _joined_locations(
    model: TLModel, layer: int, probed: _ProbedLayer
) -> dict[tuple[str, str], Tensor]:
    """(source, target) → the sum of the weight matrices that join them.

    Raises:
        HookNameError: if a matrix does not fit the locations that it joins, or is missing.
    """
    joined: dict[tuple[str, str], Tensor] = {}
    for source, target, weights in weight_matrices(model, layer):
        expected = (probed.computed[source].shape[-1], probed.computed[target].shape[-1])
        if weights.shape != expected:
            raise _refusal(
                model, f"the weights from {source} to {target} are {list(weights.shape)}"
            )
        if (source, target) in joined:
            weights = joined[source, target] + weights
        joined[source, target] = weights
    needed = {(m.source, m.target) for m in MATRICES if m.source in probed.computed}
    missing = needed - joined.keys()
    if missing:
        source, target = min(missing)
        raise _refusal(
            model,
            f"no one matrix leads from {source} to {target}, as with a mixture of experts",
        )
    return joined


def _is_equal_at_all_positions(neurons: Tensor) -> bool:
    """Whether MLP neurons depend on the MLP's read alone, which was the same at all positions."""
    change = neurons - neurons[:, :1]
    return bool(change.norm() <= 0.01 * neurons.norm())


def _is_product(probed: _ProbedLayer, source: str, target: str, weights: Tensor) -> bool:
    """Whether the target is, up to a bias and a scale, what was put in at the source times the
    weights.
    """
    computed = probed.computed[target]
    # Zeros were put in at the first position of reads, and in the first sequence of all others.
    without_source = computed[:, :1] if source == "attn_in" else computed[:1]
    change = computed - without_source
    product = (probed.put_in[source].to(weights) @ weights).to(change)
    if source == "attn_in":
        # Each position has a scale of its own, since a norm's weights scale the rows of the matrix.
        change, product = change.flatten(0, 1), product.flatten(0, 1)
    else:
        change, product = change.flatten(), product.flatten()
    alignment = (change * product).sum(-1).abs()
    return bool((alignment >= 0.99 * change.norm(dim=-1) * product.norm(dim=-1)).all())


def _check_residual_stream(model: TLModel, layer: int, probed: _ProbedLayer) -> None:
    """Raise `HookNameError` unless a layer adds what was put in as its writes, and nothing else."""
    before = probed.computed["resid_pre"]
    after = probed.computed["resid_post"]
    attn_out = probed.put_in["attn_out"]
    unexplained = after - before - attn_out - probed.put_in.get("mlp_out", 0)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    if not unexplained.norm() <= 0.01 * attn_out.norm() + 2 * eps * after.norm():
        raise _refusal(
            model, f"in layer {layer}, the residual stream gets more or less than what is written"
        )
