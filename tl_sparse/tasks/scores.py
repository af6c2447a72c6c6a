"""How well a task is done, as numbers and as a table."""

from collections.abc import Mapping
from dataclasses import dataclass

from tl_sparse.text import table


@dataclass(frozen=True)
class Score:
    """How well a task is done.

    Attributes:
        loss: cross-entropy between the two candidates in nats, a mean over pairs and both sides.
        standard_error: of the loss, over pairs (the two sides of a pair are not independent).
        accuracy: share of prompts at which the right candidate has the larger logit.
    """

    loss: float
    standard_error: float
    accuracy: float


def tasks_table(scores: Mapping[str, Score | None]) -> str:
    """Each task's loss and accuracy, best first; see `task_scores`."""
    possible = sorted(((name, s) for name, s in scores.items() if s), key=lambda item: item[1].loss)
    missing = ", ".join(name for name, s in scores.items() if s is None)
    text = table(["task", "loss", "accuracy"], [score_row(name, s) for name, s in possible])
    return text + f"\n\nNot possible with this tokenizer and context: {missing}" * bool(missing)


def score_row(name: str, score: Score) -> list[str]:
    return [name, f"{score.loss:.3f} ± {score.standard_error:.3f}", f"{score.accuracy:.1%}"]
