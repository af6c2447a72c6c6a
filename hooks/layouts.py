"""How a weight of any number of dimensions makes the matrix that it multiplies with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """Which axes of a weight make the rows of its matrix, and which ones make the columns.

    W_O `[head, d_head, d_model]`, for example, multiplies as a matrix with a row for each channel
    of each head and a column for each channel of the residual stream. Its layout is
    `MatrixLayout(rows=(0, 1), columns=(2,))`.

    Attributes:
        rows: axes of the weight; the index along the last one changes from each row to the next.
        columns: all other axes, in the same order of change.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Numbers of rows and columns of the matrix that a weight of `shape` makes."""
        n_rows = math.prod([shape[axis] for axis in self.rows])
        n_columns = math.prod([shape[axis] for axis in self.columns])
        return n_rows, n_columns

    def matrix(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "row column"]:
        """The weight as its matrix: a view if the memory of the weight allows one, else a copy."""
        ordered = weight.permute(*self.rows, *self.columns)
        return ordered.reshape(self.matrix_shape(weight.shape))

    def weight(
        self, matrix: Float[Tensor, "row column"], shape: Sequence[int]
    ) -> Float[Tensor, "..."]:
        """The weight of `shape` that makes this matrix: the inverse of `matrix`."""
        order = [*self.rows, *self.columns]
        ordered = matrix.reshape([shape[axis] for axis in order])
        return ordered.permute([order.index(axis) for axis in range(len(shape))])

    def row_and_column(
        self, positions: Int[np.ndarray, " entry"], shape: Sequence[int]
    ) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " entry"]]:
        """Where in the matrix the entries of a weight of `shape` are.

        Args:
            positions: the place of each entry in the flattened weight.
            shape: that of the weight.
        """
        indices = np.unravel_index(positions, tuple(shape))

        def index_along(axes: tuple[int, ...]) -> Any:
            sizes = [shape[axis] for axis in axes]
            return np.ravel_multi_index([indices[axis] for axis in axes], sizes)

        return index_along(self.rows), index_along(self.columns)
