"""State dict → network, and what every format's reader shares."""

import re
from collections.abc import Collection, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.config import check
from tl_sparse.errors import CheckpointError, ConfigError
from tl_sparse.network import Compact, SparseConfig, SparseTransformer

#: Floating-point dtypes that torch computes with.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: A configuration and what the file says of each tensor: views of the file, which only
#: `build_network` copies.
Checkpoint = tuple[SparseConfig, dict[str, Tensor | Compact]]


def take_flag(values: dict[str, Any], key: str, default: bool) -> bool:
    """Take a truth value out of `values`; `ConfigError` if it is anything else."""
    value = values.pop(key, default)
    check(isinstance(value, bool), key, value, "true or false")
    return bool(value)


def take_size(values: dict[str, Any], key: str) -> int:
    """Take a size out of `values`; `ConfigError` if it is not an integer of at least 1."""
    size = values.pop(key)
    check(type(size) is int and size >= 1, key, size, "an integer of at least 1")
    return int(size)


def check_keys(values: Mapping[str, Any], required: Collection[str]) -> None:
    """`ConfigError` unless all `required` keys are there."""
    if missing := [key for key in required if key not in values]:
        raise ConfigError(f"missing keys {', '.join(missing)}")


def check_known(unknown: Collection[str]) -> None:
    """`ConfigError` if keys are left over that no reader knows."""
    if unknown:
        raise ConfigError(
            f"unknown keys {', '.join(sorted(unknown))}; they may change what the model computes"
        )


def build_network(
    cfg: SparseConfig,
    state: dict[str, Tensor | Compact],
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    dense_weights: bool = True,
) -> SparseTransformer:
    """The network holding exactly the tensors of `state`, by default in the widest of their dtypes;
    without `dense_weights` the weights of the blocks as `WeightsHolder.hold_compact` has them.

    `state` is emptied on the way, so that no tensor is in memory twice for longer than its turn.
    `CheckpointError`, naming `source`, for missing, unexpected, mis-shaped, non-floating or
    non-finite tensors.
    """
    # Counted first: a wrong n_layers must not make the machine build a billion blocks.
    layers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    if cfg.n_layers > 100_000 or layers != set(range(cfg.n_layers)):
        raise CheckpointError(
            f"{source}: the configuration has {cfg.n_layers} layers, the file {len(layers)}"
        )
    try:
        with torch.device("meta"):
            network = SparseTransformer(cfg)
    except RuntimeError as error:
        raise CheckpointError(
            f"{source}: the sizes in the configuration are impossibly large: {error}"
        ) from error
    expected = network.state_dict()
    wrong = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
    wrong += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    if wrong:
        raise CheckpointError(f"{source}: tensors do not fit the configuration: {', '.join(wrong)}")
    for name, tensor in state.items():
        if (found := list(tensor.shape)) != (needed := list(expected[name].shape)):
            raise CheckpointError(
                f"{source}: {name} has shape {found}, the configuration needs {needed}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{source}: {name} has dtype {tensor.dtype}; weights must be floating-point"
            )
    dtype = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    owned, compact = dict[str, Tensor](), dict[str, Compact]()
    for name in list(state):
        stored = state.pop(name)
        values = stored.values if isinstance(stored, Compact) else stored
        # A sum could overflow, isfinite() takes as much memory again; NaN is its own minimum and
        # maximum.
        if values.numel() and not all(bool(extreme.isfinite()) for extreme in values.aminmax()):
            raise CheckpointError(f"{source}: {name} has entries that are NaN or infinite")
        if not dense_weights and re.match(r"blocks\.\d+\.(attn|mlp)\.W_", name):
            compact[name] = (stored if isinstance(stored, Compact) else Compact.of(stored)).to(
                device, dtype
            )
        elif isinstance(stored, Compact):
            owned[name] = stored.dense(device, dtype)
        else:  # a copy, whatever it is: the file behind a view may be overwritten while the model is in use
            owned[name] = stored.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        del stored, values
    for name, weight in compact.items():
        path, _, weight_name = name.rpartition(".")
        holder: Any = network.get_submodule(path)
        holder.hold_compact(weight_name, weight)
    network.load_state_dict(owned, assign=True, strict=False)  # all names are there: see above
    for module in network.modules():  # the zeros that stand for absent biases
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=dtype, device=device))
    return network


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device that is there: None is the GPU if there is one, else the CPU. `ConfigError` for one
    that is not.
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
    """A floating-point dtype, from its name too ("float32", …); None stays None. `ConfigError` for
    anything else.
    """
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ConfigError(f"dtype = {dtype!r} is not possible; use one of {names}")
    return resolved
