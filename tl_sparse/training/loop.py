"""A whole training run, from text to a saved folder."""

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
from tl_sparse.files import check_new_folder, write_json, write_tensors
from tl_sparse.hooks import TLModel
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
    """Train a model from text to a saved folder.

    While it trains, `out` holds `log.jsonl` (a line with the mean loss of every 20 steps),
    `checkpoints/`, and `data/`: the tokens, which are read from there and not again from the text
    when the run is resumed. Ctrl-C and SIGTERM write a checkpoint and stop; so do a loss that is
    not a number, and one that jumps.

    Under `accelerate launch` all processes train one model, each on its part of every batch. They
    stop together; only the main one writes, and shows the bar. All read `out` to resume.

    Args:
        config: architecture, data and hyper-parameters; `d_vocab` is also the size of the
            tokenizer, which is trained on the same text.
        out: folder for the model, its tokenizer, `training.json` (the record) and a sample of the
            training tokens, from which the pruner takes means; None saves nothing.
        device: None is the GPU if there is one, else the CPU; of several processes each takes its
            own GPU.
        progress: show a bar with loss, L0 and tokens per second.
        resume: go on with the unfinished run in `out`; on the same device what follows is what
            would have followed without the interruption, bit for bit.

    Returns:
        The model, in eval mode, and the record of how it was made.

    Raises:
        ConfigError, DataError, TokenizerError: before anything is trained or written.
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
            f"there is no unfinished run in {folder}; a run that ended has a training.json instead"
        )
    if folder is not None and not resume:
        check_new_folder(folder)


def _open(
    config: TrainConfig, folder: Path | None, resume: bool, processes: Processes
) -> tuple[Run | None, Corpus]:
    """The run in `folder`, if there is one, and the text as tokens."""
    required = _candidates()
    # The main process packs the text; then the others read it, as one reads it to resume.
    with processes.main_first():
        if folder is None:
            run = None
            corpus = packed_for(config, required)
        else:
            run = Run(folder, config, resume or not processes.main)
            corpus = run.corpus(required)
    n_rows = len(corpus.train)
    # A text of fewer sequences than a batch is one batch, which all processes must share equally.
    is_possible = n_rows >= config.batch_size or n_rows % processes.count == 0
    expected = f"at most {n_rows}, the sequences of this text"
    check(is_possible, "batch_size", config.batch_size, expected)
    return run, corpus


def _candidates() -> list[str]:
    """The answers that the tasks choose between; each must be one token of the tokenizer."""
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
    """Take the steps that remain: all, or those after the last checkpoint.

    Returns:
        The losses of all steps of the run, and the number of the first step that was taken here.
    """
    processes = trainer.processes
    processes.start_tracker(trainer.config)
    losses = torch.zeros(trainer.config.steps)
    if run is not None and resume:
        _restore(trainer, losses, run)
    first = trainer.steps_done
    if not processes.main:  # only the main process writes, and shows the bar
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
    """Put the trainer, the losses and the log into the state of the last checkpoint."""
    state, past_losses = run.restore()
    done = len(past_losses)
    trainer.load_state(state, steps_done=done)
    losses[:done] = past_losses
    if trainer.processes.main:
        run.cut_log(done)


def _loop(trainer: Trainer, corpus: Corpus, run: Run | None, monitor: Monitor) -> None:
    """Step until the last step, the target loss, or a reason to stop."""
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
    """Raise `TrainError`, once all processes are here."""
    # A process that ends takes the others with it, even one that writes.
    trainer.processes.wait()
    message = f"training ended after step {trainer.steps_done} of {trainer.config.steps}: {reason}"
    if run is not None:
        message += f"; its state is in {run.folder}, and resume goes on"
    raise TrainError(message)


def _record(
    trainer: Trainer,
    corpus: Corpus,
    losses: Float[Tensor, " step"],
    first: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """How a model was made, and how good it is: what training.json holds."""
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
    """Write the model, a sample of its text and its record; end the run."""
    model.save_pretrained(run.folder)
    sample = next(batches(corpus.train, CORPUS_ROWS, run.config.seed))
    write_tensors(run.folder / CORPUS_SAMPLE, {"tokens": sample.int()})
    write_json(run.folder / "training.json", record)
    model.cfg.model_name = run.folder.resolve().name
    run.finish()
