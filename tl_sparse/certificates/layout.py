"""How the text of a certificate is laid out: sections, paragraphs, and numbers in tables."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from tl_sparse.evaluation import Estimate
from tl_sparse.tasks import Score, table

#: The width of paragraphs, and of tables whose last column is words, in characters.
WIDTH = 96
#: Words in a table get at least so many characters of a line, however wide the other columns are.
_LEAST_WORDS = 30
#: What stands in a table where there is no number.
NOTHING = "–"
#: A table lists at most as many nodes, edges or heads.
MOST_ROWS = 12


@dataclass(frozen=True)
class SectionText:
    """The text of a section.

    Attributes:
        title: its number and its question.
        parts: tables, as `tasks.table` lays them out, and paragraphs.
    """

    title: str
    parts: list[str] = field(default_factory=list)

    @property
    def body(self) -> str:
        """The text without its title."""
        return "\n\n".join(filter(None, self.parts))

    def __str__(self) -> str:
        return f"{self.title}\n{'-' * len(self.title)}\n\n{self.body}"


def paragraph(*sentences: str) -> str:
    """Sentences as a paragraph; empty ones are left out."""
    return textwrap.fill(" ".join(filter(None, sentences)), WIDTH)


def table_of_words(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose last column is words, which go on in further lines where they are long."""
    columns = zip(header, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns][:-1]
    before_words = sum(2 + width for width in widths) + 2
    room = max(WIDTH - before_words, _LEAST_WORDS)
    lines: list[list[str]] = []
    for *cells, words in rows:
        first, *others = textwrap.wrap(words, room, break_long_words=False) or [""]
        lines.append([*cells, first])
        lines += [[*[""] * len(cells), other] for other in others]
    return table(header, lines)


def shows(what: str, not_what: str) -> str:
    """What the numbers of a section show, and what they do not."""
    return f"{paragraph('Shows:', what)}\n{paragraph('Does not show:', not_what)}"


def estimate(value: Estimate | None) -> str:
    """A number with its standard error."""
    return NOTHING if value is None else str(value)


def number(value: float | None) -> str:
    """A number without a standard error."""
    return NOTHING if value is None else f"{value:.3f}"


def share(value: Estimate | None) -> str:
    """A share in percent, with its standard error."""
    if value is None:
        return NOTHING
    if value.standard_error is None:
        return f"{value.value:.1%}"
    return f"{value.value:.1%} ± {100 * value.standard_error:.1f}"


def loss(score: Score | None) -> str:
    """The task loss of a score, with its standard error."""
    if score is None:
        return NOTHING
    return str(Estimate(score.loss, score.standard_error))


def accuracy(score: Score | None) -> str:
    """The accuracy of a score in percent."""
    return NOTHING if score is None else f"{score.accuracy:.1%}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence; the first ones, and how many more there are."""
    text = ", ".join(names[:most])
    n_more = len(names) - most
    return f"{text} and {n_more} more" if n_more > 0 else text
