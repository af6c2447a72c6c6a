"""A training run in a folder: its settings, its packed text, its checkpoints and its log."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_sparse.checkpoints import contents_of, resuming_command
from tl_sparse.config import merged
from tl_sparse.data import Corpus, DataConfig
from tl_sparse.errors import CheckpointError, ConfigError, TrainError
from tl_sparse.files import read_json, write_json, write_text
from tl_sparse.locks import folder_lock
from tl_sparse.network import SparseConfig
from tl_sparse.outputs import remove_unfinished
from tl_sparse.training.checkpoint_files import Checkpoint, Checkpoints
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.new_runs import RUN_FILE, check_no_other_files
from tl_sparse.training.objective import Objective
from tl_sparse.training.processes import Processes
from tl_sparse.training.step_models import StepModels
from tl_sparse.training.tokens import packed_for

#: The record of a run whose model is saved.
RECORD_FILE = "training.json"

#: Fields of `TrainConfig` that may differ when a run is resumed, because they affect no weight.
_FREE = {"checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "max_jump", "track"}


class Run:
    """The files that `train` writes during training; see its docstring.

    Whenever the process is killed, the run can be resumed: `run.json` is the first file that is
    written and the last that is removed, and every other file is complete when it appears.

    Args:
        folder: the run's folder.
        config: the configuration of the run.
        objective: what the run minimises.
    """

    def __init__(self, folder: Path, config: TrainConfig, objective: Objective) -> None:
        self.folder = folder
        self.config = config
        self.objective = objective
        self.checkpoints = Checkpoints(folder / "checkpoints", config.n_checkpoints)
        self.step_models = StepModels(folder, config)
        self.log = folder / "log.jsonl"
        self.data = folder / "data"
        self._about_data: dict[str, Any] | None = None  # of the packed tokens, if there are any
        self._saved = time.monotonic()

    def write_settings(self) -> None:
        """Write run.json, with which the run begins."""
        settings: dict[str, Any] = {"config": dataclasses.asdict(self.config)}
        if self.objective.settings:
            settings["objective"] = _objective_settings(self.objective)
        if self._about_data is not None:
            settings["data"] = self._about_data
        write_json(self.folder / RUN_FILE, settings)

    def reopen(self) -> None:
        """Read the settings of a run that has begun.

        Raises:
            TrainError: if the run has another configuration, or its settings are damaged.
        """
        settings = _read_settings(self.folder / RUN_FILE)
        _check_same_objective(settings, self.objective, self.folder)
        _check_same(settings["config"], self.config, self.folder)
        self._about_data = settings.get("data")

    def corpus(self, required: Sequence[str]) -> Corpus:
        """The run's tokens, packed in its folder.

        A resumed run gets the same tokens as before; see `packed_corpus`.
        """
        tokenizer = self.objective.tokenizer
        corpus = packed_for(self.config, required, self.data, self._about_data, tokenizer)
        if corpus.about != self._about_data:
            self._about_data = corpus.about
            self.write_settings()
        return corpus

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        interval = self.config.checkpoint_steps
        if interval and step % interval == 0:
            return True
        return time.monotonic() - self._saved > 60 * self.config.checkpoint_minutes

    def save(self, checkpoint: Checkpoint, processes: Processes) -> None:
        """Write a checkpoint; see `Checkpoints.save`."""
        self.checkpoints.save(checkpoint, processes)
        self._saved = time.monotonic()

    def cut_log(self, done: int) -> None:
        """Remove the lines of the log after step `done`, which will be written again.

        Lines that are not whole are removed too: a process that was killed, or a full disk, leaves
        half a line at the end.
        """
        lines = []
        if self.log.is_file():
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line + "\n" for line in lines if 0 < _logged_step(line) <= done]
        write_text(self.log, "".join(kept))

    def write_log(self, values: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl.

        Raises:
            TrainError: if it cannot be written, for example because the disk is full.
        """
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise TrainError(
                f"cannot write {self.log}: {error}; `{resuming_command(self.folder)}` continues "
                "from the last checkpoint"
            ) from error

    def remove_unfinished(self) -> None:
        """Remove the unfinished files of a process that was killed while it wrote them."""
        # Packing begins in a temporary folder beside `data`.
        for path in self.folder.glob(f".{self.data.name}.*"):
            shutil.rmtree(path, ignore_errors=True)
        remove_unfinished(self.folder)
        remove_unfinished(self.checkpoints.folder)
        self.step_models.remove_unfinished()

    def finish(self) -> None:
        """Remove the files that are only needed until training is done."""
        self.remove_unfinished()
        for path in (self.checkpoints.folder, self.data):
            shutil.rmtree(path, ignore_errors=True)
        (self.folder / RUN_FILE).unlink(missing_ok=True)


@contextmanager
def run_folder(folder: Path, resume: bool) -> Iterator[None]:
    """Within the context, only this process can train in `folder`.

    Raises:
        ConfigError: as for `check_run_folder`.
        TrainError: likewise, if another process trains there, or if there is an unfinished run and
            `resume` is not set.
    """
    with folder_lock(folder, TrainError):
        check_run_folder(folder, resume)  # another process may have trained there just now
        if not resume and (folder / RUN_FILE).is_file():
            raise TrainError(
                f"there is an unfinished run in {folder}; {to_continue(folder)}, or use a new "
                "folder"
            )
        yield


def to_continue(folder: Path) -> str:
    """How to continue the run in a folder, for messages."""
    return f"continue it with `{resuming_command(folder)}` (in Python, resume=True)"


def check_run_folder(folder: Path, resume: bool) -> None:
    """Check that a run can begin in `folder`, or be resumed.

    Whether a run that is there is still being trained is known only once the folder is locked.

    Raises:
        ConfigError: if a run cannot begin because there are files of others.
        TrainError: if there is no run to resume.
    """
    if (folder / RUN_FILE).is_file():
        return
    if resume:
        raise TrainError(f"there is no unfinished run in {folder}; {_what_is_in(folder)}")
    check_no_other_files(folder)


def _what_is_in(folder: Path) -> str:
    """What there is instead of an unfinished run."""
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / RECORD_FILE).is_file():
        return f"its {RECORD_FILE} is that of a finished run"
    contents = contents_of(folder)
    if contents == "nothing":
        return f"it has no {RUN_FILE}"
    return f"it holds a {contents}"


def config_of_run(folder: str | Path) -> TrainConfig:
    """The configuration of the unfinished run in a folder.

    Raises:
        TrainError: if there is no unfinished run, or its settings are damaged.
    """
    folder = Path(folder)
    path = folder / RUN_FILE
    settings = settings_of_run(folder)
    try:
        config: TrainConfig = merged(TrainConfig(), _all_fields(settings["config"]))
    except ConfigError as error:
        raise TrainError(f"{path} is damaged: {error}; train into a new folder") from error
    return config


def settings_of_run(folder: Path) -> dict[str, Any]:
    """All settings of the unfinished run in a folder: "config", and that of its objective, if any.

    Raises:
        TrainError: as for `config_of_run`.
    """
    check_run_folder(folder, resume=True)
    return _read_settings(folder / RUN_FILE)


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings in run.json."""
    advice = "train into a new folder without resume"
    try:
        settings = read_json(path)
    except CheckpointError as error:
        raise TrainError(f"{error}; {advice}") from error
    config = settings.get("config")
    others = (settings.get("data", {}), settings.get("objective", {}))
    if not isinstance(config, dict) or not all(isinstance(other, dict) for other in others):
        raise TrainError(f"{path} does not hold the settings of a run; {advice}")
    return settings


def _objective_settings(objective: Objective) -> dict[str, Any]:
    """The settings of an objective as they are read back from JSON."""
    settings: dict[str, Any] = json.loads(json.dumps(dict(objective.settings)))
    return {"command": objective.command, **settings}


def _check_same_objective(settings: Mapping[str, Any], objective: Objective, folder: Path) -> None:
    """Raise `TrainError` if a run is not resumed with the objective that it was begun with."""
    before = settings.get("objective", {"command": Objective.command})
    now = _objective_settings(objective)
    if before.get("command") != now["command"]:
        raise TrainError(
            f"{folder} holds a run of another kind; continue it with `{resuming_command(folder)}`"
        )
    _check_equal(before, now, before.keys() | now.keys(), folder)


def _check_equal(
    before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str], folder: Path
) -> None:
    """Raise `TrainError` for the first of these settings whose stored value is not the one now."""
    for name in sorted(names):
        if before.get(name) != now.get(name):
            difference = f"{name} = {before.get(name)!r}, not {now.get(name)!r}"
            raise TrainError(
                f"{folder} was trained with {difference}; to resume, use the same value"
            )


def _logged_step(line: str) -> int:
    """The number of steps in a line of the log; 0 if the line is not whole."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else 0


def _completed(stored: dict[str, Any], kind: type) -> dict[str, Any]:
    """Stored settings, with the defaults of fields that did not exist when they were stored."""
    defaults = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults | stored


def _all_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A stored `TrainConfig`, with the defaults of fields that did not exist when it was stored."""
    config = _completed(config, TrainConfig)
    for name, kind in (("model", SparseConfig), ("data", DataConfig)):
        if isinstance(config.get(name), dict):
            config[name] = _completed(config[name], kind)
    return config


def _check_same(before: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Raise `TrainError` if a run's stored configuration differs from the one to resume it with.

    The message names the first field that differs.
    """
    before = _all_fields(before)
    # `before` was read from JSON, in which tuples become lists.
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if isinstance(before.get("model"), dict):
        before = before | {"model": {"norm_eps": None} | before["model"]}  # added later
    _check_equal(before, now, (before.keys() | now.keys()) - _FREE, folder)
