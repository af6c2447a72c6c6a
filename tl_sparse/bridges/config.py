"""The hyper-parameters of training with bridges, and their checks."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from tl_sparse.config import check, check_types, short_repr
from tl_sparse.training import TrainConfig

if TYPE_CHECKING:  # `tl-sparse --help` needs this file, and does not wait for torch
    from tl_sparse.hooks import TLModel

#: How an encoder makes its result sparse: the k largest magnitudes, or those above a threshold.
EncoderKind = Literal["abs_topk", "threshold"]

#: The fields of a `BridgeConfig` that are weights of terms of the loss.
LOSS_WEIGHTS = (
    "weight_ce",
    "weight_kl",
    "weight_nmse",
    "weight_kl_dense_to_sparse",
    "weight_kl_sparse_to_dense",
)


@dataclass(frozen=True)
class BridgeConfig:
    """How a sparse model is trained beside a frozen dense one (Gao et al. 2025, sections 2.3, A.3).

    The loss is a weighted sum of these terms; those by site are summed over the sites. The defaults
    are those of the published runs.

    Attributes:
        train: the sparse model, its text, and how it is trained. The number of layers and the
            vocabulary must be the dense model's; see `fitting`.
        encoder: which entries of an encoded stream are kept: the largest ("abs_topk"), or those
            above a threshold that is learned for each channel.
        encoder_fraction: the share that an encoder with AbsTopK keeps.
        threshold_log_eps: the logarithm of all thresholds at the beginning.
        sharpness_start: how steeply thresholds set in at the beginning; see `Encoder.forward`.
        sharpness_stop: how steeply they set in at the end of the annealing, after which they are
            hard.
        threshold_anneal_start: when the sharpness starts to rise, as a share of the steps.
        threshold_anneal_stop: when it reaches `sharpness_stop`.
        weight_ce: the weight of the sparse model's own next-token loss.
        weight_kl: the weight of KL(dense model ‖ sparse model).
        weight_nmse: the weight of the normalised squared errors of encoders and decoders. They
            compare with the mean stream of a batch or, with several processes or `accumulation`,
            of each part of it.
        weight_kl_dense_to_sparse: the weight of KL(dense model ‖ sparse model that goes on from the
            encoded stream).
        weight_kl_sparse_to_dense: the weight of KL(dense model ‖ dense model that goes on from the
            decoded stream).
        top_tokens: how many of the dense model's likeliest tokens the KLs compare; 0 for all.
        sites_per_step: the number of sites at which a step takes the terms by site, drawn anew in
            each step and weighted accordingly; 0 for all. Fewer sites make a step cheaper.

    Raises:
        ConfigError: for an impossible value; the message gives the field, the value and the valid
            range.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    encoder: EncoderKind = "abs_topk"
    encoder_fraction: float = 0.25
    threshold_log_eps: float = -1.0
    sharpness_start: float = 1.0
    sharpness_stop: float = 100.0
    threshold_anneal_start: float = 0.0
    threshold_anneal_stop: float = 0.5
    weight_ce: float = 1.0
    weight_kl: float = 1.0
    weight_nmse: float = 1.0
    weight_kl_dense_to_sparse: float = 1.0
    weight_kl_sparse_to_dense: float = 1.0
    top_tokens: int = 0
    sites_per_step: int = 0

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_types(self)
        check(isinstance(self.train, TrainConfig), "train", self.train, "a TrainConfig")
        expected = "false, since the terms by site run the models under hooks"
        check(not self.train.compile, "compile", True, expected)
        is_fraction = 0 < self.encoder_fraction <= 1
        check(is_fraction, "encoder_fraction", self.encoder_fraction, "a fraction in (0, 1]")
        is_finite = math.isfinite(self.threshold_log_eps)
        check(is_finite, "threshold_log_eps", self.threshold_log_eps, "finite")
        for name in ("sharpness_start", "sharpness_stop"):
            value = getattr(self, name)
            check(0 < value < math.inf, name, value, "above 0, and finite")
        start, stop = self.threshold_anneal_start, self.threshold_anneal_stop
        check(0 <= start <= stop, "threshold_anneal_start", start, f"in [0, {stop:g}]")
        check(stop <= 1, "threshold_anneal_stop", stop, f"in [{start:g}, 1]")
        for name in LOSS_WEIGHTS:
            value = getattr(self, name)
            check(0 <= value < math.inf, name, value, "at least 0, and finite")
        learns = any(getattr(self, name) > 0 for name in LOSS_WEIGHTS)
        check(learns, LOSS_WEIGHTS[0], self.weight_ce, "above 0, or another weight must be")
        check(self.top_tokens >= 0, "top_tokens", self.top_tokens, "at least 0")
        n_sites = 2 * self.train.model.n_layers + 1
        in_range = 0 <= self.sites_per_step <= n_sites
        check(in_range, "sites_per_step", self.sites_per_step, f"in [0, {n_sites}], the sites")

    @classmethod
    def fitting(
        cls, dense: "TLModel", train: TrainConfig | None = None, **fields: Any
    ) -> "BridgeConfig":
        """A configuration whose sparse model has the layers, vocabulary and context of `dense`.

        Args:
            dense: the dense model.
            train: the rest of the training; None means the defaults. A context shorter than the
                dense model's stays.
            fields: fields of this class.
        """
        train = train or TrainConfig()
        n_ctx = min(train.model.n_ctx, dense.cfg.n_ctx)
        model = replace(
            train.model, n_layers=dense.cfg.n_layers, d_vocab=dense.cfg.d_vocab, n_ctx=n_ctx
        )
        return cls(train=replace(train, model=model), **fields)

    @property
    def settings(self) -> dict[str, Any]:
        """All fields but `train`, as JSON values."""
        names = [name for name in self.__dataclass_fields__ if name != "train"]
        return {name: getattr(self, name) for name in names}

    def sharpness(self, step: int) -> float:
        """How steeply thresholds set in at a step, from 0; infinite once they are hard."""
        steps = self.train.steps
        start, stop = self.threshold_anneal_start * steps, self.threshold_anneal_stop * steps
        if step >= stop:
            return math.inf
        if step <= start:
            return self.sharpness_start
        progress = (step - start) / (stop - start)
        return self.sharpness_start + progress * (self.sharpness_stop - self.sharpness_start)
