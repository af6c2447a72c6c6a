"""Weights that FSDP2 spreads over processes, and the parts of them that this process holds.

FSDP2 divides each weight along its first axis. A sharded weight is a `DTensor`, the part of it that
a process holds an ordinary tensor. Parts may be empty.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import UnsupportedError


@dataclass(frozen=True)
class Shard:
    """The part of a weight that this process holds.

    Attributes:
        part: the part; a change of it is a change of the weight.
        first: the index along the weight's first axis at which the part begins.
    """

    part: Tensor
    first: int


@checked()
def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is spread over processes."""
    # Slow to import, and there are no sharded weights before someone has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


@checked()
@torch.no_grad()
def shard_of(weight: Tensor) -> Shard:
    """The part of a weight that this process holds: all of it unless it is sharded.

    Raises:
        UnsupportedError: if the weight is sharded otherwise than along its first axis, over all
            processes.
    """
    if not is_sharded(weight):
        return Shard(weight, 0)
    sharded: Any = weight
    mesh = sharded.device_mesh
    if mesh.ndim != 1 or not all(placement.is_shard(0) for placement in sharded.placements):
        raise UnsupportedError(
            f"weights sharded as {sharded.placements} cannot be made sparse; FSDP2 over one row of "
            "processes shards them along their first axis, which can"
        )
    # As `torch.chunk` divides the axis: the last parts may be shorter, or empty.
    n_in_part = -(-sharded.shape[0] // mesh.size())
    first = min(n_in_part * mesh.get_local_rank(), sharded.shape[0])
    return Shard(sharded.to_local(), first)


@checked()
def parts_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """The parts of weights that this process holds."""
    return [shard_of(weight).part for weight in weights]


@checked()
@torch.no_grad()
def sharded_like(whole: Tensor, weight: Tensor) -> Tensor:
    """A tensor on the device of a weight and, if it has the weight's shape, sharded as this is."""
    if is_sharded(whole) or not is_sharded(weight) or whole.shape != weight.shape:
        return whole.to(weight.device)
    sharded = torch.zeros_like(weight)
    shard = shard_of(sharded)
    shard.part.copy_(whole[shard.first : shard.first + len(shard.part)])
    return sharded


class ShardExchange:
    """The exchange of the processes over which weights are spread.

    Args:
        weight: one of the weights.
    """

    def __init__(self, weight: Tensor) -> None:
        sharded: Any = weight
        self.group = sharded.device_mesh.get_group()

    def total(self, counts: Tensor) -> Tensor:
        """The sum of the counts of all processes; `counts` become this sum as well."""
        torch.distributed.all_reduce(counts, group=self.group)
        return counts

    def collected(self, part: Tensor) -> Tensor:
        """The parts of all processes, of the same shape, joined along their last axis."""
        n_processes = torch.distributed.get_world_size(self.group)
        parts = [torch.empty_like(part) for _ in range(n_processes)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


@checked()
def exchange_of(weights: Sequence[Tensor]) -> ShardExchange | None:
    """The exchange of the processes over which these weights are spread; None if they are not.

    Raises:
        UnsupportedError: if only some of them are.
    """
    n_sharded = sum(map(is_sharded, weights))
    if n_sharded == 0:
        return None
    if n_sharded < len(weights):
        raise UnsupportedError(
            f"{n_sharded} of {len(weights)} weights are sharded over processes; shard all that are "
            "made sparse, or none"
        )
    return ShardExchange(weights[0])
