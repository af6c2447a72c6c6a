"""The node locations of a model (Gao et al. 2025, section 2.2): where they are, and how nodes are named."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tl_sparse.errors import CircuitError, HookNameError
from tl_sparse.hooks.points import TLModel

#: Location, its hook point in layer i (after AbsTopK), OpenAI's name for it after the layer, its nodes in words; in the
#: order of the forward pass.
_LOCATIONS = (
    ("attn_in", "blocks.{}.ln1.hook_read", "attn.act_in", "read by attention"),
    ("attn_q", "blocks.{}.attn.hook_q", "attn.q", "query channels"),
    ("attn_k", "blocks.{}.attn.hook_k", "attn.k", "key channels"),
    ("attn_v", "blocks.{}.attn.hook_v", "attn.v", "value channels"),
    ("attn_out", "blocks.{}.hook_attn_out", "attn.resid_delta", "written by attention"),
    ("mlp_in", "blocks.{}.ln2.hook_read", "mlp.act_in", "read by MLP"),
    ("mlp_neuron", "blocks.{}.mlp.hook_post", "mlp.post_act", "MLP neurons"),
    ("mlp_out", "blocks.{}.hook_mlp_out", "mlp.resid_delta", "written by MLP"),
)
LOCATION_HOOKS = {name: hook for name, hook, _, _ in _LOCATIONS}
OPENAI_LOCATIONS = {name: theirs for name, _, theirs, _ in _LOCATIONS}
KINDS = {name: kind for name, _, _, kind in _LOCATIONS}
HEAD_LOCATIONS = ("attn_q", "attn_k", "attn_v")
_LOCATION_OF = {name: name for name in LOCATION_HOOKS} | {theirs: name for name, theirs in OPENAI_LOCATIONS.items()}
_LOCATION_AT = {hook: name for name, hook in LOCATION_HOOKS.items()}


@dataclass(frozen=True, order=True)
class Node:
    """One node: an entry of the activation at a location of a layer.

    `index` counts over all heads at attn_q, attn_k and attn_v (head = index // d_head), as in OpenAI's files.
    """

    layer: int
    location: str
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.location}.{self.index}"

    @property
    def hook(self) -> str:
        """The name of its hook point."""
        return LOCATION_HOOKS[self.location].format(self.layer)

    @property
    def openai_name(self) -> str:
        """The node as OpenAI writes it: `0.attn.q.5`, `0.mlp.post_act.7`."""
        return f"{self.layer}.{OPENAI_LOCATIONS[self.location]}.{self.index}"

    @classmethod
    def parse(cls, text: str) -> Node:
        """The node of that name, ours (`0.attn_q.5`) or OpenAI's (`0.attn.q.5`); `CircuitError` if there is none."""
        match = re.fullmatch(r"([0-9]{1,9})\.(.+)\.([0-9]{1,9})", text)
        if match is None or match[2] not in _LOCATION_OF:
            raise CircuitError(f"{text!r} is not a node, layer.location.index; locations are {', '.join(_LOCATION_OF)}")
        return cls(int(match[1]), _LOCATION_OF[match[2]], int(match[3]))


@dataclass(frozen=True, order=True)
class Edge:
    """A nonzero weight whose input and output nodes are both kept."""

    source: Node
    target: Node
    weight: float

    def __str__(self) -> str:
        return f"{self.source} → {self.target}  {self.weight:+.3f}"


def node_hooks(model: TLModel, locations: list[str] | None = None) -> dict[tuple[int, str], str]:
    """(layer, location) → hook name, for every layer, in the order of the forward pass.

    `HookNameError` for an unknown location, or a model without the paper's node locations.
    """
    for location in locations or ():
        if location not in LOCATION_HOOKS:
            raise HookNameError(f"unknown node location {location!r}; the locations are {', '.join(LOCATION_HOOKS)}")
    hooks = {
        (layer, location): hook.format(layer)
        for layer in range(model.cfg.n_layers)
        for location, hook in LOCATION_HOOKS.items()
        if locations is None or location in locations
    }
    if missing := [name for name in hooks.values() if name not in model.hook_dict]:
        raise HookNameError(f"{type(model).__name__} has no hook point {missing[0]!r}, so its nodes cannot be gated")
    return hooks


def node_at(hook_name: str, index: int) -> Node:
    """The node at a hook point of `LOCATION_HOOKS`."""
    _, layer, rest = hook_name.split(".", 2)
    location = _LOCATION_AT.get(f"blocks.{{}}.{rest}")
    if location is None:
        raise HookNameError(f"{hook_name!r} is not a node location; they are {', '.join(_LOCATION_AT)}")
    return Node(int(layer), location, index)
