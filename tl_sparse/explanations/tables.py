"""Expressions of one token, or of the position alone: a few levels, and what has which."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.explanations.building import linear, number
from tl_sparse.explanations.expressions import Compare, Expression, If, Is, Number, Position
from tl_sparse.explanations.fitting import PRICE_OF_SYMBOL, PRICE_OF_TOKEN, Candidate, Target
from tl_sparse.explanations.parsing import Vocabulary

#: The numbers of levels that are tried.
MOST_LEVELS = 16
MOST_PIECES = 16
#: What a table has to explain of what any function of the token, or of the position, can.
#: Other expressions refer to it, so it is made more exact than they have to be.
OF_TABLE = (0.999, 0.998, 0.99, 0.95, 0.9)
#: The same of functions of the position, of which small errors matter in the scores of attention.
OF_POSITIONS = 0.997
#: Of so many tokens, those that matter most, a table may list some.
MOST_KEYS = 1500
#: A table lists at most so many tokens.
MOST_TOKENS = 400


@dataclass(frozen=True, eq=False)
class Means:
    """The mean of some values for each token, or for each position.

    Attributes:
        keys: the tokens or positions that occur.
        means: the weighted mean of the values of each.
        weights: the weight of each.
    """

    keys: Int[Tensor, " key"]
    means: Float[Tensor, " key"]
    weights: Float[Tensor, " key"]

    @classmethod
    def by(
        cls, keys: Int[Tensor, " value"], values: Tensor, weights: Float[Tensor, " value"]
    ) -> "Means":
        """The means of the values with each key."""
        distinct, inverse = keys.unique(return_inverse=True)
        zeros = torch.zeros(len(distinct), dtype=torch.float64)
        weight = zeros.index_add(0, inverse, weights)
        total = zeros.index_add(0, inverse, weights * values)
        return cls(distinct, total / weight, weight)

    def of_most_weight(self, n_keys: int) -> "Means":
        """The same of the keys that matter most, at most so many."""
        if len(self.keys) <= n_keys:
            return self
        mean = self.weights @ self.means / self.weights.sum()
        matter = self.weights * (self.means - mean).square()
        return self.only(matter.topk(n_keys).indices.sort().values)

    def only(self, chosen: Tensor) -> "Means":
        """The same of the keys that a mask or indices choose."""
        return Means(self.keys[chosen], self.means[chosen], self.weights[chosen])

    def at(self, keys: Int[Tensor, " value"]) -> Float[Tensor, " value"]:
        """The mean of each key, all of which must occur."""
        return self.means[torch.searchsorted(self.keys, keys)]


def share_of(target: Target, keys: Int[Tensor, " value"]) -> float:
    """The share of the variance that the best function of these keys explains."""
    return target.score(Means.by(keys, target.values, target.weights).at(keys))


def token_tables(target: Target, which: str, vocabulary: Vocabulary) -> list[Candidate]:
    """Tables of one of the tokens of `TOKEN_NAMES`, with few levels and few tokens."""
    tokens = target.flat(lambda sequences: sequences.named[which])
    means = Means.by(tokens, target.values, target.weights)
    found = []
    for table in tables_of(means, target.variance):
        found.append(target.candidate(table.expression(which, vocabulary)))
    return found


@dataclass(frozen=True)
class TokenTable:
    """Groups of tokens, each with a number.

    Attributes:
        groups: the tokens of each group and its number.
        others: the number of all other tokens.
    """

    groups: list[tuple[list[int], float]]
    others: float

    @property
    def price(self) -> float:
        """What its size costs: each group has an `if`, an `else`, a name and a number."""
        n_tokens = sum(len(tokens) for tokens, _ in self.groups)
        return 3 * PRICE_OF_SYMBOL * len(self.groups) + PRICE_OF_TOKEN * n_tokens

    def values_at(self, tokens: Int[Tensor, " value"]) -> Float[Tensor, " value"]:
        """The number of each of these tokens."""
        values = torch.full(tokens.shape, self.others, dtype=torch.float64)
        for members, level in self.groups:
            values[torch.isin(tokens, torch.tensor(members))] = level
        return values

    def expression(self, which: str, vocabulary: Vocabulary) -> Expression:
        """The table as an expression of one of the tokens of `TOKEN_NAMES`."""
        expression: Expression = number(self.others)
        for tokens, level in reversed(self.groups):
            known = [token for token in tokens if token >= 0]
            if known:
                condition = Is(which, vocabulary.set_of(known))
                expression = If(number(level), condition, expression)
        return expression


def tables_of(
    means: Means,
    variance: float,
    most_levels: int = MOST_LEVELS,
    shares: Sequence[float] = OF_TABLE,
) -> list[TokenTable]:
    """The shortest table of these means for each share of their variance; none if there is none.

    Args:
        variance: the variance of all; where means do not vary beside it, there is no table.
        most_levels: the largest number of levels.
        shares: the shares of the variance of the means that tables are to explain.
    """
    means = means.of_most_weight(MOST_KEYS)
    order = means.means.argsort()
    ordered = Means(means.keys[order], means.means[order], means.weights[order])
    values, weights = ordered.means, ordered.weights
    total = float(weights @ values.square()) - float(weights @ values) ** 2 / float(weights.sum())
    if total <= 1e-12 * variance:
        return []
    shortest: dict[float, TokenTable] = {}
    cost = _costs(values, weights)
    for n_levels in range(2, min(most_levels, len(values)) + 1):
        group_of = division(cost, n_levels)
        for share in shares:
            table = _fewest(ordered, group_of, (1 - share) * total)
            before = shortest.get(share)
            if table is not None and (before is None or table.price < before.price):
                shortest[share] = table
    return list(shortest.values())


def _fewest(by_token: Means, group_of: Int[Tensor, " key"], allowed: float) -> TokenTable | None:
    """The table with these groups that lists the fewest tokens; None if its error is too large."""
    means, weights = by_token.means, by_token.weights
    n_groups = int(group_of.max()) + 1
    sums = torch.zeros(n_groups, dtype=torch.float64)
    of_group = sums.index_add(0, group_of, weights)
    levels = sums.index_add(0, group_of, weights * means) / of_group
    default = int(group_of.bincount().argmax())
    errors = weights * (means - levels[group_of]).square()
    if float(errors.sum()) > allowed:
        return None
    # Moving a token to the others costs the difference of its two errors.
    cost = weights * (means - levels[default]).square() - errors
    cheapest = cost.argsort()
    is_listed = torch.ones_like(group_of, dtype=torch.bool)
    is_listed[cheapest[cost[cheapest].cumsum(0) + errors.sum() <= allowed]] = False
    is_listed &= group_of != default
    if not bool(is_listed.any()) or int(is_listed.sum()) > MOST_TOKENS:
        return None
    others = float(weights[~is_listed] @ means[~is_listed] / weights[~is_listed].sum())
    groups = []
    for group in group_of[is_listed].unique().tolist():
        members = is_listed & (group_of == group)
        level = float(weights[members] @ means[members] / weights[members].sum())
        groups.append((by_token.keys[members].tolist(), level))
    groups.sort(key=lambda group: -abs(group[1] - others))
    return TokenTable(groups, others)


def division(cost: Float[Tensor, "start end"], n_segments: int) -> Int[Tensor, " key"]:
    """The number of the segment of each key, in the cheapest division into that many.

    For sorted values and the costs of segments beside their means, these are the best groups.

    By dynamic programming over the last segment.
    """
    n = len(cost)
    least = cost[0].clone()
    starts = []
    for _ in range(n_segments - 1):
        # [first value of the last segment, end]: the segments before it, and the last one
        before = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), least[:-1]])
        least, start = (before[:, None] + cost).min(0)
        starts.append(start)
    group = torch.zeros(n, dtype=torch.long)
    end = n - 1
    for number_of, start in zip(range(n_segments - 1, 0, -1), reversed(starts), strict=True):
        begin = int(start[end])
        group[begin : end + 1] = number_of
        end = begin - 1
        if end < 0:
            break
    return group.unique(return_inverse=True)[1]


def _costs(values: Tensor, weights: Tensor) -> Float[Tensor, "start end"]:
    """The squared error of each segment beside its mean."""
    weight = _sums(weights).clamp(min=1e-300)
    total = _sums(weights * values)
    return _of_segments(_sums(weights * values * values) - total * total / weight)


def position_functions(target: Target) -> list[Candidate]:
    """Functions of the position in pieces, each of which is linear."""
    means = Means.by(target.positions, target.values, target.weights)
    cost = _costs_of_lines(means)
    possible = share_of(target, target.positions)
    found = []
    for n_pieces in range(1, min(MOST_PIECES, len(means.keys)) + 1):
        pieces = division(cost, n_pieces)
        found.append(target.candidate(_in_pieces(means, pieces)))
        if found[-1].score >= OF_POSITIONS * possible:
            break
    return found


def _costs_of_lines(means: Means) -> Float[Tensor, "start end"]:
    """The squared error of the best line through each piece, from its first to its last key."""
    x, y, w = means.keys.double(), means.means, means.weights
    x = (x - x.mean()) / max(1.0, float(x.max() - x.min()))  # for small rounding errors
    weight = _sums(w).clamp(min=1e-300)
    x_sum, y_sum = _sums(w * x), _sums(w * y)
    xx = _sums(w * x * x) - x_sum * x_sum / weight
    xy = _sums(w * x * y) - x_sum * y_sum / weight
    yy = _sums(w * y * y) - y_sum * y_sum / weight
    has_slope = xx > 1e-9 * weight
    explained = torch.where(has_slope, xy * xy / torch.where(has_slope, xx, 1.0), 0.0)
    return _of_segments(yy - explained)


def _sums(values: Float[Tensor, " key"]) -> Float[Tensor, "start end"]:
    """The sum of the values of each segment, from its first to its last; elsewhere no matter."""
    total = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    return total[None, 1:] - total[:-1, None]


def _of_segments(cost: Float[Tensor, "start end"]) -> Float[Tensor, "start end"]:
    """The cost of each segment, infinite where the end is before the start."""
    is_segment = torch.ones_like(cost, dtype=torch.bool).triu()
    return cost.clamp(min=0).masked_fill(~is_segment, torch.inf)


def _in_pieces(means: Means, piece_of: Int[Tensor, " key"]) -> Expression:
    """The line through each piece, as a conditional expression."""
    last = int(piece_of.max())
    expression = _line(means.only(piece_of == last))
    for piece in range(last - 1, -1, -1):
        members = means.only(piece_of == piece)
        end = int(members.keys[-1]) + 1
        expression = If(_line(members), Compare(Position(), "<", Number(end)), expression)
    return expression


def _line(means: Means) -> Expression:
    x, weights = means.keys.double(), means.weights / means.weights.sum()
    x_mean, y_mean = float(weights @ x), float(weights @ means.means)
    dx = x - x_mean
    variance = float(weights @ dx.square())
    slope = float(weights @ (dx * (means.means - y_mean))) / variance if variance > 0 else 0.0
    largest = float(means.means.abs().max())
    if abs(slope) * float(x.max() - x.min()) < 1e-3 * largest:
        return number(y_mean)
    constant = y_mean - slope * x_mean
    return linear(constant if abs(constant) > 1e-6 * largest else 0.0, [(slope, Position())])
