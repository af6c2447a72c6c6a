"""The settings of pruning."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tl_sparse.circuits import NodeKind
from tl_sparse.config import MAX_SEED, check, check_types, merged, short_repr
from tl_sparse.evaluation import Ablation, Objective

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
    "subsets",
    "subset_pairs",
    "adversary_steps",
)


@dataclass(frozen=True)
class PruneConfig:
    """The settings of pruning.

    The defaults suit small models. The paper tunes them for each model and task (A.5), as
    `tl-sparse search` does.

    Attributes:
        nodes: whether the nodes of the circuit are channels or components, the outputs of whole
            heads and MLPs. Channels are the entries of activations, as in the paper. Components are
            far fewer and so are found faster, in dense models too; their edges cannot be cut.
        target_loss: the loss that the circuit must reach on the selection pairs, in nats. The
            paper's is 0.15.
        objective: what the target loss measures. "candidates" is the choice between the task's two
            answers, as in the paper; "model" the divergence from the model's distribution of the
            next token; "next_token" the cross-entropy of the right answer among all tokens.
        method: what ranks the nodes. Gates are "learned"; or learned for "any_size", where another
            number of them is open in each step, so that one ranking serves all sizes; or, as
            baselines, the ranking is attribution, integrated gradients or chance. Only circuits of
            "learned" gates are then changed node by node: `removal_tests`, `exchanges` and
            `fresh_subsets` do nothing with the others.
        robust: what the circuit must withstand besides all other nodes being held. With "subsets",
            it must also reach the target loss while random subsets of them are left as they are in
            the model, and with "adversary" while those are that an adversary chooses by gradient
            ascent. With "none", as in the paper, all are held at once, and errors can cancel.
        subsets: the number of random subsets under which a robust circuit must reach the target
            loss. Each test of a circuit tries others too, and those that make one fail join them.
        subset_pairs: the largest number of selection pairs on which each subset is tried. Where a
            few of them leave no doubt, the others are not used.
        fresh_subsets: the number of random subsets, not met before, under which a robust circuit is
            tried at last. Where it misses the target loss, nodes are added, and it is tried under
            as many others, until it reaches it under all of a round, or for six rounds. A search
            fits the subsets that it meets, and without this, more of the others make it fail.
        adversaries: the number of times that a fresh adversary attacks the circuit. If it raises
            the loss above the target, its subset is added to those that the circuit must withstand,
            and the search begins again at the chosen size. Once edges are cut, as many others
            attack it, and edges are put back.
        adversary_steps: the number of steps in which each fresh adversary learns.
        adversary_budget: the largest share of the other nodes that a fresh adversary may leave as
            they are. With 1, few circuits of less than half of the model withstand it.
        freeze_norms: whether norms have the scales of the full model on the same prompt, in the
            search and in the evaluation. Held nodes cannot then act through the norms.
        exclude: the names of nodes that are never used, such as `node_names` of another circuit.
        include: the names of nodes that are always used.
        allow_failing_model: whether to search although the full model misses the target loss, which
            shows what a search finds where there is nothing to find.
        max_nodes: the largest number of nodes that are tried as a circuit. If not even so many
            of the highest-ranked nodes pass, the search ends with a `PruneError`. Nodes are then
            still in it that a circuit would not need, so give many times the size that is looked
            for. A query channel and its key channel count once if they share a gate.
        steps: the number of steps in which the gates are learned.
        pairs_per_step: the number of prompt pairs in each step.
        k_coef: the weight of the number of open gates in the objective at the first step. It is
            then steered: it rises while the task loss is below `steer_to` · target_loss, and falls
            while the loss is above. One setting then fits models and tasks that need different
            weights, and the gates do not all close at once.
        steer_to: the task loss to which k_coef is steered, as a share of target_loss.
        steer_rate: the most by which the logarithm of k_coef moves in a step for good. In total, it
            moves by a factor of at most 100. With 0 here and in `steer_now`, the weight is
            constant, as in the paper.
        steer_now: the most by which the logarithm of k_coef moves in a step for this step alone.
        lr: the learning rate of AdamW at the first step. It falls linearly to 0.
        beta1: AdamW's decay rate of the mean gradient.
        beta2: AdamW's decay rate of the mean squared gradient.
        weight_decay: AdamW's weight decay.
        grad_clip: the norm to which gradients are clipped.
        warm_start: whether gates start in the order of their integrated gradients. The first ones,
            as many as reach the target loss, start at values from init_bias down to 0; the others
            start just closed. This saves most of the steps. Without a warm start, all gates start
            at init_bias, as in the paper.
        init_bias: the start value of the gates, or of the first of them with a warm start.
        init_scale: the standard deviation of the noise on the start values. Without a warm start,
            all gates can close together if it is tiny.
        temperature: the temperature of the surrogate gradient.
        tied_qk: whether each query channel shares a gate with its key channel.
        embed_gates: whether the channels of the token embedding are nodes too.
        ablation: the values at which nodes outside the circuit are held: their mean, zero, or those
            on another prompt.
        means_over: whether means are taken over the corpus, or over the task's training pairs. The
            paper takes them over the corpus.
        necessity: the weight of a term in the objective by which the circuit is also necessary. It
            is max(0, ln 2 - task loss of the model without it), on half of the pairs, and finds
            backup paths that the circuit alone does not need. With 0, the objective is the paper's.
        ablated_accuracy: the largest accuracy that the model without the circuit may have on the
            selection pairs. With 1, the circuit need only be sufficient, as in the paper.
        exchanges: the number of nodes outside the circuit that are tried in place of two of its
            own. They are tried after nodes have been removed, and others are then removed again.
        removal_tests: the largest number of circuits that are tried while nodes are removed, or
            None for no limit. A circuit of more than 512 nodes loses groups of nodes that have
            little effect to first order. Of a smaller one, the effects of the 64 nodes that it
            needs least are measured, and those that it can do without are removed; and so on until
            there are none. In a large dense model, a test takes seconds.
        restarts: the number of searches, of which the one with the fewest edges counts. Each has
            other initial gates and another order of the pairs, and all are tried under the same
            subsets.
        train_pairs: the number of prompt pairs for learning gates. They, the selection pairs and
            the held-out pairs are disjoint. If a task has too few pairs, those of the three numbers
            that are the defaults shrink in proportion.
        ranking_pairs: the number of training pairs for the integrated gradients of a warm start.
        selection_pairs: the number of prompt pairs for choosing the size of the circuit.
        cleanup_pairs: the number of selection pairs on which sizes are tried quickly, and on which
            the nodes and edges that the circuit does not need are found.
        heldout_pairs: the number of prompt pairs for judging the circuit.
        batch_size: the number of prompts, or rows of the corpus, to run at once without gradients.
        seed: the seed of the pairs, the initial gates and the order of training.

    Raises:
        ConfigError: for an impossible value; the message names the field, the value and the valid
            range.
    """

    nodes: NodeKind = "channels"
    target_loss: float = 0.15
    objective: Objective = "candidates"
    method: Literal["learned", "any_size", "attribution", "integrated_gradients", "random"] = (
        "learned"
    )
    robust: Literal["none", "subsets", "adversary"] = "none"
    subsets: int = 24
    subset_pairs: int = 48
    fresh_subsets: int = 128
    adversaries: int = 3
    adversary_steps: int = 60
    adversary_budget: float = 0.01
    freeze_norms: bool = False
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    allow_failing_model: bool = False
    max_nodes: int | None = None
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
    exchanges: int = 16
    removal_tests: int | None = 1000
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
        for name in ("exclude", "include"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        check_types(self)
        for name in _COUNTS:
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("target_loss", "k_coef", "steer_to", "lr", "grad_clip", "temperature"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("necessity", "steer_rate", "steer_now", "weight_decay", "init_scale"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"at least 0 and at most {MAX_SEED}")
        accuracy = self.ablated_accuracy
        check(0.5 <= accuracy <= 1, "ablated_accuracy", accuracy, "in [0.5, 1]")
        check(-1 <= self.init_bias <= 1, "init_bias", self.init_bias, "in [-1, 1]")
        for name in ("fresh_subsets", "adversaries", "exchanges"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        budget = self.adversary_budget
        check(0 < budget <= 1, "adversary_budget", budget, "above 0 and at most 1")
        if self.objective != "candidates":
            compares = "0 with this objective: it compares the two answers with chance"
            check(self.necessity == 0, "necessity", self.necessity, compares)
        self._check_kind_of_nodes()
        both = sorted(set(self.exclude) & set(self.include))
        check(not both, "include", both, "without the nodes that are excluded")
        if self.max_nodes is not None:
            self._check_max_nodes(self.max_nodes)
        if self.removal_tests is not None:
            expected = "None, or a whole number of at least 0"
            is_possible = type(self.removal_tests) is int and self.removal_tests >= 0
            check(is_possible, "removal_tests", self.removal_tests, expected)

    def _check_kind_of_nodes(self) -> None:
        if self.nodes == "channels":
            return
        for name in ("tied_qk", "embed_gates"):
            expected = 'False with nodes = "components": it is about channels'
            check(not getattr(self, name), name, getattr(self, name), expected)

    def _check_max_nodes(self, max_nodes: int) -> None:
        n_included = len(set(self.include))
        expected = "None, or a whole number of at least 1"
        if n_included > 1:
            expected = f"at least {n_included}, the number of nodes that are included"
        is_possible = type(max_nodes) is int and max_nodes >= max(1, n_included)
        check(is_possible, "max_nodes", max_nodes, expected)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values: names are in lists."""
        values = asdict(self)
        return {**values, "exclude": list(self.exclude), "include": list(self.include)}


def _names(field: str, value: object) -> tuple[str, ...]:
    """The names in a field, which may also be a list, as in YAML and JSON."""
    expected = 'names of nodes, such as ("0.attn_v h3.7",); circuit.node_names gives them'
    are_names = isinstance(value, tuple | list) and all(isinstance(name, str) for name in value)
    check(are_names, field, value, expected)
    return tuple(value)  # type: ignore[arg-type]


def as_config(config: PruneConfig | Mapping[str, Any] | None) -> PruneConfig:
    """The given settings, or those of `PruneConfig()` with the given fields changed.

    Raises:
        ConfigError: for an unknown key (naming the nearest valid one) or an impossible value.
    """
    if isinstance(config, PruneConfig):
        return config
    changes = {} if config is None else config
    check(
        isinstance(changes, Mapping), "config", config, "a PruneConfig, or a mapping of its fields"
    )
    return merged(PruneConfig(), changes)
