"""What the heads of a circuit look at, in words and as expressions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.explanations.building import add
from tl_sparse.explanations.expressions import Expression, Is, Number, Ref, TokenSet, literal
from tl_sparse.explanations.parsing import described_set
from tl_sparse.explanations.record import HeadExplanation, LooksAt
from tl_sparse.explanations.samples import Sample
from tl_sparse.explanations.sequences import Sequences
from tl_sparse.explanations.structure import head_of
from tl_sparse.explanations.subject import Subject

Pairs = Float[Tensor, "seq query key"]
#: The sets of tokens that phrases are about have at most so many tokens.
MOST_IN_PHRASE = 12
#: A phrase covers at least so much more than of even attention.
LEAST_ADVANTAGE = 0.1
#: From some present tokens, another rule must cover so much more of the attention.
MUCH_BETTER = 0.15
#: And from all of them together, so much more of the attention from all tokens.
LEAST_GAIN = 0.01
#: So many tokens that a head looks at are listed.
LISTED = 10


@dataclass(frozen=True, eq=False)
class Rule:
    """A way to choose earlier tokens.

    Attributes:
        words: what it chooses, in words.
        chosen: which earlier tokens (1, others 0) it chooses for each present one.
    """

    words: str
    chosen: Callable[[Sequences], Pairs]


#: What is said of a head that prefers no tokens.
ALL_ALIKE = Rule(
    "all tokens so far, none in particular",
    lambda sequences: _recent(sequences, sequences.tokens.shape[1]),
)


def explain_head(subject: Subject, layer: int, head: int) -> HeadExplanation:
    """What a head looks at: chosen on the data for fitting, and measured on the other half."""
    fit = [sample for sample in subject.samples.fit if sample.name != "tokens"]
    heldout = subject.samples.heldout
    phrase = _phrase(_rules(fit, (layer, head), subject), fit, (layer, head), subject)
    score, nothing = pattern_expression(subject, layer, head)
    overlap = None
    if score is not None and nothing is not None:
        overlap = _overlap(heldout, (layer, head), score, nothing)
    covered, evenly = _coverage(phrase, heldout, (layer, head))
    sink = _mean([1 - s.patterns[layer, head].double().sum(2) for s in heldout], heldout)
    return HeadExplanation(
        layer=layer,
        head=head,
        phrase=phrase.words,
        covered=covered,
        evenly=evenly,
        nothing=max(0.0, sink),
        score=None if score is None else str(score),
        nothing_score=nothing,
        overlap=overlap,
        looks_at=_looks_at(heldout, (layer, head), subject),
    )


def pattern_expression(
    subject: Subject, layer: int, head: int
) -> tuple[Expression | None, float | None]:
    """The score of each earlier token, and that of nothing; None where they are not known."""
    found = head_of(layer, head, subject.wiring)
    if found is None:
        return None, None
    terms = [*found.both, *found.earlier, *found.here]
    return (add(*terms) if terms else Number(0)), found.nothing


def _overlap(
    samples: list[Sample], head: tuple[int, int], score: Expression, nothing: float
) -> float:
    """The share of the attention that two patterns have in common, nothing included."""
    shares = []
    for sample in samples:
        ours = sample.sequences.pattern(score, nothing)
        theirs = sample.patterns[head].double()
        common = ours.minimum(theirs).sum(2)
        rest = (1 - ours.sum(2)).minimum(1 - theirs.sum(2)).clamp(min=0)
        shares.append(common + rest)
    return _mean(shares, samples)


def _mean(values: list[Tensor], samples: list[Sample]) -> float:
    """The mean over the real tokens of each sample, and then over the samples."""
    means = []
    for value, sample in zip(values, samples, strict=True):
        means.append(float(sample.real(value).mean()))
    return sum(means) / len(means)


# --- phrases


def _rules(samples: list[Sample], head: tuple[int, int], subject: Subject) -> list[Rule]:
    rules = [
        Rule("the first token", lambda sequences: _at(sequences, sequences.positions * 0)),
        Rule("itself", lambda sequences: _at(sequences, sequences.positions)),
        Rule("the token before", lambda sequences: _at(sequences, sequences.positions - 1)),
        Rule(
            "the token after the last earlier occurrence of the same token",
            lambda sequences: _at(sequences, sequences.after_earlier),
        ),
        Rule("the last ten tokens", lambda sequences: _recent(sequences, 10)),
    ]
    sets = [*_sets_looked_at(samples, head, subject), *_sets_in_keys(head, subject)]
    for tokens in dict.fromkeys(sets):
        words = described_set(tokens, n_most=6)
        rules.append(Rule(f"all {words} so far", _all_of(tokens)))
        rules.append(Rule(f"the last of {words}", _last_of(tokens)))
    return rules


def _at(sequences: Sequences, positions: Tensor) -> Pairs:
    """1 at one earlier position for each token; none where it is negative."""
    n_pos = sequences.tokens.shape[1]
    return (torch.arange(n_pos) == positions[:, :, None]).double()


def _recent(sequences: Sequences, n_tokens: int) -> Pairs:
    n_pos = sequences.tokens.shape[1]
    distance = torch.arange(n_pos)[:, None] - torch.arange(n_pos)
    is_recent = (distance >= 0) & (distance < n_tokens)
    return is_recent.double().expand(len(sequences.tokens), -1, -1)


def _all_of(tokens: TokenSet) -> Callable[[Sequences], Pairs]:
    def chosen(sequences: Sequences) -> Pairs:
        is_in = sequences.among(sequences.tokens, tokens).double()
        return is_in[:, None] * _recent(sequences, sequences.tokens.shape[1])

    return chosen


def _last_of(tokens: TokenSet) -> Callable[[Sequences], Pairs]:
    return lambda sequences: _at(sequences, sequences.last_in(tokens))


def _sets_looked_at(
    samples: list[Sample], head: tuple[int, int], subject: Subject
) -> list[TokenSet]:
    """Sets of the tokens that get most for their number, of different sizes."""
    share, frequency = _by_token(samples, head, subject)
    excess = share - frequency * share.sum()
    order = excess.argsort(descending=True)[:MOST_IN_PHRASE].tolist()
    order = [token for token in order if float(excess[token]) > 0]
    vocabulary = subject.samples.vocabulary
    sizes = [n for n in (1, 2, 4, 6, 8, MOST_IN_PHRASE) if n <= len(order)]
    return [vocabulary.set_of(order[:n]) for n in sizes]


def _sets_in_keys(head: tuple[int, int], subject: Subject) -> list[TokenSet]:
    """The small sets of tokens in the expressions of the head's keys."""
    nodes = {name: node for node, name in subject.wiring.names.items()}
    waiting = []
    for node, expression in subject.expressions.items():
        if node.location == "attn_k" and subject.wiring.head_of(node) == head:
            waiting.append(expression)
    found = []
    while waiting:
        for part in waiting.pop().walk():
            if isinstance(part, Ref):
                waiting.append(subject.expressions[nodes[part.name]])
            if isinstance(part, Is) and 0 < len(part.tokens.tokens) <= MOST_IN_PHRASE:
                found.append(part.tokens)
    return found


def _by_token(
    samples: list[Sample], head: tuple[int, int], subject: Subject
) -> tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]:
    """For each token, the mean share of the attention, and of even attention."""
    n_vocab = len(subject.samples.vocabulary.texts)
    share = torch.zeros(n_vocab, dtype=torch.float64)
    frequency = torch.zeros(n_vocab, dtype=torch.float64)
    for sample in samples:
        is_real = sample.sequences.is_real.double()
        weight = is_real / is_real.sum() / len(samples)
        tokens = sample.sequences.tokens.flatten()
        looked = torch.einsum("sq,sqk->sk", weight, sample.patterns[head].double())
        share.index_add_(0, tokens, looked.flatten())
        even = _recent(sample.sequences, sample.sequences.tokens.shape[1])
        even = even / even.sum(2, keepdim=True)
        looked = torch.einsum("sq,sqk->sk", weight, even)
        frequency.index_add_(0, tokens, looked.flatten())
    return share, frequency


def _looks_at(samples: list[Sample], head: tuple[int, int], subject: Subject) -> list[LooksAt]:
    share, frequency = _by_token(samples, head, subject)
    found = []
    for token in share.argsort(descending=True)[:LISTED].tolist():
        if float(share[token]) > 0:
            text = literal(subject.samples.vocabulary.literal_of(token))
            found.append(LooksAt(text, float(share[token]), float(frequency[token])))
    return found


@dataclass(frozen=True, eq=False)
class _Advantages:
    """How much more of the attention a rule covers than of even attention, by present token.

    Attributes:
        rule: the rule.
        by_token: for each present token, its part of the whole advantage.
        mass: for each present token, its part of all attention that is not the sink's.
    """

    rule: Rule
    by_token: Float[Tensor, " vocab"]
    mass: Float[Tensor, " vocab"]

    @property
    def whole(self) -> float:
        return float(self.by_token.sum())


def _phrase(
    rules: list[Rule], samples: list[Sample], head: tuple[int, int], subject: Subject
) -> Rule:
    """The rule that covers most beside even attention, and another one for some present tokens.

    Its words are a whole phrase.
    """
    n_tokens = len(subject.samples.vocabulary.texts)
    advantages = [_advantages(rule, samples, head, n_tokens) for rule in [*rules, ALL_ALIKE]]
    best = max(advantages, key=lambda each: each.whole)
    if best.whole < LEAST_ADVANTAGE:
        best = advantages[-1]
    gain, other, present = 0.0, best, torch.zeros(n_tokens, dtype=torch.bool)
    for each in advantages:
        gains = each.by_token - best.by_token
        is_better = gains > MUCH_BETTER * each.mass
        if float(gains[is_better].sum()) > gain:
            gain, other, present = float(gains[is_better].sum()), each, is_better
    if gain < LEAST_GAIN:
        return Rule(f"from any token: {best.rule.words}", best.rule.chosen)
    by_gain = (other.by_token - best.by_token).where(present, torch.zeros(())).argsort()
    ordered = by_gain.flip(0)[: int(present.sum())].tolist()
    tokens = subject.samples.vocabulary.set_of(ordered)
    first = subject.samples.vocabulary.set_of(ordered[:LISTED])
    rest = len(ordered) - len(first.tokens)
    named = described_set(first, LISTED) + (f" and {rest} more" if rest else "")
    words = f"from {named}: {other.rule.words}; from others: {best.rule.words}"
    return Rule(words, _either(tokens, other.rule, best.rule))


def _either(tokens: TokenSet, first: Rule, second: Rule) -> Callable[[Sequences], Pairs]:
    """What the first rule chooses from these present tokens, and the second from others."""

    def chosen(sequences: Sequences) -> Pairs:
        is_first = sequences.among(sequences.tokens, tokens)[:, :, None]
        return torch.where(is_first, first.chosen(sequences), second.chosen(sequences))

    return chosen


def _advantages(
    rule: Rule, samples: list[Sample], head: tuple[int, int], n_tokens: int
) -> _Advantages:
    total = torch.zeros(n_tokens, dtype=torch.float64)
    mass = torch.zeros(n_tokens, dtype=torch.float64)
    for sample in samples:
        covered, evenly, weight = _covered(rule, sample, head)
        tokens = sample.sequences.tokens[sample.sequences.is_real]
        advantage = sample.real((covered - evenly) * weight)
        total.index_add_(0, tokens, advantage / len(samples))
        mass.index_add_(0, tokens, sample.real(weight) / len(samples))
    return _Advantages(rule, total, mass)


def _coverage(rule: Rule, samples: list[Sample], head: tuple[int, int]) -> tuple[float, float]:
    """The share of the attention, without the sink's, on what a rule chooses; and of even one."""
    shares = torch.zeros(2, dtype=torch.float64)
    for sample in samples:
        covered, evenly, weight = _covered(rule, sample, head)
        shares += torch.stack([(covered * weight).sum(), (evenly * weight).sum()]) / len(samples)
    covered_share, even_share = shares.tolist()
    return covered_share, even_share


def _covered(rule: Rule, sample: Sample, head: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """For each present token, the share on what a rule chooses, of the attention and of even one.

    Returns:
        Both shares, and the weight of each present token: the attention that is not the sink's.
    """
    chosen = rule.chosen(sample.sequences)
    pattern = sample.patterns[head].double()
    on_tokens = pattern.sum(2)
    covered = (pattern * chosen).sum(2) / on_tokens.clamp(min=1e-12)
    n_earlier = torch.arange(1, pattern.shape[1] + 1, dtype=torch.float64)
    earlier = torch.ones_like(pattern[0]).tril()
    evenly = (chosen * earlier).sum(2) / n_earlier
    weight = on_tokens * sample.sequences.is_real
    return covered, evenly, weight / weight.sum().clamp(min=1e-12)
