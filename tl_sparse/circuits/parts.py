"""The data of a circuit: its nodes and edges, and what is known about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.arguments import checked, described
from tl_sparse.circuits.fingerprints import Fingerprint
from tl_sparse.circuits.kinds import NodeKind
from tl_sparse.circuits.nodes import (
    Node,
    NodeSizes,
    indices_by_location,
    is_of_components,
    kept_nodes,
    place_at,
)
from tl_sparse.errors import ArgumentError, CircuitError, UnsupportedError
from tl_sparse.hooks import NodeMasks, NodeValues
from tl_sparse.tasks import TaskPairs


@dataclass(frozen=True, eq=False)
class CircuitParts:
    """The data of a circuit, as its files contain it; `Circuit` documents each field.

    `Circuit` checks that the fields are consistent; this class does not.
    """

    kept: NodeMasks
    means: NodeValues
    model: Fingerprint
    model_name: str = ""
    task: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    edge_set: frozenset[tuple[Node, Node]] | None = None
    scores: NodeValues = field(default_factory=dict)
    labels: dict[Node, str] = field(default_factory=dict)
    pairs: TaskPairs | None = None
    frozen_norms: bool = False

    @property
    def nodes(self) -> list[Node]:
        """The kept nodes, in the order of the forward pass."""
        return kept_nodes(self.kept)

    @property
    def node_names(self) -> tuple[str, ...]:
        """The names of the kept nodes, such as `exclude` and `include` of `PruneConfig` take."""
        return tuple(map(str, self.nodes))

    def node(self, name: str) -> Node:
        """The node of this name, kept or not.

        Args:
            name: its name, such as `0.attn_v h3.7`, its name in files (`0.attn_v.55`), or OpenAI's.

        Raises:
            CircuitError: if there is no such node at the circuit's hook points.
        """
        node = Node.parse(name, NodeSizes.of_masks(self.kept))
        hook_name = self.hooks.get((node.layer, node.location))
        if hook_name is None:
            places = ", ".join(f"{layer}.{location}" for layer, location in self.hooks)
            raise CircuitError(f"no node {name!r}: the circuit's nodes are at {places}")
        size = self.kept[hook_name].numel()
        if node.index >= size:
            raise CircuitError(
                f"no node {name!r}: the indices at {node.layer}.{node.location} run from 0 to "
                f"{size - 1}, and this one is {node.index}"
            )
        return node

    @property
    def hooks(self) -> dict[tuple[int, str], str]:
        """(layer, location) → the hook point there."""
        return {place_at(hook_name, mask): hook_name for hook_name, mask in self.kept.items()}

    @property
    def component_hooks(self) -> list[str]:
        """The hook points whose nodes are outputs of components; a mask there has the shape of the
        activation, but for a last axis of size 1.
        """
        return [name for name, mask in self.kept.items() if is_of_components(name, mask)]

    @property
    def node_kind(self) -> NodeKind:
        """Whether the nodes are "channels" or, in a component circuit, "components"."""
        return "components" if self.component_hooks else "channels"

    @property
    def n_nodes(self) -> int:
        """The number of kept nodes."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def n_candidates(self) -> int:
        """The number of all nodes at the circuit's hook points, kept or not."""
        return sum(mask.numel() for mask in self.kept.values())

    def masks_of(self, nodes: Iterable[Node]) -> dict[str, Bool[Tensor, " *node"]]:
        """Masks of these nodes, at all hook points of the circuit."""
        masks = {name: torch.zeros_like(mask) for name, mask in self.kept.items()}
        hooks = self.hooks
        for node in nodes:
            masks[hooks[node.layer, node.location]].view(-1)[node.index] = True
        return masks

    # Nodes as numbers, which run over all hook points in the order of `kept`

    def numbers_in(self, nodes: NodeMasks) -> Int[Tensor, " chosen"]:
        """The numbers of the nodes in masks at the circuit's hook points, on the CPU."""
        flat = torch.cat([nodes[name].flatten().cpu() for name in self.kept])
        return flat.nonzero()[:, 0]

    def masks_of_numbers(
        self, numbers: Int[Tensor, " chosen"] | Sequence[int]
    ) -> dict[str, Bool[Tensor, " *node"]]:
        """Masks of the nodes with these numbers, at all hook points of the circuit."""
        is_chosen = torch.zeros(self.n_candidates, dtype=torch.bool)
        is_chosen[torch.as_tensor(numbers, dtype=torch.long)] = True
        sizes = [mask.numel() for mask in self.kept.values()]
        masks = {}
        for (name, mask), part in zip(self.kept.items(), is_chosen.split(sizes), strict=True):
            masks[name] = part.view(mask.shape).to(mask.device)
        return masks

    def nodes_by_location(self) -> dict[tuple[int, str], list[int]]:
        """(layer, location) → the indices of the kept nodes there."""
        return indices_by_location(self.nodes)


@checked()
def check_channels(circuit: CircuitParts, why: str) -> None:
    """Raise `UnsupportedError` if the circuit's nodes are components.

    Args:
        why: why they cannot be, as the message says it: "a program computes each node as a number".
    """
    if circuit.node_kind == "components":
        raise UnsupportedError(
            f"{why}, and the nodes of this circuit are components, whole heads and MLPs; search "
            'for a circuit with nodes="channels"'
        )


def with_labels(circuit: CircuitParts, labels: object) -> dict[Node, str]:
    """The labels of a circuit together with these; see `Circuit.with_labels`."""
    if not isinstance(labels, Mapping):
        raise ArgumentError(
            'labels must be a mapping from nodes to texts, such as {"0.attn_v h3.7": "inside a '
            f'string"}}, not {described(labels)}'
        )
    nodes = set(circuit.nodes)
    changed = dict(circuit.labels)
    for key, label in labels.items():
        if not isinstance(label, str):
            raise CircuitError(f"the label of '{key}' must be a text, not {label!r}")
        node = key if isinstance(key, Node) else circuit.node(key)
        if label and node not in nodes:
            raise CircuitError(f"{node} is not in this circuit, so it gets no label")
        changed[node] = label
    return {node: label for node, label in changed.items() if label}
