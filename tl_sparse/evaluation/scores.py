"""The scores of a circuit, and tables of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tl_sparse.arguments import checked
from tl_sparse.errors import counted
from tl_sparse.records import record_from
from tl_sparse.tasks import NextToken, Score, score_row, table

#: The values at which nodes outside a circuit are held: their means, zero, or their activations on
#: another prompt.
Ablation = Literal["mean", "zero", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)

#: What a circuit is asked to do:
#: - "candidates": the cross-entropy of the right answer between the task's two answers, which is
#:   the task loss of the paper;
#: - "model": the divergence KL(full model ‖ circuit) of the distributions of the next token;
#: - "next_token": the cross-entropy of the right answer in the whole vocabulary.
Objective = Literal["candidates", "model", "next_token"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

#: Objective → what its loss is called.
LOSS_NAMES = {
    "candidates": "task loss",
    "model": "divergence from the model",
    "next_token": "loss among all tokens",
}

#: If the logit differences of the full model and of no nodes differ by less, faithfulness, which
#: divides by their difference, would be noise.
LEAST_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Evaluation:
    """The scores of a circuit and of its model on one set of prompt pairs.

    Attributes:
        full: the score of the full model.
        circuit: the score of the circuit alone, with all other nodes held at their means. The
            circuit is sufficient if this score is good.
        ablated: the score of the model with the circuit's nodes held at their means. The circuit is
            necessary if this score is bad.
        zero: the score of the circuit alone, with all other nodes held at zero.
        resample: the score of the circuit alone, with all other nodes held at their activations on
            another prompt; see `resampled`. None for a single pair.
        n_pairs: the number of prompt pairs.
        n_nodes: the number of the circuit's nodes.
        n_edges: the number of the circuit's edges.
        empty: the score of no circuit at all: every node is held at its mean. None in files that
            were written before it was measured.
        target_loss: the loss that the search had to reach on its selection pairs; None if the
            circuit does not record it.
        objective: what that loss measures; see `Objective`.
        ablation: the values at which the search held nodes; see `Ablation`.
    """

    full: Score
    circuit: Score
    ablated: Score
    zero: Score
    resample: Score | None
    n_pairs: int
    n_nodes: int
    n_edges: int
    empty: Score | None = None
    target_loss: float | None = None
    objective: str = "candidates"
    ablation: str = "mean"

    @property
    def reached_loss(self) -> float | None:
        """The circuit's loss by the objective and the ablation of its search; None if that was not
        measured.
        """
        by_ablation = {"mean": self.circuit, "zero": self.zero, "resample": self.resample}
        alone = by_ablation.get(self.ablation)
        if alone is None:
            return None
        if self.objective == "candidates":
            return alone.loss
        next_token = alone.next_token
        if next_token is None:
            return None
        return next_token.kl if self.objective == "model" else next_token.loss

    @property
    def misses_target(self) -> bool:
        """Whether the circuit alone misses the target loss on these pairs."""
        reached = self.reached_loss
        if self.target_loss is None or reached is None:
            return False
        return reached > self.target_loss

    def faithfulness(self, score: Score) -> float | None:
        """How far a run goes from no circuit at all (0) to the full model (1).

        It is (m(C) - m(∅)) / (m(M) - m(∅)), where m is the logit difference, C the run, M the full
        model, and ∅ the model with every node at its mean (Marks et al. 2024, arXiv 2403.19647).
        It can be above 1 or below 0. None if it is not known, or if m(M) and m(∅) differ by less
        than `LEAST_DIFFERENCE`, so that there is nothing that a circuit could explain.
        """
        if self.empty is None:
            return None
        of_run, nothing = score.logit_difference, self.empty.logit_difference
        everything = self.full.logit_difference
        if of_run is None or nothing is None or everything is None:
            return None
        if abs(everything - nothing) < LEAST_DIFFERENCE:
            return None
        return (of_run - nothing) / (everything - nothing)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `dataclasses.asdict`.

        Raises:
            DataError: if an entry is missing or has the wrong type.
        """
        return record_from(cls, values)


@dataclass(frozen=True)
class SizedScore:
    """The size of a circuit and its score on a set of prompt pairs.

    Attributes:
        n_nodes: the number of its nodes.
        n_edges: the number of its edges.
        circuit: the score of the circuit alone, with all other nodes held at their means.
    """

    n_nodes: int
    n_edges: int
    circuit: Score


#: What the columns of the first table mean.
_BETWEEN_ANSWERS = """\
  task loss: cross-entropy between the two answers, in nats (chance: 0.693) ± its standard error
  logit difference: the logit of the right answer minus that of the wrong one
  faithfulness: the logit difference, from 0 for no nodes to 1 for the full model
  The last two are means over prompts: few prompts, or one of the answers, can dominate them."""
#: What the columns of the second table mean.
_AMONG_ALL_TOKENS = """\
  P(answer): the probability of the right answer as the next token
  most likely: the share of prompts at which no other token is more likely
  KL: the divergence of the next-token distribution from the full model's, in nats"""


@checked()
def scores_table(evaluation: Evaluation) -> str:
    """Tables of the scores in an `Evaluation`: between the two answers, and among all tokens."""
    scores = _named_scores(evaluation)
    rows = []
    for name, score in scores.items():
        faithfulness = evaluation.faithfulness(score)
        cells = [
            *score_row(name, score),
            _decimals(score.logit_difference),
            _decimals(faithfulness),
        ]
        rows.append(cells)
    pairs = counted(evaluation.n_pairs, "held-out pair")
    columns = ["between the two answers", "task loss", "accuracy", "logit difference"]
    sections = [
        f"On {pairs} of prompts\n\n" + table([*columns, "faithfulness"], rows),
        _BETWEEN_ANSWERS,
    ]
    if evaluation.misses_target:
        loss = f"{LOSS_NAMES[evaluation.objective]} is {evaluation.reached_loss:.3f}"
        sections.append(
            f"  The circuit misses the target on these pairs: its {loss}, and it had to be at most "
            f"{evaluation.target_loss:g} on the pairs that selected it."
        )
    rows = []
    for name, score in scores.items():
        if score.next_token is not None:
            rows.append([name, *_next_token_cells(score.next_token)])
    if rows:
        sections.append(table(["among all tokens", "P(answer)", "most likely", "KL"], rows))
        sections.append(_AMONG_ALL_TOKENS)
    return "\n\n".join(sections)


def _named_scores(evaluation: Evaluation) -> dict[str, Score]:
    """The scores of an evaluation by what they are called in tables, without those not measured."""
    scores = {
        "the full model": evaluation.full,
        "the circuit alone (sufficient?)": evaluation.circuit,
        "… the rest at zero, not at its mean": evaluation.zero,
        "… the rest resampled": evaluation.resample,
        "without the circuit (necessary?)": evaluation.ablated,
        "no nodes: all at their means": evaluation.empty,
    }
    return {name: score for name, score in scores.items() if score is not None}


def _next_token_cells(next_token: NextToken) -> list[str]:
    return [f"{next_token.probability:.1%}", f"{next_token.top:.1%}", f"{next_token.kl:.3f}"]


def _decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
