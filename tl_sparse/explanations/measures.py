"""How well an expression fits the values of a node."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: A node has two levels if a threshold and one number on each side explain so much of its values.
TWO_LEVELS = 0.95
#: A node is explained where this much of its values on held-out data is.
EXPLAINED = 0.9


@dataclass(frozen=True)
class Levels:
    """The two numbers that explain most of a node's values, and what divides them.

    This is the binarisation of Gao et al. 2025: how much of the values is left if a threshold and
    one number on each side stand for them.

    Attributes:
        low, high: the mean value on each side.
        threshold: values from here on are high.
        explained: the share of the variance that the two numbers explain; 1 for a constant.
    """

    low: float
    high: float
    threshold: float
    explained: float

    @property
    def are_two(self) -> bool:
        """Whether the node has two levels, so that an expression is judged by its accuracy."""
        return self.high > self.low and self.explained >= TWO_LEVELS


@dataclass(frozen=True)
class Fit:
    """How well an expression fits a node on held-out data.

    Attributes:
        explained: the explained variance, 1 - mean squared error / variance: 0 for the mean, and
            negative for what is worse. None where the values do not vary and the expression errs.
        balanced_accuracy: for nodes with two levels, the mean of the shares of low and of high
            values that the expression puts on the right side of the threshold; None for others, and
            where all values are on one side.
        n_values: the number of values.
    """

    explained: float | None
    balanced_accuracy: float | None
    n_values: int

    @property
    def score(self) -> float | None:
        """The balanced accuracy of a node with two levels, else the explained variance."""
        return self.explained if self.balanced_accuracy is None else self.balanced_accuracy


def is_constant(values: Float[Tensor, " value"]) -> bool:
    """Whether values differ by no more than rounding."""
    spread = float(values.max() - values.min())
    return spread <= 1e-5 * max(1e-3, float(values.abs().max()))


def two_levels(values: Float[Tensor, " value"]) -> Levels:
    """The threshold that explains most, found among all of them."""
    n = len(values)
    if is_constant(values):
        level = float(values.double().mean())
        return Levels(level, level, level, 1.0)
    ordered = values.double().sort().values
    sums = ordered.cumsum(0)
    n_low = torch.arange(1, n, dtype=torch.float64)
    low = sums[:-1] / n_low
    high = (sums[-1] - sums[:-1]) / (n - n_low)
    between = n_low * (n - n_low) * (high - low).square() / n**2
    # No threshold divides equal values.
    between = torch.where(ordered[1:] > ordered[:-1], between, -1.0)
    best = int(between.argmax())
    threshold = float(ordered[best] + ordered[best + 1]) / 2
    explained = float(between[best] / ordered.var(unbiased=False))
    return Levels(float(low[best]), float(high[best]), threshold, explained)


def fit_of(
    predicted: Float[Tensor, " value"], values: Float[Tensor, " value"], levels: Levels
) -> Fit:
    """How well predictions fit values."""
    predicted, values = predicted.double(), values.double()
    error = float((predicted - values).square().mean())
    explained: float | None
    if is_constant(values):
        is_right = error <= 1e-9 + 1e-6 * float(values.square().mean())
        explained = 1.0 if is_right else None
    else:
        explained = 1 - error / float(values.var(unbiased=False))
    accuracy = None
    if levels.are_two:
        accuracy = balanced_accuracy(predicted >= levels.threshold, values >= levels.threshold)
    return Fit(explained, accuracy, len(values))


def balanced_accuracy(
    predicted: Bool[Tensor, " value"], true: Bool[Tensor, " value"]
) -> float | None:
    """The mean of the shares of true and of false ones that are predicted so; None without both."""
    if not bool(true.any()) or bool(true.all()):
        return None
    return float(predicted[true].double().mean() + (~predicted[~true]).double().mean()) / 2
