"""What a run leaves: the models of some of its steps, the trained model, and its record."""

import dataclasses
import platform
from importlib.metadata import version
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_sparse.checkpoints import CORPUS_SAMPLE, StepRecord, save_model
from tl_sparse.data import Corpus
from tl_sparse.files import printable_name, write_json, write_tensors
from tl_sparse.training.measures import evaluate_loss
from tl_sparse.training.monitor import LOG_STEPS
from tl_sparse.training.runs import RECORD_FILE, Run
from tl_sparse.training.tokens import corpus_sample, tokens_per_step
from tl_sparse.training.trainer import Trainer


def keep_step(run: Run, trainer: Trainer, corpus: Corpus, losses: Float[Tensor, " step"]) -> None:
    """Keep the model as it is after these steps, with its record."""
    config = trainer.config
    trainer.anneal_topks()
    record = StepRecord(
        step=len(losses),
        training_loss=float(losses[-LOG_STEPS:].mean()),
        validation_loss=evaluate_loss(trainer.model, corpus.validation, config.batch_size),
        nonzero_weights=trainer.sparsity.l0(),
        weights=trainer.n_weights,
    )
    weights = trainer.whole_weights()
    if trainer.processes.main:
        run.step_models.save(trainer, weights, corpus, record)


def record_of_training(
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
        "weights": trainer.n_weights,
        "device": str(next(model.parameters()).device),
        "processes": trainer.processes.count,
        "sharded": trainer.processes.sharded,
        "versions": versions,
        "seconds": seconds,
        "tokens_per_second": (len(losses) - first) * step_tokens / seconds["training"],
        **trainer.objective.record(corpus.validation, config.batch_size),
    }


def save_trained(run: Run, trainer: Trainer, corpus: Corpus, record: dict[str, Any]) -> None:
    """Write the model, a sample of its training tokens and its record, and end the run."""
    model: Any = trainer.model
    weights = trainer.whole_weights()
    if not trainer.processes.main:
        return
    # A run that was killed at this point, and resumed, has saved a model before.
    save_model(run.folder, weights, model.sparse_cfg, model.tokenizer, overwrite=True)
    trainer.objective.save(run.folder, record)
    write_tensors(run.folder / CORPUS_SAMPLE, corpus_sample(corpus, run.config.seed))
    write_json(run.folder / RECORD_FILE, record)
    model.cfg.model_name = printable_name(run.folder)
    model.folder = run.folder.resolve()
    run.finish()
