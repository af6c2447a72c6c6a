"""Tests of significance against p-values that are worked out by hand."""

import pytest
import torch

from tl_sparse.evaluation.significance import (
    PValue,
    exceeds_fewer,
    exceeds_most,
    holm,
    independence_test,
    sign_flip_tests,
    sign_test,
)

pytestmark = pytest.mark.any_line


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_sign_test():
    # All or none of 6 coins: 2 of 64 outcomes.
    assert sign_test(6, 6, "pairs").value == pytest.approx(2 / 64)
    assert sign_test(0, 6, "pairs").value == pytest.approx(2 / 64)
    # 0, 1, 6 or 7 of 7 coins: 1 + 7 + 7 + 1 of 128 outcomes.
    assert sign_test(6, 7, "pairs").value == pytest.approx(16 / 128)
    assert sign_test(5, 10, "pairs").value == pytest.approx(1)


def test_the_sign_test_with_a_margin():
    """The coin that the null hypothesis allows and that fits the result best has P = 0.6."""
    expected = 0.6**7 + 0.4**7
    assert sign_test(7, 7, "pairs", margin=0.1).value == pytest.approx(expected)
    assert sign_test(0, 7, "pairs", margin=0.1).value == pytest.approx(expected)


def test_sign_tests_of_thousands():
    assert sign_test(5000, 10_000, "pairs").value == pytest.approx(1)
    assert sign_test(5200, 10_000, "pairs").value == pytest.approx(6.6e-5, rel=0.02)


def test_exceeding_most_of_a_distribution():
    assert exceeds_most(30, 30, "random circuits", 0.9).value == pytest.approx(0.9**30)
    expected = 0.9**40 + 40 * 0.9**39 * 0.1
    assert exceeds_most(39, 40, "random circuits", 0.9).value == pytest.approx(expected)
    assert exceeds_most(0, 40, "random circuits", 0.9).value == pytest.approx(1)


def test_exceeding_fewer_of_a_distribution():
    assert exceeds_fewer(0, 2, "random nodes", 0.9).value == pytest.approx(0.01)
    assert exceeds_fewer(1, 2, "random nodes", 0.9).value == pytest.approx(0.01 + 2 * 0.09)
    assert exceeds_fewer(2, 2, "random nodes", 0.9).value == pytest.approx(1)


@pytest.mark.parametrize(
    ("p_value", "problem"),
    [
        (sign_test(5, 5, "pairs"), "5 pairs: too few for a test"),
        (sign_test(6, 6, "pairs", 0.1), "6 pairs: too few for a test"),
        (sign_test(0, 0, "pairs"), "0 pairs: too few for a test"),
        (exceeds_most(28, 28, "random circuits", 0.9), "28 random circuits: too few for a test"),
        (exceeds_fewer(0, 0, "random nodes", 0.9), "0 random nodes: too few for a test"),
        (sign_flip_tests(torch.ones(1, 4), 999, 0)[0], "4 pairs: too few for a test"),
        (independence_test(normal(3, 1), normal(3, 1), 999, 0)[1], "3 pairs: too few for a test"),
    ],
)
def test_too_few_data_for_a_test(p_value, problem):
    """There is no p-value where no result whatever would be significant."""
    assert p_value.value is None
    assert p_value.problem == str(p_value) == problem
    assert not p_value.is_significant


def test_sign_flips():
    rises = torch.tensor([[1.0] * 8, [0.0] * 8, [-1.0] * 8, [1.0, -1.0] * 4])
    all_rise, none, all_fall, half = sign_flip_tests(rises, 20_000, seed=0)
    # Of 256 sign flips, one has as large a mean.
    assert all_rise.value == pytest.approx(1 / 256, rel=0.2)
    assert none.value == 1
    assert all_fall.value == 1
    # Of 8 coins, at least 4 heads.
    assert half.value == pytest.approx(163 / 256, rel=0.05)
    assert (all_rise.n, all_rise.data, all_rise.n_permutations) == (8, "pairs", 20_000)


def test_hsic_by_its_definition():
    first, second = normal(5, 2), normal(5, 1) * 3

    def kernel(sample):
        distances = (sample[:, None] - sample).norm(dim=2).double()
        width = distances[distances > 0].median()
        return torch.exp(-(distances**2) / (2 * width**2))

    centring = torch.eye(5).double() - 1 / 5
    product = kernel(first) @ centring @ kernel(second) @ centring
    hsic, _ = independence_test(first, second, 99, seed=0)
    assert hsic == pytest.approx(float(product.trace()) / 16, rel=1e-5)


def test_dependence_is_found_and_independence_is_not():
    x = normal(60, 1)
    _, of_itself = independence_test(x, x**2, 99, seed=0)
    assert of_itself.value == 0.01  # (1 + 0) / (1 + 99): no permutation is as dependent
    other = torch.randn(60, 1, generator=torch.Generator().manual_seed(1))
    _, of_another = independence_test(x, other, 99, seed=0)
    assert of_another.value > 0.05


def test_what_does_not_vary_is_independent_of_everything():
    hsic, p_value = independence_test(torch.ones(20, 2), normal(20, 2), 99, seed=0)
    assert (hsic, p_value.value) == (0.0, 1.0)


def test_too_few_permutations_for_a_test():
    hsic, p_value = independence_test(normal(20, 1), normal(20, 1), 19, seed=0)
    assert hsic is None
    assert p_value.value is None


def p_values(*values):
    return [PValue(value, 8, "pairs") for value in values]


def test_holm():
    corrected = [p_value.value for p_value in holm(p_values(0.01, 0.04, 0.03, 0.9))]
    # 4 · 0.01, 3 · 0.03, then at least as much as the one before, and at most 1.
    assert corrected == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert [p_value.value for p_value in holm(p_values(0.6, 0.7))] == [1.0, 1.0]


def test_tests_without_a_value_do_not_count():
    corrected = holm(p_values(0.02, None, 0.04))
    assert [p_value.value for p_value in corrected] == pytest.approx([0.04, None, 0.04])
    assert holm([]) == []
