"""The scores of a circuit, and a table of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tl_sparse.arguments import checked
from tl_sparse.errors import counted
from tl_sparse.records import record_from
from tl_sparse.tasks import Score, score_row, table

#: The values at which nodes outside a circuit are held: their means, zero, or their activations on
#: another prompt.
Ablation = Literal["mean", "zero", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)


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
            another prompt; see `resampled`.
        n_pairs: the number of prompt pairs.
        n_nodes: the number of the circuit's nodes.
        n_edges: the number of the circuit's edges.
    """

    full: Score
    circuit: Score
    ablated: Score
    zero: Score
    resample: Score
    n_pairs: int
    n_nodes: int
    n_edges: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `dataclasses.asdict`.

        Raises:
            DataError: if an entry is missing or has the wrong type.
        """
        return record_from(cls, values)


@dataclass(frozen=True)
class SizedScore:
    """The size of a circuit and its score on a set of prompt pairs."""

    n_nodes: int
    n_edges: int
    circuit: Score


@checked()
def scores_table(evaluation: Evaluation) -> str:
    """A table of the scores in an `Evaluation`."""
    rows = [
        score_row("the full model", evaluation.full),
        score_row("the circuit alone (sufficient?)", evaluation.circuit),
        score_row("… the rest at zero, not at its mean", evaluation.zero),
        score_row("… the rest resampled", evaluation.resample),
        score_row("the model without the circuit (necessary?)", evaluation.ablated),
    ]
    heading = (
        f"On {counted(evaluation.n_pairs, 'held-out pair')} of prompts "
        "(a coin has loss 0.693, accuracy 50%)"
    )
    return heading + "\n" + table(["", "task loss", "accuracy"], rows)
