"""Tests of significance: exact, or by permutation. None of them assumes a distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import counted

#: A p-value below this counts as significant.
SIGNIFICANT = 0.05
#: As many permutations or sign flips as this are held in memory at a time.
_AT_ONCE = 1000


@dataclass(frozen=True)
class PValue:
    """The probability, under the null hypothesis, of a result at least as extreme as the measured.

    Attributes:
        value: the p-value; None if there are too few data for a test.
        n: the number of independent data that the test rests on.
        data: what these data are: "pairs", "random circuits" …
        n_permutations: the number of random permutations or sign flips; 0 if the test is exact.
        problem: why there is no value; empty if there is one.
    """

    value: float | None
    n: int
    data: str
    n_permutations: int = 0
    problem: str = ""

    @property
    def is_significant(self) -> bool:
        """Whether there is a value, and it is below `SIGNIFICANT`."""
        return self.value is not None and self.value < SIGNIFICANT

    def __str__(self) -> str:
        if self.value is None:
            return self.problem
        return f"p = {self.value:.2g}"


def sign_test(n_positive: int, n: int, data: str, margin: float = 0.0) -> PValue:
    """The two-sided test of whether one of two outcomes is more frequent than the other.

    The null hypothesis is |P(positive) - 1/2| ≤ margin.

    Args:
        n_positive: the number of positive outcomes.
        n: the number of outcomes, without ties.
        data: what the outcomes are counted over, such as "pairs".
        margin: how far from 1/2 the probability may be.
    """
    probability = 0.5 + margin
    if probability**n + (1 - probability) ** n >= SIGNIFICANT:
        return _too_few(n, data)
    distance = abs(n_positive - n / 2)
    p_value = 0.0
    for k in range(n + 1):
        if abs(k - n / 2) >= distance:
            p_value += _binomial(k, n, probability)
    return PValue(min(1.0, p_value), n, data)


def exceeds_most(n_exceeded: int, n: int, data: str, share: float) -> PValue:
    """The test of whether a value exceeds more than `share` of all values of a distribution.

    The null hypothesis is that it exceeds at most this share (Shi et al. 2024, arXiv 2410.13032,
    section 4: sufficiency and partial necessity).

    Args:
        n_exceeded: how many of a sample of the distribution the value exceeds.
        n: the size of the sample.
        data: what the sample consists of, such as "random circuits".
        share: the share of the distribution.
    """
    if share**n >= SIGNIFICANT:
        return _too_few(n, data)
    p_value = math.fsum(_binomial(k, n, share) for k in range(n_exceeded, n + 1))
    return PValue(min(1.0, p_value), n, data)


def exceeds_fewer(n_exceeded: int, n: int, data: str, share: float) -> PValue:
    """The test of whether a value exceeds less than `share` of all values of a distribution.

    The null hypothesis is that it exceeds at least this share (Shi et al. 2024, section 3:
    minimality). For the arguments see `exceeds_most`.
    """
    if (1 - share) ** n >= SIGNIFICANT:
        return _too_few(n, data)
    p_value = math.fsum(_binomial(k, n, share) for k in range(n_exceeded + 1))
    return PValue(min(1.0, p_value), n, data)


def sign_flip_tests(rises: Float[Tensor, "quantity pair"], n_flips: int, seed: int) -> list[PValue]:
    """For each row, the one-sided test of whether its mean is above 0.

    The null hypothesis is that each pair's rise is as probable with the opposite sign. The p-value
    is (1 + number of random sign flips whose mean is at least the measured one) / (1 + n_flips).
    """
    n_pairs = rises.shape[1]
    if 0.5**n_pairs >= SIGNIFICANT:
        return [_too_few(n_pairs, "pairs")] * len(rises)
    precise = rises.double().cpu()
    measured = precise.sum(1)
    # Where flips give the same sum in another order, rounding must not decide.
    threshold = measured - 1e-12 * precise.abs().sum(1)
    generator = torch.Generator().manual_seed(seed)
    n_as_large = torch.zeros(len(rises), dtype=torch.long)
    for start in range(0, n_flips, _AT_ONCE):
        n_now = min(_AT_ONCE, n_flips - start)
        signs = torch.randint(2, (n_pairs, n_now), generator=generator) * 2.0 - 1
        n_as_large += (precise @ signs.double() >= threshold[:, None]).sum(1)
    p_values = (1 + n_as_large) / (1 + n_flips)
    return [PValue(p_value, n_pairs, "pairs", n_flips) for p_value in p_values.tolist()]


def independence_test(
    first: Float[Tensor, "pair feature"],
    second: Float[Tensor, "pair feature"],
    n_permutations: int,
    seed: int,
) -> tuple[float | None, PValue]:
    """The Hilbert-Schmidt independence criterion (HSIC) of two samples, and its permutation test.

    The null hypothesis is that the samples are independent. The statistic is
    trace(K H L H) / (n - 1)², where K and L are Gaussian kernels whose width is the median distance
    within each sample, and H centres them (Gretton et al. 2007, "A kernel statistical test of
    independence"). The p-value is (1 + number of permutations of the second sample with at least
    this statistic) / (1 + n_permutations).

    Returns:
        The statistic and the p-value. A sample that does not vary is independent of all others: the
        statistic is then 0 and the p-value 1.
    """
    n = len(first)
    if math.factorial(min(n, 20)) * SIGNIFICANT <= 1 or SIGNIFICANT * (1 + n_permutations) <= 1:
        return None, _too_few(n, "pairs")
    kernels = _centred_kernel(first), _centred_kernel(second)
    if kernels[0] is None or kernels[1] is None:
        return 0.0, PValue(1.0, n, "pairs", n_permutations)
    measured = float((kernels[0] * kernels[1]).sum())
    # In another order of the sum, rounding must not decide.
    threshold = measured - 1e-9 * float(kernels[0].norm() * kernels[1].norm())
    generator = torch.Generator().manual_seed(seed)
    n_as_large = 0
    for _ in range(n_permutations):
        order = torch.randperm(n, generator=generator)
        permuted = kernels[1][order][:, order]
        n_as_large += int((kernels[0] * permuted).sum() >= threshold)
    p_value = (1 + n_as_large) / (1 + n_permutations)
    return measured / (n - 1) ** 2, PValue(p_value, n, "pairs", n_permutations)


def _centred_kernel(sample: Float[Tensor, "pair feature"]) -> Float[Tensor, "pair pair"] | None:
    """The centred Gaussian kernel of a sample; None if the sample does not vary."""
    precise = sample.double().cpu()
    distances = torch.cdist(precise, precise)
    positive = distances[distances > 1e-9 * (1 + precise.abs().max())]
    if not len(positive):
        return None
    kernel = torch.exp(-(distances**2) / (2 * positive.median() ** 2))
    return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()


def holm(p_values: Sequence[PValue]) -> list[PValue]:
    """The p-values, corrected for the number of tests by Holm's method (1979).

    With the corrected values, the probability that any true null hypothesis is rejected stays below
    the level of a single test, however the tests depend on each other.

    A test without a value stays so, and does not count.
    """
    tested = [i for i, p_value in enumerate(p_values) if p_value.value is not None]
    smallest_first = sorted(tested, key=lambda i: p_values[i].value or 0.0)
    corrected = list(p_values)
    largest_so_far = 0.0
    for rank, i in enumerate(smallest_first):
        n_left = len(tested) - rank
        scaled = min(1.0, n_left * (p_values[i].value or 0.0))
        largest_so_far = max(largest_so_far, scaled)
        corrected[i] = replace(p_values[i], value=largest_so_far)
    return corrected


def _too_few(n: int, data: str) -> PValue:
    shown = counted(n, data.removesuffix("s"))
    return PValue(None, n, data, problem=f"{shown}: too few for a test")


def _binomial(k: int, n: int, probability: float) -> float:
    """The probability of k successes in n trials, each of this probability in (0, 1)."""
    log_choices = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    log_odds = k * math.log(probability) + (n - k) * math.log1p(-probability)
    return math.exp(log_choices + log_odds)
