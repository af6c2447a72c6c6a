"""Statements, numbers and tables of Python source, as they are collected line by line."""

import keyword
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import numpy as np

from tl_sparse.parsing import printable
from tl_sparse.programs.numpy_functions import Array
from tl_sparse.programs.python_notes import PromptNotes

LINE_LENGTH = 100
INDENT = "    "
#: A value by token is a dictionary in the source if at most so many tokens differ from the others.
MAX_TOKENS_SHOWN = 8
#: How many tokens a comment names on each end of a table by token.
TOKENS_IN_COMMENT = 3
#: How many of the tokens in which prompts differ it names.
MAX_TELLING = 6


def number(value: float) -> str:
    """A float with 13 significant digits, which keep sums exact to about 1e-12."""
    text = f"{value:.13g}"
    return text if set(text) & set(".e") else f"{text}.0"


@dataclass(frozen=True)
class Term:
    """A factor times an expression; without an expression, a constant."""

    factor: float
    expression: str = ""

    def __str__(self) -> str:
        if not self.expression:
            return number(self.factor)
        if self.factor == 1.0:
            return self.expression
        if self.factor == -1.0:
            return f"-{self.expression}"
        return f"{number(self.factor)} * {self.expression}"


def sum_pieces(terms: Sequence[Term]) -> list[str]:
    """The terms of a sum, each after the first with its sign in front."""
    pieces: list[str] = []
    for term in terms:
        text = str(term)
        if not pieces:
            pieces.append(text)
        elif text.startswith("-"):
            pieces.append(f"- {text[1:]}")
        else:
            pieces.append(f"+ {text}")
    return pieces or ["0.0"]


@dataclass
class Statement:
    """An assignment in the source.

    Attributes:
        target: what is assigned to, with the operator: "attn_q_0_h3_9 =".
        pieces: the parts of its right side, between which the line may be broken.
        opening, closing: what stands around them, such as "gelu(" and ")".
        name: the name that it gives; "" if it gives none.
        is_node: whether the name is that of a node.
        comments: what is said above it.
    """

    target: str
    pieces: list[str]
    opening: str = ""
    closing: str = ""
    name: str = ""
    is_node: bool = False
    comments: list[str] = field(default_factory=list)

    def identifiers(self) -> set[str]:
        """The identifiers on the right side."""
        text = " ".join([self.opening, *self.pieces, self.closing])
        return set(re.findall(r"[A-Za-z_]\w*", text))

    def lines(self, comment: str = "") -> list[str]:
        """The lines of the statement, with this comment at its end."""
        one_line = f"{INDENT}{self.target} {self.opening}{' '.join(self.pieces)}{self.closing}"
        with_comment = f"{one_line}  # {comment}"
        if comment and len(with_comment) <= LINE_LENGTH:
            return [*as_comments(self.comments), with_comment]
        above = as_comments([*self.comments, comment] if comment else self.comments)
        if len(one_line) <= LINE_LENGTH:
            return [*above, one_line]
        opening, closing = (self.opening, self.closing) if self.opening else ("(", ")")
        lines = [*above, *self._beginning(opening)]
        for piece in self.pieces:
            lines += _wrapped(piece, 2 * INDENT)
        return [*lines, f"{INDENT}{closing}"]

    def _beginning(self, opening: str) -> list[str]:
        """The lines before those of the pieces."""
        line = f"{INDENT}{self.target} {opening}"
        if len(line) <= LINE_LENGTH:
            return [line]
        # Only a list of variables is so long.
        variables = self.target.removeprefix("[").removesuffix("] =")
        return [f"{INDENT}[", *_wrapped(variables, 2 * INDENT), f"{INDENT}] = {opening}"]


def as_comments(texts: Iterable[str], indent: str = INDENT) -> list[str]:
    """The texts as lines of comment; a text with line breaks stays one comment."""
    lines = []
    for text in texts:
        lines += _wrapped(printable(text), f"{indent}# ")
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return wrap(
        text,
        LINE_LENGTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


class SourceText:
    """The Python source of a circuit while it is written.

    Attributes:
        names: node → the identifier that stands for it.
        text_of: token → its text.
        tables: the arrays that the source reads from its .npz file.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        labels: Mapping[str, str],
        text_of: Callable[[int], str],
        notes: PromptNotes,
    ) -> None:
        self.names = names
        self.text_of = text_of
        self.tables: dict[str, Array] = {}
        self._labels = labels
        self._notes = notes
        self._section = ""
        self._constants: list[str] = []
        self._body: list[Statement | str] = []

    # What a statement consists of

    def table(self, name: str, values: Any) -> str:
        """Store an array, and return the expression that reads it."""
        self.tables[name] = np.array(values)
        return f'TABLES["{name}"]'

    def by_token(self, name: str, values: Any) -> str:
        """The expression of a value by token: a dictionary if few tokens differ from the rest."""
        values = np.array(values)
        distinct, counts = np.unique(values, return_counts=True)
        other = distinct[counts.argmax()]
        differing = np.flatnonzero(values != other)
        if len(differing) > MAX_TOKENS_SHOWN:
            return f"{self.table(name, values)}[tokens]"
        if len(differing) == 0:
            return f"np.full(n, {number(other)})"
        constant = identifier(name).upper()
        self._constants += [f"{constant} = {{"]
        for token in differing.tolist():
            line = f"{INDENT}{token}: {number(values[token])},"
            self._constants.append(f"{line}  # {self.text_of(token)}")
        self._constants.append("}")
        return f"lookup({constant}, tokens, {number(other)})"

    def strongest_tokens(self, values: Any) -> str:
        """A comment that names the tokens with the largest and the smallest values."""
        values = np.array(values)
        order = values.argsort(kind="stable")
        parts = []
        for which, chosen in {"highest": order[::-1], "lowest": order}.items():
            shown = []
            for token in chosen[:TOKENS_IN_COMMENT].tolist():
                shown.append(f"{self.text_of(token)} {values[token]:.3g}")
            parts.append(f"{which}: {', '.join(shown)}")
        telling = [token for token in self._notes.telling_tokens if values[token] != 0.0]
        if telling:
            telling = sorted(telling, key=lambda token: -abs(values[token]))[:MAX_TELLING]
            shown = [f"{self.text_of(token)} {values[token]:.3g}" for token in telling]
            parts.append(f"prompts differ in {', '.join(shown)}")
        return "; ".join(parts)

    # Writing

    def section(self, title: str) -> None:
        """Begin a part of the function, which has this comment above its first statement."""
        self._section = title

    def write(self, statement: Statement) -> None:
        """Write a statement."""
        if self._section:
            self._body += ["", f"{INDENT}# {self._section}"]
            self._section = ""
        self._body.append(statement)

    def write_contest(self, nodes: Sequence[str], function: str, arguments: str) -> None:
        """Write the AbsTopK of some nodes, which gives their variables new values."""
        variables = listed(self.names[node] for node in nodes)
        comments = []
        if all(node in self._notes.zeros for node in nodes):
            shares = ", ".join(f"{self._notes.zeros[node]:.0%}" for node in nodes)
            comments.append(f"In prompts, this is 0 at {shares} of the positions.")
        self.write(Statement(f"{variables} =", [arguments], f"{function}(", ")", comments=comments))

    def assign(self, name: str, *pieces: str) -> None:
        """Write a statement that gives this name."""
        self.write(Statement(f"{name} =", list(pieces), name=name))

    def write_node(
        self,
        node: str,
        pieces: list[str],
        opening: str = "",
        closing: str = "",
        comments: Sequence[str] = (),
    ) -> None:
        """Write the statement of a node, under its label if it has one."""
        name = self.names[node]
        label = self._labels.get(node)
        above = [*([label] if label else []), *comments]
        self.write(Statement(f"{name} =", pieces, opening, closing, name, True, above))

    @property
    def constants(self) -> list[str]:
        """The lines of the dictionaries."""
        return self._constants

    def body(self) -> list[str]:
        """The lines of the statements; behind each node, the names that are computed from it."""
        users = self._users()
        lines: list[str] = []
        for entry in self._body:
            if isinstance(entry, str):
                lines.append(entry)
                continue
            comment = ""
            if entry.is_node:
                of_node = users.get(entry.name, ["only the AbsTopK of other nodes"])
                comment = f"→ {', '.join(of_node)}"
            lines += entry.lines(comment)
        return lines

    def _users(self) -> dict[str, list[str]]:
        """Variable → the names whose statements use it."""
        users = defaultdict[str, list[str]](list)
        for entry in self._body:
            if isinstance(entry, Statement) and entry.name:
                for variable in entry.identifiers() - {entry.name}:
                    users[variable].append(entry.name)
        return users


def listed(names: Iterable[str]) -> str:
    """The names as a list in the source."""
    return f"[{', '.join(names)}]"


def identifier(name: str) -> str:
    """The name of a node as a Python identifier: `0.attn_q h3.9` → `attn_q_0_h3_9`."""
    layer, _, rest = name.partition(".")
    location, _, index = rest.partition(" ")
    text = f"{location}_{layer}_{index}" if layer.isdecimal() and index else name
    return "".join(c if c.isalnum() else "_" for c in text)


def is_identifier(name: str) -> bool:
    """Whether a name can stand for a variable."""
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
