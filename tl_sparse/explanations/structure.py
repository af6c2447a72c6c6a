"""Expressions of a node through the nodes that it reads, by the names of these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_sparse.circuits import Circuit, Edge, Node
from tl_sparse.explanations.building import add, linear, number, times
from tl_sparse.explanations.expressions import Average, Call, Cut, Expression, Here, Number, Ref
from tl_sparse.explanations.fitting import Candidate, Flat, Target
from tl_sparse.hooks import TLModel, is_sparse_model

#: The score of looking at nothing where there is no attention sink.
NOTHING = -1000.0
#: So many values of a constant are tried in one round of its search.
TRIED = 61


@dataclass(frozen=True, eq=False)
class Wiring:
    """How the nodes of a circuit are joined, and what other nodes add to them.

    Attributes:
        circuit: the circuit.
        model: its model.
        edges: node → the edges that lead to it.
        names: node → its name in expressions.
    """

    circuit: Circuit
    model: TLModel
    edges: dict[Node, list[Edge]]
    names: dict[Node, str]

    def sources(self, node: Node) -> list[Edge]:
        """The edges that lead to a node from nodes that have a name already."""
        return [edge for edge in self.edges.get(node, []) if edge.source in self.names]

    def writes(self, node: Node) -> list[Node]:
        """The earlier writes to the channel of the residual stream that a node reads."""
        if not node.is_read:
            return []
        return [
            other
            for other in self.names
            if other.is_write and other.index == node.index and self.is_before(other, node)
        ]

    def is_before(self, write: Node, read: Node) -> bool:
        """Whether a write comes before a read in the forward pass."""
        order = list(self.circuit.hooks)
        return order.index((write.layer, write.location)) < order.index((read.layer, read.location))

    def ancestors(self, node: Node) -> list[Node]:
        """All earlier nodes on which a node depends, in the order of the forward pass."""
        found: set[Node] = set()
        waiting = [node]
        while waiting:
            now = waiting.pop()
            before = [edge.source for edge in self.sources(now)] + self.writes(now)
            if now.location == "attn_out":
                before += self.patterns_of(now)
            waiting += [other for other in before if other not in found]
            found.update(before)
        return [other for other in self.names if other in found]

    def patterns_of(self, write: Node) -> list[Node]:
        """The queries and keys of the heads whose values lead to a write of attention."""
        size = self.circuit.means[self.circuit.hooks[write.layer, "attn_q"]].shape[-1]
        heads = {edge.source.index // size for edge in self.sources(write)}
        found = []
        for node in self.names:
            is_score = node.layer == write.layer and node.location in ("attn_q", "attn_k")
            if is_score and node.index // size in heads:
                found.append(node)
        return found

    def head_of(self, node: Node) -> tuple[int, int]:
        """The layer and the head of a query, key or value channel."""
        size = self.circuit.kept[self.circuit.hooks[node.layer, node.location]].shape[-1]
        return node.layer, node.index // size

    def ref(self, node: Node) -> Ref:
        return Ref(self.names[node])


def through_sources(target: Target, node: Node, wiring: Wiring) -> list[Candidate]:
    """Expressions of a node through what it reads along the edges of the circuit."""
    edges = wiring.sources(node)
    if not edges:
        return []
    if node.location == "mlp_neuron":
        terms: list[Expression] = [wiring.ref(edge.source) for edge in edges]
        return activated(target, [edge.weight for edge in edges], terms)
    if node.location == "attn_out":
        return through_heads(target, edges, wiring)
    refs = [wiring.ref(edge.source) for edge in edges]
    found = []
    for n_terms in range(1, len(refs) + 1):
        found += with_cut(target, refs[:n_terms])
    return found


# --- linear functions, after which AbsTopK may follow


def with_cut(target: Target, terms: Sequence[Expression]) -> list[Candidate]:
    """Linear functions of these terms, without and with a threshold below which all is 0."""
    plain = target.linear_fit(list(terms))
    is_zero = target.values == 0
    if not 0.01 < float(is_zero.double().mean()) < 1:
        return [plain]
    kept = without(target, is_zero)
    columns = [target.predicted(term) for term in terms]
    constant, *factors = kept.regression([column[~is_zero] for column in columns]).tolist()
    inner = linear(constant, list(zip(factors, terms, strict=True)))
    return [plain, *cut_of(target, inner)]


def without(target: Target, left_out: Tensor) -> Target:
    """The target on some of its values; its samples are those of the whole."""
    weights = target.weights[~left_out]
    return Target(target.samples, target.values[~left_out], weights / weights.sum())


def cut_of(target: Target, inner: Expression) -> list[Candidate]:
    """The expression with the best threshold below which it is 0; none if that does not help."""
    values = target.predicted(inner)
    thresholds = values.abs().unique()
    if len(thresholds) > 200:
        thresholds = thresholds.quantile(torch.linspace(0, 1, 200, dtype=torch.float64))
    scores = [target.score(values * (values.abs() >= least)) for least in thresholds]
    best = max(range(len(scores)), key=scores.__getitem__)
    if scores[best] <= target.score(values) + 0.001:
        return []
    # A round number between two thresholds, so that rounding decides nothing.
    below = float(thresholds[max(0, best - 1)])
    least = number((below + float(thresholds[best])) / 2)
    return [target.candidate(Cut(inner, least))]


# --- neurons


def activated(
    target: Target, weights: Sequence[float], terms: Sequence[Expression]
) -> list[Candidate]:
    """The activation of a weighted sum, whose constant is searched for."""
    inner: Flat = torch.zeros_like(target.values)
    for weight, term in zip(weights, terms, strict=True):
        inner = inner + weight * target.predicted(term)
    found = []
    for function, apply in ACTIVATIONS.items():
        constant = _best_constant(target, inner, apply)
        argument = linear(constant, list(zip(weights, terms, strict=True)))
        whole = Call(function, argument)
        found += [target.candidate(whole), *cut_of(target, whole)]
    return [*found, *with_cut(target, terms)]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "positive": torch.nn.functional.relu,
}


def _best_constant(target: Target, inner: Flat, apply: Callable[[Tensor], Tensor]) -> float:
    """The constant c for which apply(inner + c) fits best, on a grid that becomes finer."""
    is_zero = target.values == 0
    kept = without(target, is_zero) if not bool(is_zero.all()) else target
    inner = inner[~is_zero] if kept is not target else inner
    centre = 0.0
    width = 2 * (float(inner.abs().max()) + float(target.values.abs().max())) + 1e-6
    for _ in range(4):
        tried = centre + width * torch.linspace(-1, 1, TRIED, dtype=torch.float64)
        errors = [float(kept.weights @ (apply(inner + c) - kept.values).square()) for c in tried]
        centre = float(tried[min(range(TRIED), key=errors.__getitem__)])
        width = 2 * width / (TRIED - 1)
    return centre


# --- attention


@dataclass(frozen=True)
class Head:
    """The scores of a head under a circuit, as expressions.

    A score is the sum of the products of the channels of query and key, divided by √d_head; other
    channels than the circuit's are held at their means.

    Attributes:
        both: the products of two kept channels.
        earlier: the kept key channels whose query is held.
        here: the kept query channels whose key is held, which count only beside a sink.
        nothing: the score of looking at nothing, less what all keys have.
    """

    both: tuple[Expression, ...]
    earlier: tuple[Expression, ...]
    here: tuple[Expression, ...]
    nothing: float

    def average(self, value: Expression) -> list[Expression]:
        """The mean of a value by these scores, and simpler ones without some of the terms."""
        terms = [*self.both, *self.earlier, *self.here]
        found: list[Expression] = []
        for left_out in range(1 << min(len(terms), 4)):
            kept = [term for i, term in enumerate(terms) if not (left_out >> i) & 1]
            score = add(*kept) if kept else Number(0)
            found.append(Average(value, score, number(self.nothing)))
        return found


def head_of(layer: int, head: int, wiring: Wiring) -> Head | None:
    """The scores of a head; None where the model is not of tl_sparse, whose scores may differ."""
    if not is_sparse_model(wiring.model):
        return None
    queries = _channels(layer, "attn_q", head, wiring)
    keys = _channels(layer, "attn_k", head, wiring)
    scale = len(queries) ** -0.5
    constant = 0.0
    both: list[Expression] = []
    earlier: list[Expression] = []
    here: list[Expression] = []
    for query, key in zip(queries, keys, strict=True):
        if query.ref and key.ref:
            both.append(times(number(scale), Here(query.ref), key.ref))
        elif key.ref and query.mean:
            earlier.append(times(number(scale * query.mean), key.ref))
        elif query.ref and key.mean:
            here.append(times(number(scale * key.mean), Here(query.ref)))
        elif not query.ref and not key.ref:
            constant += scale * query.mean * key.mean
    nothing = NOTHING
    sink = getattr(wiring.model.blocks[layer].attn, "sink", None)
    if sink is not None:
        nothing = float(sink[head]) - constant
    return Head(tuple(both), tuple(earlier), tuple(here), nothing)


@dataclass(frozen=True)
class _Channel:
    """A channel of a query or a key: its expression if it is in the circuit, and its mean."""

    ref: Ref | None
    mean: float


def _channels(layer: int, location: str, head: int, wiring: Wiring) -> list[_Channel]:
    circuit = wiring.circuit
    means = circuit.means[circuit.hooks[layer, location]][head].tolist()
    refs = {}
    for node in wiring.names:
        if (node.layer, node.location) == (layer, location):
            refs[node.index] = wiring.ref(node)
    first = head * len(means)
    return [_Channel(refs.get(first + i), mean) for i, mean in enumerate(means)]


def through_heads(target: Target, edges: Sequence[Edge], wiring: Wiring) -> list[Candidate]:
    """A write of attention: a linear function of the means that its heads take of their values."""
    terms: list[list[Expression]] = []
    for edge in edges:
        value = edge.source
        d_head = wiring.circuit.means[wiring.circuit.hooks[value.layer, "attn_v"]].shape[1]
        head = head_of(value.layer, value.index // d_head, wiring)
        if head is None:
            return []
        terms.append(head.average(wiring.ref(value)))
    chosen = [averages[0] for averages in terms]
    found = with_cut(target, chosen)
    if len(edges) == 1:
        for average in terms[0][1:]:
            found += with_cut(target, [average])
    elif len(edges) > 1:
        for left_out in range(len(edges)):
            found += with_cut(target, chosen[:left_out] + chosen[left_out + 1 :])
    return found
