"""Training the nonzero entries of a weight in its place, against dense gradients."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_products import close, product_of, sparse_matrix, threads
from torch import nn

from helpers import needs_numba
from tl_sparse.network.blocks import QKV_LAYOUT
from tl_sparse.network.nonzeros import NonzeroMatrix, Nonzeros
from tl_sparse.network.products import Product

pytestmark = pytest.mark.any_line


def trained_gradients(product, x, bias):
    """The product while its nonzeros are trained, and the gradients of the sum of its squares."""
    parts = [Nonzeros(getattr(product.owner, name)) for name in product.names]
    product.trained = NonzeroMatrix(parts, product.layout)
    inputs = [x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()]
    out = product(*inputs)
    product.trained = None
    gradients = torch.autograd.grad(out.square().sum(), [*inputs, *[part.values for part in parts]])
    return out, gradients, parts


def assert_gradients_are_entries_of_dense_ones(product, x, bias):
    out, (grad_x, grad_bias, *grads), parts = trained_gradients(product, x, bias)
    product.kernels = "dense"
    weights = [getattr(product.owner, name) for name in product.names]
    inputs = [x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()]
    expected = product(*inputs)
    dense = torch.autograd.grad(expected.square().sum(), [*inputs, *weights])
    close(out, expected, x.dtype)
    close(grad_x, dense[0], x.dtype)
    close(grad_bias, dense[1], x.dtype)
    for grad, part, of_weight in zip(grads, parts, dense[2:], strict=True):
        close(grad, of_weight[part.weight != 0], x.dtype)


@needs_numba
@settings(max_examples=40)
@given(st.data())
def test_gradients_are_the_entries_of_dense_ones(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    n, d_in, d_out = (data.draw(st.integers(1, 70)) for _ in range(3))
    density = data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    product = product_of(sparse_matrix(d_in, d_out, density, dtype))
    product.kernels = data.draw(st.sampled_from(["auto", "dense", "sparse"]))
    x = torch.randn(2 * n, 2, d_in, dtype=dtype)[::2]  # not contiguous
    with threads(data.draw(st.integers(1, 3))):
        assert_gradients_are_entries_of_dense_ones(product, x, torch.randn(d_out, dtype=dtype))


@needs_numba
def test_gradients_of_the_weights_that_a_product_stacks():
    owner = nn.Module()
    for name, d_in in (("W_Q", 7), ("W_Q_pos", 4)):
        weight = sparse_matrix(3 * d_in, 5, 0.4, torch.float64, seed=d_in).view(3, d_in, 5)
        setattr(owner, name, nn.Parameter(weight))
    product = Product(owner, ["W_Q", "W_Q_pos"], QKV_LAYOUT)
    x = torch.randn(6, 11, dtype=torch.float64)
    assert_gradients_are_entries_of_dense_ones(product, x, torch.randn(15, dtype=torch.float64))


@needs_numba
def test_new_values_are_multiplied_after_an_update():
    product = product_of(sparse_matrix(9, 6, 0.5, torch.float64), kernels="sparse")
    nonzeros = Nonzeros(product.owner.W)
    matrix = NonzeroMatrix([nonzeros], product.layout)
    with torch.no_grad():
        nonzeros.values *= 2
    nonzeros.write()
    matrix.update()
    x = torch.randn(40, 9, dtype=torch.float64, requires_grad=True)
    out = matrix.times(x, torch.zeros(6, dtype=torch.float64), None)
    close(out, x @ product.owner.W, torch.float64)
    grad_x = torch.autograd.grad(out.sum(), x)[0]
    close(grad_x, product.owner.W.sum(1).expand(40, -1), torch.float64)


def test_entries_go_back_to_where_they_were():
    weight = nn.Parameter(sparse_matrix(8, 5, 0.3).view(2, 4, 5).transpose(0, 2))
    nonzeros = Nonzeros(weight)
    before = weight.detach().clone()
    assert torch.equal(nonzeros.spread(nonzeros.values.detach()), before)
    assert all(a < b for a, b in pairwise(nonzeros.positions.tolist()))
    with torch.no_grad():
        nonzeros.values += 1
    nonzeros.write()
    assert torch.equal(weight.detach(), torch.where(before == 0, 0, before + 1))


def test_the_gradient_of_a_weight_that_was_used_whole_is_added():
    weight = nn.Parameter(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    nonzeros = Nonzeros(weight)
    nonzeros.take_gradient()
    assert nonzeros.values.grad is None
    weight.grad = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    nonzeros.take_gradient()
    assert nonzeros.values.grad.tolist() == [10, 100]
    assert weight.grad is None
    weight.grad = torch.ones(2, 2)
    nonzeros.take_gradient()
    assert nonzeros.values.grad.tolist() == [11, 101]


def test_a_copy_of_a_product_is_not_in_training():
    product = product_of(sparse_matrix(4, 4, 0.5))
    product.trained = NonzeroMatrix([Nonzeros(product.owner.W)], product.layout)
    assert copy.deepcopy(product).trained is None
