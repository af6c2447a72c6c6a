"""Seeded synthetic Python files made of the simple idioms that the tasks ask about.

The standard library alone is too varied for a small model to learn from a few million characters,
say, which quote closes a string. These files hold every construct of the tasks (paper, Table 1)
many times, in simple code.

A file is filled in from the templates in idioms.yaml. In a template `<kind>` stands for a fresh
draw of that kind, and `<kind1>`, `<kind2>` … for draws that differ from each other and stay the
same throughout the template. The name of a group of templates is a kind as well: one of them,
filled in.

A good half of a file are the pairs in tasks.yaml, one side of each. `tasks.py` makes its prompts of
the same templates and words, so that a model trained here can do the tasks.
"""

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
#: Names and words by kind, none a keyword. A word given twice is drawn twice as often. `var` and
#: `vars` have no word in common, so both can be parameters of one function.
WORDS: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split()) for kind, words in _DATA.pop("words").items()
}
#: Templates by what they are; one given twice is drawn twice as often.
TEMPLATES: dict[str, tuple[str, ...]] = {
    group: tuple(templates) for group, templates in _DATA.items()
}
#: What tasks.yaml says of each task.
PAIRS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8")
)
_SHARES = [task.get("share", 1) for task in PAIRS.values()]
# How many words of a kind a document uses: names come back within a document, as in real code.
_NAMES_PER_DOCUMENT = {"var": 8, "vars": 5, "fn": 7, "method": 5, "obj": 3}
_PHRASES = (
    "<noun>",
    "<adj> <noun>",
    "the <adj> <noun>",
    "<verb> the <noun>",
    "<verb> the <adj> <noun>",
)

_CHOICE = re.compile(r"«([^«|»]*)\|([^«|»]*)»")
_PLACE = re.compile(r"( *)<body>|<([a-z]+)(\d?)>")


@cache
def _prepare(template: str) -> tuple[str, list[tuple[str, int]]]:
    """A template as text for `str.format`, and what goes in its places: kind, and number or 0 for a
    fresh draw.
    """
    slots: list[tuple[str, int]] = []

    def place(match: re.Match[str]) -> str:
        if match[2] is None:
            slots.append(("body", len(match[1])))  # for a body the number is its indentation
            return match[1] + "{}"
        slots.append((match[2], int(match[3] or 0)))
        return "{}"

    return _PLACE.sub(place, template.replace("{", "{{").replace("}", "}}")), slots


def both_sides(text: str) -> tuple[str, str]:
    """`text` with every `«a|b»` as its a, and as its b."""
    return _CHOICE.sub(r"\1", text), _CHOICE.sub(r"\2", text)


class Writer:
    """Fills in templates with the names of one document: a few of each kind, drawn with `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._names = WORDS | {
            k: tuple(rng.sample(WORDS[k], n)) for k, n in _NAMES_PER_DOCUMENT.items()
        }
        self._composed: dict[str, Callable[[], str]] = {
            "phrase": self.phrase,
            "str": lambda: self._quoted(self.phrase()),
            "word": lambda: self._quoted(self._draw("noun")),
            "q": lambda: "'" if rng.random() < 0.5 else '"',
            "num": lambda: str(int(rng.random() ** 3 * 100)),  # mostly small
            "line": self.line,
        }

    def fill(self, template: str) -> str:
        """The template with its places filled in."""
        text, slots = _prepare(template)
        bound, values = dict[tuple[str, int], str](), list[str]()
        for slot in slots:
            kind, number = slot
            if kind == "body":
                body = "\n".join(self.statement() for _ in range(1 + int(self.rng.random() * 2.5)))
                values.append(body.replace("\n", "\n" + " " * number))
            elif number == 0:
                values.append(self._draw(kind))
            else:
                while slot not in bound:
                    if (drawn := self._draw(kind)) not in bound.values():
                        bound[slot] = drawn
                values.append(bound[slot])
        return text.format(*values)

    def phrase(self) -> str:
        """One to four words, as a string in code would have them."""
        (pattern,) = self.rng.choices(_PHRASES, cum_weights=(0.2, 0.5, 0.7, 0.85, 1))
        return self.fill(pattern)

    def line(self) -> str:
        """A statement of one line."""
        pick = self.rng.random()
        return self.fill(
            self.choose(
                "call_lines" if pick < 0.45 else "string_lines" if pick < 0.6 else "other_lines"
            )
        )

    def choose(self, group: str) -> str:
        """One of a group of templates (several times faster than `rng.choice`)."""
        templates = TEMPLATES[group]
        return templates[int(self.rng.random() * len(templates))]

    def statement(self) -> str:
        """A statement of one line or several."""
        return self.line() if self.rng.random() < 0.5 else self.fill(self.choose("statements"))

    def pair(self, task: str) -> str:
        """Three other templates, two of one side and one of the other, then both sides of a pair of
        that task.

        So the cues of both answers have come before, and which came more often does not tell the
        answer.
        """
        templates = PAIRS[task]["templates"]
        text = ""
        for side in self.rng.sample((0, 1, self.rng.randrange(2)), 3):
            text += (
                both_sides(self.fill(self.rng.choice(PAIRS[task].get("context", templates))))[side]
                + "\n"
            )
        return text + self.fill(self.rng.choice(templates)) + "\n"

    def document(self) -> str:
        """A whole file of about 5 to 40 lines."""
        lines_wanted = 5 + int(self.rng.random() * 18)
        blocks = (
            [self.fill("import <module1>\nimport <module2>")] if self.rng.random() < 0.3 else []
        )
        text = ""
        while text.count("\n") < lines_wanted:
            pick = self.rng.random()
            if pick < 0.5:
                (task,) = self.rng.choices(tuple(PAIRS), _SHARES)
                blocks.append(self.rng.choice(both_sides(self.pair(task))).rstrip("\n"))
            elif pick < 0.72:
                blocks.append(
                    "\n".join(self.statement() for _ in range(1 + int(self.rng.random() * 4)))
                )
            else:
                blocks.append(self.fill(self.choose("functions" if pick < 0.93 else "classes")))
            text = "\n\n".join(blocks) + "\n"
        return text

    def _draw(self, kind: str) -> str:
        if (names := self._names.get(kind)) is not None:
            return names[int(self.rng.random() * len(names))]
        if kind in TEMPLATES:
            return self.fill(self.choose(kind))
        return self._composed[kind]()

    def _quoted(self, text: str) -> str:
        return f"'{text}'" if self.rng.random() < 0.5 else f'"{text}"'


def idiom_documents(n_chars: int, seed: int) -> list[str]:
    """Synthetic Python files of together at least `n_chars` characters and less than one file more.

    The same arguments give the same files; a larger `n_chars` gives the same files and more of
    them.
    """
    rng, documents, length = random.Random(seed), list[str](), 0
    while length < n_chars:
        documents.append(Writer(rng).document())
        length += len(documents[-1])
    return documents
