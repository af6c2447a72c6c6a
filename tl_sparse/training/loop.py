"""A whole training run, from the text to a saved model."""

import math
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.checkpoints import create, load, resolve_device
from tl_sparse.config import as_config, check
from tl_sparse.data import Corpus, DataConfig
from tl_sparse.errors import CheckpointError, TrainError
from tl_sparse.files import read_json
from tl_sparse.tasks import TASKS
from tl_sparse.training.bigram import start_bigram_from_counts
from tl_sparse.training.checkpoint_files import Checkpoint, read_checkpoint
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.memory import check_training_fits
from tl_sparse.training.monitor import Monitor, Stop
from tl_sparse.training.objective import Objective
from tl_sparse.training.processes import Processes
from tl_sparse.training.records import keep_step, record_of_training, save_trained
from tl_sparse.training.runs import (
    RECORD_FILE,
    Run,
    check_run_folder,
    config_of_run,
    run_folder,
    to_continue,
)
from tl_sparse.training.signals import noticing_signals
from tl_sparse.training.step_models import is_step_to_keep
from tl_sparse.training.tokens import batches, packed_for
from tl_sparse.training.trainer import Trainer


def train(
    config: TrainConfig | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    resume: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Train a model on text, and save it in a folder.

    During training, `out` holds `log.jsonl` (one line for every 20 steps, with their mean loss),
    `checkpoints/`, and `data/` with the tokens, so that a resumed run need not read the text again;
    with `config.keep_checkpoints`, also the models of some steps, which stay.
    On Ctrl-C or SIGTERM, or if the loss is not a number or jumps, a checkpoint is written and
    training stops. A lock keeps other processes from training in `out` at the same time.

    Under `accelerate launch` all processes train one model, each of them on its part of every
    batch. They stop together. Only the main process writes files and shows the progress bar, but
    every process must be able to read `out` in order to resume.

    With `accelerate launch --use_fsdp --fsdp_version 2` they also share the memory: each holds a
    part of every weight, of its gradient and of its moments, and the weights of one block at a time
    are made whole (FSDP2 of torch). The weights that are kept nonzero are exactly those that one
    process would keep. All processes write the checkpoints, so `out` must be a folder that they
    share, and any number of processes can go on from them. The saved model is an ordinary one.

    Args:
        config: the architecture, data and hyper-parameters, or a mapping of those that differ from
            the defaults. `d_vocab` is also the size of the tokenizer, which is trained on the same
            text. None means the defaults or, to resume a run, the configuration of that run.
        out: a folder for the model, its tokenizer, `training.json` (the record) and a sample of the
            training tokens, over which the pruner takes mean activations; None saves nothing.
        device: the device; None is the GPU if there is one, else the CPU. Of several processes,
            each takes its own GPU.
        progress: whether to show a progress bar with loss, L0 and tokens per second.
        resume: whether to continue the unfinished run in `out`, from its last checkpoint, or from
            the beginning if it has none yet. On the same device the result is bit for bit that of a
            run without the interruption, however it was interrupted. A damaged checkpoint is passed
            over with a warning, and packed text that has changed is packed again.

    Returns:
        The model, in eval mode, and the record of its training. A model whose weights are sharded
        stays so, and runs only in all processes together; `load` opens the saved one.

    Raises:
        ConfigError, DataError, TokenizerError: if the configuration or the text cannot be used;
            these are raised before anything is trained, and leave nothing in `out`. ConfigError
            also if the weights are to be sharded, and an option of `accelerate launch`, the version
            of accelerate or of torch, or `config.compile` does not go with that.
        DeviceMemoryError: if the GPU has too little free memory; this leaves nothing in `out`.
        TrainError: if training stops early, there is nothing to resume, `out` holds a run to be
            resumed, another process trains there, or a file cannot be written.
    """
    return train_towards(Objective(), config, out, device, progress, resume)


def train_towards(
    objective: Objective,
    config: TrainConfig | Mapping[str, Any] | None,
    out: str | Path | None,
    device: str | torch.device | None,
    progress: bool,
    resume: bool,
) -> tuple[Any, dict[str, Any]]:
    """`train` with another objective than the next-token loss; the rest is as for `train`."""
    folder = _as_folder(out)
    if folder is None and resume:
        raise TrainError("resume needs the folder of a run, out")
    if config is None:
        config = TrainConfig()
        if folder is not None and resume:
            config = config_of_run(folder)
    config = as_config(config, TrainConfig)
    if folder is not None:
        check_run_folder(folder, resume)
    processes = Processes.launched(config, objective, folder, resolve_device(device))
    with ExitStack() as stack:
        # A notebook may have switched gradients off, as `torch.set_grad_enabled(False)` does.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if folder is not None and processes.main:
            stack.enter_context(run_folder(folder, resume))
        if folder is not None and (folder / RECORD_FILE).is_file():
            return _saved(Run(folder, config, objective), processes)
        return _train(objective, config, folder, resume, progress, processes)


def _as_folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    is_path = isinstance(out, str | PathLike) and "\0" not in str(out)
    check(is_path, "out", out, "the path of a folder, or None")
    return Path(out)


def _train(
    objective: Objective,
    config: TrainConfig,
    folder: Path | None,
    resume: bool,
    progress: bool,
    processes: Processes,
) -> tuple[Any, dict[str, Any]]:
    """Do the work of `train`, in a folder that no other run works in."""
    started = time.perf_counter()
    run, corpus, trainer = _open(objective, config, folder, resume, processes)
    prepared = time.perf_counter()
    losses, first = _take_steps(trainer, corpus, run, resume, progress)
    trained = time.perf_counter()
    seconds = {"data": prepared - started, "training": trained - prepared}
    record = record_of_training(trainer, corpus, losses, first, seconds)
    if not math.isfinite(record["validation_loss"]):
        raise TrainError(
            f"the validation loss of the trained model is {record['validation_loss']}; train into "
            f"a new folder, with a smaller lr than {config.lr}"
        )
    if run is not None and (processes.main or processes.sharded):
        if config.keeps_steps:
            keep_step(run, trainer, corpus, losses)
        save_trained(run, trainer, corpus, record)
    processes.wait()
    return trainer.model, record


def _saved(run: Run, processes: Processes) -> tuple[Any, dict[str, Any]]:
    """The model and the record of a run that was killed after it had saved both."""
    run.reopen()
    model = load(run.folder, device=processes.device)
    record = read_json(run.folder / RECORD_FILE)
    processes.wait()
    if processes.main:
        run.finish()
    return model, record


def _open(
    objective: Objective,
    config: TrainConfig,
    folder: Path | None,
    resume: bool,
    processes: Processes,
) -> tuple[Run | None, Corpus, Trainer]:
    """The run in `folder`, or None without a folder; the text as tokens; and the trainer.

    A new run that cannot begin leaves no files.
    """
    run = None if folder is None else Run(folder, config, objective)
    is_new = processes.main and not resume
    try:
        check_training_fits(
            config, processes.count, processes.sharded, resolve_device(processes.device)
        )
        corpus = _tokens(objective, config, run, is_new, processes)
        trainer = _new_trainer(objective, config, corpus, processes)
    except BaseException:
        if run is not None and is_new:
            run.finish()
        raise
    return run, corpus, trainer


def _tokens(
    objective: Objective,
    config: TrainConfig,
    run: Run | None,
    is_new: bool,
    processes: Processes,
) -> Corpus:
    """The text as tokens, packed in the folder of the run if there is one."""
    required = _candidates(config.data)
    # The main process packs the text, and the others then read the packed tokens as a resumed run
    # does.
    with processes.main_first():
        if run is None:
            corpus = packed_for(config, required, tokenizer=objective.tokenizer)
        else:
            if is_new:
                run.write_settings()
            else:
                run.reopen()
            if processes.main:
                run.remove_unfinished()
            corpus = run.corpus(required)
    n_rows = len(corpus.train)
    # A text with fewer sequences than a batch is a single batch, which must be divisible among the
    # processes.
    is_possible = n_rows >= config.batch_size or n_rows % processes.count == 0
    expected = f"at most {n_rows}, the number of sequences in this text"
    check(is_possible, "batch_size", config.batch_size, expected)
    return corpus


def _candidates(data: DataConfig) -> list[str]:
    """The answers of the built-in tasks that must be single tokens of the tokenizer."""
    if data.source != "builtin" and not data.task_answers:
        return []
    candidates: set[str] = set()
    for task in TASKS.values():
        candidates.update(task.candidates or ())
    return sorted(candidates)


def _new_trainer(
    objective: Objective, config: TrainConfig, corpus: Corpus, processes: Processes
) -> Trainer:
    """The trainer of a new model, before its first step."""
    device = processes.device_of_new_model
    model = create(config.model, config.seed, corpus.tokenizer, device)
    if config.model.bigram_table and config.bigram_from_counts:
        start_bigram_from_counts(model, corpus.train)
    return Trainer(model.train(), config, processes, objective)


def _take_steps(
    trainer: Trainer, corpus: Corpus, run: Run | None, resume: bool, progress: bool
) -> tuple[Float[Tensor, " step"], int]:
    """Take all steps, or those after the last checkpoint if the run is resumed.

    Returns:
        The losses of all steps of the run, and the number of the first step that this call took.
    """
    processes = trainer.processes
    processes.start_tracker(trainer.config)
    losses = torch.zeros(trainer.config.steps)
    if run is not None and resume:
        _restore(trainer, losses, run)
    first = trainer.steps_done
    # Only the main process writes the log and shows the bar. Others take part in writing models and
    # checkpoints only if they hold parts of the weights.
    log_of = run if processes.main else None
    monitor = Monitor(trainer, losses, corpus, log_of, show_bar=progress and processes.main)
    if not (processes.main or processes.sharded):
        run = None
    try:
        _loop(trainer, corpus, run, monitor)
    finally:
        processes.end_tracker()
    trainer.model.eval()
    trainer.anneal_topks()
    trainer.model.network.cfg = trainer.architecture()
    return losses[: trainer.steps_done], first


def _restore(trainer: Trainer, losses: Float[Tensor, " step"], run: Run) -> None:
    """Restore the trainer, the losses and the log to the last checkpoint that is not damaged."""
    past_losses = _load_last_checkpoint(trainer, run)
    done = len(past_losses)
    losses[:done] = past_losses
    if trainer.processes.main:
        run.cut_log(done)


def _load_last_checkpoint(trainer: Trainer, run: Run) -> Float[Tensor, " step"]:
    """Load the last checkpoint that is not damaged into the trainer.

    Returns:
        The losses of the steps until then; none if there is no checkpoint yet.

    Raises:
        TrainError: if all checkpoints are damaged.
    """
    damaged = []
    for path in run.checkpoints.latest_first():
        try:
            checkpoint = read_checkpoint(path, trainer.config.steps, trainer.empty_state)
            trainer.load_state(checkpoint.state, steps_done=len(checkpoint.losses))
        except CheckpointError as error:
            damaged.append(f"{path} is damaged ({error})")
            continue
        if damaged:
            _warn(trainer, f"{'; '.join(damaged)}; training goes on from {path.name}")
        return checkpoint.losses
    folder = run.checkpoints.folder
    if damaged:
        raise TrainError(
            f"{'; '.join(damaged)}; there is no earlier checkpoint. Remove {folder} to resume from "
            "the beginning"
        )
    _warn(trainer, f"there is no checkpoint in {folder} yet; training starts from the beginning")
    return torch.zeros(0)


def _warn(trainer: Trainer, message: str) -> None:
    """Warn in the main process only, since all of them find the same."""
    if trainer.processes.main:
        warnings.warn(message, stacklevel=2)


def _loop(trainer: Trainer, corpus: Corpus, run: Run | None, monitor: Monitor) -> None:
    """Take steps until the last step, the target validation loss, or a reason to stop early."""
    config = trainer.config
    processes = trainer.processes
    device = next(trainer.model.parameters()).device
    stream = batches(corpus.train, config.batch_size, config.seed, start=trainer.steps_done)
    with noticing_signals() as processes.received:
        for step, tokens in zip(monitor.bar, stream, strict=False):
            loss = trainer.step(processes.part(tokens).to(device))
            monitor.losses[step] = float(loss)
            done = trainer.steps_done
            stop = monitor.reason_to_stop(step)
            is_taken = done > step  # a step whose loss is not a number is not taken
            # The log and the step's model are written before the checkpoint: a run that is resumed
            # from there goes on after this line.
            if is_taken and monitor.is_due(done):
                validation_loss = monitor.log(done).get("validation_loss", math.inf)
                if validation_loss <= config.target_validation_loss:
                    return
            if run is not None and is_taken and is_step_to_keep(config, done):
                keep_step(run, trainer, corpus, monitor.losses[:done])
            if run is not None and done < config.steps:
                is_due = stop is not None or run.is_due(done)
                if processes.from_main(is_due):  # clocks differ
                    run.save(Checkpoint(trainer.state(), monitor.losses[:done]), processes)
            if stop is not None:
                _stop(trainer, run if processes.main else None, stop)


def _stop(trainer: Trainer, run: Run | None, stop: Stop) -> NoReturn:
    """Raise `TrainError` in all processes, once they have all arrived here."""
    # A process that exits ends the others, and the main process may still be writing.
    trainer.processes.wait()
    steps = f"{trainer.steps_done} of {trainer.config.steps}"
    message = f"training ended after step {steps}: {stop.reason}"
    if run is not None:
        message += f"; its state is saved in {run.folder}{_going_on(stop, run.folder)}"
    raise TrainError(message)


def _going_on(stop: Stop, folder: Path) -> str:
    """How a run that was stopped is continued; it follows the name of its folder."""
    if not stop.can_go_on:
        return ", but resume would come to the same loss; train into a new folder"
    how = f"; {to_continue(folder)}"
    return f"{how} and a larger {stop.larger}" if stop.larger else how
