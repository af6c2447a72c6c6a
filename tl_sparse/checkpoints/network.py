"""`Checkpoint`, which every reader returns, and the network that is built from it."""

import math
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.errors import CheckpointError, ConfigError, counted
from tl_sparse.memory import check_fits
from tl_sparse.network import Compact, SparseConfig, SparseTransformer

#: Floating-point dtypes that torch computes with.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: The largest number of layers accepted; it is checked before any block is built.
_MAX_LAYERS = 1000
#: A model may take at most this many times the bytes of the tensors in its file, plus the bytes in
#: `_ALWAYS_ALLOWED`. Only compact storage makes a file smaller than its model: the sparsest
#: published models take 200 times as much memory as their nonzero weights.
_MAX_TIMES = 1024
_ALWAYS_ALLOWED = 64 * 2**20
_BLOCK_TENSOR = re.compile(r"blocks\.(\d{1,9})\.")
_BLOCK_WEIGHT = re.compile(r"blocks\.\d+\.(attn|mlp)\.W_")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as it was read from its folder.

    Attributes:
        config: the architecture.
        tensors: the state dict, in our names and shapes. The tensors are views of the file and not
            yet checked; `build_network` checks and copies them.
        remark: what the user should know about how the files were read; "" if nothing.
    """

    config: SparseConfig
    tensors: dict[str, Tensor | Compact]
    remark: str = ""


def build_network(
    checkpoint: Checkpoint,
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    dense_weights: bool = True,
) -> SparseTransformer:
    """Build the network with exactly the tensors of `checkpoint`.

    This empties `checkpoint.tensors` step by step, so that only one tensor at a time is in memory
    twice.

    Args:
        checkpoint: the return value of a reader.
        source: the folder of the model, for error messages.
        device: the device of the parameters.
        dtype: the dtype of the parameters. None means the widest dtype of the tensors.
        dense_weights: whether the weights of the blocks are parameters. If not, they are held
            compact; see `WeightsHolder.hold_compact`.

    Raises:
        DeviceMemoryError: if a GPU has too little free memory for the weights.
        CheckpointError: for missing, unexpected, mis-shaped, non-floating or non-finite tensors;
            or if the model would be more than a thousand times as large as the tensors in its file.
    """
    tensors = checkpoint.tensors
    _check_layers(checkpoint, source)
    network = _network_without_tensors(checkpoint.config, source)
    _check_tensors(tensors, network.state_dict(), source)
    _check_size(tensors, source)
    dtype = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    if dense_weights:
        check_weights_fit(network, device, dtype)
    parameters: dict[str, Tensor] = {}
    for name in list(tensors):
        stored = tensors.pop(name)
        if not _is_finite(stored):
            raise CheckpointError(f"{source}: {name} has entries that are NaN or infinite")
        if dense_weights or not _BLOCK_WEIGHT.match(name):
            parameters[name] = _dense_copy(stored, device, dtype)
        else:
            _hold_compact(network, name, _compact_copy(stored, device, dtype))
        del stored
    # Not strict, because compact weights are not parameters; all names were checked above.
    network.load_state_dict(parameters, assign=True, strict=False)
    # The only buffers are the zeros that stand in for absent biases.
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=dtype, device=device))
    return network


def check_weights_fit(
    network: SparseTransformer, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Raise `DeviceMemoryError` if a GPU has too little free memory for the weights alone."""
    n_weights = sum(parameter.numel() for parameter in network.parameters())
    advice = "use another device, or a dtype of half precision"
    check_fits("this model", {"weights": n_weights * dtype.itemsize}, device, advice)


def _check_layers(checkpoint: Checkpoint, source: Path) -> None:
    """Check n_layers first, so that a wrong value does not make us build a billion blocks."""
    n_layers = checkpoint.config.n_layers
    matches = [_BLOCK_TENSOR.match(name) for name in checkpoint.tensors]
    layers = {int(match[1]) for match in matches if match}
    if n_layers > _MAX_LAYERS:
        raise CheckpointError(
            f"{source}: the configuration has {n_layers} layers, and at most {_MAX_LAYERS} are read"
        )
    if layers != set(range(n_layers)):
        raise CheckpointError(
            f"{source}: the configuration has {counted(n_layers, 'layer')}, "
            f"but the file has {len(layers)}"
        )


def _network_without_tensors(config: SparseConfig, source: Path) -> SparseTransformer:
    """The modules of the network, with meta tensors, which take no memory."""
    try:
        with torch.device("meta"):
            return SparseTransformer(config)
    except RuntimeError as error:
        raise CheckpointError(
            f"{source}: the sizes in the configuration are impossibly large: {error}"
        ) from error


def _check_tensors(
    tensors: dict[str, Tensor | Compact], expected: dict[str, Tensor], source: Path
) -> None:
    """Raise `CheckpointError` if a name or shape is not as expected, or a dtype not a float."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    if problems:
        raise CheckpointError(
            f"{source}: tensors do not fit the configuration: {', '.join(problems)}"
        )
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        expected_shape = list(expected[name].shape)
        if shape != expected_shape:
            raise CheckpointError(
                f"{source}: {name} has shape {shape}, but the configuration needs {expected_shape}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{source}: {name} has dtype {tensor.dtype}; weights must be floating-point"
            )


def _check_size(tensors: dict[str, Tensor | Compact], source: Path) -> None:
    """Raise `CheckpointError` if the tensors take far more memory than what the file holds of them.

    The file may hold few entries of a large compact tensor, or one tensor under many names.
    """
    n_bytes = 0
    stored: dict[int, int] = {}  # address of a storage → its bytes
    for tensor in tensors.values():
        n_bytes += math.prod(tensor.shape) * tensor.dtype.itemsize
        parts = (tensor.values, tensor.positions) if isinstance(tensor, Compact) else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
    allowed = _MAX_TIMES * sum(stored.values()) + _ALWAYS_ALLOWED
    if n_bytes > allowed:
        raise CheckpointError(
            f"{source}: the model would take {n_bytes:,} bytes, more than the {allowed:,} that its "
            f"file of weights accounts for"
        )


def _is_finite(stored: Tensor | Compact) -> bool:
    values = stored.values if isinstance(stored, Compact) else stored
    if values.numel() == 0:
        return True
    # A sum could overflow, and isfinite() needs another tensor of this size. If a tensor has a NaN,
    # its minimum and maximum are NaN.
    minimum, maximum = values.aminmax()
    return bool(minimum.isfinite()) and bool(maximum.isfinite())


def _dense_copy(stored: Tensor | Compact, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    if isinstance(stored, Compact):
        return stored.dense(device, dtype)
    # Always copy, because the file behind a view may be overwritten while the model is in use.
    return stored.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _compact_copy(
    stored: Tensor | Compact, device: torch.device | str, dtype: torch.dtype
) -> Compact:
    if not isinstance(stored, Compact):
        stored = Compact.of(stored)
    return stored.to(device, dtype)


def _hold_compact(network: SparseTransformer, name: str, weight: Compact) -> None:
    """Replace the parameter `name` of the network by a compact weight."""
    module_name, _, weight_name = name.rpartition(".")
    holder: Any = network.get_submodule(module_name)
    holder.hold_compact(weight_name, weight)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device that exists here.

    Args:
        device: None means the GPU if there is one, else the CPU.

    Raises:
        ConfigError: if torch has no such device on this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = _devices_here()
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, TypeError, AssertionError) as error:
        is_gpu = str(device).startswith(("cuda", "mps"))
        why = ", because torch finds no GPU here" if is_gpu and len(here) == 1 else ""
        raise ConfigError(
            f"device = {device!r} is not possible{why}; use {' or '.join(here)}"
        ) from error
    return resolved


def _devices_here() -> list[str]:
    """The devices of this machine on which torch computes, for error messages."""
    devices = ["'cpu'"]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices.append(f"'cuda:{number}'")
    if torch.backends.mps.is_available():
        devices.append("'mps'")
    return devices


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype.

    Args:
        dtype: a torch dtype, or its name, such as "float32"; for None, None is returned.

    Raises:
        ConfigError: for anything else.
    """
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ConfigError(f"dtype = {dtype!r} is not possible; use one of {names}")
    return resolved
