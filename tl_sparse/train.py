"""Weight-sparse training (Gao et al. 2025, sections 2.1, A.2; the authors' published update rule)."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.checkpoints import create, resolve_device
from tl_sparse.config import SparseConfig, check, check_types, paper_topk
from tl_sparse.data import DataConfig, load_documents, pack_tokens
from tl_sparse.errors import ConfigError, TrainError
from tl_sparse.files import write_json, write_tensors
from tl_sparse.hooks.weights import WeightSparsity, annealed
from tl_sparse.tasks import TASKS
from tl_sparse.tokenizer import train_tokenizer

#: Rows of training tokens stored with a model, enough for stable means wherever it is pruned later.
SAMPLE_ROWS = 512


def laptop_model() -> SparseConfig:
    """The architecture that trains in minutes on two cores."""
    return SparseConfig(
        n_layers=2, d_model=128, n_heads=8, d_head=16, d_mlp=512, d_vocab=1024, n_ctx=128,
        abs_topk=paper_topk(0.25), attn_sinks=True, bigram_table=True,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults make a small sparse model in about two minutes on two cores.

    Attributes:
        model: the architecture.
        data: the text.
        steps, batch_size: optimizer steps, and sequences of `n_ctx` tokens in each.
        lr, eps, beta1, beta2: Adam's. The learning rate is further multiplied by the warm-up and decay, and
            by sqrt(l0_fraction / current fraction) ("sharkfin": 1/sqrt(L0), A.2).
        warmup_fraction: share of the steps in which the learning rate rises; it then falls to 0.
        weight_decay: matrices shrink by `weight_decay · lr · w` after the top-k.
        l0_fraction: share of each weight matrix that is nonzero in the end; 1 trains a dense model.
        l0_fraction_embed: the same for embedding and unembedding.
        anneal_start, anneal_stop: where in training, in shares of the steps, the fraction falls from 1.
        min_nonzero: entries kept at least per neuron and attention channel.
        bigram_from_counts: start the bigram table at the log-frequencies of the training tokens.
        seed: of the weights, the tokenizer's text, the data and its order.

    Raises:
        ConfigError: for an impossible value, naming the field, the value and the valid range.
    """

    model: SparseConfig = field(default_factory=laptop_model)
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 1500
    batch_size: int = 16
    lr: float = 8e-3
    eps: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_fraction: float = 0.01
    weight_decay: float = 0.1
    l0_fraction: float = 1 / 32
    l0_fraction_embed: float = 1 / 8
    anneal_start: float = 0.01
    anneal_stop: float = 0.5
    min_nonzero: int = 4
    bigram_from_counts: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "eps"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("beta1", "beta2", "warmup_fraction"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("l0_fraction", "l0_fraction_embed"):
            check(0 < getattr(self, name) <= 1, name, getattr(self, name), "a fraction in (0, 1]")
        check(0 <= self.weight_decay, "weight_decay", self.weight_decay, "at least 0")
        check(0 <= self.anneal_start <= self.anneal_stop, "anneal_start", self.anneal_start, "in [0, anneal_stop]")
        check(self.anneal_stop <= 1, "anneal_stop", self.anneal_stop, "in [anneal_start, 1]")
        check(self.min_nonzero >= 0, "min_nonzero", self.min_nonzero, "at least 0")
        check(self.seed >= 0, "seed", self.seed, "at least 0")


class Trainer:
    """The published update rule, a step at a time (METHOD §3): gradients divided by their RMS, one Adam step
    without decay, the top-k of every weight matrix, then decay of the matrices.

    Args:
        model: a model of ours; its parameters without `requires_grad` stay as they are.
        config: the hyper-parameters; `config.steps` is the length of the schedules.
    """

    def __init__(self, model: torch.nn.Module, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.parameters)
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.Adam(self.parameters, lr=0.0, betas=betas, eps=config.eps, fused=fused)
        window = config.anneal_start * config.steps, config.anneal_stop * config.steps
        self.sparsity = WeightSparsity(
            model,
            annealed(config.l0_fraction, *window),
            embed_fraction=annealed(config.l0_fraction_embed, *window),
            min_nonzero=config.min_nonzero,
        )
        self._matrices = [p for group in self.sparsity.groups for p in group.parameters]

    def lr(self, step: int) -> float:
        """lr · (warm-up, then linear decay to 0) · sqrt(final fraction / fraction at this step)."""
        config, warmup = self.config, int(self.config.warmup_fraction * self.config.steps)
        shape = step / warmup if step < warmup else 1 - (step - warmup) / (config.steps - warmup)
        return config.lr * shape * (config.l0_fraction / self.sparsity.fractions(step)[0]) ** 0.5

    def step(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """One optimizer step on a batch; returns its mean next-token loss."""
        lr = self.lr(self.sparsity.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.model(tokens, return_type="loss")
        loss.backward()
        self._normalize_gradients()
        with self.sparsity.attached(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self._matrices, 1 - self.config.weight_decay * lr)
        return loss.detach()

    @torch.no_grad()
    def _normalize_gradients(self) -> None:
        """Divide by the root mean square over all entries of all parameters (published script)."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        rms = (squares / sum(g.numel() for g in gradients)).sqrt()
        torch._foreach_mul_(gradients, 1 / (rms + 1e-5))


def batches(tokens: Int[Tensor, "seq pos"], batch_size: int, seed: int) -> Iterator[Int[Tensor, "batch pos"]]:
    """Endless batches, every row once per epoch, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(tokens), generator=generator).split(batch_size):
            if len(rows) == batch_size or len(tokens) < batch_size:
                yield tokens[rows].long()


@torch.no_grad()
def evaluate_loss(model: torch.nn.Module, tokens: Int[Tensor, "seq pos"], batch_size: int) -> float:
    """Mean next-token loss over the rows of `tokens`, in nats per token."""
    device = next(model.parameters()).device
    losses = [model(rows.long().to(device), return_type="loss") * len(rows) for rows in tokens.split(batch_size)]
    return float(torch.stack(losses).sum() / len(tokens))


@torch.no_grad()
def start_bigram_from_counts(model: torch.nn.Module, tokens: Int[Tensor, "seq pos"], prior: float = 10.0) -> None:
    """Set the bigram table to log p(next | current) over `tokens`, smoothed by `prior` counts of the unigram."""
    table = model.network.bigram.W_bigram
    d_vocab = len(table)
    pairs = tokens[:, :-1].long() * d_vocab + tokens[:, 1:].long()
    counts = torch.bincount(pairs.flatten(), minlength=d_vocab**2).view(d_vocab, d_vocab).double()
    unigram = counts.sum(0) + 1
    smoothed = counts + prior * unigram / unigram.sum()
    table.copy_((smoothed / smoothed.sum(1, keepdim=True)).log())


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """Train a model from text to a saved folder.

    Args:
        config: architecture, data and hyper-parameters; `d_vocab` is also the size of the tokenizer, which is
            trained on the same text.
        out: folder for the model, its tokenizer, `training.json` (the record) and a sample of the training
            tokens, from which the pruner takes means; None saves nothing.
        device: None is the GPU if there is one, else the CPU.
        progress: show a bar with loss, L0 and tokens per second.

    Returns:
        The model, in eval mode, and the record of how it was made.

    Raises:
        ConfigError, DataError, TokenizerError: before anything is trained or written.
        TrainError: if the loss is no longer a number.
    """
    if out is not None and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError(f"out = {str(out)!r} is not possible; it must be a new or empty folder")
    started, device = time.perf_counter(), resolve_device(device)
    documents = load_documents(config.data)
    required = sorted({candidate for task in TASKS.values() for candidate in task.candidates})
    tokenizer = train_tokenizer(documents.train, config.model.d_vocab, required)
    rows = pack_tokens(documents.train, tokenizer, config.model.n_ctx, config.seed)
    validation = pack_tokens(documents.validation, tokenizer, config.model.n_ctx, config.seed)
    prepared = time.perf_counter()

    model = create(config.model, config.seed, tokenizer, device)
    if config.model.bigram_table and config.bigram_from_counts:
        start_bigram_from_counts(model, rows)
    trainer = Trainer(model.train(), config)
    loss = _run(trainer, rows, device, progress)
    model.eval()
    trained = time.perf_counter()

    nonzero, weights = trainer.sparsity.l0(), sum(p.numel() for p in trainer._matrices)
    n_tokens = config.steps * min(config.batch_size, len(rows)) * config.model.n_ctx
    record = {
        "config": dataclasses.asdict(config),
        "data": documents.description,
        "training_tokens_available": rows.numel(),
        "training_tokens_seen": n_tokens,
        "training_loss": loss,
        "validation_loss": evaluate_loss(model, validation, config.batch_size),
        "nonzero_weights": nonzero,
        "weights": weights,
        "seconds": {"data": prepared - started, "training": trained - prepared},
        "tokens_per_second": n_tokens / (trained - prepared),
        "device": str(device),
        "versions": {name: version(name) for name in ("tl-sparse", "transformer-lens", "torch", "tokenizers")}
        | {"python": platform.python_version()},
    }
    if out is not None:
        generator = torch.Generator().manual_seed(config.seed)
        sample = rows[torch.randperm(len(rows), generator=generator)[:SAMPLE_ROWS]]
        model.save_pretrained(out)
        write_tensors(Path(out) / "corpus_sample.safetensors", {"tokens": sample})
        write_json(Path(out) / "training.json", record)
        model.cfg.model_name = Path(out).resolve().name
    return model, record


def _run(trainer: Trainer, rows: Int[Tensor, "seq pos"], device: torch.device, progress: bool) -> float:
    """All steps; returns the mean training loss of the last 50."""
    config, stream = trainer.config, batches(rows, trainer.config.batch_size, trainer.config.seed)
    losses: list[Tensor] = []
    bar = tqdm(range(config.steps), desc="training", disable=not progress, unit="step")
    for step, tokens in zip(bar, stream, strict=False):
        losses.append(trainer.step(tokens.to(device)))
        if step % 20 == 19 or step == config.steps - 1:
            recent = float(torch.stack(losses[-20:]).mean())
            if recent != recent:
                raise TrainError(f"the loss is not a number since about step {step}; try a smaller lr than {config.lr}")
            elapsed = bar.format_dict["elapsed"] or 1e-9
            kept = trainer.sparsity.fractions(step)[0]
            rate = (step + 1) * tokens.numel() / elapsed
            bar.set_postfix_str(f"loss {recent:.3f}, L0 {kept:.1%}, {rate:,.0f} tokens/s")
    return float(torch.stack(losses[-50:]).mean())
