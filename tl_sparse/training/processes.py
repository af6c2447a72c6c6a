"""A run in several processes, and its trackers.

Both use accelerate, which is imported only where it is needed.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.config import check
from tl_sparse.errors import CheckpointError, TLSparseError
from tl_sparse.hooks import TLModel
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.objective import Objective
from tl_sparse.training.sharding import (
    check_can_shard,
    is_asked_for,
    shard,
    sharding_accelerator,
)
from tl_sparse.training.signals import SIGNALS


class Processes:
    """The processes of a run. Without arguments there is only this process.

    Every process computes the gradients of its part of the batch, and the gradients are averaged.
    Usually every process holds the whole model, which is not wrapped, and all of them then take the
    same step on the same weights. If the weights are sharded, every process holds a part of each
    weight, of its gradient and of its moments, and takes the step on this part.

    Args:
        accelerator: an `accelerate.Accelerator`, if there are several processes or a tracker.
        device: the device of this process.

    Attributes:
        count: the number of processes.
        main: whether this is the main process, which writes the files.
        sharded: whether the weights are sharded over the processes.
        received: the signals that this process has received.
        stop: a signal that some process had received before the last call of `average`; None if no
            process had received one.
    """

    def __init__(self, accelerator: Any = None, device: torch.device | None = None) -> None:
        self.accelerator = accelerator
        self.device = device
        self.count: int = 1
        self.main: bool = True
        self.sharded: bool = False
        if accelerator is not None:
            self.count = accelerator.num_processes
            self.main = accelerator.is_main_process
            self.sharded = self.count > 1 and bool(accelerator.is_fsdp2)
        self.received: list[int] = []
        self.stop: Signals | None = None

    @classmethod
    def launched(
        cls,
        config: TrainConfig,
        objective: Objective,
        folder: str | Path | None,
        device: torch.device,
    ) -> "Processes":
        """The processes that `accelerate launch` started, with the tracker that `config` names.

        Raises:
            ConfigError: if the batch cannot be divided among the processes, if `device` names one
                GPU for several processes, if the tracker is not installed, or if the weights are
                to be sharded and cannot be; see `check_can_shard`.
            UnsupportedError: if the weights are to be sharded, and the objective does not allow it.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        can_divide = config.batch_size % count == 0
        expected = f"a multiple of the {count} processes"
        check(can_divide, "batch_size", config.batch_size, expected)
        is_shared = count > 1 and device.index is not None
        expected = "without a number, because each of the processes takes its own"
        check(not is_shared, "device", str(device), expected)
        if count == 1 and config.track == "none":
            return cls(device=device)
        is_to_be_sharded = count > 1 and is_asked_for()
        if is_to_be_sharded:
            check_can_shard(config, objective, device)

        tracker = None if config.track == "none" else config.track
        if tracker is not None:
            _check_installed(tracker)
        options: dict[str, Any] = {"log_with": tracker, "project_dir": folder or "."}
        if is_to_be_sharded:
            accelerator = sharding_accelerator(device, **options)
        else:
            from accelerate import Accelerator

            on_cpu = count > 1 and device.type == "cpu"
            accelerator = Accelerator(cpu=on_cpu, **options)
        if count > 1:
            device = accelerator.device
            _stop_with_launcher()
        processes = cls(accelerator, device)
        processes.wait()  # nothing is written before all have checked the folder
        return processes

    @property
    def device_of_new_model(self) -> torch.device | None:
        """The device on which a model is made. One that will be sharded is made on the CPU, from
        which every process moves only its part.
        """
        return torch.device("cpu") if self.sharded else self.device

    def shard(self, model: TLModel) -> None:
        """Shard the weights of a new model over the processes, if the run is to be sharded.

        Its parameters are then others than before.
        """
        if self.sharded:
            shard(self.accelerator, model.network)
            model.cfg.device = str(self.device)

    def part(self, batch: Int[Tensor, "batch pos"]) -> Int[Tensor, "part pos"]:
        """The rows of a batch that this process handles."""
        if self.count == 1:
            return batch
        return batch.chunk(self.count)[self.accelerator.process_index]

    @torch.no_grad()
    def average(
        self, loss: Float[Tensor, ""], parameters: Sequence[Tensor] = ()
    ) -> Float[Tensor, ""]:
        """Average the loss and the gradients of a step over the processes, in one exchange.

        The gradients of `parameters` are replaced by their mean, which those of sharded weights
        are already. The signals that were received are exchanged as well, so that `stop` is set in
        all processes or in none.

        Returns:
            The mean loss.
        """
        noticed = [float(number in self.received) for number in SIGNALS]
        if self.count > 1:
            averaged = () if self.sharded else parameters
            gradients = [p.grad for p in averaged if p.grad is not None]
            *means, loss_mean, noticed_mean = self._means(
                [*gradients, loss.view(1), loss.new_tensor(noticed)]
            )
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
            loss = loss_mean[0]
            noticed = noticed_mean.tolist()
        stops = [number for number, share in zip(SIGNALS, noticed, strict=True) if share > 0]
        self.stop = stops[0] if stops else None
        return loss

    def _means(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The mean of each tensor over the processes, flattened."""
        flat = [tensor.flatten() for tensor in tensors]
        mean: Tensor = self.accelerator.reduce(torch.cat(flat), "mean")
        return mean.split([len(part) for part in flat])

    def total(self, of_parts: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A sum over all weights, from the sum over what this process holds of them."""
        if not self.sharded:
            return of_parts
        total: Tensor = self.accelerator.reduce(of_parts, "sum")
        return total

    def from_main(self, value: Any) -> Any:
        """The value that the main process has, in all processes that share the sharded weights."""
        if not self.sharded:
            return value
        from accelerate.utils import broadcast_object_list

        [value_of_main] = broadcast_object_list([value])
        return value_of_main

    @contextmanager
    def main_alone(self) -> Iterator[bool]:
        """Within the context, which gives whether this is the main process, only this one acts.

        The others wait until it has left the context.

        Raises:
            CheckpointError: in all processes, if the main process cannot write or read a file.
        """
        message = None
        try:
            yield self.main
        except (OSError, TLSparseError) as error:
            message = str(error)
        message = self.from_main(message)
        if message is not None:
            raise CheckpointError(message)

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the other processes enter only once the main process has left it."""
        if self.count == 1:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.main_process_first()
        return context

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def start_tracker(self, config: TrainConfig) -> None:
        """Start a run of the tracker, if there is one."""
        if self.accelerator is not None:
            settings = _flat(dataclasses.asdict(config))
            self.accelerator.init_trackers("tl_sparse", settings)

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Send a line of the log to the tracker, if there is one."""
        if self.accelerator is not None:
            self.accelerator.log(values, step)

    def end_tracker(self) -> None:
        """End the run that `start_tracker` started."""
        if self.accelerator is None:
            return
        # accelerate's `end_training` would also close the connection between the processes.
        for tracker in self.accelerator.trackers:
            tracker.finish()


@functools.cache  # one thread is enough for all runs of this process
def _stop_with_launcher() -> None:
    """Stop this process, as `kill` does, when the process that launched it has ended.

    A launcher that is killed cannot stop the processes of a run, which would go on without it. On
    Windows the end of the launcher is not noticed.
    """
    threading.Thread(target=_watch_launcher, args=[os.getppid()], daemon=True).start()


def _watch_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _check_installed(tracker: str) -> None:
    from accelerate.tracking import get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    expected = f"'none' until it is installed: pip install {tracker}"
    check(tracker in installed, "track", tracker, expected)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings, with keys joined by dots, since trackers take no mappings."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
