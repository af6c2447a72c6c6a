"""What the drawings of a circuit show: its nodes, its tokens and answers, and what joins them."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.description import recorded_losses
from tl_sparse.circuits.ends import (
    TaskEnds,
    has_bigram_table,
    residual_joins,
    task_ends,
    why_no_nodes,
)
from tl_sparse.circuits.nodes import Node
from tl_sparse.circuits.task import circuit_task
from tl_sparse.errors import CircuitError, DataError, TaskError, TokenizerError, counted
from tl_sparse.hooks import TLModel
from tl_sparse.parsing import printable
from tl_sparse.tasks import Task

LinkKind = Literal["edge", "embedding", "unembedding", "stream"]
#: The text of a token is shortened to this length.
TOKEN_CHARS = 24


@dataclass(frozen=True)
class Token:
    """A token of the task, from which the circuit reads, or an answer, whose logit it writes."""

    id: int
    text: str
    is_answer: bool = False


@dataclass(frozen=True)
class Link:
    """A line of the drawing, from what is computed first to what is computed from it.

    Attributes:
        source, target: what it joins.
        kind: an edge of the circuit; an entry of the embedding, or of the unembedding; or the
            residual stream, from a write to a later read of the same channel.
        weight: None for the residual stream.
    """

    source: Node | Token
    target: Node | Token
    kind: LinkKind
    weight: float | None = None

    @property
    def text(self) -> str:
        """The weight or, for the residual stream, the name of the channel."""
        if self.weight is not None:
            return f"{self.weight:+.2f}"
        return f"channel {self.source.index}" if isinstance(self.source, Node) else ""


@dataclass(frozen=True)
class Diagram:
    """A circuit as its drawings show it.

    Attributes:
        title: lines with the task, the model, the sizes and, where they are measured, the losses.
        nodes: the nodes, in the order of the forward pass.
        labels: the user's own words for nodes, without characters that break lines.
        tokens: the tokens that bring something to a channel that is read.
        answers: the two answers; none if the task or the tokenizer is not known.
        links: what joins them.
        notes: what is left out, and why.
    """

    title: list[str]
    nodes: list[Node]
    labels: dict[Node, str] = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)
    answers: list[Token] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def diagram(
    circuit: Circuit, model: TLModel, task: Task | str | None = None, most: int | None = None
) -> Diagram:
    """The circuit as its drawings show it.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the tokens and answers; by default the circuit's own, if it is known and
            fits the model's tokenizer. Otherwise they are left out, and a note says why.
        most: the largest number of edges. Of more than these, the strongest are drawn, and the
            title says so.

    Raises:
        CircuitError: if `model` is not the circuit's model.
        TaskError, TokenizerError, DataError: if there is no such task, or it does not fit the
            model's tokenizer.
    """
    edges = circuit.edges(model)
    nodes = circuit.nodes
    notes = []
    ends = TaskEnds()
    try:
        ends = task_ends(model, nodes, circuit_task(circuit, task))
    except (CircuitError, DataError, TaskError, TokenizerError) as error:
        if task is not None:
            raise
        notes.append(f"Without tokens and answers: {printable(str(error))}")
    title = [_name(circuit), _facts(circuit, len(edges))]
    if most is not None and len(edges) > most:
        title.append(f"drawn: the {most:,} strongest edges; .graphml and .csv have all of them")
        edges = heapq.nlargest(most, edges, key=lambda edge: abs(edge.weight))
    if not nodes:
        title.append(why_no_nodes(model))
    elif has_bigram_table(model):
        title.append("the logits also have the share of the bigram table, which no node carries")
    links = [Link(edge.source, edge.target, "edge", edge.weight) for edge in edges]
    links += [Link(write, read, "stream") for write, read in residual_joins(nodes)]
    ends_drawn = _Ends(ends, model)
    return Diagram(
        title=title,
        nodes=nodes,
        labels={node: printable(label) for node, label in circuit.labels.items()},
        tokens=ends_drawn.tokens,
        answers=ends_drawn.answers,
        links=[*links, *ends_drawn.links()],
        notes=notes,
    )


class _Ends:
    """The tokens and answers of a drawing, and their links."""

    def __init__(self, ends: TaskEnds, model: TLModel) -> None:
        self._ends = ends
        self._texts = {token: token_text(model, token) for token in ends.tokens}
        bringing = {entry.token for entry in ends.embed}
        self.tokens = [self._token(token) for token in ends.tokens if token in bringing]
        self.answers = [self._token(token, is_answer=True) for token in ends.candidates]

    def links(self) -> Iterator[Link]:
        """The entries of the embedding, and then those of the unembedding."""
        for entry in self._ends.embed:
            yield Link(self._token(entry.token), entry.node, "embedding", entry.weight)
        for entry in self._ends.unembed:
            answer = self._token(entry.token, is_answer=True)
            yield Link(entry.node, answer, "unembedding", entry.weight)

    def _token(self, token: int, is_answer: bool = False) -> Token:
        return Token(token, self._texts[token], is_answer)


def token_text(model: TLModel, token: int) -> str:
    """The text of a token in quotes, without characters that break lines."""
    text = model.tokenizer.decode([token])
    if len(text) > TOKEN_CHARS:
        text = text[: TOKEN_CHARS - 1] + "…"
    return repr(text)


def _name(circuit: Circuit) -> str:
    task = printable(circuit.task) or "no task"
    return f"{task} in {printable(circuit.model_name) or 'an unnamed model'}"


def _facts(circuit: Circuit, n_edges: int) -> str:
    """The sizes of a circuit and, where they are measured, its loss and that of its model."""
    facts = f"{counted(circuit.n_nodes, 'node')}, {counted(n_edges, 'edge')}"
    losses = recorded_losses(circuit)
    if "circuit" in losses:
        facts += f", task loss {losses['circuit']:.3f} nats"
        if "full" in losses:
            facts += f" (the full model: {losses['full']:.3f})"
    return facts
