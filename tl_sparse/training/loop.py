"""A whole training run, from text to a saved folder."""

import dataclasses
import math
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.checkpoints import CORPUS_ROWS, CORPUS_SAMPLE, create, resolve_device
from tl_sparse.config import check
from tl_sparse.data import Corpus
from tl_sparse.errors import TrainError
from tl_sparse.files import check_new_folder, write_json, write_tensors
from tl_sparse.hooks import TLModel, hooked
from tl_sparse.tasks import TASKS
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.processes import Processes
from tl_sparse.training.runs import Run, noticing_signals, packed_for
from tl_sparse.training.trainer import Trainer

#: A line of the log, and a look at the bar, every so many steps; the share of dead neurons in every
#: fifth of them.
LOG_STEPS = 20


def batches(
    tokens: Int[Tensor, "seq pos"], batch_size: int, seed: int, start: int = 0
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Endless batches from number `start`, every row once per epoch, in an order that depends on
    the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(len(tokens), generator=generator) for _ in count())
    chosen = (
        rows
        for order in epochs
        for rows in order.split(batch_size)
        if len(rows) == min(batch_size, len(tokens))
    )
    for rows in islice(chosen, start, None):
        yield tokens[rows].long()


@torch.no_grad()
def evaluate_loss(model: TLModel, tokens: Int[Tensor, "seq pos"], batch_size: int) -> float:
    """Mean next-token loss over the rows of `tokens`, in nats per token."""
    device = next(model.parameters()).device
    losses = [
        model(rows.long().to(device), return_type="loss") * len(rows)
        for rows in tokens.split(batch_size)
    ]
    return float(torch.stack(losses).sum() / len(tokens))


@torch.no_grad()
def dead_neurons(model: TLModel, tokens: Int[Tensor, "seq pos"]) -> float:
    """The share of MLP neurons that are zero, after AbsTopK, at every one of the tokens."""
    used: dict[str, Tensor] = {}

    def record(post: Tensor, hook: Any) -> None:
        used[hook.name] = post.detach().ne(0).flatten(0, 1).any(0)

    with hooked(model, {f"blocks.{i}.mlp.hook_post": record for i in range(model.cfg.n_layers)}):
        model(tokens.long().to(next(model.parameters()).device), return_type=None)
    return 1 - float(torch.cat(list(used.values())).float().mean())


@torch.no_grad()
def start_bigram_from_counts(
    model: TLModel, tokens: Int[Tensor, "seq pos"], prior: float = 10.0
) -> None:
    """Set the bigram table to log p(next | current) over `tokens`, smoothed by `prior` counts of
    the unigram.
    """
    table = model.network.bigram.W_bigram
    d_vocab = len(table)
    counts = torch.zeros(d_vocab**2, dtype=torch.long)
    for rows in tokens.split(4096):
        pairs = rows[:, :-1].long() * d_vocab + rows[:, 1:].long()
        counts += torch.bincount(pairs.flatten(), minlength=d_vocab**2)
    counts = counts.view(d_vocab, d_vocab).double()
    unigram = counts.sum(0) + 1
    smoothed = counts + prior * unigram / unigram.sum()
    table.copy_((smoothed / smoothed.sum(1, keepdim=True)).log())


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
    if resume and (out is None or not (Path(out) / "run.json").is_file()):
        raise TrainError(
            f"there is no unfinished run in {out}; a run that ended has a training.json instead"
        )
    if out is not None and not resume:
        check_new_folder(out)
    processes = Processes.launched(config, out, resolve_device(device))
    started, device = time.perf_counter(), processes.device
    required = sorted({candidate for task in TASKS.values() for candidate in task.candidates or ()})
    with processes.main_first():  # the others read what it has packed
        run = None if out is None else Run(Path(out), config, resume or not processes.main)
        corpus = packed_for(config, required) if run is None else run.corpus(required)
    rows = corpus.train
    divisible = len(rows) >= config.batch_size or len(rows) % processes.count == 0
    check(
        divisible,
        "batch_size",
        config.batch_size,
        f"at most {len(rows)}, the sequences of this text",
    )
    prepared = time.perf_counter()

    model = create(config.model, config.seed, corpus.tokenizer, device)
    if config.model.bigram_table and config.bigram_from_counts:
        start_bigram_from_counts(model, rows)
    trainer = Trainer(model.train(), config, processes)
    processes.start_tracker(config)
    losses = torch.zeros(config.steps)
    if run is not None and resume:
        past = run.restore(trainer)
        losses[: len(past)] = past
        if processes.main:
            run.cut_log(len(past))
    run, first = run if processes.main else None, trainer.sparsity.steps
    try:
        _steps(trainer, losses, corpus, run, progress and processes.main)
    finally:
        processes.end_tracker()
    model.eval()
    trained = time.perf_counter()

    done, seconds = (
        trainer.sparsity.steps,
        {"data": prepared - started, "training": trained - prepared},
    )
    record = _record(trainer, corpus, losses[:done]) | {
        "seconds": seconds,
        "tokens_per_second": (done - first) * _tokens_per_step(config, rows) / seconds["training"],
    }
    if run is not None:
        model.save_pretrained(run.folder)
        write_tensors(
            run.folder / CORPUS_SAMPLE,
            {"tokens": next(batches(rows, CORPUS_ROWS, config.seed)).int()},
        )
        write_json(run.folder / "training.json", record)
        model.cfg.model_name = run.folder.resolve().name
        run.finish()
    processes.wait()
    return model, record


def _tokens_per_step(config: TrainConfig, rows: Int[Tensor, "seq pos"]) -> int:
    return min(config.batch_size, len(rows)) * config.model.n_ctx


def _record(trainer: Trainer, corpus: Corpus, losses: Float[Tensor, " step"]) -> dict[str, Any]:
    """How a model was made, and how good it is."""
    config, model = trainer.config, trainer.model
    return {
        "config": dataclasses.asdict(config),
        "data": corpus.about["description"],
        "training_tokens_available": corpus.train.numel(),
        "training_tokens_seen": len(losses) * _tokens_per_step(config, corpus.train),
        "training_loss": float(losses[-50:].mean()),
        "validation_loss": evaluate_loss(model, corpus.validation, config.batch_size),
        "nonzero_weights": trainer.sparsity.l0(),
        "weights": sum(p.numel() for p in trainer.matrices),
        "device": str(next(model.parameters()).device),
        "processes": trainer.processes.count,
        "versions": {
            name: version(name) for name in ("tl-sparse", "transformer-lens", "torch", "tokenizers")
        }
        | {"python": platform.python_version()},
    }


def _steps(
    trainer: Trainer,
    losses: Float[Tensor, " step"],
    corpus: Corpus,
    run: Run | None,
    progress: bool,
) -> None:
    """The steps that are left, until the target is reached; `losses` is filled in."""
    config, first, processes = trainer.config, trainer.sparsity.steps, trainer.processes
    device, validation = next(trainer.model.parameters()).device, corpus.validation
    stream, dead = batches(corpus.train, config.batch_size, config.seed, first), math.nan
    bar = tqdm(
        range(first, config.steps),
        "training",
        config.steps,
        initial=first,
        disable=not progress,
        unit="step",
    )
    with noticing_signals() as processes.received:
        for step, tokens in zip(bar, stream, strict=False):
            losses[step] = loss = float(trainer.step(processes.part(tokens).to(device)))
            usual = float(losses[max(0, step - 100) : step].mean()) if step else loss
            stop, done = "", trainer.sparsity.steps
            if not loss - usual < config.max_jump:  # also if it is not a number
                stop = f"the loss went from {usual:.3f} to {loss:.3f}; a smaller lr than {config.lr} may help"
            elif processes.stop:
                stop = f"stopped by {processes.stop.name}"
            if run is not None and done < config.steps and (stop or run.is_due(done)):
                run.save(trainer, losses[:done])
            if stop and done < config.steps:
                # a process that ends takes the others with it, even one that writes
                processes.wait()
                where = (
                    f"; its state is in {run.folder}, and resume goes on" if run is not None else ""
                )
                raise TrainError(
                    f"training ended after step {done} of {config.steps}: {stop}{where}"
                )
            if done % LOG_STEPS == 0 or done == config.steps:
                recent = float(losses[max(0, done - LOG_STEPS) : done].mean())
                kept = trainer.sparsity.fraction_at(step)
                measured = {"step": done, "loss": recent, "lr": trainer.lr(step), "l0": kept}
                if done % (5 * LOG_STEPS) == 0 or done == config.steps:
                    measured["dead_neurons"] = dead = dead_neurons(
                        trainer.model, validation[: config.batch_size]
                    )
                if config.validate_steps and done % config.validate_steps < LOG_STEPS:
                    agreed = torch.tensor(
                        evaluate_loss(trainer.model, validation, config.batch_size), device=device
                    )
                    measured["validation_loss"] = float(processes.average(agreed))
                if run is not None:
                    run.write_log(**measured)
                processes.track(done, measured)
                rate = (done - first) * tokens.numel() / (bar.format_dict["elapsed"] or 1e-9)
                shown = "" if math.isnan(dead) else f", {dead:.0%} of neurons dead"
                bar.set_postfix_str(
                    f"loss {recent:.3f}, L0 {kept:.1%}{shown}, {rate:,.0f} tokens/s"
                )
                if measured.get("validation_loss", math.inf) <= config.target_validation_loss:
                    return
