"""The loss and accuracy of a task, and the text tables in which such scores are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tl_sparse.arguments import checked
from tl_sparse.errors import ArgumentError, counted
from tl_sparse.parsing import printable

#: What the columns of the table are.
_WHAT_LOSS_IS = """\
  task loss: cross-entropy between the two answers, in nats (chance: 0.693) ± its standard error"""


@dataclass(frozen=True)
class NextToken:
    """How a model continues the prompts of a task, among all tokens of its vocabulary.

    Attributes:
        probability: the probability of the right answer, averaged over prompts.
        top: the share of prompts at which the right answer is the most likely token.
        kl: the Kullback-Leibler divergence KL(full model ‖ this model) of the distributions of the
            next token, in nats, averaged over prompts.
        loss: the cross-entropy of the right answer among all tokens, in nats, averaged over
            prompts. None in files that were written before it was measured.
    """

    probability: float
    top: float
    kl: float
    loss: float | None = None


@dataclass(frozen=True)
class Score:
    """How well a model does a task: the choice between its two answers.

    Attributes:
        loss: cross-entropy between the two candidates in nats, averaged over both prompts
            of all pairs.
        standard_error: standard error of the loss, taken over pairs, because the two prompts of a
            pair are not independent; None for a single pair.
        accuracy: share of prompts for which the right candidate has the larger logit.
        logit_difference: the logit of the right candidate minus that of the wrong one, averaged
            over prompts. None in files that were written before it was measured.
        next_token: the same runs, among all tokens; None if that was not measured.
    """

    loss: float
    standard_error: float | None
    accuracy: float
    logit_difference: float | None = None
    next_token: NextToken | None = None

    def __str__(self) -> str:
        parts = [f"loss {_loss_in_words(self)}", f"accuracy {self.accuracy:.1%}"]
        if self.logit_difference is not None:
            parts.append(f"logit difference {self.logit_difference:.2f}")
        return ", ".join(parts)


@checked()
def tasks_table(
    scores: Mapping[str, Score | None], problems: Mapping[str, str] | None = None
) -> str:
    """A table of each task's loss and accuracy, lowest loss first, from `task_scores`.

    Args:
        scores: task → its score; None if it is not possible.
        problems: task → the reason why it is not possible, where that is known.
    """
    scored: dict[str, Score] = {}
    missing: list[str] = []
    for name, score in scores.items():
        if score is None:
            missing.append(name)
        else:
            scored[name] = score
    by_loss = sorted(scored, key=lambda name: scored[name].loss)
    rows = [score_row(name, scored[name]) for name in by_loss]
    text = table(["task", "task loss", "accuracy"], rows) + "\n\n" + _WHAT_LOSS_IS
    if missing:
        text += "\n\nNot possible with this tokenizer and context:"
        for name in missing:
            text += f"\n  {printable(name)}"
            if problems and name in problems:
                text += f": {printable(problems[name])}"
    return text


@checked()
def score_row(name: str, score: Score) -> list[str]:
    """The cells of one table row: name, loss with its standard error, and accuracy."""
    return [name, _loss_in_words(score), f"{score.accuracy:.1%}"]


def _loss_in_words(score: Score) -> str:
    """The loss with its standard error."""
    if score.standard_error is None:
        return f"{score.loss:.3f}"
    return f"{score.loss:.3f} ± {score.standard_error:.3f}"


@checked()
def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table with left-aligned columns and a rule under the header.

    Characters that could steer a terminal are written as escapes.

    Raises:
        ArgumentError: if a row has not as many cells as the header.
    """
    if any(len(row) != len(header) for row in rows):
        raise ArgumentError(f"each row of a table must have {counted(len(header), 'cell')}")
    header, *rows = [list(map(printable, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in (header, rule, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
