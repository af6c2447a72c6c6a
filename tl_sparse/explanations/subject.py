"""What is explained: a circuit, its model, the data, and the expressions that are known so far."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.circuits import Circuit, Edge, Node, check_channels
from tl_sparse.errors import DataError, UnsupportedError
from tl_sparse.explanations.expressions import Expression, Ref
from tl_sparse.explanations.parsing import Vocabulary, parse
from tl_sparse.explanations.samples import Samples, draw_samples
from tl_sparse.explanations.sequences import Sequences, Values, values_of
from tl_sparse.explanations.structure import Wiring
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task

#: Of so many batches of tokens, the values of all expressions are kept.
REMEMBERED = 8


@dataclass(eq=False)
class Subject:
    """A circuit and the expressions of its nodes, in the order of the forward pass.

    Attributes:
        circuit: the circuit.
        model: its model.
        samples: the data.
        wiring: how the nodes are joined, and the names of those that have an expression.
        expressions: node → its expression.
    """

    circuit: Circuit
    model: TLModel
    samples: Samples
    wiring: Wiring
    expressions: dict[Node, Expression] = field(default_factory=dict)
    _known: list[Sequences] = field(default_factory=list)

    def under_circuit(self) -> AbstractContextManager[None]:
        """The context in which the model runs under the circuit.

        Unlike `Circuit.applied`, it does not check again that the model is the circuit's.
        """
        circuit = self.circuit
        return circuit.holding(self.model, circuit.dropped, circuit.means, self._cut)

    @cached_property
    def _cut(self) -> list[Edge]:
        return self.circuit.cut_edges(self.model)

    def give(self, node: Node, name: str, expression: Expression) -> None:
        """Note the expression of a node, to which those of later nodes may refer."""
        for sample in self.samples.all():
            sample.sequences.refs[name] = values_of(expression, sample.sequences)
        self.wiring.names[node] = name
        self._known = []
        self.expressions[node] = expression

    def parsed(self, node: Node, text: str) -> Expression:
        """The user's expression for a node, which may name earlier nodes.

        Raises:
            DataError: if it is not an expression; the message names the node.
        """
        names = []
        for other in self.circuit.nodes:
            if other == node:
                break
            if other in self.wiring.names:
                names.append(self.wiring.names[other])
        return parse_for(node, text, self.samples.vocabulary, names)

    def values_on(self, tokens: Int[Tensor, "seq pos"]) -> dict[Node, Values]:
        """The values of all expressions on other tokens, which may share memory."""
        sequences = self.sequences_of(tokens)
        return {node: sequences.refs[self.wiring.names[node]] for node in self.expressions}

    def sequences_of(self, tokens: Int[Tensor, "seq pos"]) -> Sequences:
        """Other tokens, with the values of all expressions; the last few are remembered."""
        tokens = tokens.cpu()
        for known in self._known:
            if torch.equal(known.tokens, tokens):
                return known
        sequences = Sequences(
            tokens, torch.ones_like(tokens, dtype=torch.bool), self.samples.vocabulary
        )
        for node, expression in self.expressions.items():
            sequences.refs[self.wiring.names[node]] = values_of(expression, sequences)
        self._known = [*self._known[-REMEMBERED + 1 :], sequences]
        return sequences

    def whole_size(self, expression: Expression) -> int:
        """The size of an expression with the expressions of all nodes that it names written out."""
        nodes = {name: node for node, name in self.wiring.names.items()}
        size = expression.size
        for part in expression.walk():
            if isinstance(part, Ref):
                size += self.whole_size(self.expressions[nodes[part.name]]) - 1
        return size


def parse_for(node: Node, text: str, vocabulary: Vocabulary, names: list[str] | None) -> Expression:
    """The user's expression for a node; see `parse`.

    Raises:
        DataError: if it is not an expression; the message names the node.
    """
    try:
        return parse(text, vocabulary, names)
    except DataError as error:
        raise DataError(f"the expression of {node}: {error}") from error


def subject_of(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None,
    corpus: Int[Tensor, "seq pos"] | None,
    seed: int,
) -> Subject:
    """Check that the circuit can be explained, and run it on the data.

    Raises:
        CircuitError: if the circuit is of another model, or has no means.
        UnsupportedError: if its nodes are components, if it has `frozen_norms`, or if positions
            attend to later ones.
        CircuitError, TaskError, DataError, TokenizerError: if there are not two pairs of prompts.
    """
    circuit.check_model(model)
    circuit.check_means()
    check_channels(circuit, "an expression is the value of a node at each position")
    if circuit.frozen_norms:
        raise UnsupportedError(
            "this circuit runs with the norm scales of the full model, so its nodes depend on more "
            "than the nodes they read, and expressions cannot stand for them"
        )
    samples = draw_samples(circuit, model, task, corpus, seed)
    edges: dict[Node, list[Edge]] = {}
    for edge in circuit.edges(model):
        edges.setdefault(edge.target, []).append(edge)
    return Subject(circuit, model, samples, Wiring(circuit, model, edges, {}))
