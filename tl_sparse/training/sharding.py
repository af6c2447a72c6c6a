"""Runs whose weights are spread over the processes, with FSDP2 of torch through accelerate.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. accelerate is imported only where it is
needed.
"""

import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from tl_sparse.config import check
from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks import is_sharded, shard_of
from tl_sparse.network import Product
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.objective import Objective


def is_asked_for() -> bool:
    """Whether `accelerate launch` was told to shard the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_can_shard(config: TrainConfig, objective: Objective, device: torch.device) -> None:
    """Check, before anything is made, that a run can shard its weights.

    Raises:
        ConfigError: if a setting of the run or of `accelerate launch` does not go with sharding, or
            accelerate or torch is too old for it.
        UnsupportedError: if the objective trains something else beside the model.
    """
    if not objective.can_shard:
        raise UnsupportedError(
            f"`tl-sparse {objective.command}` cannot shard weights: launch it without --use_fsdp, "
            "so that every process holds the whole model"
        )
    check(not config.compile, "compile", True, "false while the weights are sharded (--use_fsdp)")
    n_steps = config.dense_gradient_steps
    expected = "1 while the weights are sharded (--use_fsdp)"
    check(n_steps == 1, "dense_gradient_steps", n_steps, expected)
    is_alone = device.type != "cpu" or not torch.accelerator.is_available()
    expected = "that of the accelerators, which FSDP2 uses where it sees any"
    check(is_alone, "device", str(device), expected)
    _check_versions()
    _check_launch_options()


def _check_versions() -> None:
    from accelerate import FullyShardedDataParallelPlugin

    fields = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    expected = "at least 1.6 to shard weights with FSDP2 (--use_fsdp)"
    check("fsdp_version" in fields, "accelerate", version("accelerate"), expected)
    expected = "at least 2.9 to shard weights, for checkpoints in safetensors files"
    check(_can_write_checkpoints(), "torch", version("torch"), expected)


def _can_write_checkpoints() -> bool:
    """Whether torch can write the checkpoints of sharded runs."""
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    except ImportError:
        return False
    return "save_distributed" in inspect.signature(HuggingFaceStorageWriter).parameters


#: Options of `accelerate launch` that do not go with the trainer: environment variable → option.
_OFF = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing",
    "FSDP_IGNORED_MODULES": "--fsdp_ignored_modules",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}


def _check_launch_options() -> None:
    fsdp_version = os.environ.get("FSDP_VERSION", "1")
    check(fsdp_version == "2", "--fsdp_version", fsdp_version, "2")
    for variable, option in _OFF.items():
        value = os.environ.get(variable, "false")
        check(value.lower() == "false", option, value, "left out with this trainer")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    expected = "'no'; precision = 'bfloat16' multiplies matrices in bfloat16"
    check(precision == "no", "--mixed_precision", precision, expected)


def sharding_accelerator(device: torch.device, **options: Any) -> Any:
    """An `accelerate.Accelerator` that shards models with FSDP2.

    Args:
        device: the device of the run.
        options: further arguments of `accelerate.Accelerator`.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # Without a policy, all weights would be gathered at once instead of block by block.
        auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        cpu_ram_efficient_loading=False,  # all processes draw the same weights from the seed
    )
    on_cpu = device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, fsdp_plugin=plugin, mixed_precision="no", **options)
    if on_cpu:
        # FSDP2 also works on CPUs, but accelerate leaves models there as they are unless its state
        # says otherwise.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def shard(accelerator: Any, network: nn.Module) -> None:
    """Spread the weights of a network over the processes: its parameters become `DTensor`s."""
    # accelerate shards a model only together with an optimizer.
    unused = torch.optim.SGD(network.parameters())
    accelerator.prepare(network, unused)
    accelerator.free_memory()  # it would keep both of them
    for module in network.modules():
        if isinstance(module, Product):
            # FSDP2 frees the memory of whole weights, which sparse products would share with NumPy.
            module.kernels = "dense"


class WholeWeights(Mapping[str, Tensor]):
    """The weights of a sharded model for the main process, each made whole when it is read.

    While the main process reads all of them once, in order, the others call `take_part`. So no
    process holds more than one whole weight at a time, and only the main process any.

    Args:
        weights: the state dict of the model, in this process.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        if not is_sharded(weight):
            return weight
        return _gathered(weight)

    def take_part(self) -> None:
        """Give the main process this process's parts of all weights."""
        for weight in self.weights.values():
            if is_sharded(weight):
                torch.distributed.gather(_padded_part(weight), dst=0, group=_group(weight))


@torch.no_grad()
def _gathered(weight: Tensor) -> Tensor:
    """A sharded weight as a whole, in the main process, while the others give their parts."""
    group = _group(weight)
    n_processes = torch.distributed.get_world_size(group)
    part = _padded_part(weight)
    whole = part.new_empty(n_processes * len(part), *weight.shape[1:])
    torch.distributed.gather(part, list(whole.chunk(n_processes)), dst=0, group=group)
    return whole[: len(weight)]


@torch.no_grad()
def _padded_part(weight: Tensor) -> Tensor:
    """What this process holds of a sharded weight, with zeros up to the length of the first part.

    Parts are gathered at one length.
    """
    part = shard_of(weight).part
    n_in_part = -(-len(weight) // torch.distributed.get_world_size(_group(weight)))
    padded = part.new_zeros(n_in_part, *weight.shape[1:])
    padded[: len(part)] = part
    return padded


def _group(weight: Tensor) -> Any:
    """The processes over which a sharded weight is spread."""
    sharded: Any = weight
    return sharded.device_mesh.get_group()
