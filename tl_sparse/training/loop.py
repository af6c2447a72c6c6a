"""A whole training run, from the text to a saved model."""

import dataclasses
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.checkpoints import CORPUS_ROWS, CORPUS_SAMPLE, create, resolve_device
from tl_sparse.config import check
from tl_sparse.data import Corpus
from tl_sparse.errors import TrainError
from tl_sparse.files import printable_name, write_json, write_tensors
from tl_sparse.hooks import TLModel
from tl_sparse.outputs import check_new_folder
from tl_sparse.tasks import TASKS
from tl_sparse.training.bigram import start_bigram_from_counts
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.measures import evaluate_loss
from tl_sparse.training.monitor import Monitor
from tl_sparse.training.processes import Processes
from tl_sparse.training.runs import Run
from tl_sparse.training.signals import noticing_signals
from tl_sparse.training.tokens import batches, packed_for, tokens_per_step
from tl_sparse.training.trainer import Trainer


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    resume: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Train a model on text, and save it in a folder.

    During training, `out` holds `log.jsonl` (one line for every 20 steps, with their mean loss),
    `checkpoints/`, and `data/` with the tokens, so that a resumed run need not read the text again.
    On Ctrl-C or SIGTERM, or if the loss is not a number or jumps, a checkpoint is written and
    training stops.

    Under `accelerate launch` all processes train one model, each of them on its part of every
    batch. They stop together. Only the main process writes files and shows the progress bar, but
    every process must be able to read `out` in order to resume.

    Args:
        config: the architecture, data and hyper-parameters. `d_vocab` is also the size of the
            tokenizer, which is trained on the same text.
        out: a folder for the model, its tokenizer, `training.json` (the record) and a sample of the
            training tokens, over which the pruner takes mean activations; None saves nothing.
        device: the device; None is the GPU if there is one, else the CPU. Of several processes,
            each takes its own GPU.
        progress: whether to show a progress bar with loss, L0 and tokens per second.
        resume: whether to continue the unfinished run in `out`. On the same device the result is
            bit for bit that of a run without the interruption.

    Returns:
        The model, in eval mode, and the record of its training.

    Raises:
        ConfigError, DataError, TokenizerError: if the configuration or the text cannot be used;
            these are raised before anything is trained or written.
        TrainError: if training stops early, or there is nothing to resume.
    """
    folder = None if out is None else Path(out)
    _check_folder(folder, resume)
    processes = Processes.launched(config, folder, resolve_device(device))
    started = time.perf_counter()
    run, corpus = _open(config, folder, resume, processes)
    prepared = time.perf_counter()
    trainer = _new_trainer(config, corpus, processes)
    losses, first = _take_steps(trainer, corpus, run, resume, progress)
    trained = time.perf_counter()
    seconds = {"data": prepared - started, "training": trained - prepared}
    record = _record(trainer, corpus, losses, first, seconds)
    if run is not None and processes.main:
        _save(run, trainer.model, corpus, record)
    processes.wait()
    return trainer.model, record


def _check_folder(folder: Path | None, resume: bool) -> None:
    if resume and (folder is None or not Run.is_unfinished(folder)):
        raise TrainError(
            f"there is no unfinished run in {folder}; a finished run has a training.json instead"
        )
    if folder is not None and not resume:
        check_new_folder(folder)


def _open(
    config: TrainConfig, folder: Path | None, resume: bool, processes: Processes
) -> tuple[Run | None, Corpus]:
    """The run in `folder`, or None without a folder, and the text as tokens."""
    required = _candidates()
    # The main process packs the text, and the others then read the packed tokens as a resumed run
    # does.
    with processes.main_first():
        if folder is None:
            run = None
            corpus = packed_for(config, required)
        else:
            run = Run(folder, config, resume or not processes.main)
            corpus = run.corpus(required)
    n_rows = len(corpus.train)
    # A text with fewer sequences than a batch is a single batch, which must be divisible among the
    # processes.
    is_possible = n_rows >= config.batch_size or n_rows % processes.count == 0
    expected = f"at most {n_rows}, the number of sequences in this text"
    check(is_possible, "batch_size", config.batch_size, expected)
    return run, corpus


def _candidates() -> list[str]:
    """The answers of the tasks, each of which must be a single token of the tokenizer."""
    candidates: set[str] = set()
    for task in TASKS.values():
        candidates.update(task.candidates or ())
    return sorted(candidates)


def _new_trainer(config: TrainConfig, corpus: Corpus, processes: Processes) -> Trainer:
    """The trainer of a new model, before its first step."""
    model = create(config.model, config.seed, corpus.tokenizer, processes.device)
    if config.model.bigram_table and config.bigram_from_counts:
        start_bigram_from_counts(model, corpus.train)
    return Trainer(model.train(), config, processes)


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
    if not processes.main:  # only the main process writes files and shows the bar
        run = None
        progress = False
    monitor = Monitor(trainer, losses, corpus, run, progress)
    try:
        _loop(trainer, corpus, run, monitor)
    finally:
        processes.end_tracker()
    trainer.model.eval()
    return losses[: trainer.steps_done], first


def _restore(trainer: Trainer, losses: Float[Tensor, " step"], run: Run) -> None:
    """Restore the trainer, the losses and the log to the last checkpoint."""
    state, past_losses = run.restore()
    done = len(past_losses)
    trainer.load_state(state, steps_done=done)
    losses[:done] = past_losses
    if trainer.processes.main:
        run.cut_log(done)


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
            if done < config.steps:
                reason = monitor.reason_to_stop(step)
                if run is not None and (reason or run.is_due(done)):
                    run.save(trainer.state(), monitor.losses[:done])
                if reason:
                    _stop(trainer, run, reason)
            if monitor.is_due(done):
                measured = monitor.log(done)
                validation_loss = measured.get("validation_loss", math.inf)
                if validation_loss <= config.target_validation_loss:
                    return


def _stop(trainer: Trainer, run: Run | None, reason: str) -> NoReturn:
    """Raise `TrainError` in all processes, once they have all arrived here."""
    # A process that exits ends the others, and the main process may still be writing.
    trainer.processes.wait()
    message = f"training ended after step {trainer.steps_done} of {trainer.config.steps}: {reason}"
    if run is not None:
        message += f"; its state is saved in {run.folder}, from which resume continues"
    raise TrainError(message)


def _record(
    trainer: Trainer,
    corpus: Corpus,
    losses: Float[Tensor, " step"],
    first: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The contents of training.json: how the model was trained, and how good it is."""
    config = trainer.config
    model = trainer.model
    step_tokens = tokens_per_step(config, corpus.train)
    versions = {
        name: version(name) for name in ("tl-sparse", "transformer-lens", "torch", "tokenizers")
    }
    versions["python"] = platform.python_version()
    return {
        "config": dataclasses.asdict(config),
        "data": corpus.about["description"],
        "training_tokens_available": corpus.train.numel(),
        "training_tokens_seen": len(losses) * step_tokens,
        "training_loss": float(losses[-50:].mean()),
        "validation_loss": evaluate_loss(model, corpus.validation, config.batch_size),
        "nonzero_weights": trainer.sparsity.l0(),
        "weights": sum(p.numel() for p in trainer.matrices),
        "device": str(next(model.parameters()).device),
        "processes": trainer.processes.count,
        "versions": versions,
        "seconds": seconds,
        "tokens_per_second": (len(losses) - first) * step_tokens / seconds["training"],
    }


def _save(run: Run, model: TLModel, corpus: Corpus, record: dict[str, Any]) -> None:
    """Write the model, a sample of its training tokens and its record, and end the run."""
    # A run that was killed at this point, and resumed, has saved a model before.
    model.save_pretrained(run.folder, overwrite=True)
    sample = next(batches(corpus.train, CORPUS_ROWS, run.config.seed))
    write_tensors(run.folder / CORPUS_SAMPLE, {"tokens": sample.int()})
    write_json(run.folder / "training.json", record)
    model.cfg.model_name = printable_name(run.folder)
    run.finish()
