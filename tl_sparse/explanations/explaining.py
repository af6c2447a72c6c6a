"""Explaining a circuit: an expression for each node, and what it is worth."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, Node, hash_of_circuit, hash_of_model, hash_of_tensor
from tl_sparse.errors import ConfigError, DataError
from tl_sparse.explanations.expressions import Expression
from tl_sparse.explanations.finding import candidates_for, chosen, dependence, shorter_ones
from tl_sparse.explanations.fitting import Target
from tl_sparse.explanations.heads import explain_head, pattern_expression
from tl_sparse.explanations.measures import Levels, fit_of, two_levels
from tl_sparse.explanations.names import checked_names, kept_node, name_of
from tl_sparse.explanations.parsing import Vocabulary, parse
from tl_sparse.explanations.record import (
    Explanation,
    HeadExplanation,
    NodeExplanation,
    Replaced,
    Shorter,
    Swapped,
)
from tl_sparse.explanations.replacement import (
    ValuesOn,
    all_expressions,
    means_on,
    one_expression,
    replaced,
    swapped,
)
from tl_sparse.explanations.samples import heads_of, vocabulary_of
from tl_sparse.explanations.sequences import Sequences, values_of
from tl_sparse.explanations.subject import Subject, parse_for, subject_of
from tl_sparse.hooks import TLModel, frozen
from tl_sparse.tasks import Task


@checked("task", "corpus")
def explain_circuit(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    *,
    corpus: Int[Tensor, "seq pos"] | None = None,
    own: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Explanation:
    """An expression over the tokens for each node of a circuit, found by search.

    Expressions are fitted to the values that the nodes have under the circuit, on one half of the
    task's held-out prompts and of the corpus, and judged on the other half. A read of the first
    block is a function of one token, or of the position, and is written as such; other nodes get
    the shortest expression that is good enough, which may name the nodes that they read.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the prompts; by default the circuit's own.
        corpus: tokens of the model's training distribution; by default the sample in the folder
            that the model was loaded from. Without either, there are prompts alone.
        own: node → the user's own expression, which takes the place of the search.
        names: node → its name in expressions; the names of the others are made.
        progress: show a bar over the nodes.
        seed: the seed of everything random.

    Raises:
        CircuitError: if the circuit is of another model, or has no means; or if `own` or `names`
            has a node that is not in it.
        UnsupportedError: if the circuit's nodes are components, if it has `frozen_norms`, or if
            positions attend to later ones.
        CircuitError, TaskError, DataError, TokenizerError: if there are not two held-out pairs.
        DataError: if an expression of the user's, or a name, is not possible.
        ConfigError: if `seed` is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be at least 0")
    started = time.perf_counter()
    with frozen(model), torch.no_grad():
        texts = _own_texts(own or {}, circuit, vocabulary_of(model))
        given = checked_names(names or {}, circuit)
        finding = _Finding(subject_of(circuit, model, task, corpus, seed), texts, given)
        for node in tqdm(circuit.nodes, "explaining", disable=not progress):
            finding.explain(node)
        nodes = []
        for node in tqdm(circuit.nodes, "replacing", disable=not progress):
            nodes.append(_measured(finding.subject, node, finding.found[node]))
        heads = [explain_head(finding.subject, *head) for head in heads_of(circuit)]
        explanation = _explanation(finding.subject, nodes, heads, seed)
    return replace(explanation, seconds=time.perf_counter() - started)


def _own_texts(own: Mapping[str, str], circuit: Circuit, vocabulary: Vocabulary) -> dict[Node, str]:
    """The user's expressions, which are read once before anything runs.

    Names of other nodes are not known by then, so any name is taken for one.
    """
    texts = {}
    for key, text in own.items():
        node = kept_node(circuit, key)
        parse_for(node, text, vocabulary, None)
        texts[node] = text
    return texts


@dataclass(frozen=True)
class _Found:
    """What was found for a node, before anything is measured on held-out data."""

    name: str
    expression: Expression
    origin: str
    depends_on: str
    shorter: list[Shorter]


@dataclass(eq=False)
class _Finding:
    """Finds expressions, node after node in the order of the forward pass.

    Attributes:
        subject: what is explained.
        own: node → the user's expression.
        given: node → the user's name.
        found: node → what was found.
        words: name → the word in it.
    """

    subject: Subject
    own: dict[Node, str]
    given: dict[Node, str]
    found: dict[Node, _Found] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def explain(self, node: Node) -> None:
        """Find the expression of a node; those of all earlier ones must have been found."""
        target = Target.of_node(node, self.subject.samples.fit)
        depends_on = dependence(target)
        shorter: list[Shorter] = []
        if node in self.own:
            origin = "own"
            expression = self.subject.parsed(node, self.own[node])
        else:
            origin = "found"
            candidates = candidates_for(target, node, self.subject)
            best = chosen(candidates, target, node, self.subject)
            expression = best.expression
            shorter = shorter_ones(candidates, best)
        taken = {*self.given.values(), *self.words}
        telling = self.subject.samples.telling
        name, word = name_of(node, expression, self.words, taken, telling)
        name = self.given.get(node, name)
        self.words[name] = word
        self.subject.give(node, name, expression)
        self.found[node] = _Found(name, expression, origin, depends_on, shorter)


# --- measuring


def _measured(subject: Subject, node: Node, found: _Found) -> NodeExplanation:
    """The explanation of a node, measured on the held-out half."""
    levels = _levels(subject, node)
    fits = {}
    for sample in subject.samples.heldout:
        predicted = sample.real(values_of(found.expression, sample.sequences))
        fits[sample.name] = fit_of(predicted, sample.real(sample.values[node]), levels)
    data = subject.samples.heldout_prompts
    by_expression = one_expression(subject, node, found.expression)
    by_mean = means_on(subject, [node])
    return NodeExplanation(
        node=str(node),
        name=found.name,
        expression=str(found.expression),
        size=found.expression.size,
        whole_size=subject.whole_size(found.expression),
        origin=found.origin,
        depends_on=found.depends_on,
        levels=levels,
        text=fits.get("text"),
        prompts=fits["prompts"],
        given_others=_given_others(subject, node, found.expression),
        in_circuit=replaced(subject, data, by_expression, under_circuit=True),
        in_model=replaced(subject, data, by_expression, under_circuit=False),
        held_in_circuit=replaced(subject, data, by_mean, under_circuit=True),
        held_in_model=replaced(subject, data, by_mean, under_circuit=False),
        shorter=found.shorter,
    )


def _levels(subject: Subject, node: Node) -> Levels:
    """The two levels of a node, on the prompts and the text for fitting."""
    values = []
    for sample in subject.samples.fit:
        if sample.name != "tokens":
            values.append(sample.real(sample.values[node]))
    return two_levels(torch.cat(values))


def _given_others(subject: Subject, node: Node, expression: Expression) -> float:
    """The explained variance on the held-out half if what is named has its true values."""
    scores = []
    names = subject.wiring.names
    for sample in subject.samples.heldout:
        sequences = sample.sequences
        true = {names[other]: sample.values[other] for other in names}
        given = Sequences(sequences.tokens, sequences.is_real, sequences.vocabulary, true)
        predicted = sample.real(values_of(expression, given))
        levels = two_levels(sample.real(sample.values[node]))
        fit = fit_of(predicted, sample.real(sample.values[node]), levels)
        if fit.explained is not None:
            scores.append(fit.explained)
    return min(scores, default=0.0)


def _explanation(
    subject: Subject,
    nodes: list[NodeExplanation],
    heads: list[HeadExplanation],
    seed: int,
) -> Explanation:
    circuit, samples = subject.circuit, subject.samples
    data = samples.heldout_prompts
    text = samples.heldout_text
    all_nodes = circuit.nodes

    def under_circuit(values_on: ValuesOn | None) -> Replaced:
        return replaced(subject, data, values_on, under_circuit=True)

    return Explanation(
        model=circuit.model_name,
        task=data.task,
        seed=seed,
        n_pairs=data.n_pairs,
        n_rows=0 if text is None else len(text),
        no_text=samples.no_text,
        contents=_contents(subject),
        nodes=nodes,
        heads=heads,
        model_alone=replaced(subject, data, None, under_circuit=False),
        circuit_alone=under_circuit(None),
        all_replaced=under_circuit(all_expressions(subject)),
        nothing_kept=under_circuit(means_on(subject, all_nodes)),
        swapped=_swapped(subject, text),
        seconds=0.0,
        subject=subject,
    )


def _swapped(subject: Subject, text: Int[Tensor, "seq pos"] | None) -> Swapped | None:
    patterns = {}
    for layer, head in heads_of(subject.circuit):
        score, nothing = pattern_expression(subject, layer, head)
        if score is not None and nothing is not None:
            patterns[layer, head] = (score, nothing)
    if text is None or text.shape[1] < 2 or not patterns:
        return None
    return swapped(subject, patterns, text)


# --- testing the user's own expressions


@dataclass(frozen=True, eq=False)
class Source:
    """What an explanation that was read from a file is opened with; see `explain_circuit`."""

    circuit: Circuit | None
    model: TLModel | None
    task: Task | str | None
    corpus: Int[Tensor, "seq pos"] | None


def tested(explanation: Explanation, node: str, expression: str, source: Source) -> NodeExplanation:
    """Measure an expression of the user's; see `Explanation.test`."""
    before = explanation[node]
    subject = explanation.subject
    if subject is None or source.circuit is not None or source.model is not None:
        subject = _opened(explanation, source)
    place = kept_node(subject.circuit, before.node)
    with frozen(subject.model), torch.no_grad():
        parsed = subject.parsed(place, expression)
        found = _Found(before.name, parsed, "own", before.depends_on, [])
        return _measured(subject, place, found)


def _opened(explanation: Explanation, source: Source) -> Subject:
    """The subject of an explanation that was read from a file.

    Raises:
        ConfigError: if the circuit or the model is missing.
        CircuitError: if they are others than those of the explanation.
        DataError: if text or prompts are.
    """
    circuit, model = source.circuit, source.model
    if circuit is None or model is None:
        raise ConfigError(
            "an explanation that was read from a file has no model; give it the circuit and its "
            "model: explanation.test(node, expression, circuit, model)"
        )
    explanation.check(circuit, model)
    with frozen(model), torch.no_grad():
        subject = subject_of(circuit, model, source.task, source.corpus, explanation.seed)
        if _contents(subject) != explanation.contents:
            raise DataError(
                "the explanation is of other text or prompts; give the task=… and the corpus=… "
                "with which it was made"
            )
        for each in explanation.nodes:
            names = list(subject.wiring.names.values())
            expression = parse(each.expression, subject.samples.vocabulary, names)
            subject.give(circuit.node(each.node), each.name, expression)
    return subject


def _contents(subject: Subject) -> dict[str, str]:
    """The hashes of what is explained, and of what expressions are judged on."""
    contents = {
        "circuit": hash_of_circuit(subject.circuit),
        "model": hash_of_model(subject.model),
        "prompts": hash_of_tensor(subject.samples.heldout_prompts.tokens),
    }
    text = subject.samples.heldout_text
    if text is not None:
        contents["text"] = hash_of_tensor(text)
    return contents
