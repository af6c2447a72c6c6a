"""Cutting entries of a weight matrix: the product is as if they were zero.

The weights themselves stay as they are, so that a model can be saved, trained or used by another
thread meanwhile.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.network.compressed import Compressed


@dataclass(frozen=True, eq=False)
class Cut:
    """Entries of a matrix W `[d_in, d_out]` that contribute a mean instead of their activation.

    Attributes:
        inputs: the row of each entry in W.
        outputs: the column of each entry in W. No two entries have the same row and column.
        means: the mean of the activation that each entry multiplies.
    """

    inputs: Int[Tensor, " entry"]
    outputs: Int[Tensor, " entry"]
    means: Float[Tensor, " entry"]

    def from_matrix(
        self, matrix: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"]
    ) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
        """The matrix without the entries, and the bias with the means of what they contribute.

        Gradients flow to the matrix and the bias.
        """
        at = self.inputs.to(matrix.device), self.outputs.to(matrix.device)
        entries = matrix[at]
        contributions = torch.zeros_like(matrix).index_put(at, entries * self.means.to(matrix))
        without = matrix.index_put(at, torch.zeros_like(entries))
        # A sum over a dense matrix is always added up in the same order, index_add is not.
        return without, bias + contributions.sum(0)

    def from_entries(
        self, entries: Compressed, bias: Float[Tensor, " d_out"]
    ) -> tuple[Compressed, Float[Tensor, " d_out"]]:
        """The same for the nonzero entries of Wᵀ, whose columns must be in order in each row."""
        if len(entries.values) == 0:
            return entries, bias
        place = entries.rows * entries.n_columns + entries.columns
        wanted = self.outputs * entries.n_columns + self.inputs
        found = torch.searchsorted(place, wanted).clamp(max=len(place) - 1)
        is_nonzero = place[found] == wanted
        found = found[is_nonzero]
        contributions = entries.values[found] * self.means[is_nonzero].to(entries.values)
        without = entries.with_zeros_at(found)
        return without, bias.index_add(0, self.outputs[is_nonzero], contributions.to(bias))

    def and_also(self, other: "Cut", d_out: int) -> "Cut":
        """Both cuts. An entry that is in both contributes the mean of this one."""
        inputs = torch.cat([self.inputs, other.inputs])
        outputs = torch.cat([self.outputs, other.outputs])
        means = torch.cat([self.means, other.means.to(self.means)])
        places = (inputs * d_out + outputs).numpy()
        first_of_each = torch.from_numpy(np.unique(places, return_index=True)[1])
        return Cut(inputs[first_of_each], outputs[first_of_each], means[first_of_each])
