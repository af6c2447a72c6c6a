"""Matrices as their nonzero entries, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.hooks import MatrixLayout
from tl_sparse.kernels import kernel, shared_out


@dataclass(frozen=True)
class Compressed:
    """The nonzero entries of a matrix, row by row (CSR).

    Attributes:
        starts: row r has the entries in the range [starts[r], starts[r + 1]).
        columns: the column of each entry.
        values: the value of each entry.
        n_columns: the number of columns of the matrix.
    """

    starts: Int[Tensor, "row_1"]
    columns: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    n_columns: int

    @classmethod
    def empty(cls, n_rows: int, n_columns: int, n_entries: int, like: Tensor) -> "Compressed":
        """Memory for `n_entries` entries with values of the dtype of `like`; `starts` is zero."""
        return cls(
            starts=like.new_zeros(n_rows + 1, dtype=torch.int64),
            columns=like.new_empty(n_entries, dtype=torch.int32),
            values=like.new_empty(n_entries),
            n_columns=n_columns,
        )

    @classmethod
    def of(cls, matrix: Float[Tensor, "row column"], n_nonzero: int) -> "Compressed":
        """The nonzero entries of a dense matrix that has `n_nonzero` of them."""
        matrix = matrix.contiguous()
        n_rows, n_columns = matrix.shape
        compressed = cls.empty(n_rows, n_columns, n_nonzero, like=matrix)
        kernel("compress", matrix)(matrix, *compressed.parts)
        return compressed

    @classmethod
    def of_entries(
        cls,
        rows: Int[Tensor, " entry"],
        columns: Int[Tensor, " entry"],
        values: Float[Tensor, " entry"],
        n_rows: int,
        n_columns: int,
    ) -> "Compressed":
        """The matrix with the given entries, which may come in any order."""
        order = (rows * n_columns + columns).argsort()
        starts = F.pad(rows.bincount(minlength=n_rows).cumsum(0), (1, 0))
        return cls(starts, columns[order].int(), values[order], n_columns)

    @property
    def rows(self) -> Int[Tensor, " entry"]:
        """The row of each entry."""
        n_rows = len(self.starts) - 1
        return torch.arange(n_rows).repeat_interleave(self.starts.diff())

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors, in the order in which the kernels take them."""
        return self.starts, self.columns, self.values

    @cached_property
    def transposed(self) -> "Compressed":
        """The transposed matrix."""
        n_rows = len(self.starts) - 1
        transposed = self.empty(self.n_columns, n_rows, len(self.values), like=self.values)
        kernel("transpose", self.values)(*self.parts, *transposed.parts)
        return transposed

    def times(
        self, x: Float[Tensor, "*batch column"], offsets: Float[Tensor, " row"] | None
    ) -> Float[Tensor, "*batch row"]:
        """The product of this matrix with each vector in x, plus offsets if there are any.

        No gradients flow through it.
        """
        tokens = x.detach().reshape(-1, x.shape[-1]).contiguous()
        added = tokens.new_empty(0) if offsets is None else offsets.detach().contiguous()
        n_rows = len(self.starts) - 1
        # NumPy allocates in huge pages where the system has them, which is several times faster
        # than allocation by torch. `out` must not be a view, because autograd copies the gradient
        # of a view that is changed in place.
        out = torch.from_numpy(np.empty((*x.shape[:-1], n_rows), tokens.numpy().dtype))
        shared_out(
            kernel("multiply", tokens),
            len(tokens),
            tokens.numel() + out.numel(),
            tokens,
            *self.parts,
            added,
            out.view(len(tokens), n_rows),
        )
        return out

    def with_zeros_at(self, entries: Int[Tensor, " index"]) -> "Compressed":
        """The same matrix, with zeros as the values of the entries that have these indices."""
        zeros = self.values.new_zeros(len(entries))
        return replace(self, values=self.values.index_put((entries,), zeros))


@dataclass(frozen=True)
class StackedEntries:
    """Where entries of weights are in the matrix that stacks the weights along its rows.

    Attributes:
        rows: the row of each entry; the entries of the first weight come first.
        columns: the column of each entry.
        n_rows: the number of rows of the matrix.
        n_columns: the number of its columns.
    """

    rows: Int[Tensor, " entry"]
    columns: Int[Tensor, " entry"]
    n_rows: int
    n_columns: int

    @classmethod
    def of(
        cls,
        positions: Sequence[Int[Tensor, " entry"]],
        shapes: Sequence[Sequence[int]],
        layout: MatrixLayout,
    ) -> "StackedEntries":
        """Those at the given positions of each flattened weight.

        Args:
            positions: the positions for each weight.
            shapes: the shape of each weight.
            layout: the layout of each weight as a matrix.
        """
        rows, columns = [], []
        n_rows = n_columns = 0
        for of_weight, shape in zip(positions, shapes, strict=True):
            row, column = layout.row_and_column(of_weight.numpy(), shape)
            rows.append(torch.from_numpy(row) + n_rows)
            columns.append(torch.from_numpy(column))
            more_rows, n_columns = layout.matrix_shape(shape)
            n_rows += more_rows
        return cls(torch.cat(rows), torch.cat(columns), n_rows, n_columns)
