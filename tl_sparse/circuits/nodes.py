"""The node locations of a model (Gao et al. 2025, section 2.2): where they are, and how nodes are
named.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import CircuitError, HookNameError
from tl_sparse.hooks import TLModel

#: Location, its hook point in a block, OpenAI's name for it after the layer, its nodes in words; in
#: the order of the forward pass. Reads: on our models (after AbsTopK), a `TransformerBridge` (after
#: the norm) and a `HookedTransformer` (before the norm's weight, where holding an entry at its mean
#: is the same).
_LOCATIONS = (
    (
        "attn_in",
        ("ln1.hook_read", "attn.hook_in", "ln1.hook_normalized"),
        "attn.act_in",
        "read by attention",
    ),
    ("attn_q", ("attn.hook_q",), "attn.q", "query channels"),
    ("attn_k", ("attn.hook_k",), "attn.k", "key channels"),
    ("attn_v", ("attn.hook_v",), "attn.v", "value channels"),
    ("attn_out", ("hook_attn_out",), "attn.resid_delta", "written by attention"),
    (
        "mlp_in",
        ("ln2.hook_read", "mlp.hook_in", "ln2.hook_normalized"),
        "mlp.act_in",
        "read by MLP",
    ),
    ("mlp_neuron", ("mlp.hook_post",), "mlp.post_act", "MLP neurons"),
    ("mlp_out", ("hook_mlp_out",), "mlp.resid_delta", "written by MLP"),
)
LOCATION_HOOKS = {name: hooks for name, hooks, _, _ in _LOCATIONS}
#: Not in a block, and nodes only where `PruneConfig.embed_gates` asks for it: what the tokens
#: write.
EMBED_LOCATION, EMBED_HOOK = "embed_out", "hook_embed"
OPENAI_LOCATIONS = {name: theirs for name, _, theirs, _ in _LOCATIONS} | {EMBED_LOCATION: "embed"}
KINDS = {name: kind for name, _, _, kind in _LOCATIONS} | {EMBED_LOCATION: "written by tokens"}
HEAD_LOCATIONS = ("attn_q", "attn_k", "attn_v")
_LOCATION_OF = {name: name for name in KINDS} | {
    theirs: name for name, theirs in OPENAI_LOCATIONS.items()
}
_LOCATION_AT = {hook: name for name, hooks in LOCATION_HOOKS.items() for hook in hooks}
#: Weight matrices that join locations of a block (METHOD §4): module, parameter, source, target.
#: From the writes to later reads there is no weight: the residual stream joins them.
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

    `index` counts over all heads at attn_q, attn_k and attn_v (head = index // d_head), as in
    OpenAI's files.
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
        """The node of that name, ours (`0.attn_q.5`) or OpenAI's (`0.attn.q.5`); `CircuitError` if
        there is none.
        """
        match = re.fullmatch(r"([0-9]{1,9})\.(.+)\.([0-9]{1,9})", text)
        if match is None or match[2] not in _LOCATION_OF:
            raise CircuitError(
                f"{text!r} is not a node, layer.location.index; locations are {', '.join(_LOCATION_OF)}"
            )
        return cls(int(match[1]), _LOCATION_OF[match[2]], int(match[3]))


@dataclass(frozen=True, order=True)
class Edge:
    """A nonzero weight whose input and output nodes are both kept."""

    source: Node
    target: Node
    weight: float

    def __str__(self) -> str:
        return f"{self.source} → {self.target}  {self.weight:+.3f}"


def node_at(hook_name: str, index: int) -> Node:
    """The node at a hook point of `LOCATION_HOOKS`."""
    if hook_name == EMBED_HOOK:
        return Node(0, EMBED_LOCATION, index)
    _, layer, point = hook_name.split(".", 2)
    if point not in _LOCATION_AT:
        raise HookNameError(
            f"{hook_name!r} is not a node location; they are, in blocks.i, {', '.join(_LOCATION_AT)}"
        )
    return Node(int(layer), _LOCATION_AT[point], index)


def weight_matrices(
    model: TLModel, layer: int
) -> Iterator[tuple[str, str, Float[Tensor, "source target"]]]:
    """Source, target and weights of each matrix that joins two locations of a layer, in the order
    of the forward pass.

    Two can be joined by several: by W_in and W_gate of a gated MLP, by W_O of all heads that share
        a value channel.
    """
    for part, weight, source, target in MATRICES:
        module: Any = getattr(model.blocks[layer], part, None)
        # A HookedTransformer's W_K repeats, for every query head, what its parameter _W_K holds
        # once.
        matrix = getattr(module, f"_{weight}", getattr(module, weight, None))
        if matrix is None:
            continue
        # Positional rows, where there are some, are below the others.
        rows = getattr(module, f"{weight}_pos", None)
        matrix = (matrix if rows is None else torch.cat([matrix, rows], dim=-2)).detach()
        if source == "attn_v":
            n_values = len(getattr(module, "_W_V", module.W_V))
            for of_one in rearrange(
                matrix, "(head shared) s t -> shared (head s) t", head=n_values
            ):
                yield source, target, of_one
        else:
            yield (
                source,
                target,
                rearrange(matrix, "h s t -> s (h t)") if matrix.ndim == 3 else matrix,
            )


def n_weights(model: TLModel) -> tuple[int, int]:
    """How many weights between nodes are not zero, and how many there are."""
    matrices = [
        matrix
        for layer in range(model.cfg.n_layers)
        for *_, matrix in weight_matrices(model, layer)
    ]
    return sum(int(matrix.count_nonzero()) for matrix in matrices), sum(
        matrix.numel() for matrix in matrices
    )


def node_label(model: TLModel, node: Node) -> str:
    """`0.attn_v head 3, channel 5`: a node with its head where it has one."""
    return f"{node.layer}.{node.location} {index_label(model, node.location, node.index)}"


def index_label(model: TLModel, location: str, index: int) -> str:
    if location in HEAD_LOCATIONS:
        head, channel = divmod(index, model.cfg.d_head)
        return f"h{head}.{channel}"
    return str(index)
