"""What is measured of a circuit, as numbers and as a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tl_sparse.tasks import Score, score_row
from tl_sparse.text import table

#: What the nodes outside a circuit are held at: their means, zero, or what they are on another
#: prompt.
Ablation = Literal["mean", "zero", "resample"]


@dataclass(frozen=True)
class Evaluation:
    """A circuit on one set of prompt pairs.

    Attributes:
        full: the whole model.
        circuit: the circuit alone, all else at its mean: sufficient if this is good.
        ablated: the model with the circuit's nodes at their means: necessary if this is bad.
        zero: the circuit alone, all other nodes at zero.
        resample: the circuit alone, all other nodes as they are on another prompt of these; see
            `resampled`.
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
        """The inverse of `dataclasses.asdict`."""
        fields: dict[str, Any] = {
            name: Score(**v) if isinstance(v, dict) else v for name, v in values.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class SizedScore:
    """A circuit of some size, on a set of prompt pairs."""

    n_nodes: int
    n_edges: int
    circuit: Score


def scores_table(evaluation: Evaluation) -> str:
    """The losses of the full model, the circuit alone, and the model without the circuit."""
    rows = [
        score_row("the full model", evaluation.full),
        score_row("the circuit alone (sufficient?)", evaluation.circuit),
        score_row("… the rest at zero, not at its mean", evaluation.zero),
        score_row("… the rest resampled", evaluation.resample),
        score_row("the model without the circuit (necessary?)", evaluation.ablated),
    ]
    heading = (
        f"On {evaluation.n_pairs} held-out pairs of prompts (a coin has loss 0.693, accuracy 50%)"
    )
    return heading + "\n" + table(["", "task loss", "accuracy"], rows)
