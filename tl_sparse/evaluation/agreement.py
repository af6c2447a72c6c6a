"""How well the values of one run follow those of another: correlation and normalised error."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.evaluation.estimates import Estimate

#: For standard errors, pairs of prompts are dealt into at most so many blocks. It bounds the memory
#: that the sums of a large circuit need.
MAX_BLOCKS = 64
#: Values vary if their standard deviation is above this share of their root mean square. What is
#: below it is rounding in float32.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Agreement:
    """How well a value in one run follows the same value in a reference run.

    Attributes:
        reference_mean: its mean in the reference run.
        mean: its mean in the other run.
        reference_varies: whether it varies in the reference run by more than rounding.
        varies: whether it varies in the other run.
        correlation: the Pearson correlation of the two; None if one of them does not vary.
        error: the sum of (value - reference)² over that of (reference - its mean)². 0 if both are
            equal, 1 for a constant at the reference's mean; None if the reference does not vary.
    """

    reference_mean: float
    mean: float
    reference_varies: bool
    varies: bool
    correlation: Estimate | None
    error: Estimate | None


class AgreementSums:
    """Sums over samples, from which the agreement of each of many nodes follows.

    Samples of the same pair of prompts depend on each other. Standard errors are therefore those of
    the delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17): each block of pairs
    is left out in turn.
    """

    def __init__(self, n_nodes: int, n_pairs: int) -> None:
        self.n_blocks = min(MAX_BLOCKS, n_pairs)
        # The number of samples, and the sums of: reference, value, their squares, and the square of
        # their difference. The latter, not their product, so that equal values have no error.
        self._sums = torch.zeros(self.n_blocks, 6, n_nodes, dtype=torch.float64)

    def add(
        self,
        reference: Float[Tensor, "sample node"],
        value: Float[Tensor, "sample node"],
        pairs: Int[Tensor, " sample"],
    ) -> None:
        """Add samples.

        Args:
            pairs: the number of the pair of prompts that each sample is from.
        """
        reference = reference.double()
        value = value.double()
        terms = (
            torch.ones_like(reference),
            reference,
            value,
            reference.square(),
            value.square(),
            (value - reference).square(),
        )
        self._sums = self._sums.to(reference.device)
        blocks = pairs.to(reference.device) % self.n_blocks
        for i, term in enumerate(terms):
            self._sums[:, i].index_add_(0, blocks, term)

    def agreements(self) -> list[Agreement]:
        """The agreement of each node."""
        total = self._sums.sum(0)
        n, reference_sum, value_sum, reference_squares, value_squares, _ = total
        variance, value_variance = _variances(total)
        varying = torch.stack(
            [
                variance > ROUNDING**2 * reference_squares,
                value_variance > ROUNDING**2 * value_squares,
            ]
        )
        means = torch.stack([reference_sum, value_sum]) / n
        figures = _correlation_and_error(total)
        standard_errors = _jackknife(_correlation_and_error(total - self._sums))
        found = []
        for node in range(total.shape[1]):
            correlation, error = map(_estimate, figures[:, node], standard_errors[:, node])
            reference_mean, mean = means[:, node].tolist()
            reference_varies, varies = varying[:, node].tolist()
            found.append(
                Agreement(
                    reference_mean=reference_mean,
                    mean=mean,
                    reference_varies=reference_varies,
                    varies=varies,
                    correlation=correlation if reference_varies and varies else None,
                    error=error if reference_varies else None,
                )
            )
        return found


def _variances(
    sums: Float[Tensor, "*block 6 node"],
) -> tuple[Float[Tensor, "*block node"], Float[Tensor, "*block node"]]:
    """The sums of squared deviations from the mean: of the reference, and of the value."""
    n, reference, value, reference_squares, value_squares, _ = sums.unbind(-2)
    return reference_squares - reference**2 / n, value_squares - value**2 / n


def _correlation_and_error(
    sums: Float[Tensor, "*block 6 node"],
) -> Float[Tensor, "2 *block node"]:
    n, reference, value, reference_squares, value_squares, errors = sums.unbind(-2)
    variance, value_variance = _variances(sums)
    products = (reference_squares + value_squares - errors) / 2
    covariance = products - reference * value / n
    correlation = covariance / (variance * value_variance).sqrt()
    return torch.stack([correlation.clamp(-1, 1), errors / variance])


def _jackknife(without_block: Float[Tensor, "figure block node"]) -> Float[Tensor, "figure node"]:
    """Standard errors from the figures without each of the blocks in turn."""
    n_blocks = without_block.shape[1]
    deviations = without_block - without_block.mean(1, keepdim=True)
    return ((n_blocks - 1) / n_blocks * deviations.square().sum(1)).sqrt()


def _estimate(value: Float[Tensor, ""], standard_error: Float[Tensor, ""]) -> Estimate:
    """The standard error is None if it cannot be told from so few blocks."""
    if not bool(standard_error.isfinite()):
        return Estimate(float(value))
    return Estimate(float(value), float(standard_error))
