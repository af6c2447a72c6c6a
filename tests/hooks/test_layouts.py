"""Weights as matrices, and back."""

import numpy as np
import pytest
import torch
from einops import rearrange

from tl_sparse.hooks import MatrixLayout

#: Layout, shape of the weight, and the einops pattern that makes the same matrix.
LAYOUTS = [
    (MatrixLayout(rows=(1,), columns=(0, 2)), (2, 3, 4), "h i d -> i (h d)"),
    (MatrixLayout(rows=(0, 2), columns=(1,)), (2, 3, 4), "h i d -> (h d) i"),
    (MatrixLayout(rows=(0, 1), columns=(2,)), (2, 3, 4), "h d o -> (h d) o"),
    (MatrixLayout(rows=(0,), columns=(1,)), (3, 4), "i o -> i o"),
    (MatrixLayout(rows=(1,), columns=(0,)), (3, 4), "i o -> o i"),
]


@pytest.mark.parametrize(("layout", "shape", "pattern"), LAYOUTS)
def test_a_matrix_and_the_places_of_its_entries(layout, shape, pattern):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = layout.matrix(weight)
    assert torch.equal(matrix, rearrange(weight, pattern))
    assert layout.matrix_shape(shape) == tuple(matrix.shape)
    assert torch.equal(layout.weight(matrix, shape), weight)
    row, column = layout.row_and_column(np.arange(weight.numel()), shape)
    assert torch.equal(matrix[row, column], weight.flatten())


def test_a_bias_is_one_row():
    layout = MatrixLayout(rows=(), columns=(0, 1))
    bias = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layout.matrix(bias), bias.flatten()[None])
    assert torch.equal(layout.weight(layout.matrix(bias), bias.shape), bias)
