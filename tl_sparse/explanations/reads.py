"""Expressions of a read behind the first writes: a token's own share, and what nodes have written.

The norm divides both by a scale that depends on the token, and AbsTopK drops the channel where
others are larger.
"""

import torch
from torch import Tensor

from tl_sparse.circuits import Node
from tl_sparse.explanations.expressions import (
    Expression,
    add,
    number,
    times,
)
from tl_sparse.explanations.fitting import Candidate, Flat, Target
from tl_sparse.explanations.parsing import Vocabulary
from tl_sparse.explanations.structure import Wiring, cut_of, with_cut, without
from tl_sparse.explanations.tables import Means, tables_of

#: How many factors a token may have, and which shares of their variance tables explain.
MOST_FACTORS = 3
OF_FACTORS = (0.9, 0.7)
#: The levels of the tables that are added.
MOST_CONSTANTS = 6
OF_CONSTANTS = (0.99, 0.95, 0.9)


def through_writes(
    target: Target, node: Node, wiring: Wiring, vocabulary: Vocabulary
) -> list[Candidate]:
    """Expressions of a read through the earlier writes to its channel."""
    writes = wiring.writes(node)
    if not writes:
        return []
    refs: list[Expression] = [wiring.ref(write) for write in writes]
    written = add(*refs)
    found = with_cut(target, [written])
    if len(refs) > 1:
        found += with_cut(target, refs)
    for which in ("token", "previous"):
        found += _by_tokens(target, written, which, vocabulary)
    return found


def _by_tokens(
    target: Target, written: Expression, which: str, vocabulary: Vocabulary
) -> list[Candidate]:
    """Expressions in which the slope and the constant depend on the token."""
    tokens = target.flat(lambda sequences: sequences.named[which])
    x = target.predicted(written)
    is_zero = target.values == 0
    found = []
    for factor in _factors(target, tokens, x, which, vocabulary):
        found += _with_table(target, times(factor, written), tokens, which, vocabulary)
    if not 0.01 < float(is_zero.double().mean()) < 0.99:
        return found
    # Where AbsTopK drops small values, the others are fitted, and then a threshold.
    kept = without(target, is_zero)
    for factor in _factors(kept, tokens[~is_zero], x[~is_zero], which, vocabulary):
        whole = times(factor, written)
        for candidate in _with_table(target, whole, tokens, which, vocabulary, kept=~is_zero):
            found += cut_of(target, candidate.expression)
    return found


def _factors(
    target: Target, tokens: Tensor, x: Flat, which: str, vocabulary: Vocabulary
) -> list[Expression]:
    """Factors of what is written: one number, and tables of few numbers by token.

    The norm divides by a scale that depends on the token, and for some tokens AbsTopK drops the
    channel whatever is written, which is a factor of 0.
    """
    x_means = Means.by(tokens, x, target.weights)
    y_means = Means.by(tokens, target.values, target.weights)
    dx, dy = x - x_means.at(tokens), target.values - y_means.at(tokens)
    key = torch.searchsorted(x_means.keys, tokens)
    zeros = torch.zeros(len(x_means.keys), dtype=torch.float64)
    xx = zeros.index_add(0, key, target.weights * dx * dx)
    xy = zeros.index_add(0, key, target.weights * dx * dy)
    if float(xx.sum()) <= 1e-12 * max(target.variance, 1e-300):
        return [number(1.0)]
    factors: list[Expression] = [number(float(xy.sum() / xx.sum()))]
    has_slope = xx > 1e-6 * xx.sum()
    slopes = Means(x_means.keys[has_slope], (xy / xx)[has_slope], xx[has_slope])
    for table in tables_of(slopes, 0.0, MOST_FACTORS, OF_FACTORS):
        factors.append(table.expression(which, vocabulary))
    return factors


def _with_table(
    target: Target,
    expression: Expression,
    tokens: Tensor,
    which: str,
    vocabulary: Vocabulary,
    kept: Tensor | None = None,
) -> list[Candidate]:
    """The expression plus a number for each of a few groups of tokens."""
    rest = target.values - target.predicted(expression)
    weights = target.weights
    if kept is not None:
        rest, weights, tokens = rest[kept], weights[kept], tokens[kept]
    means = Means.by(tokens, rest, weights)
    found = [target.candidate(add(number(float(weights @ rest / weights.sum())), expression))]
    for table in tables_of(means, target.variance, MOST_CONSTANTS, OF_CONSTANTS):
        found.append(target.candidate(add(expression, table.expression(which, vocabulary))))
    return found
