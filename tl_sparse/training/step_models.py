"""The models that a run keeps of its steps, to be looked at: weights alone, without what only
resuming needs.
"""

import math
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tl_sparse.checkpoints import (
    CORPUS_SAMPLE,
    STEPS_FOLDER,
    StepRecord,
    resuming_command,
    save_model,
    step_path,
    write_step_record,
)
from tl_sparse.data import Corpus
from tl_sparse.errors import CheckpointError, TrainError
from tl_sparse.files import write_tensors
from tl_sparse.outputs import UNFINISHED_FOLDER, remove_unfinished
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.tokens import corpus_sample
from tl_sparse.training.trainer import Trainer


def is_step_to_keep(config: TrainConfig, done: int) -> bool:
    """Whether the model after `done` steps is kept; the last one is, when training ends."""
    if done >= config.steps:
        return False
    if config.keep_checkpoints == "log":
        return is_log_spaced(done)
    if config.keep_checkpoints == "all":
        return done % config.checkpoint_steps == 0
    return False


def is_log_spaced(step: int) -> bool:
    """Whether a step is one of about ten in each factor of ten: a rounded power of 10^(1/10).

    These are 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 79, 100, 126, …
    """
    power = round(10 * math.log10(step))
    return step == round(10 ** (power / 10))


class StepModels:
    """The models of steps in the folder of a run; see `tl_sparse.checkpoints.find`.

    Args:
        run: the folder of the run.
        config: its configuration.
    """

    def __init__(self, run: Path, config: TrainConfig) -> None:
        self.run = run
        self.config = config

    def save(
        self, trainer: Trainer, weights: Mapping[str, Tensor], corpus: Corpus, record: StepRecord
    ) -> None:
        """Write the model as it is now: all files of its folder, or none.

        A run that is resumed comes to some steps again, and writes the same models.

        Raises:
            TrainError: if they cannot be written.
        """
        path = step_path(self.run, record.step)
        written = path.with_name(UNFINISHED_FOLDER + uuid.uuid4().hex)
        try:
            model = trainer.model
            save_model(written, weights, trainer.architecture(), model.tokenizer)
            write_tensors(written / CORPUS_SAMPLE, corpus_sample(corpus, self.config.seed))
            write_step_record(written, record)
            shutil.rmtree(path, ignore_errors=True)
            written.rename(path)
        except (CheckpointError, OSError) as error:
            raise TrainError(
                f"cannot keep the model of step {record.step}: {error}; "
                f"`{resuming_command(self.run)}` continues from the last checkpoint"
            ) from error
        finally:
            shutil.rmtree(written, ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Remove what a process that was killed left unfinished."""
        remove_unfinished(self.run / STEPS_FOLDER)
