"""The checkpoints of a training run: files from which it can be resumed exactly."""

import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from tl_sparse.checksums import stored_checksum
from tl_sparse.errors import CheckpointError, TrainError
from tl_sparse.files import read_tensors, write_tensors
from tl_sparse.training.processes import Processes
from tl_sparse.training.sharded_checkpoints import read_shards, write_shards

#: The ending of the checkpoints of runs whose weights are sharded; these are folders.
_SHARDED = ".sharded"


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        state: the tensors of the trainer's state.
        losses: the losses of all steps so far.
    """

    state: dict[str, Tensor]
    losses: Float32[Tensor, " step"]


class Checkpoints:
    """The checkpoints in a folder, each of them a file step-NUMBER.safetensors.

    Those of a run whose weights are sharded are folders step-NUMBER.sharded.

    Args:
        folder: the folder.
        n_kept: the number of latest checkpoints that are kept.
    """

    def __init__(self, folder: Path, n_kept: int) -> None:
        self.folder = folder
        self.n_kept = n_kept

    def save(self, checkpoint: Checkpoint, processes: Processes) -> None:
        """Write a checkpoint, and remove the oldest ones and those of later steps.

        There are later ones only if they are damaged: the run was then resumed from an earlier one.
        If the weights are sharded, all processes call this together.

        Raises:
            TrainError: if it cannot be written; the earlier checkpoints are then unchanged.
        """
        tensors = dict(checkpoint.state)
        tensors["losses"] = checkpoint.losses
        path = _path(self.folder, checkpoint.losses, processes.sharded)
        try:
            if processes.sharded:
                write_shards(path, tensors, processes)
            else:
                write_tensors(path, tensors)
        except CheckpointError as error:
            raise TrainError(f"{error}; the earlier checkpoints are unchanged") from error
        if not processes.main:
            return
        earlier = [each for each in self.latest_first() if each < path]
        kept = [path, *earlier][: self.n_kept]
        for each in self.latest_first():
            if each not in kept:
                _remove(each)

    def latest_first(self) -> list[Path]:
        """The files and folders of all checkpoints."""
        files = self.folder.glob("step-*.safetensors")
        folders = self.folder.glob(f"step-*{_SHARDED}")
        return sorted([*files, *folders], reverse=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def read_checkpoint(
    path: Path, max_steps: int, empty_state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> Checkpoint:
    """Read a checkpoint of a run of at most `max_steps` steps.

    Args:
        path: the checkpoint.
        max_steps: the number of steps of the run.
        empty_state: from the tensors of a state, without their values, makes the tensors that a
            sharded checkpoint is read into.

    Raises:
        CheckpointError: if it is damaged.
    """
    if path.suffix == _SHARDED:

        def empty(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
            state = dict(stored)
            losses = state.pop("losses", None)
            if losses is None:
                raise CheckpointError("it has no losses")
            return {**empty_state(state), "losses": torch.empty_like(losses, device="cpu")}

        stored = read_shards(path, empty)
    else:
        stored = read_tensors(path)
        _check_old_checksum(stored, is_needed=stored_checksum(path) is None)
    losses = stored.pop("losses", None)
    if losses is None or losses.dtype != torch.float32 or losses.ndim != 1:
        raise CheckpointError("it has no losses")
    if path != _path(path.parent, losses, path.suffix == _SHARDED) or len(losses) > max_steps:
        raise CheckpointError(f"it is from step {len(losses)}")
    return Checkpoint(stored, losses)


def _path(folder: Path, losses: Float32[Tensor, " step"], sharded: bool) -> Path:
    ending = _SHARDED if sharded else ".safetensors"
    return folder / f"step-{len(losses):08}{ending}"


def _check_old_checksum(stored: dict[str, Tensor], is_needed: bool) -> None:
    """Check the checksum of the values, which older checkpoints have instead of one of the file.

    It is removed from `stored`.
    """
    checksum = stored.pop("checksum", None)
    if checksum is None and not is_needed:
        return
    if checksum is None or checksum.numel() != 1 or int(checksum) != _checksum(stored):
        raise CheckpointError("its checksum is wrong")


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(content, checksum)
    return checksum
