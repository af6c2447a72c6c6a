"""Expressions of a read behind the first writes.

A channel of the stream is what nodes have written, plus what the token itself has there. The norm
divides both by a scale that depends on the token, and AbsTopK drops the channel where enough others
are larger, so that a threshold depends on the token too: cut(factor · written + constant, least),
where each of the three is a number, or a table of few numbers by token.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Node
from tl_sparse.explanations.building import add, number, times
from tl_sparse.explanations.expressions import Cut, Expression, If, Is
from tl_sparse.explanations.fitting import PRICE_OF_TOKEN, Candidate, Flat, Target
from tl_sparse.explanations.parsing import Vocabulary
from tl_sparse.explanations.structure import Wiring, cut_of, with_cut, without
from tl_sparse.explanations.tables import Means, tables_of

#: How many factors there may be, and which shares of their variance tables explain.
MOST_FACTORS = 4
OF_FACTORS = (0.97, 0.85)
#: The same of the constants.
MOST_CONSTANTS = 8
OF_CONSTANTS = (0.99, 0.97, 0.9)
#: How many thresholds are tried, and how many a table may have.
TRIED, MOST_THRESHOLDS = 24, 3
#: AbsTopK matters where it drops a share between these.
LEAST_DROPPED, MOST_DROPPED = 0.01, 0.99


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
    read = _Read(target, written, target.predicted(written), target.tokens, vocabulary)
    is_dropped = target.values == 0
    found += read.sums()
    if LEAST_DROPPED < float(is_dropped.double().mean()) < MOST_DROPPED:
        # Where AbsTopK drops small values, the others are fitted, and then thresholds.
        for candidate in read.only(~is_dropped).sums():
            found += cut_of(target, candidate.expression)
            found += read.with_thresholds(candidate.expression)
    return found


@dataclass(frozen=True, eq=False)
class _Read:
    """A read that is fitted, or some of its values.

    Attributes:
        target: its values.
        written: what nodes have written, as an expression.
        x: the values of that.
        tokens: the present token at each value.
        vocabulary: the texts of the tokens.
    """

    target: Target
    written: Expression
    x: Flat
    tokens: Int[Tensor, " value"]
    vocabulary: Vocabulary

    def only(self, chosen: Tensor) -> "_Read":
        """The same for some of the values."""
        kept = without(self.target, ~chosen)
        return _Read(kept, self.written, self.x[chosen], self.tokens[chosen], self.vocabulary)

    def sums(self) -> list[Candidate]:
        """factor · written + constant, each a number or a table by token.

        The scores are those on the values that are fitted.
        """
        found = []
        for slope, factor in self._factors():
            rest = self.target.values - slope * self.x
            whole = times(factor, self.written)
            means = Means.by(self.tokens, rest, self.target.weights)
            constant = float(self.target.weights @ rest)
            found.append(self._candidate(slope * self.x + constant, add(number(constant), whole)))
            for table in tables_of(means, self.target.variance, MOST_CONSTANTS, OF_CONSTANTS):
                predicted = slope * self.x + table.values_at(self.tokens)
                expression = add(whole, table.expression("token", self.vocabulary))
                found.append(self._candidate(predicted, expression))
        return found

    def _candidate(self, predicted: Flat, expression: Expression) -> Candidate:
        return Candidate(expression, self.target.score(predicted))

    def _factors(self) -> list[tuple[Flat, Expression]]:
        """One factor for all tokens, and tables: their values, and as expressions."""
        weights = self.target.weights
        x_means = Means.by(self.tokens, self.x, weights)
        y_means = Means.by(self.tokens, self.target.values, weights)
        dx = self.x - x_means.at(self.tokens)
        dy = self.target.values - y_means.at(self.tokens)
        key = torch.searchsorted(x_means.keys, self.tokens)
        zeros = torch.zeros(len(x_means.keys), dtype=torch.float64)
        xx = zeros.index_add(0, key, weights * dx * dx)
        xy = zeros.index_add(0, key, weights * dx * dy)
        slope = float(xy.sum() / xx.sum()) if float(xx.sum()) > 0 else 1.0
        factors: list[tuple[Flat, Expression]] = []
        factors.append((torch.full_like(self.x, slope), number(slope)))
        has_slope = xx > 1e-6 * xx.sum()
        slopes = Means(x_means.keys[has_slope], (xy / xx)[has_slope], xx[has_slope])
        if len(slopes.keys) > 1:
            for table in tables_of(slopes, 0.0, MOST_FACTORS, OF_FACTORS):
                expression = table.expression("token", self.vocabulary)
                factors.append((table.values_at(self.tokens), expression))
        return factors

    def with_thresholds(self, expression: Expression) -> list[Candidate]:
        """The expression where it is large enough, by a threshold that depends on the token."""
        values = self.target.predicted(expression)
        thresholds = values.abs().quantile(torch.linspace(0, 1, TRIED, dtype=torch.float64))
        keys, key = self.tokens.unique(return_inverse=True)
        errors = []
        for least in thresholds:
            kept = values * (values.abs() >= least)
            error = self.target.weights * (self.target.values - kept).square()
            zeros = torch.zeros(len(keys), dtype=torch.float64)
            errors.append(zeros.index_add(0, key, error))
        by_threshold = torch.stack(errors) / self.target.variance
        choice = _chosen_thresholds(by_threshold)
        if len(set(choice.tolist())) == 1:
            return []
        others = int(choice.bincount().argmax())
        least_of: Expression = number(float(thresholds[others]))
        for chosen in sorted(set(choice.tolist()) - {others}):
            tokens = self.vocabulary.set_of(keys[choice == chosen].tolist())
            least_of = If(number(float(thresholds[chosen])), Is("token", tokens), least_of)
        return [self.target.candidate(Cut(expression, least_of))]


def _chosen_thresholds(errors: Float[Tensor, "threshold token"]) -> Int[Tensor, " token"]:
    """The threshold of each token, of at most `MOST_THRESHOLDS` different ones.

    The first is the best for all tokens. The others are added one after the other, for the tokens
    whose error they reduce by more than naming a token costs.
    """
    n_tokens = errors.shape[1]
    choice = torch.full((n_tokens,), int(errors.sum(1).argmin()))
    for _ in range(MOST_THRESHOLDS - 1):
        now = errors.gather(0, choice[None])[0]
        gains = now - errors - PRICE_OF_TOKEN
        best = int(gains.clamp(min=0).sum(1).argmax())
        choice = torch.where(gains[best] > 0, best, choice)
    return choice
