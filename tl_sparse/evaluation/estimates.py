"""Means over prompts, pairs or draws, with their standard errors."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import ArgumentError, counted


@dataclass(frozen=True)
class Estimate:
    """A number that was measured on a sample.

    Attributes:
        value: the number.
        standard_error: its standard error; None if the sample is too small to tell.
    """

    value: float
    standard_error: float | None = None

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@checked()
def mean_of(values: Float[Tensor, " sample"]) -> Estimate:
    """The mean of independent values, such as one for each pair of prompts."""
    n = len(values)
    precise = values.double()
    standard_error = float(precise.std()) / math.sqrt(n) if n > 1 else None
    return Estimate(float(precise.mean()), standard_error)


@checked()
def mean_of_pairs(values: Float[Tensor, " prompt"]) -> Estimate:
    """The mean over the prompts of a task, of which each two in a row are a pair.

    The prompts of a pair depend on each other, so the standard error is that over pairs.

    Raises:
        ArgumentError: if there is no value, or an odd number of them.
    """
    if len(values) == 0 or len(values) % 2 == 1:
        n_values = counted(len(values), "value")
        raise ArgumentError(f"values must be two for each pair of prompts, not {n_values}")
    return mean_of(values.view(-1, 2).mean(1))


@checked()
def ratio_of_pairs(
    numerators: Float[Tensor, " prompt"], denominators: Float[Tensor, " prompt"]
) -> Estimate:
    """The ratio of two means over the same prompts, of which each two in a row are a pair.

    Its standard error is that of the linearised ratio: of the mean over pairs of numerator - ratio
    · denominator, divided by the mean denominator. The value is NaN if that mean is zero.

    Raises:
        ArgumentError: as for `mean_of_pairs`, or if the two are not as many.
    """
    if len(numerators) != len(denominators):
        raise ArgumentError(
            f"numerators and denominators must be as many, not {len(numerators)} and "
            f"{len(denominators)}"
        )
    below = mean_of_pairs(denominators).value
    if below == 0:
        return Estimate(math.nan, None)
    ratio = mean_of_pairs(numerators).value / below
    residuals = numerators.double() - ratio * denominators.double()
    error = mean_of_pairs(residuals).standard_error
    return Estimate(ratio, None if error is None else error / abs(below))


def correlation(first: Float[Tensor, " sample"], second: Float[Tensor, " sample"]) -> Estimate:
    """The Pearson correlation of two samples, with its asymptotic standard error.

    The standard error is (1 - r²) / sqrt(n - 1). The value is NaN if a sample does not vary.
    """
    first, second = first.double(), second.double()
    first, second = first - first.mean(), second - second.mean()
    scale = float(first.norm() * second.norm())
    if scale == 0:
        return Estimate(math.nan, None)
    r = float(first @ second) / scale
    n = len(first)
    return Estimate(r, (1 - r**2) / math.sqrt(n - 1) if n > 2 else None)
