"""One run in several processes, and its trackers: both are accelerate's, imported only where they
are asked for.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.config import check
from tl_sparse.training.config import TrainConfig

#: What stops a run, in all of its processes after the same step.
SIGNALS = (SIGINT, SIGTERM)


class Processes:
    """The processes of a run, each with the whole model; without arguments, this one alone.

    The model is not wrapped. Every process takes the gradients of its part of the batch; once these
    are averaged, all do the same step on the same weights.

    Args:
        accelerator: accelerate's, if there are several processes or a tracker.
        device: of this process.
    """

    def __init__(self, accelerator: Any = None, device: torch.device | None = None) -> None:
        self.accelerator, self.device = accelerator, device
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.main: bool = accelerator is None or accelerator.is_main_process
        self.received: list[int] = []  # signals, by this process
        self.stop: Signals | None = (
            None  # a signal that any process had received before the last average
        )

    @classmethod
    def launched(
        cls, config: TrainConfig, folder: str | Path | None, device: torch.device
    ) -> "Processes":
        """As many as `accelerate launch` started, with the tracker that `config` asks for.

        Raises:
            ConfigError: if the batch cannot be divided, `device` is one for all, or the tracker is
                not installed.
        """
        count, tracker = (
            int(os.environ.get("WORLD_SIZE", "1")),
            None if config.track == "none" else config.track,
        )
        check(
            config.batch_size % count == 0,
            "batch_size",
            config.batch_size,
            f"a multiple of the {count} processes",
        )
        numbered = count > 1 and device.index is not None
        check(
            not numbered,
            "device",
            str(device),
            "without a number: each of several processes takes its own",
        )
        if count == 1 and tracker is None:
            return cls(device=device)
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        installed = tracker is None or tracker in [str(name) for name in get_available_trackers()]
        check(installed, "track", tracker, f"'none' until it is installed: pip install {tracker}")
        on_cpu = count > 1 and device.type == "cpu"
        accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=folder or ".")
        processes = cls(accelerator, accelerator.device if count > 1 else device)
        processes.wait()  # nobody writes before all have seen what the folder holds
        return processes

    def part(self, batch: Int[Tensor, "batch pos"]) -> Int[Tensor, "part pos"]:
        """The rows of a batch that are this process's."""
        return batch if self.count == 1 else batch.chunk(self.count)[self.accelerator.process_index]

    @torch.no_grad()
    def average(
        self, loss: Float[Tensor, ""], parameters: Sequence[Tensor] = ()
    ) -> Float[Tensor, ""]:
        """The mean loss; gradients become their mean, and `stop` is agreed upon, all in one
        exchange.
        """
        noticed = [float(number in self.received) for number in SIGNALS]
        if self.count > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            ours = [g.flatten() for g in gradients] + [loss.view(1), loss.new_tensor(noticed)]
            means = self.accelerator.reduce(torch.cat(ours), "mean").split(
                [len(values) for values in ours]
            )
            for gradient, mean in zip(gradients, means, strict=False):
                gradient.copy_(mean.view_as(gradient))
            loss, noticed = means[-2][0], means[-1].tolist()
        self.stop = next(
            (number for number, share in zip(SIGNALS, noticed, strict=True) if share), None
        )
        return loss

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the main process goes through before the others enter it."""
        return nullcontext() if self.count == 1 else self.accelerator.main_process_first()

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def start_tracker(self, config: TrainConfig) -> None:
        """Begin a run of the tracker, if there is one."""
        if self.accelerator is not None:
            self.accelerator.init_trackers("tl_sparse", dict(_flat(dataclasses.asdict(config))))

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Give a line of the log to the tracker."""
        if self.accelerator is not None:
            self.accelerator.log(values, step)

    def end_tracker(self) -> None:
        """End what `start_tracker` began."""
        if (
            self.accelerator is not None
        ):  # its own `end_training` would also end the processes' connection
            for tracker in self.accelerator.trackers:
                tracker.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield from (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else [(prefix + name, value)]
        )
