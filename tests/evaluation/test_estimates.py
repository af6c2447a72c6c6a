"""Means and correlations with their standard errors."""

import math

import pytest
import torch

from tl_sparse.evaluation.estimates import correlation, mean_of, mean_of_pairs

pytestmark = pytest.mark.any_line


def test_the_mean_and_its_standard_error():
    # The standard deviation of 1, 2, 3 is 1.
    estimate = mean_of(torch.tensor([1.0, 2.0, 3.0]))
    assert estimate.value == 2.0
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(3))
    assert str(estimate) == "2.000 ± 0.577"


def test_one_value_has_no_standard_error():
    estimate = mean_of(torch.tensor([1.5]))
    assert estimate.standard_error is None
    assert str(estimate) == "1.500"


def test_the_standard_error_over_prompts_is_that_over_pairs():
    # Means of pairs: 1, 2, 3. Over six independent prompts it would be 1.1 / sqrt(6) = 0.45.
    estimate = mean_of_pairs(torch.tensor([0.0, 2.0, 1.0, 3.0, 3.0, 3.0]))
    assert estimate.value == 2.0
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(3))


def test_correlation():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, 2 * x + 1).value == pytest.approx(1)
    assert correlation(x, -x).value == pytest.approx(-1)
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-1, 1, -1, 1): 2 / sqrt(5 · 4).
    estimate = correlation(x, torch.tensor([0.0, 2.0, 0.0, 2.0]))
    assert estimate.value == pytest.approx(2 / math.sqrt(20))
    assert estimate.standard_error == pytest.approx((1 - 0.2) / math.sqrt(3))


def test_no_correlation_with_what_does_not_vary():
    estimate = correlation(torch.ones(4), torch.arange(4.0))
    assert math.isnan(estimate.value)
    assert estimate.standard_error is None
