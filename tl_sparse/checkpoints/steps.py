"""The models that a training run keeps of its steps, each called RUN@STEP, such as "run@100".

They are in the folder `steps` of the run. Each is a folder of its own in our format, with the
tokenizer, the sample of the run's corpus and `step.json`, so that it can also be opened alone,
moved and uploaded.
"""

import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tl_sparse.errors import CheckpointError, DataError
from tl_sparse.files import printable_name, read_json, write_json
from tl_sparse.records import record_from

#: The folder with the steps, in the folder of the run.
STEPS_FOLDER = "steps"
#: The record of a step, in its folder.
_STEP_FILE = "step.json"
_STEP_NAME = re.compile(r"step-(\d{8,10})", re.ASCII)
#: A message names all steps of a run if there are at most this many, and the nearest ones of more.
_NAMED_STEPS = 60
_NEAREST_STEPS = 10


@dataclass(frozen=True)
class StepRecord:
    """What is known of a run after one of its steps.

    Attributes:
        step: the number of steps taken.
        training_loss: the mean loss of the last steps, at most twenty, in nats per token.
        validation_loss: the loss on held-out text, in nats per token.
        nonzero_weights: the number of nonzero weights in all matrices, the L0.
        weights: the number of all their weights.
    """

    step: int
    training_loss: float
    validation_loss: float
    nonzero_weights: int
    weights: int

    @property
    def nonzero_fraction(self) -> float:
        """The share of the weights that is nonzero; NaN if a damaged record has no weights."""
        return self.nonzero_weights / self.weights if self.weights else math.nan


def step_path(run: Path, step: int) -> Path:
    """Where the model of a step is kept, or would be, in the folder of its run."""
    return run / STEPS_FOLDER / f"step-{step:08}"


def kept_steps(run: str | Path) -> list[int]:
    """The steps whose models a run keeps, in rising order; none if it keeps none.

    Args:
        run: the folder of the run, which need not be finished.
    """
    steps = []
    for path in Path(run, STEPS_FOLDER).glob("step-*"):
        name = _STEP_NAME.fullmatch(path.name)
        if name is not None and path == step_path(Path(run), int(name[1])) and path.is_dir():
            steps.append(int(name[1]))
    return sorted(steps)


def step_folder(run: str | Path, step: int) -> Path:
    """The folder with the model of a step.

    Raises:
        CheckpointError: if the run does not keep it; the message lists the steps that it keeps.
    """
    path = step_path(Path(run), step)
    steps = kept_steps(run)
    if not steps:
        raise CheckpointError(
            f"{run} keeps no models of its steps; `tl-sparse train --keep-checkpoints log` keeps "
            "some of each training"
        )
    if step not in steps:
        raise CheckpointError(
            f"{run} keeps no model of step {step}; it keeps {_listed(steps, step)}"
        )
    return path


def _listed(steps: list[int], wanted: int) -> str:
    """The steps that a run keeps, or those of them that are nearest to a wanted one."""
    if len(steps) <= _NAMED_STEPS:
        return f"steps {', '.join(map(str, steps))}"
    by_distance = sorted(steps, key=lambda step: abs(step - wanted))
    nearest = sorted(by_distance[:_NEAREST_STEPS])
    return f"{len(steps):,} others, of which the nearest are {', '.join(map(str, nearest))}"


def folder_of_step(source: str | Path) -> Path | None:
    """The folder with the model of a source RUN@STEP; None if it has another form.

    Raises:
        CheckpointError: if RUN is a folder, but does not keep this step.
    """
    run, _, step = str(source).rpartition("@")
    is_step = step.isdecimal() and step.isascii() and len(step) <= 10
    if not is_step or not os.path.isdir(run):
        return None
    return step_folder(run, int(step))


def name_of_model(folder: Path) -> str:
    """The name of a model in a folder: RUN@STEP for a step of a run, else that of the folder."""
    folder = folder.resolve()
    name = _STEP_NAME.fullmatch(folder.name)
    if name is None or folder.parent.name != STEPS_FOLDER:
        return printable_name(folder)
    return f"{printable_name(folder.parents[1])}@{int(name[1])}"


def write_step_record(folder: Path, record: StepRecord) -> None:
    """Write the record of a step into its folder."""
    write_json(folder / _STEP_FILE, asdict(record))


def read_step_record(folder: Path) -> StepRecord:
    """The record of a step, from its folder.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = folder / _STEP_FILE
    try:
        return record_from(StepRecord, read_json(path))
    except DataError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
