"""Whether something fits the memory of a GPU, found out before it starts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tl_sparse.errors import DeviceMemoryError

GIB = 2**30


def check_fits(
    what: str, parts: Mapping[str, int], device: torch.device | str, advice: str
) -> None:
    """Raise an error if a GPU has less free memory than is needed.

    Args:
        what: what needs the memory, the subject of the message.
        parts: what it consists of → bytes. Together they should be what is needed at least.
        device: nothing is checked on devices other than GPUs.
        advice: how to need less.

    Raises:
        DeviceMemoryError: it says how much is needed, for what, and how much is free.
    """
    needed = sum(parts.values())
    free = free_bytes(torch.device(device))
    if free is None or needed <= free:
        return
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    raise DeviceMemoryError(
        f"{what} needs at least {needed / GIB:.2f} GiB on {device} ({listed}), and "
        f"{free / GIB:.2f} GiB are free there; {advice}"
    )


def is_limited(device: torch.device | str) -> bool:
    """Whether it is known how much memory of a device is free, as for a GPU."""
    return free_bytes(torch.device(device)) is not None


def free_bytes(device: torch.device) -> int | None:
    """The bytes of a GPU that this process can still use; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # torch keeps memory of tensors that are gone, and uses it again.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def parameter_bytes(module: nn.Module) -> int:
    """The bytes of all parameters of a module, each counted once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def saved_bytes(run: Callable[[], object], module: nn.Module) -> int:
    """The bytes that autograd keeps for the backward pass of what `run` computes.

    The parameters and buffers of `module` are not counted, since they are in memory anyway. On the
    device "meta", this takes neither memory nor much time.
    """
    known = set()
    for tensor in (*module.parameters(), *module.buffers()):
        known.add(_storage(tensor))
    kept: dict[int, Tensor] = {}  # held until the end, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    def give_back(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    """The identity of the memory of a tensor, which views share."""
    address: Any = tensor.untyped_storage()._cdata
    return int(address)
