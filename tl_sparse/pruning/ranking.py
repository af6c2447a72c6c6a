"""Circuits of the nodes that a search ranks highest."""

import dataclasses

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.hooks import NodeGates
from tl_sparse.pruning.fixed import FixedGates


class Ranking:
    """Makes circuits of the nodes whose gates rank highest.

    Attributes:
        empty: a circuit of no nodes.
        gates: the gates, in the order of whose τ the nodes rank.
        fixed: those of nodes that are always or never used, which rank first and last.
        rank: the rank of each gate, from 0.
        n_included: the number of gates of nodes that are always used.
        smallest, largest: the sizes that are possible, since these are always used, others never,
            and none is larger than `max_nodes`.
    """

    def __init__(
        self,
        empty: Circuit,
        gates: NodeGates,
        fixed: FixedGates,
        max_nodes: int | None = None,
    ) -> None:
        self.empty = empty
        self.gates = gates
        self.fixed = fixed
        highest_first = gates.tau.detach().argsort(descending=True, stable=True)
        self.rank = highest_first.argsort()
        self.n_included = int(fixed.included.sum())
        self.smallest = max(1, self.n_included)
        self.largest = len(self.rank) - int(fixed.excluded.sum())
        if max_nodes is not None:
            self.largest = min(self.largest, max_nodes)

    def circuit(self, size: int) -> Circuit:
        """The circuit of the `size` highest-ranked gates."""
        return self.of_gates(self.rank < size)

    def of_gates(self, kept: Bool[Tensor, " gate"]) -> Circuit:
        """The circuit of the nodes of these gates."""
        return dataclasses.replace(self.empty, kept=self.gates.at_nodes(kept))

    def comparable_tau(self) -> Float[Tensor, " gate"]:
        """The values of τ in [-1, 1], with those of fixed gates at its ends.

        Values that were not clamped while they were learned are divided by the largest magnitude.
        """
        tau = self.gates.tau.detach().clone()
        learned = tau[~(self.fixed.included | self.fixed.excluded)]
        if len(learned):
            tau /= max(1.0, float(learned.abs().max()))
        return tau.clamp(-1, 1)
