"""The node locations of a model (Gao et al. 2025, section 2.2): where they are, and how nodes are named."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import CircuitError, HookNameError
from tl_sparse.hooks import TLModel, frozen, hooked

#: Location, its hook point in a block, OpenAI's name for it after the layer, its nodes in words; in the order of the
#: forward pass. Reads: on our models (after AbsTopK), a `TransformerBridge` (after the norm) and a `HookedTransformer`
#: (before the norm's weight, where holding an entry at its mean is the same).
_LOCATIONS = (
    ("attn_in", ("ln1.hook_read", "attn.hook_in", "ln1.hook_normalized"), "attn.act_in", "read by attention"),
    ("attn_q", ("attn.hook_q",), "attn.q", "query channels"),
    ("attn_k", ("attn.hook_k",), "attn.k", "key channels"),
    ("attn_v", ("attn.hook_v",), "attn.v", "value channels"),
    ("attn_out", ("hook_attn_out",), "attn.resid_delta", "written by attention"),
    ("mlp_in", ("ln2.hook_read", "mlp.hook_in", "ln2.hook_normalized"), "mlp.act_in", "read by MLP"),
    ("mlp_neuron", ("mlp.hook_post",), "mlp.post_act", "MLP neurons"),
    ("mlp_out", ("hook_mlp_out",), "mlp.resid_delta", "written by MLP"),
)
LOCATION_HOOKS = {name: hooks for name, hooks, _, _ in _LOCATIONS}
#: Not in a block, and nodes only where `PruneConfig.embed_gates` asks for it: what the tokens write.
EMBED_LOCATION, EMBED_HOOK = "embed_out", "hook_embed"
OPENAI_LOCATIONS = {name: theirs for name, _, theirs, _ in _LOCATIONS} | {EMBED_LOCATION: "embed"}
KINDS = {name: kind for name, _, _, kind in _LOCATIONS} | {EMBED_LOCATION: "written by tokens"}
HEAD_LOCATIONS = ("attn_q", "attn_k", "attn_v")
_LOCATION_OF = {name: name for name in KINDS} | {theirs: name for name, theirs in OPENAI_LOCATIONS.items()}
_LOCATION_AT = {hook: name for name, hooks in LOCATION_HOOKS.items() for hook in hooks}
#: Weight matrices that join locations of a block (METHOD §4): module, parameter, source, target. From the writes to
#: later reads there is no weight: the residual stream joins them.
MATRICES = (
    ("attn", "W_Q", "attn_in", "attn_q"),
    ("attn", "W_K", "attn_in", "attn_k"),
    ("attn", "W_V", "attn_in", "attn_v"),
    ("attn", "W_O", "attn_v", "attn_out"),
    ("mlp", "W_in", "mlp_in", "mlp_neuron"),
    ("mlp", "W_gate", "mlp_in", "mlp_neuron"),
    ("mlp", "W_out", "mlp_neuron", "mlp_out"),
)


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
    def openai_name(self) -> str:
        """The node as OpenAI writes it: `0.attn.q.5`, `0.mlp.post_act.7`."""
        return f"{self.layer}.{OPENAI_LOCATIONS[self.location]}.{self.index}"

    @classmethod
    def parse(cls, text: str) -> "Node":
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

    A model without MLPs has no nodes there. In parallel blocks attention and MLP have a read each, also where one norm
    makes both. If the model is not ours, a short run shows whether its hook points carry the nodes.

    Raises:
        HookNameError: for an unknown location, and for a model that lacks one, or in which it is something else.
    """
    for location in locations or ():
        if location not in LOCATION_HOOKS:
            raise HookNameError(f"unknown node location {location!r}; the locations are {', '.join(LOCATION_HOOKS)}")
    existing, hooks = model.hook_dict, dict[tuple[int, str], str]()
    for layer, (location, points) in itertools.product(range(model.cfg.n_layers), LOCATION_HOOKS.items()):
        if location.startswith("mlp") and getattr(model.cfg, "attn_only", False):
            continue
        names = [f"blocks.{layer}.{point}" for point in points]
        if not (found := [name for name in names if name in existing]):
            raise _refusal(model, f"it has no hook point {' or '.join(names)}")
        hooks[layer, location] = found[0]
    if not hasattr(model, "sparse_cfg"):
        _check(model, hooks)
    return {place: hook for place, hook in hooks.items() if locations is None or place[1] in locations}


def node_at(hook_name: str, index: int) -> Node:
    """The node at a hook point of `LOCATION_HOOKS`."""
    if hook_name == EMBED_HOOK:
        return Node(0, EMBED_LOCATION, index)
    _, layer, point = hook_name.split(".", 2)
    if point not in _LOCATION_AT:
        raise HookNameError(f"{hook_name!r} is not a node location; they are, in blocks.i, {', '.join(_LOCATION_AT)}")
    return Node(int(layer), _LOCATION_AT[point], index)


def weight_matrices(model: TLModel, layer: int) -> Iterator[tuple[str, str, Float[Tensor, "source target"]]]:
    """Source, target and weights of each matrix that joins two locations of a layer, in the order of the forward pass.

    Two can be joined by several: by W_in and W_gate of a gated MLP, by W_O of all heads that share a value channel.
    """
    for part, weight, source, target in MATRICES:
        module: Any = getattr(model.blocks[layer], part, None)
        # A HookedTransformer's W_K repeats, for every query head, what its parameter _W_K holds once.
        matrix = getattr(module, f"_{weight}", getattr(module, weight, None))
        if matrix is None:
            continue
        # Positional rows, where there are some, are below the others.
        rows = getattr(module, f"{weight}_pos", None)
        matrix = (matrix if rows is None else torch.cat([matrix, rows], dim=-2)).detach()
        if source == "attn_v":
            n_values = len(getattr(module, "_W_V", module.W_V))
            for of_one in rearrange(matrix, "(head shared) s t -> shared (head s) t", head=n_values):
                yield source, target, of_one
        else:
            yield source, target, rearrange(matrix, "h s t -> s (h t)") if matrix.ndim == 3 else matrix


def n_weights(model: TLModel) -> tuple[int, int]:
    """How many weights between nodes are not zero, and how many there are."""
    matrices = [matrix for layer in range(model.cfg.n_layers) for *_, matrix in weight_matrices(model, layer)]
    return sum(int(matrix.count_nonzero()) for matrix in matrices), sum(matrix.numel() for matrix in matrices)


def _refusal(model: TLModel, why: str) -> HookNameError:
    names = (getattr(model.cfg, name, None) for name in ("architecture", "original_architecture", "model_name"))
    return HookNameError(f"nodes of {next(filter(None, names), 'a')} ({type(model).__name__}) cannot be gated: {why}")


@torch.no_grad()
def _check(model: TLModel, hooks: Mapping[tuple[int, str], str]) -> None:
    """Raise `HookNameError` unless the hook points of a stock model carry nodes (METHOD §4): with values of ours put in
    at all of them, each is what the weights alone make of those before it, and the stream gets what is written."""
    if re.search("solu|_ln$", str(model.cfg.act_fn)):
        raise _refusal(model, f"{model.cfg.act_fn} mixes MLP neurons")
    seen, put = dict[tuple[int, str], Tensor](), dict[tuple[int, str], Tensor]()
    generator, size, weight = torch.Generator().manual_seed(0), (3, min(4, model.cfg.n_ctx)), next(model.parameters())

    def probe(place: tuple[int, str], x: Tensor, hook: object) -> Tensor | None:
        if x.shape[:2] != size or x.ndim != 3 + (place[1] in HEAD_LOCATIONS):
            raise _refusal(model, f"the activation at {points[place]} is {list(x.shape)}, not [batch, pos, node]")
        seen[place] = x.flatten(2).to("cpu", torch.float32, copy=True)  # a copy, since models add in place
        width = seen[place].shape[-1]
        if place[1] == "attn_in":  # one entry at each position but the first: it shows its row of the weights
            values = F.one_hot(torch.randint(width, size, generator=generator), width).float()
            values[:, 0] = 0.0
        else:  # the same at all positions, in sizes that a norm would make equal; equal attention
            values = torch.randn(3, 1, width, generator=generator).repeat(1, size[1], 1)
            values *= torch.tensor([0.0, 1.0, 3.0])[:, None, None] * (place[1] not in ("attn_q", "attn_k"))
        return put.setdefault(place, values).view(x.shape).to(x) if place in hooks else None

    points = {(i, at): f"blocks.{i}.hook_{at}" for i, _ in hooks for at in ("resid_pre", "resid_post")} | dict(hooks)
    with frozen(model), hooked(model, {name: partial(probe, place) for place, name in points.items()}):
        model((torch.arange(size[1]) + model.cfg.d_vocab // 2).expand(size).to(weight.device))
    if silent := [name for place, name in points.items() if place not in seen]:
        raise _refusal(model, f"nothing passes {silent[0]}")
    for layer in range(model.cfg.n_layers):
        x, given = ({at: v for (i, at), v in values.items() if i == layer} for values in (seen, put))
        joined = defaultdict[tuple[str, str], Any](float)
        for source, target, matrix in weight_matrices(model, layer):
            if matrix.shape != (x[source].shape[-1], x[target].shape[-1]):
                raise _refusal(model, f"the weights from {source} to {target} are {list(matrix.shape)}")
            joined[source, target] += matrix
        if missing := {(source, target) for *_, source, target in MATRICES if source in x} - joined.keys():
            raise _refusal(model, f"no one matrix leads from {' to '.join(min(missing))}, as with a mixture of experts")
        for (source, target), weights in joined.items():
            change = x[target] - (x[target][:, :1] if source.endswith("in") else x[target][:1])
            sound = change.norm() <= 0.01 * x[target].norm()
            if target != "mlp_neuron":  # rows one by one, since a norm's weights scale them; writes all together
                pair = torch.stack([change, (given[source].to(weights) @ weights).to(change)])
                a, b = pair.flatten(1, 2 if source == "attn_in" else 3)
                sound = ((a * b).sum(-1).abs() >= 0.99 * a.norm(dim=-1) * b.norm(dim=-1)).all()
            if not sound:
                raise _refusal(model, f"in layer {layer}, {target} is not what the weights alone make of {source}")
        wrong = x["resid_post"] - x["resid_pre"] - given["attn_out"] - given.get("mlp_out", 0)
        rounding = 2 * torch.finfo(weight.dtype).eps * x["resid_post"].norm()
        if not wrong.norm() <= 0.01 * given["attn_out"].norm() + rounding:
            raise _refusal(model, f"in layer {layer}, the residual stream gets more or less than what is written")
