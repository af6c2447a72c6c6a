"""A training run in a folder: its log, and the checkpoints from which it can be resumed exactly."""

import dataclasses
import json
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.data import Corpus
from tl_sparse.errors import CheckpointError, TrainError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors, write_text
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.tokens import packed_for

#: Fields of `TrainConfig` that may differ when a run is resumed, because they affect no weight.
_FREE = {"checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "track"}


class Run:
    """The files that `train` writes during training; see its docstring.

    A checkpoint is a file step-NUMBER.safetensors. It holds the tensors of the trainer's state, the
    losses of all steps so far as "losses", and a checksum of all of these as "checksum".

    Args:
        folder: the run's folder.
        config: the configuration of the run.
        resume: whether to continue from the last checkpoint in `folder`.

    Raises:
        TrainError: if `resume` is set and the run in `folder` has another configuration.
    """

    def __init__(self, folder: Path, config: TrainConfig, resume: bool) -> None:
        self.folder = folder
        self.config = config
        self.checkpoints = folder / "checkpoints"
        self.log = folder / "log.jsonl"
        self.data = folder / "data"
        self._settings = folder / "run.json"
        self._about_data: dict[str, Any] | None = None  # of the packed tokens, when resuming
        if resume:
            stored = read_json(self._settings)
            _check_same(stored.get("config", {}), config, folder)
            self._about_data = stored.get("data", {})
        self._saved = time.monotonic()

    @staticmethod
    def is_unfinished(folder: Path) -> bool:
        """Whether there is a run in `folder` that can be resumed."""
        return (folder / "run.json").is_file()

    def corpus(self, required: Sequence[str]) -> Corpus:
        """The run's tokens, packed in its folder.

        A resumed run gets the same tokens as before; see `packed_corpus`.
        """
        corpus = packed_for(self.config, required, self.data, self._about_data)
        if self._about_data is None:
            settings = {"config": dataclasses.asdict(self.config), "data": corpus.about}
            write_json(self._settings, settings)
        return corpus

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        interval = self.config.checkpoint_steps
        if interval and step % interval == 0:
            return True
        return time.monotonic() - self._saved > 60 * self.config.checkpoint_minutes

    def save(self, state: Mapping[str, Tensor], losses: Float[Tensor, " step"]) -> None:
        """Write the checkpoint after len(losses) steps, and remove the oldest checkpoints.

        Args:
            state: the state of the trainer.
            losses: the losses of all steps so far.

        Raises:
            TrainError: if it cannot be written; the earlier checkpoints are then unchanged.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        tensors["losses"] = losses.cpu()
        tensors["checksum"] = torch.tensor(_checksum(tensors))
        path = self.checkpoints / f"step-{len(losses):08}.safetensors"
        try:
            write_tensors(path, tensors)
        except Exception as error:  # safetensors raises its own errors, such as for a full disk
            raise TrainError(
                f"cannot write {path}: {error}; the earlier checkpoints are unchanged"
            ) from error
        for old in self._paths()[: -self.config.keep_checkpoints]:
            old.unlink()
        self._saved = time.monotonic()

    def restore(self) -> tuple[dict[str, Tensor], Float[Tensor, " step"]]:
        """Read the last checkpoint: the state of the trainer, and the losses of all steps up to it.

        Raises:
            TrainError: if there is no checkpoint, or it is damaged.
        """
        paths = self._paths()
        if not paths:
            advice = "train into a new folder without resume"
            raise TrainError(f"there is no checkpoint in {self.checkpoints}; {advice}")
        *earlier, last = paths
        try:
            stored = read_tensors(last)
            if int(stored.pop("checksum")) != _checksum(stored):
                raise CheckpointError(f"{last} is damaged: its checksum is wrong")
        except (CheckpointError, KeyError) as error:
            if earlier:
                advice = f"remove it to continue from {earlier[-1].name}"
            else:
                advice = "there is no earlier checkpoint"
            raise TrainError(f"{error}; {advice}") from error
        losses = stored.pop("losses")
        return stored, losses

    def cut_log(self, done: int) -> None:
        """Remove the lines of the log after step `done`, which will be written again."""
        if self.log.is_file():
            lines = self.log.read_text().splitlines(keepends=True)
        else:
            lines = []
        kept = [line for line in lines if json.loads(line)["step"] <= done]
        write_text(self.log, "".join(kept))

    def write_log(self, values: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def finish(self) -> None:
        """Remove the files that are only needed until training is done."""
        # If packing was interrupted, it left temporary folders beside `data`.
        temporary = self.folder.glob(f".{self.data.name}.*")
        for path in (self.checkpoints, self.data, *temporary):
            shutil.rmtree(path, ignore_errors=True)
        self._settings.unlink()

    def _paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*.safetensors"))


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(content, checksum)
    return checksum


def _check_same(before: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Raise `TrainError` if a run's stored configuration differs from the one to resume it with.

    The message names the first field that differs.
    """
    # `before` was read from JSON, in which tuples become lists.
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if isinstance(before.get("model"), dict):
        before = before | {"model": {"norm_eps": None} | before["model"]}  # added later
    for name in sorted((before.keys() | now.keys()) - _FREE):
        if before.get(name) != now.get(name):
            difference = f"{name} = {before.get(name)!r}, not {now.get(name)!r}"
            raise TrainError(
                f"{folder} was trained with {difference}; to resume, use the same value"
            )
