"""How well the values of one run follow those of another: correlation and normalised error."""

from collections.abc import Sequence
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
        reference_mean: its mean in the reference run; of a vector, the norm of its mean.
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

    A node may be a vector of several entries. All of them then count together: its variances,
    covariance and errors are the sums of those of its entries.

    Samples of the same pair of prompts depend on each other. Standard errors are therefore those of
    the delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17): each block of pairs
    is left out in turn.
    """

    def __init__(self, n_entries: Sequence[int], n_pairs: int) -> None:
        """Empty sums.

        Args:
            n_entries: the number of entries of each node, 1 for a channel.
        """
        self.n_entries = list(n_entries)
        self.n_blocks = min(MAX_BLOCKS, n_pairs)
        # The number of samples, and the sums of: reference, value, their squares, and the square of
        # their difference. The latter, not their product, so that equal values have no error.
        self._sums = torch.zeros(self.n_blocks, 6, sum(self.n_entries), dtype=torch.float64)

    def add(
        self,
        reference: Float[Tensor, "sample entry"],
        value: Float[Tensor, "sample entry"],
        pairs: Int[Tensor, " sample"],
    ) -> None:
        """Add samples.

        Args:
            reference, value: the entries of all nodes, node by node.
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
        of_each_node = self._sums.cpu().split(self.n_entries, dim=2)
        return [_agreement(sums) for sums in of_each_node]


def _agreement(sums: Float[Tensor, "block 6 entry"]) -> Agreement:
    """The agreement of one node, from its sums over the samples of each block."""
    total = sums.sum(0)
    _, _, _, reference_squares, value_squares, _ = total.sum(1).tolist()
    variance, value_variance = _variances(total).tolist()
    reference_varies = variance > ROUNDING**2 * reference_squares
    varies = value_variance > ROUNDING**2 * value_squares
    without_block = total - sums
    correlation = error = None
    if reference_varies and varies:
        correlation = _estimate(_correlation(total), _correlation(without_block))
    if reference_varies:
        error = _estimate(_error(total), _error(without_block))
    reference_mean, mean = _size(total[1] / total[0]), _size(total[2] / total[0])
    return Agreement(reference_mean, mean, reference_varies, varies, correlation, error)


def _size(mean: Float[Tensor, " entry"]) -> float:
    """The mean of a node; of a vector, the norm of its mean."""
    return float(mean) if len(mean) == 1 else float(mean.norm())


def _variances(sums: Float[Tensor, "*block 6 entry"]) -> Float[Tensor, "*block 2"]:
    """The sums of squared deviations from the mean: of the reference, and of the value."""
    n = sums[..., :1, :]
    means = sums[..., 1:3, :] / n
    return (sums[..., 3:5, :] - n * means.square()).sum(-1)


def _correlation(sums: Float[Tensor, "*block 6 entry"]) -> Float[Tensor, " *block"]:
    n, reference, value, reference_squares, value_squares, errors = sums.unbind(-2)
    products = (reference_squares + value_squares - errors) / 2
    covariance = (products - reference * value / n).sum(-1)
    return (covariance / _variances(sums).prod(-1).sqrt()).clamp(-1, 1)


def _error(sums: Float[Tensor, "*block 6 entry"]) -> Float[Tensor, " *block"]:
    return sums[..., 5, :].sum(-1) / _variances(sums)[..., 0]


def _estimate(figure: Float[Tensor, ""], without_block: Float[Tensor, " block"]) -> Estimate:
    """A figure with its jackknife standard error, if it can be told from so few blocks."""
    n_blocks = len(without_block)
    deviations = without_block - without_block.mean()
    standard_error = ((n_blocks - 1) / n_blocks * deviations.square().sum()).sqrt()
    if n_blocks < 3 or not bool(standard_error.isfinite()):
        return Estimate(float(figure))
    return Estimate(float(figure), float(standard_error))
