"""Floating-point numbers as integers: their bits, and what those bits mean."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatBits:
    """The bits of a floating-point dtype.

    Attributes:
        integer: the integer dtype of the same size.
        key: the integer dtype in which kernels compare magnitudes.
        unsigned: all bits but the sign bit.
        infinity: the bits of infinity. Those of every NaN, without the sign bit, are above.
    """

    integer: torch.dtype
    key: torch.dtype
    unsigned: int
    infinity: int

    @property
    def n_bits(self) -> int:
        """The number of bits of a magnitude."""
        return self.unsigned.bit_length()


FLOAT_BITS = {
    torch.float16: FloatBits(torch.int16, torch.int32, 0x7FFF, 0x7C00),
    torch.bfloat16: FloatBits(torch.int16, torch.int32, 0x7FFF, 0x7F80),
    torch.float32: FloatBits(torch.int32, torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: FloatBits(torch.int64, torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


def bits(x: Tensor) -> Tensor:
    """The bits of floating-point numbers, viewed as integers."""
    return x.view(FLOAT_BITS[x.dtype].integer)
