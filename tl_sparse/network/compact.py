"""Tensors that are mostly zero, stored as their nonzero entries.

In a `model.safetensors` with storage "compact", such a tensor `name` is stored as three tensors:

- `name.values`: its nonzero entries, in row-major order,
- `name.positions`: the index of each entry in the flattened tensor, int32,
- `name.shape`: the shape of the tensor.

An entry takes 8 bytes in float32 and 6 bytes in bfloat16. At a density of 1 %, a tensor therefore
takes 1/50 or 1/33 of the bytes of its dense form. -0.0 counts as nonzero, so that a tensor is
restored bit for bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_sparse.errors import CheckpointError
from tl_sparse.kernels import bits

#: The endings of the names of the three tensors.
_PARTS = ("values", "positions", "shape")
#: The approximate number of bytes that two more tensors take in the header of a file. A tensor that
#: would save less stays dense.
_OVERHEAD = 256


@dataclass(frozen=True, eq=False)
class Compact:
    """A tensor of `shape` that is zero except for `values` at the increasing row-major `positions`.

    Two instances are equal only if they are the same object.
    """

    values: Shaped[Tensor, "kept"]
    positions: Int[Tensor, "kept"]
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Compact":
        """A copy of the nonzero entries of a tensor."""
        flat = tensor.detach().flatten()
        positions = bits(flat).nonzero().flatten()  # only +0.0 has no bit set
        return cls(flat[positions], positions.int(), tensor.shape)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Compact":
        """A copy on another device, or of another dtype."""
        values = self.values.to(device, dtype, copy=True)
        positions = self.positions.to(device, copy=True)
        return Compact(values, positions, self.shape)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Compact":
        """`function` applied to the values and to the positions, for example to move them."""
        return Compact(function(self.values), function(self.positions), self.shape)

    def dense(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The dense tensor."""
        flat = torch.zeros(math.prod(self.shape), device=device, dtype=dtype)
        flat[self.positions.to(device).long()] = self.values.to(device, dtype)
        return flat.view(self.shape)


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that storage "compact" writes for the floating-point `tensors`, by name.

    Tensors that would not take fewer bytes compact stay dense.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        on_cpu = tensor.detach().cpu()
        if _saves_memory(on_cpu):
            compact = Compact.of(on_cpu)
            packed[f"{name}.values"] = compact.values
            packed[f"{name}.positions"] = compact.positions
            packed[f"{name}.shape"] = torch.tensor(tensor.shape)
        else:
            packed[name] = tensor
    return packed


def _saves_memory(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU takes fewer bytes compact than dense."""
    flat = tensor.flatten()
    n_nonzero = int(bits(flat).count_nonzero())
    n_bytes = n_nonzero * (flat.itemsize + torch.int32.itemsize) + _OVERHEAD
    positions_fit_int32 = len(flat) < 2**31
    return n_bytes < flat.nbytes and positions_fit_int32


def unpack(packed: Mapping[str, Tensor], path: Path) -> dict[str, Tensor | Compact]:
    """The inverse of `pack`, except that compact tensors stay compact.

    Raises:
        CheckpointError: if the parts of a compact tensor do not fit together; it names `path`.
    """
    tensors: dict[str, Tensor | Compact] = {}
    for key, tensor in packed.items():
        name, _, part = key.rpartition(".")
        if part not in _PARTS:
            tensors[key] = tensor
        elif name in packed:
            raise CheckpointError(f"{path}: {name} is in the file twice, dense and compact")
        elif name not in tensors:
            tensors[name] = _unpack_one(name, packed, path)
    return tensors


def _unpack_one(name: str, packed: Mapping[str, Tensor], path: Path) -> Compact:
    values = packed.get(f"{name}.values")
    positions = packed.get(f"{name}.positions")
    shape = packed.get(f"{name}.shape")
    if values is None or positions is None or shape is None:
        needed = f"{name}.values, {name}.positions, {name}.shape"
        raise CheckpointError(f"{path}: {name} needs all of {needed}")
    size = _size(shape)
    if size is None:
        raise CheckpointError(f"{path}: {name}.shape must be a 1-D int64 tensor of at most 8 sizes")
    if positions.dtype != torch.int32 or positions.ndim != 1 or positions.shape != values.shape:
        raise CheckpointError(
            f"{path}: {name}.positions must be 1-D, with one int32 for each of {name}.values"
        )
    if not _are_increasing(positions, math.prod(size)):
        raise CheckpointError(
            f"{path}: {name}.positions must increase and be indices into shape {list(size)}"
        )
    return Compact(values, positions, size)


def _size(shape: Tensor) -> torch.Size | None:
    """The shape stored in `name.shape`; None if it is not a list of at most 8 sizes."""
    if shape.dtype != torch.int64 or shape.ndim != 1 or len(shape) > 8:
        return None
    sizes = shape.tolist()
    if any(size < 0 for size in sizes):
        return None
    return torch.Size(sizes)


def _are_increasing(positions: Tensor, n_entries: int) -> bool:
    """Whether positions increase strictly and all lie in [0, n_entries)."""
    if len(positions) == 0:
        return True
    is_inside = int(positions[0]) >= 0 and int(positions[-1]) < n_entries
    return is_inside and bool((positions[1:] > positions[:-1]).all())
