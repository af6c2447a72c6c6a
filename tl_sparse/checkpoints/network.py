"""What every reader returns, a `Checkpoint`, and how it becomes a network."""

import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.network import Compact, SparseConfig, SparseTransformer

#: Floating-point dtypes that torch computes with.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Checked before any block is built.
_MAX_LAYERS = 100_000
_BLOCK_TENSOR = re.compile(r"blocks\.(\d{1,9})\.")
_BLOCK_WEIGHT = re.compile(r"blocks\.\d+\.(attn|mlp)\.W_")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as its folder has it.

    Attributes:
        config: the architecture.
        tensors: the state dict, in our names and shapes: views of the file, not yet checked, which
            only `build_network` copies.
    """

    config: SparseConfig
    tensors: dict[str, Tensor | Compact]


def build_network(
    checkpoint: Checkpoint,
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    dense_weights: bool = True,
) -> SparseTransformer:
    """The network with exactly the tensors of `checkpoint`.

    `checkpoint.tensors` is emptied on the way, so that only one tensor at a time is in memory
    twice.

    Args:
        checkpoint: what a reader returned.
        source: where it comes from, for error messages.
        device: where the parameters go.
        dtype: of the parameters; None: the widest dtype of the tensors.
        dense_weights: False: the weights of the blocks are held as
            `WeightsHolder.hold_compact` does.

    Raises:
        CheckpointError: for missing, unexpected, mis-shaped, non-floating or non-finite tensors.
    """
    tensors = checkpoint.tensors
    _check_layers(checkpoint, source)
    network = _network_without_tensors(checkpoint.config, source)
    _check_tensors(tensors, network.state_dict(), source)
    dtype = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
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
    # Not strict: compact weights are no parameters, and that all names are there is known by now.
    network.load_state_dict(parameters, assign=True, strict=False)
    for module in network.modules():  # buffers are the zeros that stand for absent biases
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=dtype, device=device))
    return network


def _check_layers(checkpoint: Checkpoint, source: Path) -> None:
    """First of all: a wrong n_layers must not make the machine build a billion blocks."""
    n_layers = checkpoint.config.n_layers
    matches = [_BLOCK_TENSOR.match(name) for name in checkpoint.tensors]
    layers = {int(match[1]) for match in matches if match}
    if n_layers > _MAX_LAYERS or layers != set(range(n_layers)):
        raise CheckpointError(
            f"{source}: the configuration has {n_layers} layers, the file {len(layers)}"
        )


def _network_without_tensors(config: SparseConfig, source: Path) -> SparseTransformer:
    """The modules of the network; their tensors have shapes only, and take no memory."""
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
    """Raise `CheckpointError` unless names and shapes are the expected ones, and all are floats."""
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
                f"{source}: {name} has shape {shape}, the configuration needs {expected_shape}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{source}: {name} has dtype {tensor.dtype}; weights must be floating-point"
            )


def _is_finite(stored: Tensor | Compact) -> bool:
    values = stored.values if isinstance(stored, Compact) else stored
    if values.numel() == 0:
        return True
    # A sum could overflow, and isfinite() of all entries takes as much memory again. The minimum
    # and maximum of a tensor with a NaN are NaN.
    minimum, maximum = values.aminmax()
    return bool(minimum.isfinite()) and bool(maximum.isfinite())


def _dense_copy(stored: Tensor | Compact, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    if isinstance(stored, Compact):
        return stored.dense(device, dtype)
    # Always a copy: the file behind a view may be overwritten while the model is in use.
    return stored.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _compact_copy(
    stored: Tensor | Compact, device: torch.device | str, dtype: torch.dtype
) -> Compact:
    if not isinstance(stored, Compact):
        stored = Compact.of(stored)
    return stored.to(device, dtype)


def _hold_compact(network: SparseTransformer, name: str, weight: Compact) -> None:
    """Put a weight in the place of the parameter `name` of the network."""
    module_name, _, weight_name = name.rpartition(".")
    holder: Any = network.get_submodule(module_name)
    holder.hold_compact(weight_name, weight)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device that exists here.

    Args:
        device: None is the GPU if there is one, else the CPU.

    Raises:
        ConfigError: if torch has no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"device = {device!r} is not possible here; use 'cpu', 'cuda', 'cuda:1', …"
        ) from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype.

    Args:
        dtype: torch's dtype, or its name, such as "float32"; None stays None.

    Raises:
        ConfigError: for anything else.
    """
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ConfigError(f"dtype = {dtype!r} is not possible; use one of {names}")
    return resolved
