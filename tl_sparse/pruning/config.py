"""How to prune."""

from dataclasses import dataclass
from typing import Literal

from tl_sparse.config import check, check_types, short_repr
from tl_sparse.evaluation import Ablation

#: Fields that must be at least 1.
_COUNTS = (
    "steps",
    "restarts",
    "batch_size",
    "pairs_per_step",
    "train_pairs",
    "selection_pairs",
    "heldout_pairs",
    "ranking_pairs",
    "cleanup_pairs",
)


@dataclass(frozen=True)
class PruneConfig:
    """How to prune. The defaults suit small models (the paper tunes them for each model and task,
    A.5; `tl-sparse search` does that).

    Attributes:
        target_loss: task loss that the circuit must reach on the selection pairs (paper: 0.15).
        method: what ranks the nodes. `learned` gates; as baselines `attribution`,
            `integrated_gradients`, `random`.
        steps, pairs_per_step: gate-learning steps, and prompt pairs in each.
        k_coef: weight of the number of open gates in the objective at the first step. From there it
            is steered: up while the task loss is below `steer_to` · target_loss, down while it is
            above. With each step its logarithm moves by at most `steer_rate` for good (a factor of
            100 in all), and by at most `steer_now` for the moment. One setting then fits models and
            tasks that need different weights, and the gates do not all close at once. With both at
            0 it is constant (the paper).
        lr, beta1, beta2, weight_decay, grad_clip: AdamW's, and the norm gradients are clipped to;
            the learning rate falls linearly to 0.
        warm_start: gates start in the order of their integrated gradients on `ranking_pairs` pairs,
            from init_bias down to 0 over the first that reach the target loss, the others just
            closed. This saves most of the steps. Otherwise all start at init_bias (the paper).
        init_bias, init_scale: the noise init_scale · N(0, 1) is added to each start. Without a warm
            start and with a tiny scale all gates can close together.
        temperature: of the surrogate gradient.
        tied_qk: a query channel and its key channel share a gate.
        embed_gates: the channels of the token embedding are nodes too.
        ablation: what nodes outside the circuit are held at: their `mean` over the corpus, `zero`,
            or, with `resample`, their activations on another prompt.
        means_over: the means are those over the corpus (the paper), or for comparison over the
            task's training pairs.
        necessity: weight of a further term in the objective, max(0, ln 2 - task loss of the model
            without the circuit), on half of the pairs; it finds backup paths that the circuit alone
            does not need. 0 is the paper's objective.
        ablated_accuracy: largest accuracy on the selection pairs that the model without the circuit
            may have; 1 asks for a sufficient circuit only, as the paper does.
        restarts: searches with other initial gates and another order of pairs; the circuit with the
            fewest edges is kept.
        train_pairs, selection_pairs, heldout_pairs: prompt pairs to learn gates on, to choose the
            size on, and to judge on; all different.
        cleanup_pairs: selection pairs on which sizes are tried, and on which nodes and edges are
            removed that the circuit does not need.
        batch_size: prompts, or rows of the corpus, run at once without gradients.
        seed: of the pairs, the initial gates and the order of training.

    Raises:
        ConfigError: for an impossible value, naming the field, the value and the valid range.
    """

    target_loss: float = 0.15
    method: Literal["learned", "attribution", "integrated_gradients", "random"] = "learned"
    steps: int = 140
    pairs_per_step: int = 16
    k_coef: float = 2e-3
    steer_to: float = 0.8
    steer_rate: float = 0.04
    steer_now: float = 3.0
    lr: float = 2e-2
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1e-3
    grad_clip: float = 1.0
    warm_start: bool = True
    init_bias: float = 0.6
    init_scale: float = 0.03
    temperature: float = 1.0
    tied_qk: bool = False
    embed_gates: bool = False
    ablation: Ablation = "mean"
    means_over: Literal["corpus", "task"] = "corpus"
    necessity: float = 0.0
    ablated_accuracy: float = 1.0
    restarts: int = 1
    train_pairs: int = 2048
    ranking_pairs: int = 64
    selection_pairs: int = 512
    cleanup_pairs: int = 96
    heldout_pairs: int = 512
    batch_size: int = 256
    seed: int = 0

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_types(self)
        for name in _COUNTS:
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("target_loss", "k_coef", "steer_to", "lr", "grad_clip", "temperature"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("necessity", "steer_rate", "steer_now", "weight_decay", "init_scale", "seed"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        accuracy = self.ablated_accuracy
        check(0.5 <= accuracy <= 1, "ablated_accuracy", accuracy, "in [0.5, 1]")
        check(-1 <= self.init_bias <= 1, "init_bias", self.init_bias, "in [-1, 1]")
