"""The hyper-parameters of training, and their checks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tl_sparse.config import MAX_SEED, check, check_types, is_number, short_repr
from tl_sparse.data import DataConfig
from tl_sparse.network import SparseConfig, paper_topk

#: The largest number of steps, which bounds the memory for their losses.
MAX_STEPS = 1_000_000_000
#: Between dense gradients, weights of which a smaller share is nonzero train that share only.
NONZEROS_BELOW = 1 / 4


def laptop_model() -> SparseConfig:
    """An architecture that trains in minutes on two CPU cores."""
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
    """The hyper-parameters of training. The defaults train a small sparse model in about two
    minutes on two CPU cores.

    "Published script" and "paper's text" refer to two recipes of `RECIPES`: the authors'
    training script, and Gao et al. 2025 (arXiv 2511.13653), to which section numbers refer as well.

    Attributes:
        model: the architecture.
        data: the training text.
        steps: the number of optimizer steps.
        batch_size: the number of sequences of n_ctx tokens in each step, over all processes.
        lr: the learning rate of Adam. It is multiplied by the warm-up and decay schedule.
        eps: Adam's epsilon.
        beta1: Adam's decay rate of the mean gradient.
        beta2: Adam's decay rate of the mean squared gradient.
        warmup_fraction: the share of the steps in which the learning rate rises linearly. After
            these it falls linearly to 0.
        sharkfin: whether the learning rate rises as the weights become fewer. It is multiplied by
            sqrt(l0_fraction / current fraction), which is the factor 1/sqrt(L0) of section A.2.
        gradient: whether the gradient is divided by its root mean square, or that is clipped to 1.
            The root mean square is over all parameters; "divide" is the published script, "clip"
            the paper's text.
        weight_decay: the coefficient λ, with which each matrix shrinks by λ · lr · w in a step.
        decay: whether the matrices decay after the top-k, or before the step, as in AdamW. "after"
            is the published script, "adamw" the paper's text.
        l0_fraction: the share of each weight matrix that is nonzero in the end, at least
            min_nonzero / d_model; 1 for a dense model.
        l0_count: the number of nonzero weights in all matrices together; 0 for l0_fraction.
        l0_fraction_embed: the nonzero share of the (un)embedding; 0 for that of the other matrices.
            The paper's text has 0.
        l0_groups: the nonzero shares of groups of weights by name. For example
            {"blocks.*.mlp.W_in": 0.1}; see `WeightSparsity`.
        fused_qkv: whether Q, K and V share one budget of nonzero weights. The published script does
            so; in the paper's text each has its own.
        sparse_biases: whether the biases of attention and MLPs become sparse as well. They do in
            the paper's text.
        anneal_start: when the nonzero shares start to fall from 1, as a share of the steps.
        anneal_stop: when the nonzero shares reach their final values, as a share of the steps.
        anneal_shape: how the nonzero shares fall between these two. Linearly in section A.2.
        min_nonzero: the smallest number of nonzero entries per neuron and attention channel. A
            smaller l0_fraction than min_nonzero / d_model is refused.
        dense_gradient_steps: the number of steps from one dense gradient to the next, once the
            nonzero shares are final. In the steps between, the zeros of weights of which less than
            a quarter is nonzero stay zeros: they have no gradients, moments and updates. With 1,
            all gradients are dense. See `tl_sparse.training.nonzero_steps`.
        topk_anneal_start: when the fractions of AbsTopK start to fall from 1, as a share of the
            steps.
        topk_anneal_stop: when the fractions of AbsTopK reach the model's, as a share of the steps.
            If both are 0, they are those of the model from the first step.
        bigram_from_counts: whether the bigram table starts at the log-frequencies of the training
            tokens.
        last_bigram_row: whether the last row of the bigram table is trained. The published script
            never trains it.
        accumulation: the number of parts of a batch, processed in turn to save memory.
        precision: the precision in which matrices are multiplied. Weights, moments and the loss are
            always float32.
        compile: whether to run the model through torch.compile.
        max_jump: the jump of the loss, in nats, at which training saves its state and stops. It is
            above the mean of the hundred steps before.
        checkpoint_steps: the number of steps between checkpoints to resume from; 0 for minutes
            only.
        checkpoint_minutes: the number of minutes between checkpoints to resume from.
        keep_checkpoints: the number of latest checkpoints that are kept until training is done, or
            which steps' models are kept for good. "log" keeps about ten for each factor of ten:
            those after 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 79, 100, … steps
            (rounded powers of 10^(1/10)); "all" those after every `checkpoint_steps` steps. Both
            also keep the last one, and the two latest checkpoints until training is done. Kept
            models are weights alone, with zeros taking no space; the model of step 100 of the run
            in `folder` is called "folder@100", also while the run goes on.
        validate_steps: the number of steps between validations; 0 for one at the end.
        target_validation_loss: the validation loss at which training stops; 0 for never. For
            example to train a dense twin of a sparse model.
        track: a tracker that also receives every line of the log. The files of tensorboard are in
            the folder of the run.
        seed: the seed of the weights and of the order of the data. On the command line, --seed also
            sets `data.seed`, which chooses the text.

    Raises:
        ConfigError: for an impossible value; the message gives the field, the value and the valid
            range.
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
    dense_gradient_steps: int = 1
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
    keep_checkpoints: int | Literal["all", "log"] = 2
    validate_steps: int = 0
    target_validation_loss: float = 0.0
    track: Literal["none", "wandb", "tensorboard"] = "none"
    seed: int = 0

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_types(self)
        check(isinstance(self.model, SparseConfig), "model", self.model, "a SparseConfig")
        check(isinstance(self.data, DataConfig), "data", self.data, "a DataConfig")
        n_ctx = self.model.n_ctx
        check(n_ctx >= 2, "n_ctx", n_ctx, "at least 2, so that there is a next token to predict")
        self._check_ranges()
        _check_window("anneal", self.anneal_start, self.anneal_stop)
        _check_window("topk_anneal", self.topk_anneal_start, self.topk_anneal_stop)
        self._check_checkpoints()
        self._check_compile()
        self._check_validation()
        self._check_l0()

    def _check_ranges(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "dense_gradient_steps"):
            value = getattr(self, name)
            check(value >= 1, name, value, "at least 1")
        check(self.steps <= MAX_STEPS, "steps", self.steps, f"at most {MAX_STEPS:,}")
        check(self.seed < 2**64, "seed", self.seed, "below 2**64")
        for name in ("lr", "eps", "max_jump", "checkpoint_minutes"):
            value = getattr(self, name)
            check(0 < value < math.inf, name, value, "above 0, and finite")
        for name in ("weight_decay", "target_validation_loss"):
            value = getattr(self, name)
            check(value < math.inf, name, value, "finite")
        for name in ("beta1", "beta2", "warmup_fraction"):
            value = getattr(self, name)
            check(0 <= value < 1, name, value, "in [0, 1)")
        for name in (
            "min_nonzero",
            "checkpoint_steps",
            "validate_steps",
            "target_validation_loss",
            "weight_decay",
        ):
            value = getattr(self, name)
            check(value >= 0, name, value, "at least 0")
        check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"at least 0 and at most {MAX_SEED}")

    def _check_checkpoints(self) -> None:
        kept = self.keep_checkpoints
        is_number = type(kept) is int and kept >= 1
        expected = "a number of at least 1, 'log' or 'all'"
        check(is_number or kept in ("log", "all"), "keep_checkpoints", kept, expected)
        has_steps = kept != "all" or self.checkpoint_steps >= 1
        expected = "at least 1 with keep_checkpoints = 'all', which keeps the model at these steps"
        check(has_steps, "checkpoint_steps", self.checkpoint_steps, expected)

    def _check_compile(self) -> None:
        """Check that no k changes, since the k of each AbsTopK is built into a compiled model."""
        k_changes = self.topk_anneal_stop > 0
        expected = "false while the fractions of AbsTopK change (topk_anneal_stop)"
        check(not (self.compile and k_changes), "compile", True, expected)

    def _check_validation(self) -> None:
        has_target = self.target_validation_loss != 0
        is_measured = self.validate_steps > 0
        expected = "at least 1 with a target_validation_loss"
        check(is_measured or not has_target, "validate_steps", 0, expected)

    def _check_l0(self) -> None:
        """Check the numbers and shares of nonzero weights, also against `min_nonzero`."""
        d_model = self.model.d_model
        expected = f"at most {d_model}, the number of entries of each neuron"
        check(self.min_nonzero <= d_model, "min_nonzero", self.min_nonzero, expected)
        least_fraction = self.min_nonzero / d_model
        why = f"since min_nonzero keeps {self.min_nonzero} of the {d_model} entries of each neuron"

        n_weights = self.model.n_matrix_weights
        least_count = math.ceil(least_fraction * n_weights)
        is_possible = self.l0_count == 0 or least_count <= self.l0_count <= n_weights
        expected = f"0, or from {least_count:,} to {n_weights:,}, all matrix weights, {why}"
        check(is_possible, "l0_count", self.l0_count, expected)

        embed = self.l0_fraction_embed
        check(0 <= embed <= 1, "l0_fraction_embed", embed, "a fraction in [0, 1]")

        groups = self.l0_groups
        is_mapping = isinstance(groups, Mapping)
        check(is_mapping, "l0_groups", groups, "a mapping of names to fractions")
        for name, fraction in {"l0_fraction": self.l0_fraction, **groups}.items():
            check(isinstance(name, str), "l0_groups", groups, "a mapping of names to fractions")
            is_fraction = is_number(fraction) and 0 < fraction <= 1
            check(is_fraction, name, fraction, "a fraction in (0, 1]")

        becomes_sparse = self.matrix_fraction < NONZEROS_BELOW
        is_used = self.dense_gradient_steps == 1 or becomes_sparse
        field_name = "l0_count" if self.l0_count else "l0_fraction"
        expected = (
            f"a share below {NONZEROS_BELOW:g} of the weights if dense_gradient_steps = "
            f"{self.dense_gradient_steps}; use dense_gradient_steps = 1 for more nonzero weights"
        )
        check(is_used, field_name, getattr(self, field_name), expected)

        is_enough = self.l0_count > 0 or self.l0_fraction >= least_fraction
        expected = f"at least {least_fraction:.6g}, {why}; raise it, or lower min_nonzero"
        check(is_enough, "l0_fraction", self.l0_fraction, expected)

    @property
    def n_checkpoints(self) -> int:
        """The number of latest checkpoints to resume from that are kept until training is done."""
        kept = self.keep_checkpoints
        return kept if isinstance(kept, int) else 2

    @property
    def keeps_steps(self) -> bool:
        """Whether the models of some steps are kept for good."""
        return self.keep_checkpoints in ("log", "all")

    @property
    def matrix_fraction(self) -> float:
        """The share of the matrix weights of all layers that is nonzero at the end of training."""
        if self.l0_count:
            return self.l0_count / self.model.n_matrix_weights
        return self.l0_fraction


def _check_window(prefix: str, start: float, stop: float) -> None:
    """Check the fields {prefix}_start and {prefix}_stop, which are shares of the steps."""
    check(0 <= start <= stop, f"{prefix}_start", start, f"in [0, {prefix}_stop]")
    check(stop <= 1, f"{prefix}_stop", stop, f"in [{prefix}_start, 1]")
