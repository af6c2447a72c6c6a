"""Seeded synthetic Python files made of the simple idioms that the tasks ask about.

The standard library alone is too varied for a small model to learn from a few million characters, say, which
quote closes a string. These files hold every construct of the tasks (paper, Table 1) many times, in simple
code.

A file is filled in from the templates below. In a template `<kind>` stands for a fresh draw of that kind, and
`<kind1>`, `<kind2>` … for draws that differ from each other and stay the same throughout the template.
`tasks.py` fills its prompts from the same templates and words, so that a model trained here can do the tasks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection
from functools import cache
from typing import NamedTuple

# Names and words, none a keyword. A word given twice is drawn twice as often. `var` and `vars` have no word
# in common, so both can be parameters of one function.
WORDS: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split())
    for kind, words in {
        "noun": "house river garden book table window road tree stone bird letter market bridge train "
        "doctor teacher paper mountain kitchen village island song dog cat horse door ship lamp box "
        "field city forest story picture clock",
        "adj": "red old small dark green quiet long new blue round cold white heavy open empty bright "
        "warm broken happy little large black",
        "verb": "open close find read move clean paint watch build follow check leave call hold",
        "var": "name value item count total size color text line data result state level price key "
        "score index width label user node path current message",
        "vars": "names values items numbers words rows lines records users keys nodes files parts scores "
        "groups points",
        "flag": "done ready running valid active found enabled visible",
        "fn": "print log show send write load save find_item get_value parse run update make_list check "
        "read_all add_one build process format_name compute start stop warn report",
        "method": "append remove save load send get find write update log insert show close start add_item",
        "obj": "self logger window client parser config server cache queue store",
        "cls": "User Node Item Table Point Counter Reader Writer Shape Account Server Message Stack Car",
        "module": "os sys re json math time random logging string copy",
        "infile": "input.txt source.txt data.csv config.json input.csv source.py words.txt",
        "outfile": "output.txt result.txt report.csv log.txt output.json summary.txt out.csv",
        "error": "ValueError KeyError TypeError OSError",
        "op": "+ - * +",
        "cmp": "== != < > <= >= ==",
    }.items()
}
# How many of these a document uses: names come back within a document, as in real code.
_NAMES_PER_DOCUMENT = {"var": 8, "vars": 5, "fn": 7, "method": 5, "obj": 3}

# Whole statements of one line each, which can stand anywhere. A template given twice is drawn twice as often.
CALL_LINES = (
    "<fn>(<str>)",
    "<fn>(<str>)",
    "<fn>(<str>, <str>)",
    "<fn>(<var>, <str>)",
    "<obj>.<method>(<str>)",
    "<obj>.<method>(<str>, <var>)",
    "<var> = <fn>(<str>)",
    "<var> = <fn>(<str>, <num>)",
    "<var> = <obj>.<method>(<str>)",
    "<vars>.append(<str>)",
)
STRING_LINES = (
    "<var> = <str>",
    "<var> = <word>",
    "<vars>[<word>] = <str>",
    "<var> = <vars>[<word>]",
    "<var1> += <str>",
    "<vars> = [<str>, <str>]",
)
# Lines with one string that is opened and closed: the distractors of a quote task.
CLOSED_STRINGS = (
    "<fn>(<str>)",
    "<fn>(<str>)",
    "<obj>.<method>(<str>)",
    "<var> = <fn>(<str>)",
    "<vars>.append(<str>)",
    "<var> = <str>",
)
# A call that goes on after its string: what a quote task ends with, once the quote is put after the bracket.
OPEN_CALLS = (
    "<fn>(<phrase>",
    "<fn>(<phrase>",
    "<obj>.<method>(<phrase>",
    "<var> = <fn>(<phrase>",
    "<vars>.append(<phrase>",
)
OTHER_LINES = (
    "<var> = <num>",
    "<var1> = <var2> <op> <num>",
    "<var> += <num>",
    "<flag> = True",
    "<flag> = False",
    "<var1>, <var2> = <var2>, <var1>",
    "<fn>(<var>)",
    "<vars> = [<num>, <num>, <num>]",
    "<vars> = [<word>, <word>]",
    "<vars> = [[<num>, <num>], [<num>, <num>]]",
    "<vars> = [[<var1>, <var2>], [<num>, <num>, <num>]]",
    "<vars> = {<word>: <num>, <word>: <num>}",
    "<vars> = {<word>: [<num>, <num>], <word>: [<num>]}",
    "<vars>.append([<var1>, <var2>])",
    "<fn>([<var1>, <num>, <var2>])",
    "<var1> = <var2> if <var2> <cmp> <num> else <num>",
    "<var> = <str> if <flag> else <word>",
    "<fn> = lambda <var1>: <var1> <op> <num>",
    "<fn> = lambda <var1>, <var2>: <var1> <op> <var2>",
    "<vars1> = sorted(<vars2>, key=lambda <var1>: <var1>[<num>])",
    "<fn>(f<q1><noun> {<var>}<q1>)",
    "<fn>(f<q1>{<var1>} <noun> {<var2>}<q1>)",
    "<fn>(f<q1>the <adj> <noun>: {<var>}<q1>)",
    "<fn>(<var1>, <var2>=None)",
    "<vars> = open(<q1><infile><q1>, 'r')",
    "<vars> = open(<q1><outfile><q1>, 'w')",
    "<vars> = set(<vars>)",
)
# Statements of several lines. Statements of one line go where `<line>` stands.
STATEMENTS = (
    "for <var1> in <vars1>:\n    <line>\n    <fn>(<var1>)",
    "for <var1> in <vars1>:\n    if <var1> == <word>:\n        <vars2>.append(<var1>)",
    "for <var1> in range(<num>):\n    <line>",
    "for <var1> in range(len(<vars1>)):\n    <fn>(<vars1>[<var1>])",
    "for <var1>, <var2> in enumerate(<vars1>):\n    <fn>(<var1>, <var2>)",
    "for <var1>, <var2> in enumerate(<vars1>):\n    <line>",
    "while <var1> <cmp> <num>:\n    <var1> += <num>\n    <line>",
    "while <flag>:\n    <line>\n    <line>",
    "while True:\n    <line>\n    if <flag>:\n        break",
    "if <var1> == <num>:\n    <line>",
    "if <flag1> == True:\n    <line>\n    <flag1> = False",
    "if <var1> == <word>:\n    <line>\nelse:\n    <line>",
    "if <var1> <cmp> <num>:\n    <line>\nelif <var1> <cmp> <num>:\n    <line>\nelse:\n    <line>",
    "if <var1> in <vars1>:\n    <line>\nelif <flag>:\n    <line>",
    "with open(<q1><infile><q1>, 'r') as <var1>:\n    <vars> = <var1>.read()",
    "with open(<q1><infile><q1>, 'r') as <var1>:\n    for <var2> in <var1>:\n        <fn>(<var2>)",
    "with open(<q1><outfile><q1>, 'w') as <var1>:\n    <var1>.write(<str>)",
    "with open(<q1><outfile><q1>, 'w') as <var1>:\n    <var1>.write(<var2>)",
    "<var1> = set()\n<var1>.add(<var2>)",
    "<var1> = set()\nfor <var2> in <vars1>:\n    <var1>.add(<var2>)",
    "<var1> = set()\n<line>\n<var1>.add(<word>)",
    "<var1> = <q1><q1>\n<var1> += <str>",
    "<var1> = <word>\nfor <var2> in <vars1>:\n    <var1> += <var2>",
    "<var1> = <str>\n<line>\n<var1> += <word>",
    "<vars1> = {\n    <word>: <num>,\n    <word>: <str>,\n    <word>: <var1>,\n}",
    "<vars1> = [\n    <str>,\n    <str>,\n    <word>,\n]",
    "try:\n    <line>\nexcept <error>:\n    <fn>(<str>)",
)
FUNCTIONS = (
    "def <fn>():\n    <body>\n    return True",
    "def <fn>(<var1>):\n    <body>\n    return <var1>",
    "def <fn>(<var1>, <var2>):\n    <body>\n    return <var1> <op> <var2>",
    "def <fn>(<var1>, <vars1>):\n    if <var1> in <vars1>:\n        return True\n    return False",
    "def <fn>(<var1>, <var2>=None):\n    <body>\n    return <var2>",
    "def <fn>(<var1>=None):\n    <body>\n    return <var1> == <num>",
    "def <fn>(<var1>=None, <var2>=None):\n    <body>",
    "def <fn>(<vars1>, <var1>=None, <var2>=None):\n    <body>\n    return <vars1>",
    "def <fn>(<vars1>):\n    <q1><q1><q1>The <adj> <noun>.<q1><q1><q1>\n    <body>\n    return len(<vars1>)",
    "def <fn>(<vars1>):\n    for <var1> in <vars1>:\n        if <var1> <cmp> <num>:\n"
    "            return True\n    return False",
    "def <fn>(<var1>):\n    while True:\n        <line>\n        if <var1> == <num>:\n"
    "            return True",
)
CLASSES = (
    "class <cls>:\n    def __init__(self, <var1>):\n        self.<var1> = <var1>\n        self.<vars1> = []",
    "class <cls>:\n    def __init__(self, <var1>, <var2>):\n        self.<var1> = <var1>\n"
    "        self.<var2> = <var2>\n\n"
    "    def <method>(self):\n        <body>\n        return self.<var1>",
    "class <cls>:\n    def __init__(self, <var1>, <var2>, <var3>=None):\n        self.<var1> = <var1>\n"
    "        self.<var2> = <var2>\n        self.<var3> = <var3>\n\n"
    "    def <method>(self, <vars1>):\n        self.<vars1> = <vars1>\n        <body>",
)

_PLACE = re.compile(r"( *)<body>|<([a-z]+)(\d?)>")


class _Template(NamedTuple):
    """A template made ready: `text` for `str.format`, and what goes in its places."""

    text: str
    slots: tuple[tuple[str, int], ...]  # (kind, number), number 0: a fresh draw


@cache
def _prepare(template: str) -> _Template:
    slots: list[tuple[str, int]] = []

    def place(match: re.Match[str]) -> str:
        if match[2] is None:
            slots.append(("body", len(match[1])))  # for a body the number is its indentation
            return match[1] + "{}"
        slots.append((match[2], int(match[3] or 0)))
        return "{}"

    escaped = template.replace("{", "{{").replace("}", "}}")
    return _Template(_PLACE.sub(place, escaped), tuple(slots))


class Writer:
    """Fills in templates with the names of one document: a few of each kind, drawn with `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._names = WORDS | {k: tuple(rng.sample(WORDS[k], n)) for k, n in _NAMES_PER_DOCUMENT.items()}
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
        bound: dict[tuple[str, int], str] = {}
        values = []
        for slot in slots:
            kind, number = slot
            if kind == "body":
                value = self._body(indent=number)
            elif number == 0:
                value = self._draw(kind)
            elif (value := bound.get(slot, "")) == "":
                value = bound[slot] = self._draw_other_than(bound.values(), kind)
            values.append(value)
        return text.format(*values)

    def phrase(self) -> str:
        """One to four words, as a string in code would have them."""
        draw, pattern = self._draw, self.rng.random()
        if pattern < 0.2:
            return draw("noun")
        if pattern < 0.5:
            return f"{draw('adj')} {draw('noun')}"
        if pattern < 0.7:
            return f"the {draw('adj')} {draw('noun')}"
        if pattern < 0.85:
            return f"{draw('verb')} the {draw('noun')}"
        return f"{draw('verb')} the {draw('adj')} {draw('noun')}"

    def line(self) -> str:
        """A statement of one line."""
        pick = self.rng.random()
        templates = CALL_LINES if pick < 0.45 else STRING_LINES if pick < 0.6 else OTHER_LINES
        return self.fill(self.choose(templates))

    def choose(self, templates: tuple[str, ...]) -> str:
        """One of the templates (several times faster than `rng.choice`)."""
        return templates[int(self.rng.random() * len(templates))]

    def statement(self) -> str:
        """A statement of one line or several."""
        return self.line() if self.rng.random() < 0.5 else self.fill(self.choose(STATEMENTS))

    def document(self) -> str:
        """A whole file of about 5 to 40 lines."""
        lines_wanted = 5 + int(self.rng.random() * 18)
        blocks = [self.fill("import <module1>\nimport <module2>")] if self.rng.random() < 0.3 else []
        text = ""
        while text.count("\n") < lines_wanted:
            pick = self.rng.random()
            if pick < 0.45:
                blocks.append("\n".join(self.statement() for _ in range(1 + int(self.rng.random() * 4))))
            else:
                blocks.append(self.fill(self.choose(FUNCTIONS if pick < 0.85 else CLASSES)))
            text = "\n\n".join(blocks) + "\n"
        return text

    def _draw(self, kind: str) -> str:
        if (names := self._names.get(kind)) is not None:
            return names[int(self.rng.random() * len(names))]
        return self._composed[kind]()

    def _draw_other_than(self, taken: Collection[str], kind: str) -> str:
        while (value := self._draw(kind)) in taken:
            pass
        return value

    def _quoted(self, text: str) -> str:
        return f"'{text}'" if self.rng.random() < 0.5 else f'"{text}"'

    def _body(self, indent: int) -> str:
        body = "\n".join(self.statement() for _ in range(1 + int(self.rng.random() * 2.5)))
        return body.replace("\n", "\n" + " " * indent)


def idiom_documents(n_chars: int, seed: int) -> list[str]:
    """Synthetic Python files of together at least `n_chars` characters and less than one file more.

    The same arguments give the same files; a larger `n_chars` gives the same files and more of them.
    """
    rng = random.Random(seed)
    documents: list[str] = []
    length = 0
    while length < n_chars:
        documents.append(Writer(rng).document())
        length += len(documents[-1])
    return documents
