"""Nodes and weights under a circuit: which nodes are kept, and what the held ones contribute."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.network import Product


@dataclass(frozen=True, eq=False)
class Location:
    """The nodes at one location of a block, flat.

    Attributes:
        is_kept: which of them are in the circuit.
        means: the values at which the others are held.
    """

    is_kept: Bool[Tensor, " node"]
    means: Float[Tensor, " node"]

    @property
    def kept(self) -> Int[Tensor, " kept"]:
        """The indices of the nodes in the circuit."""
        return self.is_kept.nonzero()[:, 0]

    @property
    def held(self) -> Float[Tensor, " node"]:
        """The means of the nodes outside the circuit, and 0 for those in it."""
        return self.means.masked_fill(self.is_kept, 0.0)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix and its bias as they act under the circuit, with edges cut."""

    weight: Float[Tensor, "source target"]
    bias: Float[Tensor, "*n_ctx target"]

    def from_kept(self, sources: Location) -> "Matrix":
        """The same for the kept sources alone; the bias has what the held ones contribute."""
        bias = self.bias + sources.held @ self.weight
        return Matrix(self.weight[sources.is_kept], bias)


@dataclass(frozen=True, eq=False)
class HeadNodes:
    """Query, key or value channels of some heads.

    Attributes:
        is_kept: which are kept.
        held: the values of the others, and 0 for kept ones.
    """

    is_kept: Bool[Tensor, "head channel"]
    held: Float[Tensor, "head channel"]

    def columns(self, chosen: Bool[Tensor, " channel"]) -> "HeadNodes":
        """These channels alone."""
        return HeadNodes(self.is_kept[:, chosen], self.held[:, chosen])

    def and_one(self, constant: Float[Tensor, "head 1"]) -> "HeadNodes":
        """The same with one more channel, a constant."""
        is_kept = torch.cat([self.is_kept, torch.zeros_like(constant, dtype=torch.bool)], dim=1)
        return HeadNodes(is_kept, torch.cat([self.held, constant], dim=1))


def precise(values: Tensor) -> Tensor:
    """Weights or means in float64 on the CPU."""
    # Copied, so that a compiled circuit does not change with the model.
    return values.detach().to("cpu", torch.float64, copy=True)


def matrix_of(times: Product, bias: Tensor) -> Matrix:
    """The matrix of a product, and its bias, with edges cut where the circuit cuts them."""
    weight, with_cuts = times.matrix_and_bias(bias)
    return Matrix(precise(weight), precise(with_cuts))
