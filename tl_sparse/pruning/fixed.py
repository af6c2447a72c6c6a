"""Gates that a search must not move: those of nodes that are always or never used."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import CircuitError, ConfigError
from tl_sparse.hooks import NodeGates
from tl_sparse.pruning.config import PruneConfig

#: Beyond all values of τ that are learned.
_FAR = 1000.0


@dataclass(frozen=True)
class FixedGates:
    """The gates of the nodes that are always used, and of those that never are."""

    included: Bool[Tensor, " gate"]
    excluded: Bool[Tensor, " gate"]

    @classmethod
    def of_config(cls, empty: Circuit, gates: NodeGates, config: PruneConfig) -> "FixedGates":
        """The gates of the nodes that `include` and `exclude` name.

        Args:
            empty: a circuit with the hook points of the search.

        Raises:
            ConfigError: if a name is not that of a node, if a gate is shared by a node of each
                kind, or if no node is left.
        """
        included = _gates_of("include", config.include, empty, gates)
        excluded = _gates_of("exclude", config.exclude, empty, gates)
        if bool((included & excluded).any()):
            raise ConfigError("exclude and include name nodes that share a gate (tied_qk)")
        if bool(excluded.all()):
            raise ConfigError(
                f"exclude names all {len(excluded)} nodes of the model, so no circuit is possible"
            )
        return cls(included, excluded)

    @torch.no_grad()
    def apply(self, gates: NodeGates) -> None:
        """Open or close these gates, so that they rank above or below all others."""
        gates.tau[self.included] = _FAR
        gates.tau[self.excluded] = -_FAR


def _gates_of(
    field: str, names: Iterable[str], empty: Circuit, gates: NodeGates
) -> Bool[Tensor, " gate"]:
    nodes = []
    for name in names:
        try:
            nodes.append(empty.node(name))
        except CircuitError as error:
            raise ConfigError(f"{field} = {name!r} is not possible: {error}") from error
    return gates.of_nodes(empty.masks_of(nodes))
