"""Seeded synthetic Python files made of the simple idioms that the tasks ask about.

The standard library is so varied that a small model cannot learn from a few million characters of
it, for example, which quote closes a string. These files hold every construct of the tasks (Gao et
al. 2025, arXiv 2511.13653, Table 1) many times, in simple code.

A file is filled in from the templates in idioms.yaml. In a template `<kind>` stands for a fresh
draw of that kind, and `<kind1>`, `<kind2>` … for draws that differ from each other and stay the
same throughout the template. The name of a group of templates is also a kind: it stands for one
template of that group, filled in.

A little more than half of each file consists of one side of pairs from tasks.yaml. `task.py` makes
its prompts from the same templates and words, so that a model trained on these files can do the
tasks.

For a given seed the text must never change, because bundled models and stored runs depend on it.
The random generator must therefore be called at the same places in this file, in the same order.
"""

import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from tl_sparse.arguments import checked


def read_yaml(name: str) -> dict[str, Any]:
    """What a YAML file beside this one holds."""
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def words_by_kind(listed: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Words by kind from texts that list them, as a YAML file has them."""
    return {kind: tuple(words.split()) for kind, words in listed.items()}


_IDIOMS = read_yaml("idioms.yaml")
#: Names and words by kind; none of them is a Python keyword. A word that is listed twice is drawn
#: twice as often. `var` and `vars` share no word, so both can be parameters of one function.
WORDS = words_by_kind(_IDIOMS.pop("words"))
#: Templates by group; a template that is listed twice is drawn twice as often.
TEMPLATES: dict[str, tuple[str, ...]] = {
    group: tuple(templates) for group, templates in _IDIOMS.items()
}
#: The entry of each task in tasks.yaml.
PAIRS: dict[str, dict[str, Any]] = read_yaml("tasks.yaml")

_TASK_NAMES = tuple(PAIRS)
_TASK_SHARES = tuple(task.get("share", 1) for task in PAIRS.values())
# The number of words of each kind that one document uses, so that names recur within a document, as
# they do in real code.
_NAMES_PER_DOCUMENT = {"var": 8, "vars": 5, "fn": 7, "method": 5, "obj": 3}
_PHRASES = (
    "<noun>",
    "<adj> <noun>",
    "the <adj> <noun>",
    "<verb> the <noun>",
    "<verb> the <adj> <noun>",
)
_PHRASE_CUMULATIVE_WEIGHTS = (0.2, 0.5, 0.7, 0.85, 1)

_CHOICE = re.compile(r"«([^«|»]*)\|([^«|»]*)»")
_PLACE = re.compile(r"<([a-z]+)(\d?)>")


class _Place(NamedTuple):
    """A place in a template.

    Attributes:
        kind: the kind of text that goes there; "body" is one to three statements.
        number: 0 for a fresh draw; places with the same kind and the same nonzero number hold the
            same text.
        indent: the number of spaces before a body, by which its later lines are indented as well.
    """

    kind: str
    number: int
    indent: int


@cache
def _parsed(template: str) -> tuple[str, list[_Place]]:
    """The template as a format string for `str.format`, and its places."""
    places = []
    for match in _PLACE.finditer(template):
        kind, digit = match.groups()
        before = template[: match.start()]
        indent = len(before) - len(before.rstrip(" ")) if kind == "body" else 0
        places.append(_Place(kind, int(digit or 0), indent))
    escaped = template.replace("{", "{{").replace("}", "}}")
    return _PLACE.sub("{}", escaped), places


def both_sides(text: str) -> tuple[str, str]:
    """`text` with every `«a|b»` replaced by its a, and `text` with every one replaced by its b."""
    return _CHOICE.sub(r"\1", text), _CHOICE.sub(r"\2", text)


def prompts_of_text(text: str) -> tuple[str, str]:
    """The prompts of a pair: both sides of its text before the answer, the last `«a|b»`."""
    return both_sides(text[: text.rindex("«")])


class Writer:
    """Fills in templates for one document with a few names of each kind, drawn with `rng`.

    Args:
        rng: the random generator.
        words: the names and words by kind.
    """

    def __init__(
        self, rng: random.Random, words: Mapping[str, tuple[str, ...]] = MappingProxyType(WORDS)
    ) -> None:
        self.rng = rng
        self._names = dict(words)
        for kind, n_names in _NAMES_PER_DOCUMENT.items():
            self._names[kind] = tuple(rng.sample(words[kind], n_names))
        self._composed: dict[str, Callable[[], str]] = {
            "phrase": self.phrase,
            "str": self._string,
            "word": self._quoted_noun,
            "q": self._quote,
            "num": self._number,
            "line": self.line,
        }

    def fill(self, template: str) -> str:
        """The template with its places filled in."""
        text, places = _parsed(template)
        numbered: dict[_Place, str] = {}
        values = []
        for place in places:
            if place.kind == "body":
                body = self._statements(2.5)
                values.append(body.replace("\n", "\n" + " " * place.indent))
            elif place.number == 0:
                values.append(self._draw(place.kind))
            else:
                if place not in numbered:
                    numbered[place] = self._draw_another(place.kind, numbered.values())
                values.append(numbered[place])
        return text.format(*values)

    def phrase(self) -> str:
        """A phrase of one to four words, such as a string in code would hold."""
        (pattern,) = self.rng.choices(_PHRASES, cum_weights=_PHRASE_CUMULATIVE_WEIGHTS)
        return self.fill(pattern)

    def line(self) -> str:
        """A statement of one line."""
        pick = self.rng.random()
        if pick < 0.45:
            group = "call_lines"
        elif pick < 0.6:
            group = "string_lines"
        else:
            group = "other_lines"
        return self.fill(self.choose(group))

    def choose(self, group: str) -> str:
        """A random template of a group (several times faster than `rng.choice`)."""
        templates = TEMPLATES[group]
        return templates[int(self.rng.random() * len(templates))]

    def statement(self) -> str:
        """A statement of one or more lines."""
        if self.rng.random() < 0.5:
            return self.line()
        return self.fill(self.choose("statements"))

    def pair(self, task: str) -> str:
        """Three lines of context, and then a pair of the task with its choices marked `«a|b»`."""
        templates = PAIRS[task]["templates"]
        return self.pair_of(templates, PAIRS[task].get("context", templates))

    def pair_of(
        self, templates: Sequence[str], context_templates: Sequence[str], n_lines: int = 3
    ) -> str:
        """Lines of context, and then one of `templates` with its choices marked `«a|b»`.

        Each line of context is a filled-in template. One more than half of them show one side of
        the choice and the others show the other, at random, so that the cues for both answers have
        occurred before, and which of them occurred more often does not give away the answer.

        Args:
            templates: templates of the pair.
            context_templates: templates of the context.
            n_lines: the number of lines of context, which is odd.
        """
        both = (0, 1) * (n_lines // 2)
        sides = self.rng.sample((*both, self.rng.randrange(2)), n_lines)
        return self.pair_after(sides, templates, context_templates)

    def pair_after(
        self, sides: Sequence[int], templates: Sequence[str], context_templates: Sequence[str]
    ) -> str:
        """A line of context that shows each of `sides`, 0 or 1, and then one of `templates`."""
        lines = [self.context_line(side, context_templates) for side in sides]
        lines.append(self.fill(self.rng.choice(templates)))
        return "\n".join(lines) + "\n"

    def context_line(self, side: int, context_templates: Sequence[str]) -> str:
        """One of these templates, filled in, as it is on this side of a pair."""
        return both_sides(self.fill(self.rng.choice(context_templates)))[side]

    def document(self) -> str:
        """A whole file of about 5 to 40 lines."""
        lines_wanted = 5 + int(self.rng.random() * 18)
        blocks = []
        if self.rng.random() < 0.3:
            blocks.append(self.fill("import <module1>\nimport <module2>"))
        text = ""
        while text.count("\n") < lines_wanted:
            blocks.append(self._block())
            text = "\n\n".join(blocks) + "\n"
        return text

    def _block(self) -> str:
        """The text between two blank lines of a document."""
        pick = self.rng.random()
        if pick < 0.5:
            (task,) = self.rng.choices(_TASK_NAMES, _TASK_SHARES)
            return self.rng.choice(both_sides(self.pair(task))).rstrip("\n")
        if pick < 0.72:
            return self._statements(4)
        if pick < 0.93:
            return self.fill(self.choose("functions"))
        return self.fill(self.choose("classes"))

    def _statements(self, spread: float) -> str:
        """One statement, followed by fewer than `spread` further statements."""
        n_statements = 1 + int(self.rng.random() * spread)
        return "\n".join(self.statement() for _ in range(n_statements))

    def _draw(self, kind: str) -> str:
        names = self._names.get(kind)
        if names is not None:
            return names[int(self.rng.random() * len(names))]
        if kind in TEMPLATES:
            return self.fill(self.choose(kind))
        return self._composed[kind]()

    def _draw_another(self, kind: str, taken: Collection[str]) -> str:
        """A draw that differs from everything in `taken`."""
        drawn = self._draw(kind)
        while drawn in taken:
            drawn = self._draw(kind)
        return drawn

    def _string(self) -> str:
        return self._quoted(self.phrase())

    def _quoted_noun(self) -> str:
        return self._quoted(self._draw("noun"))

    def _quoted(self, text: str) -> str:
        quote = self._quote()
        return quote + text + quote

    def _quote(self) -> str:
        return "'" if self.rng.random() < 0.5 else '"'

    def _number(self) -> str:
        return str(int(self.rng.random() ** 3 * 100))  # mostly small numbers


@checked()
def idiom_documents(n_chars: int, seed: int) -> list[str]:
    """Synthetic Python files that have at least `n_chars` characters in all, and no file more than
    that takes.

    The same arguments give the same files; a larger `n_chars` gives the same files, followed by
    further ones.
    """
    rng = random.Random(seed)
    documents: list[str] = []
    length = 0
    while length < n_chars:
        document = Writer(rng).document()
        documents.append(document)
        length += len(document)
    return documents
