"""The search for short expressions of a node over the tokens, one term after another."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import Node
from tl_sparse.explanations.building import both, opposite
from tl_sparse.explanations.expressions import (
    QUOTES,
    TOKEN_NAMES,
    Compare,
    Count,
    Depth,
    Distance,
    Expression,
    Inside,
    Is,
    Last,
    Number,
    Position,
    Repeated,
    Same,
    Seen,
    Share,
    TokenSet,
)
from tl_sparse.explanations.fitting import Candidate, Target, price
from tl_sparse.explanations.parsing import Vocabulary
from tl_sparse.explanations.structure import Wiring
from tl_sparse.explanations.tables import Means, tables_of

#: The largest number of terms of a linear expression.
MOST_TERMS = 4
#: The shares of what a token tells of a node that sets of tokens are to explain.
OF_SETS = (0.9, 0.7, 0.5)
#: Sets with more tokens than this are not used in other functions of sets.
SMALL_SET = 24
#: With so many features, each is joined by `and` with each other.
JOINED = 12


@dataclass(frozen=True, eq=False)
class Pool:
    """Expressions from which others are put together.

    Attributes:
        expressions: the expressions.
        columns: the values of each on the data for fitting.
    """

    expressions: list[Expression]
    columns: Float[Tensor, "value expression"]


def search(target: Target, node: Node, wiring: Wiring, vocabulary: Vocabulary) -> list[Candidate]:
    """Linear expressions of one to four terms; each has one term more than the one before."""
    pool = pool_of(target, features(target, node, wiring, vocabulary))
    if not pool.expressions:
        return []
    pool = joined_pools(pool, pool_of(target, _conjunctions(target, pool)))
    return _forward(target, pool)


def pool_of(target: Target, expressions: list[Expression]) -> Pool:
    """The expressions that vary on the data, each once."""
    kept = []
    columns = []
    seen = set()
    for expression in dict.fromkeys(expressions):
        column = target.predicted(expression)
        digest = hash(tuple(column[:: max(1, len(column) // 997)].tolist()))
        if float(column.max() - column.min()) < 1e-9 or digest in seen:
            continue
        seen.add(digest)
        kept.append(expression)
        columns.append(column)
    if not kept:
        return Pool([], torch.zeros(len(target.values), 0, dtype=torch.float64))
    return Pool(kept, torch.stack(columns, dim=1))


def joined_pools(first: Pool, second: Pool) -> Pool:
    """The expressions of both."""
    columns = torch.cat([first.columns, second.columns], dim=1)
    return Pool([*first.expressions, *second.expressions], columns)


def features(
    target: Target, node: Node, wiring: Wiring, vocabulary: Vocabulary
) -> list[Expression]:
    """The simple expressions from which those of this node may be put together."""
    found: list[Expression] = [Position(), Repeated(), Same("token", "previous")]
    found += [wiring.ref(other) for other in wiring.ancestors(node)]
    found += [Inside(quote) for quote in QUOTES]
    found += [Depth(brackets) for brackets in ("(", "[", "{", "([{")]
    sets: list[TokenSet] = []
    for which in TOKEN_NAMES:
        of_which = _sets(target, which, vocabulary)
        found += [Is(which, tokens) for tokens in of_which]
        if which == "token":
            sets += of_which
    sets += _standard_sets(vocabulary)
    sets = [tokens for tokens in dict.fromkeys(sets) if 0 < len(tokens.tokens) <= SMALL_SET]
    for tokens in sets:
        found += [Seen(tokens), Count(tokens), Distance(tokens)]
        found += [opposite(Seen(tokens))]
    for tokens in sets:
        for others in sets:
            if set(tokens.tokens).isdisjoint(others.tokens):
                found += [Last(tokens, others), Share(tokens, others)]
    return found + _thresholds(target, [Position(), *map(Distance, sets), *map(Count, sets)])


def _sets(target: Target, which: str, vocabulary: Vocabulary) -> list[TokenSet]:
    """Sets of tokens at which the node's mean is unlike that at others."""
    tokens = target.flat(lambda sequences: sequences.named[which])
    means = Means.by(tokens, target.values, target.weights)
    found = []
    for table in tables_of(means, target.variance, most_levels=3, shares=OF_SETS):
        for members, _ in table.groups:
            known = [token for token in members if token >= 0]
            if known:
                found.append(vocabulary.set_of(known))
    return list(dict.fromkeys(found))


def _standard_sets(vocabulary: Vocabulary) -> list[TokenSet]:
    """Sets of tokens that matter in code: quotes, brackets, ends of lines."""
    found = []
    for chars in ("'", '"', "([{", ")]}", "\n", ","):
        members = []
        for token, text in enumerate(vocabulary.texts):
            if text and any(char in text for char in chars):
                members.append(token)
        found.append(vocabulary.set_of(members))
    return found


def _thresholds(target: Target, numbers: list[Expression]) -> list[Expression]:
    """Whether each of these whole numbers is below the threshold that tells most of the node."""
    found: list[Expression] = []
    for expression in numbers:
        keys = target.predicted(expression).long()
        means = Means.by(keys, target.values, target.weights)
        if len(means.keys) < 3:
            continue
        weight = means.weights.cumsum(0)
        total = (means.weights * means.means).cumsum(0)
        low, high = weight[:-1], weight[-1] - weight[:-1]
        between = (total[:-1] / low - (total[-1] - total[:-1]) / high.clamp(min=1e-300)).square()
        best = int((between * low * high).argmax())
        found.append(Compare(expression, "<", Number(float(means.keys[best + 1]))))
    return found


def _conjunctions(target: Target, pool: Pool) -> list[Expression]:
    """The most telling truth values, joined two by two."""
    gains = []
    for i, expression in enumerate(pool.expressions):
        if expression.is_boolean:
            gains.append((float(_gain(target, pool.columns[:, [i]])[0]), i))
    gains.sort(reverse=True)
    top = [pool.expressions[i] for _, i in gains[:JOINED]]
    found: list[Expression] = []
    for i, first in enumerate(top):
        for second in top[:i]:
            found += [both(second, first), both(second, opposite(first))]
            found.append(both(opposite(second), first))
    return found


def _gain(target: Target, columns: Float[Tensor, "value column"]) -> Float[Tensor, " column"]:
    """The share of the variance that a linear function of each column alone explains."""
    centred = columns - target.weights @ columns
    along = (target.weights * (target.values - target.mean)) @ centred
    size = target.weights @ centred.square()
    return along.square() / size.clamp(min=1e-12) / target.variance


def _forward(target: Target, pool: Pool) -> list[Candidate]:
    """Add the term that explains most for its size, refit, and so on."""
    prices = torch.tensor([price(each) for each in pool.expressions], dtype=torch.float64)
    # By the weights, and without what the constant and the terms that were chosen explain.
    root = target.weights.sqrt()[:, None]
    columns = (pool.columns - target.weights @ pool.columns) * root
    rest = (target.values - target.mean) * root[:, 0]
    least_left = 1e-6 * columns.square().sum(0)
    chosen: list[int] = []
    found: list[Candidate] = []
    for _ in range(MOST_TERMS):
        left = columns.square().sum(0)
        gains = (rest @ columns).square() / left.clamp(min=1e-12) / target.variance
        gains = gains.masked_fill(left <= least_left, 0.0) - prices
        best = int(gains.argmax())
        if float(gains[best]) <= 0:
            break
        chosen.append(best)
        found.append(target.linear_fit([pool.expressions[i] for i in chosen]))
        direction = columns[:, best] / left[best].sqrt()
        columns = columns - direction[:, None] * (direction @ columns)
        rest = rest - direction * (direction @ rest)
    return found
