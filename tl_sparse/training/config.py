"""How to train: hyper-parameters, recipes and presets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tl_sparse.config import check, check_types, short_repr
from tl_sparse.data import DataConfig
from tl_sparse.network import SparseConfig, paper_topk


def laptop_model() -> SparseConfig:
    """The architecture that trains in minutes on two cores."""
    return SparseConfig(
        n_layers=2,
        d_model=128,
        n_heads=8,
        d_head=16,
        d_mlp=512,
        d_vocab=1024,
        n_ctx=128,
        abs_topk=paper_topk(0.25),
        attn_sinks=True,
        bigram_table=True,
        positions="concatenated",
        d_pos=16,
    )


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults make a small sparse model in about two minutes on two cores.

    Attributes:
        model: the architecture.
        data: the text.
        steps, batch_size: optimizer steps, and sequences of `n_ctx` tokens in each, over all
            processes.
        lr, eps, beta1, beta2: Adam's. The learning rate is further multiplied by the warm-up and
            decay.
        warmup_fraction: share of the steps in which the learning rate rises; it then falls to 0.
        sharkfin: multiply the learning rate by sqrt(l0_fraction / current fraction), too:
            1/sqrt(L0), A.2.
        gradient: "divide" it by its root mean square over all parameters (published script), or
            "clip" that to 1 (the paper's text).
        weight_decay: λ. Matrices shrink by λ · lr · w.
        decay: whether they do so "after" the top-k (published script), or before the step, as
            "adamw".
        l0_fraction: share of each weight matrix that is nonzero in the end; 1 trains a dense model.
        l0_count: the same as a number, of nonzero weights in the matrices of all layers; 0: by
            `l0_fraction`.
        l0_fraction_embed: share of the embedding and the unembedding; 0: as of the matrices (the
            paper's text).
        l0_groups: shares of groups of weights of their own, by name: {"blocks.*.mlp.W_in": 0.1};
            see `WeightSparsity`.
        fused_qkv: Q, K and V share one budget (published script); else each has its own.
        sparse_biases: the biases of attention and MLPs become sparse, too (the paper's text).
        anneal_start, anneal_stop: where in training, in shares of the steps, the fractions fall
            from 1.
        anneal_shape: "linear" (A.2) or "exponential".
        min_nonzero: entries kept at least per neuron and attention channel.
        topk_anneal_start, topk_anneal_stop: where in training the fractions of AbsTopK fall from 1
            to the model's; both 0: they are the model's from the beginning.
        bigram_from_counts: start the bigram table at the log-frequencies of the training tokens.
        last_bigram_row: whether the last row of the bigram table is trained; the authors' code
            never does.
        accumulation: parts of each batch that are in memory one after the other.
        precision: "bfloat16" multiplies matrices in it; weights, moments and the loss are float32
            always.
        compile: run the model through torch.compile.
        max_jump: training stops, its state saved, if the loss of a step is this many nats above the
            mean of the hundred before.
        checkpoint_steps, checkpoint_minutes: what there is to resume from is written every so many
            steps, and minutes; 0: not by steps.
        keep_checkpoints: how many of these are kept until training is done.
        validate_steps: measure the validation loss every so many steps; 0: in the end only.
        target_validation_loss: stop as soon as the validation loss is this low (a dense twin of a
            sparse model); 0: never.
        track: also give every line of the log to this tracker; tensorboard's files are in the run's
            folder.
        seed: of the weights, the tokenizer's text, the data and its order.

    Raises:
        ConfigError: for an impossible value, naming the field, the value and the valid range.
    """

    model: SparseConfig = field(default_factory=laptop_model)
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 1200
    batch_size: int = 16
    lr: float = 2e-2
    eps: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_fraction: float = 0.01
    sharkfin: bool = True
    gradient: Literal["divide", "clip"] = "divide"
    weight_decay: float = 0.1
    decay: Literal["after", "adamw"] = "after"
    l0_fraction: float = 1 / 32
    l0_count: int = 0
    l0_fraction_embed: float = 1 / 8
    l0_groups: Mapping[str, float] = field(default_factory=dict)
    fused_qkv: bool = True
    sparse_biases: bool = False
    anneal_start: float = 0.01
    anneal_stop: float = 0.5
    anneal_shape: Literal["linear", "exponential"] = "linear"
    min_nonzero: int = 4
    topk_anneal_start: float = 0.0
    topk_anneal_stop: float = 0.0
    bigram_from_counts: bool = True
    last_bigram_row: bool = True
    accumulation: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    max_jump: float = 5.0
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    validate_steps: int = 0
    target_validation_loss: float = 0.0
    track: Literal["none", "wandb", "tensorboard"] = "none"
    seed: int = 0

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "keep_checkpoints", "accumulation"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "eps", "max_jump", "checkpoint_minutes"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("beta1", "beta2", "warmup_fraction"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in (
            "min_nonzero",
            "checkpoint_steps",
            "validate_steps",
            "target_validation_loss",
            "seed",
        ):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        for window in ("anneal", "topk_anneal"):
            start, stop = getattr(self, f"{window}_start"), getattr(self, f"{window}_stop")
            check(0 <= start <= stop, f"{window}_start", start, f"in [0, {window}_stop]")
            check(stop <= 1, f"{window}_stop", stop, f"in [{window}_start, 1]")
        traced = self.compile and self.topk_anneal_stop > 0
        check(
            not traced,
            "compile",
            True,
            "false while the fractions of AbsTopK change (topk_anneal_stop)",
        )
        measured = self.validate_steps > 0 or self.target_validation_loss == 0
        check(measured, "validate_steps", 0, "at least 1 with a target_validation_loss")
        weights, floor = self.model.n_matrix_weights, self.min_nonzero / self.model.d_model
        why = f", since min_nonzero = {self.min_nonzero} of the {self.model.d_model} entries of each neuron stay"
        least = math.ceil(floor * weights)
        expected = f"0, or from {least:,} to the {weights:,} weights there are{why}"
        check(
            self.l0_count == 0 or least <= self.l0_count <= weights,
            "l0_count",
            self.l0_count,
            expected,
        )
        check(
            0 <= self.l0_fraction_embed <= 1,
            "l0_fraction_embed",
            self.l0_fraction_embed,
            "a fraction in [0, 1]",
        )
        check(
            isinstance(self.l0_groups, Mapping),
            "l0_groups",
            self.l0_groups,
            "a mapping of names to fractions",
        )
        for name, value in {"l0_fraction": self.l0_fraction, **self.l0_groups}.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            check(number and 0 < value <= 1, name, value, "a fraction in (0, 1]")
        feasible = self.l0_count > 0 or self.l0_fraction >= floor
        check(feasible, "l0_fraction", self.l0_fraction, f"at least {floor:.6g}{why}")

    @property
    def matrix_fraction(self) -> float:
        """The share of the weights of the matrices in all layers that is nonzero in the end."""
        return self.l0_count / self.model.n_matrix_weights if self.l0_count else self.l0_fraction


#: Fields of TrainConfig by recipe: where the published script and the paper's text differ (METHOD
#: §2, §3).
RECIPES: dict[str, dict[str, Any]] = {
    "published": dict(
        gradient="divide", decay="after", fused_qkv=True, sparse_biases=False, last_bigram_row=False
    ),
    "paper": dict(
        gradient="clip", decay="adamw", fused_qkv=False, sparse_biases=True, l0_fraction_embed=0.0
    ),
}


def _paper(width: int) -> TrainConfig:
    """The published sizes: d_model 256 · width; the number of nonzero weights is that of 4x with
    1/64 (METHOD §3).
    """
    d_model, fraction = 256 * width, 1 / 64 * (4 / width) ** 2
    model = SparseConfig(
        n_layers=8,
        d_model=d_model,
        n_heads=d_model // 16,
        d_head=16,
        d_mlp=4 * d_model,
        d_vocab=2048,
        n_ctx=256,
        abs_topk=paper_topk(0.25),
        attn_sinks=True,
        bigram_table=True,
    )
    return TrainConfig(
        model,
        steps=244_141,
        batch_size=512,
        lr=1.28e-2,
        l0_fraction=fraction,
        anneal_stop=0.8 if width == 8 else 0.5,
        l0_fraction_embed=min(1.0, fraction * width),
        checkpoint_minutes=30.0,
        bigram_from_counts=False,
    )


_PRESETS = {
    "laptop": TrainConfig(),
    "small": TrainConfig(
        replace(laptop_model(), d_model=256, n_heads=16, d_mlp=1024),
        steps=6000,
        lr=8e-3,
        l0_fraction=1 / 64,
        l0_fraction_embed=1 / 16,
        min_nonzero=2,
    ),
    **{f"paper-{width}x": _paper(width) for width in (1, 2, 4, 8)},
}
PRESETS = tuple(_PRESETS)


def preset(name: str, recipe: str | None = None) -> TrainConfig:
    """A training configuration by name: "laptop" (minutes on two cores), "small", "paper-1x" …
    "paper-8x".

    Args:
        name: of the preset.
        recipe: "published" or "paper", to follow either to the letter; None: the published update
            rule, and the last row of the bigram table is trained as the others are.

    Raises:
        ConfigError: for another name.
    """
    check(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    check(recipe is None or recipe in RECIPES, "recipe", recipe, f"one of {', '.join(RECIPES)}")
    return replace(_PRESETS[name], **RECIPES.get(recipe or "", {}))
