"""A training run in a folder: its log, and checkpoints from which it goes on exactly where it
was.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_sparse.data import Corpus, packed_corpus
from tl_sparse.errors import CheckpointError, TrainError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors, write_text
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.processes import SIGNALS

if TYPE_CHECKING:
    from tl_sparse.training.trainer import Trainer


#: What may differ when a run goes on: it changes no weight.
_FREE = {"checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "track"}


def packed_for(
    config: TrainConfig,
    required: Sequence[str],
    folder: Path | None = None,
    about: dict[str, Any] | None = None,
) -> Corpus:
    """The tokenizer and tokens that a run of `config` reads; see `packed_corpus`."""
    return packed_corpus(
        config.data,
        d_vocab=config.model.d_vocab,
        n_ctx=config.model.n_ctx,
        seed=config.seed,
        required=required,
        folder=folder,
        about=about,
    )


class Run:
    """What `train` writes while it trains; see its docstring.

    Args:
        folder: of the run.
        config: how it trains.
        resume: go on from the last checkpoint in `folder`.

    Raises:
        TrainError: to resume: if it was another configuration.
    """

    def __init__(self, folder: Path, config: TrainConfig, resume: bool) -> None:
        self.folder, self.config = folder, config
        self.checkpoints, self.log, self.data = (
            folder / "checkpoints",
            folder / "log.jsonl",
            folder / "data",
        )
        self._about = None
        if resume:
            stored = read_json(folder / "run.json")
            _check_same(stored.get("config", {}), config, folder)
            self._about = stored.get("data", {})
        self._saved = time.monotonic()

    def corpus(self, required: Sequence[str]) -> Corpus:
        """The run's tokens, packed in its folder; to resume, the same again: see
        `packed_corpus`.
        """
        corpus = packed_for(self.config, required, self.data, self._about)
        if self._about is None:
            write_json(
                self.folder / "run.json",
                {"config": dataclasses.asdict(self.config), "data": corpus.about},
            )
        return corpus

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step` steps."""
        config = self.config
        by_step = config.checkpoint_steps and step % config.checkpoint_steps == 0
        return bool(by_step) or time.monotonic() - self._saved > 60 * config.checkpoint_minutes

    def save(self, trainer: Trainer, losses: Tensor) -> None:
        """Write a checkpoint of the trainer after len(losses) steps, and drop the oldest.

        Raises:
            TrainError: if it cannot be written; those before it are as they were.
        """
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in _state(trainer).items()
        }
        tensors["losses"] = losses.cpu()
        tensors["checksum"] = torch.tensor(_checksum(tensors))
        path = self.checkpoints / f"step-{len(losses):08}.safetensors"
        try:
            write_tensors(path, tensors)
        except Exception as error:  # safetensors has errors of its own for a full disk
            raise TrainError(
                f"cannot write {path}: {error}; the checkpoints before it are as they were"
            ) from error
        for old in self._paths()[: -self.config.keep_checkpoints]:
            old.unlink()
        self._saved = time.monotonic()

    def restore(self, trainer: Trainer) -> Tensor:
        """Put the trainer into the state of the last checkpoint; returns the losses of all steps
        until then.

        Raises:
            TrainError: if there is none, or it is damaged.
        """
        paths = self._paths()
        if not paths:
            raise TrainError(
                f"there is no checkpoint in {self.checkpoints}; train into a new folder without resume"
            )
        try:
            stored = read_tensors(paths[-1])
            if int(stored.pop("checksum")) != _checksum(stored):
                raise CheckpointError(f"{paths[-1]} is damaged: its checksum is wrong")
        except (CheckpointError, KeyError) as error:
            before = (
                f"remove it to go on from {paths[-2].name}"
                if len(paths) > 1
                else "there is none before it"
            )
            raise TrainError(f"{error}; {before}") from error
        losses = stored.pop("losses")
        trainer.sparsity.steps = len(losses)
        _restore(trainer, stored)
        return losses

    def cut_log(self, done: int) -> None:
        """Remove the lines of steps after `done`, which will come again."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.is_file() else []
        write_text(self.log, "".join(line for line in lines if json.loads(line)["step"] <= done))

    def write_log(self, **values: Any) -> None:
        """Add a line to log.jsonl."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def finish(self) -> None:
        """Remove what is of use only while the run goes on."""
        for path in (self.checkpoints, self.data, *self.folder.glob(f".{self.data.name}.*")):
            shutil.rmtree(path, ignore_errors=True)
        (self.folder / "run.json").unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.safetensors"))


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """All that a step depends on, besides the configuration and the data: weights and moments."""
    state = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            state[f"{key}/{name}"] = value
    return state


@torch.no_grad()
def _restore(trainer: Trainer, stored: dict[str, Tensor]) -> None:
    for name, tensor in trainer.model.state_dict().items():
        tensor.copy_(stored.pop(f"model/{name}"))
    parameters = dict(trainer.model.named_parameters())
    for entry, value in stored.items():
        key, _, name = entry.partition("/")
        parameter = parameters[name]
        trainer.optimizer.state[parameter][key] = value.to(parameter.device)


def _checksum(tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _check_same(before: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Raise `TrainError` naming what differs between a run's configuration and the one it is to go
    on with.
    """
    now = json.loads(
        json.dumps(dataclasses.asdict(config))
    )  # what is compared has been through JSON on both sides
    for name in sorted((before.keys() | now.keys()) - _FREE):
        if before.get(name) != now.get(name):
            differ = f"{name} = {before.get(name)!r}, not {now.get(name)!r}"
            raise TrainError(f"{folder} was trained with {differ}; to resume, ask for the same")


@contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """Within the context, SIGINT (Ctrl-C) and SIGTERM only put their number into the list; a second
    one acts.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def notice(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, notice)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
