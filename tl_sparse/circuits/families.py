"""Finding the hook points that carry a model's nodes, which differ between model families."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits.kinds import NODE_KINDS, NodeKind
from tl_sparse.circuits.nodes import (
    BLOCK_LOCATIONS,
    COMPONENT_LOCATIONS,
    LOCATIONS,
    MATRICES,
    NodeLocation,
    weight_matrices,
)
from tl_sparse.config import check
from tl_sparse.errors import HookNameError
from tl_sparse.hooks import TLModel, frozen, hooked, is_sparse_model


@checked("kind")
def node_hooks(
    model: TLModel, locations: list[str] | None = None, kind: NodeKind = "channels"
) -> dict[tuple[int, str], str]:
    """(layer, location) → hook name, for every layer, in the order of the forward pass.

    A model without MLPs has no nodes at the MLP locations. In parallel blocks, attention and MLP
    each have their own read, even if both come from the same norm. For a model that is not from
    this package, a short forward pass checks that its hook points carry the nodes.

    Args:
        locations: the names of the locations to return; by default all of them.
        kind: whether nodes are channels, or the outputs of whole heads and MLPs.

    Raises:
        ConfigError: for an unknown kind.
        HookNameError: if a location is unknown, or the model has no hook point for it, or the
            activation there does not consist of nodes.
    """
    check(kind in NODE_KINDS, "kind", kind, f"one of {', '.join(NODE_KINDS)}")
    of_kind = COMPONENT_LOCATIONS if kind == "components" else BLOCK_LOCATIONS
    known = [location.name for location in of_kind]
    for location_name in locations or ():
        if location_name not in known:
            raise HookNameError(
                f"unknown node location {location_name!r}; the locations are {', '.join(known)}"
            )
    has_mlps = not getattr(model.cfg, "attn_only", False)
    hooks = {}
    for layer in range(model.cfg.n_layers):
        for location in of_kind:
            if has_mlps or not location.name.startswith("mlp"):
                hooks[layer, location.name] = _hook_name(model, layer, location)
    if not is_sparse_model(model):
        if kind == "components":
            _check_components(model, hooks)
        else:
            _check_nodes(model, hooks)
    if locations is None:
        return hooks
    return {place: hook for place, hook in hooks.items() if place[1] in locations}


def _hook_name(model: TLModel, layer: int, location: NodeLocation) -> str:
    """The name of the first of the location's hook points that the model has."""
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


# Checking that the hook points of a model from outside this package carry nodes


@dataclass(frozen=True)
class _ProbedLayer:
    """The activations of one layer in a forward pass with substituted values at all node locations.

    Both dictionaries map a location, or `resid_pre`, `resid_post` or `attn_out`, to values of shape
    [batch, pos, node].
    """

    #: The activation that the layer computed there from the values substituted before it.
    computed: dict[str, Tensor] = field(default_factory=dict)
    #: The value substituted for it. `resid_pre` and `resid_post` have entries too, but the residual
    #: stream is not changed. Nor is `attn_out` where nodes are components.
    substituted: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def _check_nodes(model: TLModel, hooks: Mapping[tuple[int, str], str]) -> None:
    """Raise `HookNameError` unless the hook points of a model carry nodes.

    Values are substituted at all of them. They carry nodes if the activation at each location then
    depends on the earlier locations through the weights alone, and if exactly the substituted
    writes are added to the residual stream.
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
                    f"in layer {layer}, {target} is not what the weights alone compute from "
                    f"{source}",
                )
        _check_residual_stream(model, layer, probed)


def _probe(model: TLModel, hooks: Mapping[tuple[int, str], str]) -> list[_ProbedLayer]:
    """Run the model on three short sequences, with values substituted at `hooks`."""
    size = (3, min(4, model.cfg.n_ctx))
    generator = torch.Generator().manual_seed(0)
    layers = [_ProbedLayer() for _ in range(model.cfg.n_layers)]
    points = {}
    for layer, _ in hooks:
        points[layer, "resid_pre"] = f"blocks.{layer}.hook_resid_pre"
        points[layer, "resid_post"] = f"blocks.{layer}.hook_resid_post"
        points[layer, "attn_out"] = f"blocks.{layer}.hook_attn_out"
    points.update(hooks)

    def probe(place: tuple[int, str], x: Tensor, hook: object) -> Tensor | None:
        layer, location = place
        is_by_head = place in hooks and (LOCATIONS[location].is_by_head or location == "head")
        n_axes = 4 if is_by_head else 3
        if tuple(x.shape[:2]) != size or x.ndim != n_axes:
            raise _refusal(
                model,
                f"the activation at {points[place]} is {list(x.shape)}, not [batch, pos, node]",
            )
        # Copied, because models may change the residual stream in place.
        computed = x.flatten(2).to("cpu", torch.float32, copy=True)
        layers[layer].computed[location] = computed
        values = _probe_values(location, size, computed.shape[-1], generator)
        values = layers[layer].substituted.setdefault(location, values)
        return values.view(x.shape).to(x) if place in hooks else None

    device = next(model.parameters()).device
    tokens = torch.arange(size[1], device=device) + model.cfg.d_vocab // 2
    tokens = tokens.expand(size)
    probes = {name: partial(probe, place) for place, name in points.items()}
    with frozen(model), hooked(model, probes):
        model(tokens)
    for (layer, location), name in points.items():
        if location not in layers[layer].computed:
            raise _refusal(model, f"the forward pass does not run {name}")
    return layers


def _probe_values(
    location: str, size: tuple[int, int], width: int, generator: torch.Generator
) -> Tensor:
    """The values to substitute at a location, of shape [batch, pos, node]."""
    if location == "attn_in":
        # A one-hot vector at each position but the first: each selects one row of the weights.
        values = F.one_hot(torch.randint(width, size, generator=generator), width).float()
        values[:, 0] = 0.0
        return values
    # The values are equal at all positions, so that averaging them by attention changes nothing.
    # The sequences differ in scale, so that a norm, which would remove the scale, is noticed.
    n_sequences, n_pos = size
    values = torch.randn(n_sequences, 1, width, generator=generator).repeat(1, n_pos, 1)
    if location == "head":
        values[:] = values[:1]  # the sequences differ in scale alone
    factors = torch.tensor([0.0, 1.0, 3.0])
    if location in ("attn_q", "attn_k"):
        factors = torch.zeros(n_sequences)
    return values * factors[:, None, None]


def _joined_locations(
    model: TLModel, layer: int, probed: _ProbedLayer
) -> dict[tuple[str, str], Tensor]:
    """(source, target) → the sum of the weight matrices that join these two locations.

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
            f"no single matrix joins {source} to {target}, as in a mixture of experts",
        )
    return joined


def _is_equal_at_all_positions(neurons: Tensor) -> bool:
    """Whether the MLP neurons are equal at all positions, as the substituted MLP reads are."""
    change = neurons - neurons[:, :1]
    return bool(change.norm() <= 0.01 * neurons.norm())


def _is_product(probed: _ProbedLayer, source: str, target: str, weights: Tensor) -> bool:
    """Whether the activation at the target is the product of the values substituted at the source
    and the weights, up to a bias and a scale.
    """
    computed = probed.computed[target]
    # The substituted values are zero at the first position for attn_in, and in the first sequence
    # for all other locations.
    without_source = computed[:, :1] if source == "attn_in" else computed[:1]
    change = computed - without_source
    product = (probed.substituted[source].to(weights) @ weights).to(change)
    if source == "attn_in":
        # Each position has its own scale, since the norm's weights scale the rows of the matrix.
        change, product = change.flatten(0, 1), product.flatten(0, 1)
    else:
        change, product = change.flatten(), product.flatten()
    alignment = (change * product).sum(-1).abs()
    return bool((alignment >= 0.99 * change.norm(dim=-1) * product.norm(dim=-1)).all())


def _check_residual_stream(model: TLModel, layer: int, probed: _ProbedLayer) -> None:
    """Raise `HookNameError` unless a layer adds exactly the substituted writes to the stream."""
    _check_added(model, layer, probed, probed.substituted["attn_out"], "mlp_out")


@torch.no_grad()
def _check_components(model: TLModel, hooks: Mapping[tuple[int, str], str]) -> None:
    """Raise `HookNameError` unless the hook points of a model carry the outputs of components.

    Values are substituted at all of them. They carry outputs if what attention writes is a linear
    function of the values of the heads, up to a bias, and if exactly that and the substituted
    outputs of MLPs are added to the residual stream.
    """
    for layer, probed in enumerate(_probe(model, hooks)):
        written = probed.computed["attn_out"]
        # The values of the three sequences have the factors 0, 1 and 3.
        change = written[2] - written[0]
        tripled = 3 * (written[1] - written[0])
        if not (change - tripled).norm() <= 0.01 * change.norm():
            raise _refusal(
                model, f"in layer {layer}, attn_out is not a linear function of the heads' outputs"
            )
        _check_added(model, layer, probed, written, "mlp")


def _check_added(
    model: TLModel, layer: int, probed: _ProbedLayer, attn_out: Tensor, mlp: str
) -> None:
    """Raise `HookNameError` unless a layer adds to the stream what attention and the MLP write.

    Args:
        attn_out: what attention writes.
        mlp: the location at which the substituted output of the MLP is.
    """
    before = probed.computed["resid_pre"]
    after = probed.computed["resid_post"]
    unexplained = after - before - attn_out - probed.substituted.get(mlp, 0)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    if not unexplained.norm() <= 0.01 * attn_out.norm() + 2 * eps * after.norm():
        raise _refusal(
            model,
            f"in layer {layer}, the change of the residual stream is not the sum of attn_out and "
            f"{mlp}",
        )
