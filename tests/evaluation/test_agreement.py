"""How well values follow each other: correlations, errors, and their standard errors."""

import math

import pytest
import torch

from tl_sparse.evaluation.agreement import AgreementSums

pytestmark = pytest.mark.any_line


def agreements(reference, value, pairs=None):
    reference, value = torch.as_tensor(reference), torch.as_tensor(value)
    if pairs is None:
        pairs = torch.arange(len(reference))
    sums = AgreementSums([1] * reference.shape[1], n_pairs=int(pairs.max()) + 1)
    half = len(reference) // 2  # in two parts, as batches come
    sums.add(reference[:half], value[:half], pairs[:half])
    sums.add(reference[half:], value[half:], pairs[half:])
    return sums.agreements()


def test_agreement_by_hand():
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-1, 1, -1, 1): 2 / sqrt(5 · 4). The differences of the
    # values are (1, -1, 3, 1), so the error is 12 / 5.
    (found,) = agreements([[1.0], [2.0], [3.0], [4.0]], [[0.0], [3.0], [0.0], [3.0]])
    deviations = [(-1.5, -1.5), (-0.5, 1.5), (0.5, -1.5), (1.5, 1.5)]
    products = sum(x * y for x, y in deviations)
    assert found.correlation.value == pytest.approx(products / math.sqrt(5 * 9))
    assert found.error.value == pytest.approx((1 + 1 + 9 + 1) / 5)
    assert (found.reference_mean, found.mean) == (2.5, 1.5)
    assert found.reference_varies
    assert found.varies


def test_equal_values_agree_exactly():
    reference = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) + 1000
    for found in agreements(reference, reference):
        assert found.correlation.value == pytest.approx(1, abs=1e-12)
        assert found.correlation.standard_error == pytest.approx(0, abs=1e-6)
        assert found.error.value == 0
        assert found.error.standard_error == 0


def test_values_that_do_not_vary_have_no_correlation():
    varying = torch.arange(4.0)
    constant = torch.full((4,), 3.0) + torch.tensor([0.0, 1e-6, 0.0, -1e-6])  # rounding
    reference = torch.stack([constant, varying, constant], 1)
    value = torch.stack([varying, constant, constant], 1)
    first, second, third = agreements(reference, value)
    assert first.correlation is second.correlation is third.correlation is None
    assert first.error is third.error is None
    assert second.error.value == pytest.approx((9 + 4 + 1 + 0) / 5, rel=1e-5)
    assert [each.reference_varies for each in (first, second, third)] == [False, True, False]
    assert [each.varies for each in (first, second, third)] == [True, False, False]
    assert third.mean == pytest.approx(3.0)


def test_standard_errors_are_those_over_pairs():
    """Copies of a sample in the same pair tell nothing new."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(20, 1, generator=generator)
    value = reference + torch.randn(20, 1, generator=generator)
    (once,) = agreements(reference, value)
    copies = torch.arange(20).repeat(3)
    (thrice,) = agreements(reference.repeat(3, 1), value.repeat(3, 1), copies)
    for figure in ("correlation", "error"):
        expected = getattr(once, figure)
        found = getattr(thrice, figure)
        assert found.value == pytest.approx(expected.value)
        assert found.standard_error == pytest.approx(expected.standard_error)
    # About that of independent samples: (1 - r²) / sqrt(n - 1).
    r = once.correlation.value
    assert once.correlation.standard_error == pytest.approx((1 - r**2) / math.sqrt(19), rel=0.5)


def test_standard_errors_are_right_on_average():
    """The spread of the correlation over many samples, for more pairs than there are blocks."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(130, 200, generator=generator)
    value = reference + torch.randn(130, 200, generator=generator)
    found = agreements(reference, value)
    correlations = torch.tensor([each.correlation.value for each in found])
    standard_errors = torch.tensor([each.correlation.standard_error for each in found])
    assert float(standard_errors.mean()) == pytest.approx(float(correlations.std()), rel=0.15)
    errors = torch.tensor([each.error.value for each in found])
    of_errors = torch.tensor([each.error.standard_error for each in found])
    assert float(of_errors.mean()) == pytest.approx(float(errors.std()), rel=0.15)


def test_one_pair_has_no_standard_error():
    (found,) = agreements([[1.0], [2.0]], [[1.0], [3.0]], torch.tensor([0, 0]))
    assert found.correlation.value == pytest.approx(1)
    assert found.correlation.standard_error is None
    assert found.error.standard_error is None
