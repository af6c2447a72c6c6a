"""Reading expressions from text: the grammar of `expressions`, and nothing else of Python."""

import ast
import keyword
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from tl_sparse.errors import DataError
from tl_sparse.explanations.building import add, both, either, opposite, times
from tl_sparse.explanations.expressions import (
    BRACKETS,
    QUOTES,
    TOKEN_NAMES,
    Average,
    Call,
    Compare,
    Count,
    Cut,
    Depth,
    Distance,
    Expression,
    Here,
    If,
    Inside,
    Is,
    Last,
    Latest,
    Number,
    Position,
    Ref,
    Repeated,
    Same,
    Seen,
    Share,
    TokenLiteral,
    TokenSet,
    literal,
    token_set,
)
from tl_sparse.parsing import printable

#: The longest text that is read, and how deep its parts may be nested.
MAX_CHARS = 100_000
MAX_DEPTH = 60
_FUNCTIONS = {
    "count": "a set of tokens",
    "distance": "a set of tokens",
    "seen": "a set of tokens",
    "share": "two sets of tokens",
    "last": "two sets of tokens",
    "depth": 'opening brackets, such as "(["',
    "inside": "a quote, \"'\" or '\"'",
    "abs": "a number",
    "gelu": "a number",
    "max": "0 and a number",
    "cut": "two numbers",
    "latest": "a number and a set of tokens",
    "average": "a value, a score, and the score of nothing",
    "here": "a value, within the score of average",
}
#: All names that have a meaning of their own, so that no node can be called so.
RESERVED = frozenset([*TOKEN_NAMES, *_FUNCTIONS, "position", "repeated", "set", *keyword.kwlist])


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that expressions can name.

    Attributes:
        texts: the text of each token.
        ids: text → id, of the tokens whose text no other token has.
    """

    texts: tuple[str, ...]
    ids: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_texts(cls, texts: Collection[str]) -> "Vocabulary":
        """The vocabulary with these texts, in the order of the ids."""
        ids: dict[str, int] = {}
        repeated = set()
        for token, text in enumerate(texts):
            if text in ids:
                repeated.add(text)
            ids[text] = token
        return cls(tuple(texts), {text: ids[text] for text in ids if text not in repeated})

    def literal_of(self, token: int) -> TokenLiteral:
        """How an expression names a token: by its text, or by its id if the text is not unique."""
        text = self.texts[token]
        return text if self.ids.get(text) == token and text else token

    def set_of(self, tokens: Collection[int]) -> TokenSet:
        """The set of the tokens with these ids."""
        return token_set(*map(self.literal_of, tokens))

    def id_of(self, token: TokenLiteral) -> int:
        """The id of the token that an expression names so.

        Raises:
            DataError: if the vocabulary has no such token.
        """
        if isinstance(token, int):
            if not 0 <= token < len(self.texts):
                raise DataError(f"no token {token}: ids run from 0 to {len(self.texts) - 1}")
            return token
        if token not in self.ids:
            if token in self.texts:
                raise DataError(f"several tokens have the text {token!r}; give an id instead")
            near = get_close_matches(token, self.ids, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"no token has the text '{printable(token)}'{hint}")
        return self.ids[token]


def parse(text: str, vocabulary: Vocabulary, names: Collection[str] | None = ()) -> Expression:
    """The expression with this text.

    Args:
        text: for example `token in {" in", "if"} and not repeated`.
        vocabulary: the tokens that it may name.
        names: the names of nodes to whose expressions it may refer; None means any name.

    Raises:
        DataError: if the text is not an expression of the grammar; the message says where.
    """
    if len(text) > MAX_CHARS:
        raise DataError(f"the expression has {len(text):,} characters; at most {MAX_CHARS:,}")
    source = " ".join(text.split("\n")).strip()
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        where = getattr(error, "offset", None)
        place = f" at character {where}" if where else ""
        reason = getattr(error, "msg", str(error))
        raise DataError(f"{_shown(source)} is not an expression{place}: {reason}") from error
    return _Parser(source, vocabulary, None if names is None else frozenset(names)).whole(tree.body)


def _shown(source: str) -> str:
    shown = source if len(source) <= 60 else source[:60] + "…"
    return f"'{printable(shown)}'"


class _Parser:
    """Turns the syntax tree of a text into an expression."""

    def __init__(self, source: str, vocabulary: Vocabulary, names: frozenset[str] | None) -> None:
        self.source = source
        self.vocabulary = vocabulary
        self.names = names
        self.depth = 0
        self.in_score = False

    def whole(self, node: ast.expr) -> Expression:
        return self.any(node)

    def wrong(self, node: ast.AST, message: str) -> DataError:
        start = getattr(node, "col_offset", 0)
        part = ast.get_source_segment(self.source, node) or ""
        return DataError(f"{_shown(part)} at character {start + 1}: {message}")

    def any(self, node: ast.expr) -> Expression:
        """Any expression, a number or a truth value."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.wrong(node, f"expressions are nested at most {MAX_DEPTH} deep")
        try:
            return self._by_kind(node)
        finally:
            self.depth -= 1

    def _by_kind(self, node: ast.expr) -> Expression:
        if isinstance(node, ast.Constant):
            return self.constant(node)
        if isinstance(node, ast.Name):
            return self.name(node)
        if isinstance(node, ast.UnaryOp):
            return self.unary(node)
        if isinstance(node, ast.BinOp):
            return self.binary(node)
        if isinstance(node, ast.BoolOp):
            join = both if isinstance(node.op, ast.And) else either
            return join(*map(self.truth, node.values))
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        if isinstance(node, ast.IfExp):
            return If(self.any(node.body), self.truth(node.test), self.any(node.orelse))
        if isinstance(node, ast.Call):
            return self.call(node)
        raise self.wrong(node, "expressions have no such part")

    def truth(self, node: ast.expr) -> Expression:
        expression = self.any(node)
        if not expression.is_boolean:
            raise self.wrong(node, "it is a number; a truth value is needed here, such as x >= 1")
        return expression

    def constant(self, node: ast.Constant) -> Expression:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(
                node, "only numbers stand alone; tokens stand in sets, {…}, or after =="
            )
        if not math.isfinite(value) or abs(value) > 1e300:
            raise self.wrong(node, "the number is too large")
        return Number(value)

    def name(self, node: ast.Name) -> Expression:
        name = node.id
        if name == "position":
            return Position()
        if name == "repeated":
            return Repeated()
        if name in TOKEN_NAMES:
            raise self.wrong(node, f'it is a token; compare it: {name} == "x", or {name} in {{…}}')
        if self.names is None or name in self.names:
            return Ref(name)
        known = [*TOKEN_NAMES, "position", "repeated", *sorted(self.names)]
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the names are {', '.join(known)}"
        raise self.wrong(node, f"unknown name{hint}")

    def unary(self, node: ast.UnaryOp) -> Expression:
        if isinstance(node.op, ast.Not):
            return opposite(self.truth(node.operand))
        if isinstance(node.op, ast.USub):
            return times(Number(-1), self.any(node.operand))
        raise self.wrong(node, "of the signs, only - and not are known")

    def binary(self, node: ast.BinOp) -> Expression:
        left, right = self.any(node.left), self.any(node.right)
        if isinstance(node.op, ast.Add):
            return add(left, right)
        if isinstance(node.op, ast.Sub):
            return add(left, times(Number(-1), right))
        if isinstance(node.op, ast.Mult):
            return times(left, right)
        raise self.wrong(node, "of the operators, only +, - and * are known")

    def comparison(self, node: ast.Compare) -> Expression:
        if len(node.ops) != 1:
            raise self.wrong(node, "compare two at a time, and join them with `and`")
        operator, right = node.ops[0], node.comparators[0]
        if isinstance(node.left, ast.Name) and node.left.id in TOKEN_NAMES:
            return self.token_comparison(node, node.left.id, operator, right)
        left = self.any(node.left)
        if isinstance(operator, ast.Lt):
            return Compare(left, "<", self.any(right))
        if isinstance(operator, ast.GtE):
            return Compare(left, ">=", self.any(right))
        raise self.wrong(node, "numbers are compared with < and >=, tokens with ==, != and in")

    def token_comparison(
        self, node: ast.Compare, which: str, operator: ast.cmpop, right: ast.expr
    ) -> Expression:
        """A comparison of a token with a set, with one token, or with another of `TOKEN_NAMES`."""
        is_set = isinstance(operator, ast.In | ast.NotIn)
        is_one = isinstance(operator, ast.Eq | ast.NotEq)
        found: Expression
        if is_one and isinstance(right, ast.Name) and right.id in TOKEN_NAMES:
            found = Same(which, right.id)
        elif is_one:
            found = Is(which, token_set(self.token(right)))
        elif is_set:
            found = Is(which, self.set(right))
        else:
            raise self.wrong(node, "tokens are compared with ==, !=, in and not in")
        return opposite(found) if isinstance(operator, ast.NotIn | ast.NotEq) else found

    def token(self, node: ast.expr) -> TokenLiteral:
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.wrong(node, 'a token is needed here: its text, such as " in", or its id')
        try:
            found = self.vocabulary.id_of(value)
        except DataError as error:
            raise self.wrong(node, str(error)) from error
        return self.vocabulary.literal_of(found)

    def set(self, node: ast.expr) -> TokenSet:
        if isinstance(node, ast.Set):
            return token_set(*map(self.token, node.elts))
        if ast.unparse(node) == "set()":
            return token_set()
        raise self.wrong(node, 'a set of tokens is needed here, such as {" in", "if"}')

    def call(self, node: ast.Call) -> Expression:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS:
            near = get_close_matches(name, _FUNCTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_FUNCTIONS)}"
            raise self.wrong(node, f"unknown function; {hint}")
        n_wanted = {"share": 2, "last": 2, "max": 2, "cut": 2, "latest": 2, "average": 3}
        if node.keywords or len(node.args) != n_wanted.get(name, 1):
            raise self.wrong(node, f"{name} takes {_FUNCTIONS[name]}")
        if name in ("average", "here"):
            return self.attention(node, name)
        if name in ("depth", "inside"):
            return self.of_text(node, name)
        if name in ("count", "distance", "seen", "share", "last", "latest"):
            return self.of_sets(node, name)
        return self.of_numbers(node, name)

    def of_sets(self, node: ast.Call, name: str) -> Expression:
        """The functions that take sets of tokens."""
        if name == "latest":
            return Latest(self.any(node.args[0]), self.set(node.args[1]))
        sets = [self.set(argument) for argument in node.args]
        if name == "share":
            return Share(sets[0], sets[1])
        if name == "last":
            return Last(sets[0], sets[1])
        made: dict[str, type[Count | Distance | Seen]]
        made = {"count": Count, "distance": Distance, "seen": Seen}
        return made[name](sets[0])

    def of_text(self, node: ast.Call, name: str) -> Expression:
        """The functions that take brackets or a quote."""
        argument = node.args[0]
        value = argument.value if isinstance(argument, ast.Constant) else None
        if name == "inside":
            if value not in QUOTES:
                raise self.wrong(argument, f"inside takes {_FUNCTIONS[name]}")
            return Inside(str(value))
        is_right = isinstance(value, str) and value and set(value) <= BRACKETS.keys()
        if not is_right:
            raise self.wrong(argument, f"depth takes {_FUNCTIONS[name]}")
        return Depth("".join(bracket for bracket in BRACKETS if bracket in str(value)))

    def of_numbers(self, node: ast.Call, name: str) -> Expression:
        """The functions that take numbers."""
        arguments = list(map(self.any, node.args))
        if name == "cut":
            return Cut(arguments[0], arguments[1])
        if name != "max":
            return Call(name, arguments[0])
        if arguments[0] != Number(0):
            raise self.wrong(node, "max takes 0 and a number, in this order")
        return Call("positive", arguments[1])

    def attention(self, node: ast.Call, name: str) -> Expression:
        """`average`, and `here` in its score."""
        if name == "here":
            if not self.in_score:
                raise self.wrong(node, "here(…) stands only in the score of average(…)")
            self.in_score = False
            value = self.any(node.args[0])
            self.in_score = True
            return Here(value)
        if self.in_score:
            raise self.wrong(node, "the score of average(…) has no average(…) of its own")
        value = self.any(node.args[0])
        self.in_score = True
        score = self.any(node.args[1])
        self.in_score = False
        return Average(value, score, self.any(node.args[2]))


def check_name(name: str) -> None:
    """Raise `DataError` unless a node can be called so in expressions."""
    if not name.isidentifier() or not name.isascii():
        raise DataError(f"{name!r} cannot be a name; names are letters, digits and _")
    if name in RESERVED:
        raise DataError(f"{name!r} cannot be a name, because it has a meaning in expressions")


def described_set(tokens: TokenSet, n_most: int = 8) -> str:
    """A set in words: its tokens or, if there are many, the first and how many more."""
    if len(tokens.tokens) <= n_most:
        return ", ".join(map(literal, tokens.tokens))
    first = ", ".join(map(literal, tokens.tokens[:n_most]))
    return f"{first} and {len(tokens.tokens) - n_most} more"
