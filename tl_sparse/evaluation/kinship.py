"""Families of circuits: what a search found again and again while it was forbidden more and more.

These are the records of `family.json`; `tl_sparse.suites.find_family` makes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_sparse.evaluation.coablation import Backups
from tl_sparse.evaluation.estimates import Estimate
from tl_sparse.evaluation.relatives import Relatedness
from tl_sparse.records import record_from

#: Why a family ends.
EXHAUSTED = "exhausted"
OUT_OF_ROUNDS = "out of rounds"
NO_CIRCUIT = "no circuit"


@dataclass(frozen=True)
class FamilySearch:
    """One search of a round.

    Attributes:
        seed: its seed.
        problem: why it found no circuit; None if it found one. The next four are then unknown.
        nodes: the names of the circuit's nodes.
        n_edges: the number of its edges.
        loss: its task loss alone on held-out pairs, in nats.
        accuracy_without: the accuracy of the model without it.
        seconds: how long the search took.
    """

    seed: int
    problem: str | None
    nodes: list[str]
    n_edges: int | None
    loss: Estimate | None
    accuracy_without: float | None
    seconds: float


@dataclass(frozen=True)
class FamilyRound:
    """The searches with the same forbidden nodes.

    Attributes:
        number: the number of the round, from 0.
        newly_forbidden: the nodes that are forbidden for the first time, or again after a round
            without circuits.
        forbidden: all nodes that are forbidden in this round, including these.
        searches: one for each seed.
        cost: the edges of its smallest circuit, divided by those of round 0. None if there is no
            circuit, or that of round 0 has no edges.
        overlap: the mean Jaccard index of the nodes of two of its circuits. Pairs of circuits
            depend on each other, so that it has no standard error. None if it has fewer than two.
    """

    number: int
    newly_forbidden: list[str]
    forbidden: list[str]
    searches: list[FamilySearch]
    cost: float | None = None
    overlap: float | None = None

    @property
    def found(self) -> list[FamilySearch]:
        """The searches that found a circuit."""
        return [search for search in self.searches if search.problem is None]

    @property
    def smallest(self) -> FamilySearch | None:
        """The search that found the circuit with the fewest edges, then nodes; None if none did."""
        return min(self.found, key=_size, default=None)


def _size(search: FamilySearch) -> tuple[int, int]:
    return search.n_edges or 0, len(search.nodes)


@dataclass(frozen=True)
class CoreCandidate:
    """A node that is in every circuit of round 0: is there a circuit without it?

    Attributes:
        node: its name.
        is_needed: whether none was found. It is then in the core.
        loss_without: the loss of the full model while this node alone is held, on selection pairs
            and by the objective of the search. If this reaches the target, the rest of the model
            is a circuit without the node, and none is searched unless the search has a limit.
        problem: why a search with this node forbidden found no circuit; None if there is one.
        n_nodes: the size of the first set of nodes without it that passes, from which nothing is
            removed; None if there was no search, or it found none.
        seconds: how long this took.
    """

    node: str
    is_needed: bool
    loss_without: Estimate
    problem: str | None
    seconds: float
    n_nodes: int | None = None


@dataclass(frozen=True)
class Family:
    """The circuits of a task in a model that a search finds while it is forbidden more and more.

    Attributes:
        model, task: their names.
        seeds: the seeds of each round.
        target_loss: the loss that each circuit had to reach on its selection pairs, in nats.
        n_model_nodes: the number of all nodes of the model.
        rounds: the rounds, in their order.
        ending: "exhausted" if nothing is left that could be forbidden: every node that the last
            circuits share is needed, or its prohibition leaves no circuit. "out of rounds" if
            there were more rounds to run, and "no circuit" if round 0 found none.
        core: the nodes that every circuit needs: those of `core_candidates` that are needed.
        core_candidates: the nodes that are in all circuits of round 0.
        needed_later: the nodes without which no circuit was found any more, given what else was
            forbidden then.
        occurrences: node → the number of circuits, of all rounds, that it is in; most first.
        overlap_within: the mean Jaccard index of two circuits of the same round.
        overlap_between: that of two circuits of different rounds. Nodes of the core are in both.
        overlap_by_chance: that of two random sets of nodes of the mean size of the circuits.
        relatedness: whether the smallest circuits of later rounds can stand in for that of round 0.
            None if there are no two rounds with circuits.
        backups: conditional co-ablation of the smallest circuit of round 0: the nodes whose effect
            grows once it is gone. None if it has no nodes.
        backups_in_later: those of its found nodes that are in circuits of later rounds.
        backups_by_chance: how many of as many random nodes outside the circuit would be.
    """

    model: str
    task: str
    seeds: list[int]
    target_loss: float
    n_model_nodes: int
    rounds: list[FamilyRound]
    ending: str
    core: list[str]
    core_candidates: list[CoreCandidate]
    needed_later: list[str]
    occurrences: dict[str, int]
    overlap_within: float | None
    overlap_between: float | None
    overlap_by_chance: float | None
    relatedness: Relatedness | None
    backups: Backups | None
    backups_in_later: list[str]
    backups_by_chance: float | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Family":
        """The inverse of `dataclasses.asdict`.

        Raises:
            DataError: if an entry is missing or has the wrong type.
        """
        return record_from(cls, values)

    @property
    def n_circuits(self) -> int:
        """The number of circuits of all rounds."""
        return sum(len(each.found) for each in self.rounds)
