"""How a weight of any number of dimensions is laid out as a matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """Which axes of a weight become the rows of its matrix, and which become the columns.

    For example, W_O `[head, d_head, d_model]` acts as a matrix with one row per channel of each
    head and one column per channel of the residual stream. Its layout is
    `MatrixLayout(rows=(0, 1), columns=(2,))`.

    Attributes:
        rows: the axes that become rows, flattened in row-major order (the last one varies fastest).
        columns: all other axes, flattened in the same way.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """The numbers of rows and columns of the matrix of a weight of `shape`."""
        n_rows = math.prod([shape[axis] for axis in self.rows])
        n_columns = math.prod([shape[axis] for axis in self.columns])
        return n_rows, n_columns

    def matrix(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "row column"]:
        """The weight as a matrix: a view if its memory layout allows one, else a copy."""
        ordered = weight.permute(*self.rows, *self.columns)
        return ordered.reshape(self.matrix_shape(weight.shape))

    def weight(
        self, matrix: Float[Tensor, "row column"], shape: Sequence[int]
    ) -> Float[Tensor, "..."]:
        """The weight of `shape` that has this matrix: the inverse of `matrix`."""
        order = [*self.rows, *self.columns]
        ordered = matrix.reshape([shape[axis] for axis in order])
        return ordered.permute([order.index(axis) for axis in range(len(shape))])

    def row_and_column(
        self, positions: Int[np.ndarray, " entry"], shape: Sequence[int]
    ) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " entry"]]:
        """The row and the column in the matrix of each of the given entries of a weight.

        Args:
            positions: the index of each entry in the flattened weight.
            shape: the shape of the weight.
        """
        indices = np.unravel_index(positions, tuple(shape))

        def index_along(axes: tuple[int, ...]) -> Any:
            sizes = [shape[axis] for axis in axes]
            return np.ravel_multi_index([indices[axis] for axis in axes], sizes)

        return index_along(self.rows), index_along(self.columns)

    def rows_and_columns(
        self, shape: Sequence[int], first: int, n: int
    ) -> tuple[Int[Tensor, " row"], Int[Tensor, " column"]]:
        """For a slice of a weight along its first axis: the row in the weight's matrix of each row
        of the slice's matrix, and the same for its columns.

        Args:
            shape: the shape of the whole weight.
            first: the index at which the slice begins.
            n: its length, which may be 0.
        """

        def index_along(axes: tuple[int, ...]) -> Int[Tensor, " index"]:
            index = torch.zeros(1, dtype=torch.long)
            for axis in axes:
                along = torch.arange(shape[axis])
                if axis == 0:
                    along = along[first : first + n]
                index = (index.unsqueeze(1) * shape[axis] + along).flatten()
            return index

        return index_along(self.rows), index_along(self.columns)
