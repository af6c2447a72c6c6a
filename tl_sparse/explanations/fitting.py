"""Fitting: the values of a node on half of the data, and how well expressions fit them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import Node
from tl_sparse.explanations.building import linear
from tl_sparse.explanations.expressions import Expression
from tl_sparse.explanations.measures import is_constant
from tl_sparse.explanations.samples import Sample
from tl_sparse.explanations.sequences import Sequences, values_of

Flat = Float[Tensor, " value"]
#: So much of the score is given up to save one symbol; a token in a set counts for less.
PRICE_OF_SYMBOL, PRICE_OF_TOKEN = 0.0005, 0.0001
#: A constant below this share of the standard deviation is left out.
NEGLIGIBLE = 1e-3
#: Of expressions with this score, the shortest is taken.
ENOUGH = 0.97
#: The weights of the samples. Every token once is only there for tokens that text has not.
SAMPLE_WEIGHTS = {"prompts": 1.0, "text": 1.0, "tokens": 0.1}


@dataclass(frozen=True)
class Candidate:
    """An expression and how well it fits.

    Attributes:
        expression: the expression.
        score: the explained variance on the data for fitting, the mean of that on text and on
            prompts.
    """

    expression: Expression
    score: float


@dataclass(frozen=True, eq=False)
class Target:
    """The values of a node on the data for fitting.

    Attributes:
        samples: the data.
        values: the values at all real tokens of all samples, in a row.
        weights: the weight of each in the mean squared error, with a sum of 1: those of each sample
            add up to the same, divided by the variance there.
    """

    samples: list[Sample]
    values: Flat
    weights: Flat

    @classmethod
    def of_node(cls, node: Node, samples: list[Sample]) -> "Target":
        """The values of a node."""
        parts = [sample.real(sample.values[node]).double() for sample in samples]
        values = torch.cat(parts)
        variance = float(values.var(unbiased=False))
        weights = []
        for sample, part in zip(samples, parts, strict=True):
            # Where a node hardly varies on one of the samples, small errors there do not matter.
            of_part = max(float(part.var(unbiased=False)), 0.05 * variance, 1e-300)
            weights.append(
                torch.full_like(part, SAMPLE_WEIGHTS[sample.name] / (len(part) * of_part))
            )
        joined = torch.cat(weights)
        return cls(samples, values, joined / joined.sum())

    @property
    def is_constant(self) -> bool:
        return is_constant(self.values)

    @cached_property
    def mean(self) -> float:
        """The weighted mean."""
        return float(self.weights @ self.values)

    @cached_property
    def variance(self) -> float:
        """The weighted variance."""
        return float(self.weights @ (self.values - self.mean).square())

    @cached_property
    def tokens(self) -> Tensor:
        """The present token at each value."""
        return self.flat(lambda sequences: sequences.tokens)

    @cached_property
    def positions(self) -> Tensor:
        """The position of each value."""
        return self.flat(lambda sequences: sequences.positions)

    def flat(self, of: Callable[[Sequences], Tensor]) -> Tensor:
        """What a function of the sequences gives at all real tokens, in a row."""
        return torch.cat([sample.real(of(sample.sequences)) for sample in self.samples])

    def predicted(self, expression: Expression) -> Flat:
        """The values of an expression."""
        return self.flat(lambda sequences: values_of(expression, sequences))

    def score(self, predicted: Flat) -> float:
        """The explained variance, by the weights."""
        error = float(self.weights @ (self.values - predicted).square())
        return 1 - error / self.variance if self.variance else 1.0

    def candidate(self, expression: Expression) -> Candidate:
        """The expression with its score."""
        return Candidate(expression, self.score(self.predicted(expression)))

    def regression(self, columns: list[Flat]) -> Tensor:
        """The constant and the factors of the columns that fit best."""
        design = torch.stack([torch.ones_like(self.values), *columns], dim=1)
        root = self.weights.sqrt()[:, None]
        gram = (design * root).T @ (design * root)
        size = gram.diagonal().sqrt().clamp(min=1e-12)
        gram = gram / size[:, None] / size
        gram += 1e-9 * torch.eye(len(gram), dtype=gram.dtype)
        moments = (design * self.weights[:, None]).T @ self.values / size
        return torch.linalg.solve(gram, moments) / size

    def linear_fit(self, expressions: list[Expression]) -> Candidate:
        """The best linear function of these expressions."""
        columns = [self.predicted(expression) for expression in expressions]
        constant, *factors = self.regression(columns).tolist()
        if abs(constant) < NEGLIGIBLE * self.variance**0.5:
            constant = 0.0
        return self.candidate(linear(constant, list(zip(factors, expressions, strict=True))))


def best(candidates: list[Candidate], enough: float = ENOUGH) -> Candidate:
    """The shortest candidate that is good enough; else the best one for its size."""
    good = [each for each in candidates if each.score >= enough]
    if good:
        return min(good, key=lambda each: (each.expression.size, -each.score))
    return max(candidates, key=lambda each: each.score - price(each.expression))


def price(expression: Expression) -> float:
    """How much of the score an expression has to earn for its size."""
    n_tokens = expression.n_tokens
    return PRICE_OF_SYMBOL * (expression.size - n_tokens) + PRICE_OF_TOKEN * n_tokens
