"""Tensors that are mostly zero, stored as what is not.

In a `model.safetensors` of storage "compact", such a tensor `name` is three: `name.values`, its
entries that are not zero, in row-major order; `name.positions`, int32, where each is in the
flattened tensor; and `name.shape`. An entry takes 8 bytes in float32 and 6 in bfloat16, so at 1 %
density a tensor takes 1/50 and 1/33 of its bytes. -0.0 is stored: what comes back is the same, bit
by bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_sparse.errors import CheckpointError

_PARTS = ("values", "positions", "shape")
#: What more entries in the file's header take, roughly: a tensor that saves less stays dense.
_OVERHEAD = 256
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Compact:
    """A tensor of `shape` that is zero except for `values` at the increasing row-major `positions`.

    Two of them are equal if they are the same object.
    """

    values: Shaped[Tensor, "kept"]
    positions: Int[Tensor, "kept"]
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Compact":
        """What is not zero of a tensor; nothing of its memory is shared."""
        flat = tensor.detach().flatten()
        positions = flat.view(_BITS[flat.itemsize]).nonzero().flatten()
        return cls(flat[positions], positions.int(), tensor.shape)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Compact":
        """A copy elsewhere, or of another dtype."""
        return Compact(
            self.values.to(device, dtype, copy=True),
            self.positions.to(device, copy=True),
            self.shape,
        )

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Compact":
        """With what a function makes of its tensors, such as those elsewhere."""
        return Compact(function(self.values), function(self.positions), self.shape)

    def dense(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The tensor, with zeros."""
        flat = torch.zeros(math.prod(self.shape), device=device, dtype=dtype)
        flat[self.positions.to(device).long()] = self.values.to(device, dtype)
        return flat.view(self.shape)


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What storage "compact" writes of floating-point `tensors`; those that would not be smaller
    stay as they are.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().flatten()
        n_kept = int(flat.view(_BITS[flat.itemsize]).count_nonzero())
        if n_kept * (flat.itemsize + 4) + _OVERHEAD < flat.nbytes and len(flat) < 2**31:
            found = Compact.of(flat)
            parts = (found.values, found.positions, torch.tensor(tensor.shape))
            packed |= {f"{name}.{part}": value for part, value in zip(_PARTS, parts, strict=True)}
        else:
            packed[name] = tensor
    return packed


def unpack(packed: Mapping[str, Tensor], path: Path) -> dict[str, Tensor | Compact]:
    """The inverse of `pack`; nothing is expanded yet. `CheckpointError` for parts of `path` that do
    not fit.
    """
    tensors: dict[str, Tensor | Compact] = {}
    for key, tensor in packed.items():
        name, _, part = key.rpartition(".")
        if part not in _PARTS:
            tensors[key] = tensor
        elif name in packed:
            raise CheckpointError(f"{path}: {name} is there twice, dense and compact")
        elif name not in tensors:
            tensors[name] = _checked(name, packed, path)
    return tensors


def _checked(name: str, packed: Mapping[str, Tensor], path: Path) -> Compact:
    values, positions, shape = (packed.get(f"{name}.{part}") for part in _PARTS)
    if values is None or positions is None or shape is None:
        raise CheckpointError(
            f"{path}: {name} needs all of {', '.join(f'{name}.{part}' for part in _PARTS)}"
        )
    if shape.dtype != torch.int64 or shape.ndim != 1 or len(shape) > 8 or bool((shape < 0).any()):
        raise CheckpointError(f"{path}: {name}.shape is no list of sizes")
    if positions.dtype != torch.int32 or positions.ndim != 1 or positions.shape != values.shape:
        raise CheckpointError(
            f"{path}: {name}.positions must be one int32 for each of {name}.values"
        )
    size = torch.Size(shape.tolist())
    inside = len(positions) == 0 or (
        int(positions[0]) >= 0 and int(positions[-1]) < math.prod(size)
    )
    if not inside or not bool((positions[1:] > positions[:-1]).all()):
        raise CheckpointError(
            f"{path}: {name}.positions must increase and be in a tensor of shape {list(size)}"
        )
    return Compact(values, positions, size)
