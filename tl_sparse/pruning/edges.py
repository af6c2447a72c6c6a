"""Cutting the edges that a circuit does not need."""

from collections.abc import Collection, Sequence

from tl_sparse.circuits import Circuit, Edge, joined_nodes
from tl_sparse.errors import counted
from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.adversaries import n_attacks, succeeding_attack
from tl_sparse.pruning.criterion import Criterion, evenly, representative
from tl_sparse.pruning.elimination import eliminate
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.repair import MOST_REPAIRS, MOST_ROUNDS, mend, repaired
from tl_sparse.tasks import TaskData

#: Each time, so many of the edges that were cut are tried, and the best one is put back.
_EDGES_TRIED = 64


def without_superfluous_edges(
    circuit: Circuit,
    criterion: Criterion,
    train: TaskData,
    selection: TaskData,
    progress: bool,
) -> Circuit:
    """The circuit without the edges that it does not need, and the nodes that they alone joined.

    The edge with the least effect is tried first. If the circuit must be robust, it is at last
    attacked by fresh adversaries, or tried under fresh subsets, and gets back the edges that it
    needs there.
    """
    cuts = CutEdges(circuit, criterion)
    some_pairs = representative(circuit, criterion, selection)
    effects = {}
    with phase("measuring edges", progress, len(cuts.edges), "edge") as bar:
        for edge in cuts.edges:
            effects[edge] = criterion.loss(cuts.without([edge]), some_pairs)
            bar.update()
    with phase("removing edges", progress, len(cuts.edges), "edge") as bar:
        cut = eliminate(
            sorted(cuts.edges, key=effects.__getitem__),
            lambda cut: criterion.passes_quickly(cuts.without(cut), some_pairs),
            lambda cut: criterion.passes(cuts.without(cut), selection),
            bar.update,
        )
        bar.set_postfix_str(f"{counted(len(cuts.edges) - len(cut), 'edge')} left")
    cuts.cut(cut)
    tried_on = evenly(selection, criterion.config.subset_pairs)
    first_attack = n_attacks(criterion.config)  # those before are of the search for its nodes
    for attack in range(first_attack, 2 * first_attack):
        subset = succeeding_attack(cuts.circuit, criterion, train, selection, attack, progress)
        if subset is not None:
            criterion.add(subset)
            with phase("putting edges back", progress) as bar:
                mend(cuts, subset, criterion, tried_on, bar)
    # The rounds before are those of the search for its nodes.
    return repaired(cuts, criterion, selection, MOST_REPAIRS * MOST_ROUNDS, progress)


class CutEdges:
    """Edges that are cut in a circuit and can be put back; see `Additions`.

    Attributes:
        edges: the edges of the circuit in which none is cut.
        circuit: the circuit without those that are cut, and the nodes that they alone joined.
        n_added: the number of edges that were put back.
    """

    def __init__(self, circuit: Circuit, criterion: Criterion) -> None:
        self.circuit = circuit
        self.edges = circuit.edges(criterion.model)
        self.n_added = 0
        self._uncut = circuit
        self._model = criterion.model
        self._always = {circuit.node(name) for name in criterion.config.include}
        self._cut: list[Edge] = []

    def without(self, cut: Collection[Edge]) -> Circuit:
        """The circuit with these edges cut, and no others.

        Nodes that are always used stay, also without edges.
        """
        smaller = self._uncut.without(cut, self._model)
        still_joined = joined_nodes(set(self.edges).difference(cut))
        alone = joined_nodes(cut) - still_joined - self._always
        return smaller.without(alone, self._model)

    def cut(self, edges: Sequence[Edge]) -> None:
        """Cut these edges, of which the first have the least effect."""
        self._cut = list(edges)
        self.circuit = self.without(self._cut)

    def candidates(self, subset: NodeMasks) -> list[Edge]:
        """The edges that were cut last, whatever the subset."""
        return self._cut[-_EDGES_TRIED:]

    def circuit_with(self, part: Edge) -> Circuit:
        """The circuit with this edge too."""
        return self.without([edge for edge in self._cut if edge != part])

    def add(self, part: Edge) -> None:
        """Put this edge back."""
        self._cut.remove(part)
        self.circuit = self.without(self._cut)
        self.n_added += 1
