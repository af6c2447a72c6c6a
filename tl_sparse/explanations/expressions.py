"""The grammar of explanations: expressions over the tokens of a sequence, as printed in Python.

Every expression has a value at every position of a sequence, a number or a truth value, which
counts as 1 or 0 in sums. Its text is what `parsing.parse` reads: both ways give the same
expression.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

#: How tightly an expression binds in Python, from a conditional expression to a name.
CONDITIONAL, DISJUNCTION, CONJUNCTION, NEGATION, COMPARISON, SUM, PRODUCT, NAME = range(8)

#: The names of tokens: the present one, the one before it, the one before that, the first token of
#: the present line, and the token that followed the last earlier occurrence of the present one.
TOKEN_NAMES = ("token", "previous", "before_previous", "line_start", "follower")
#: Opening bracket → closing bracket.
BRACKETS = {"(": ")", "[": "]", "{": "}"}
QUOTES = ("'", '"')

#: A token in an expression: its text or, where several tokens have the same text, its id.
TokenLiteral = str | int


@dataclass(frozen=True)
class TokenSet:
    """A set of tokens.

    Attributes:
        tokens: the texts or ids of its tokens, sorted and without repeats; see `token_set`.
    """

    tokens: tuple[TokenLiteral, ...]

    def __str__(self) -> str:
        if not self.tokens:
            return "set()"
        return "{" + ", ".join(map(literal, self.tokens)) + "}"


def token_set(*tokens: TokenLiteral) -> TokenSet:
    """The set of these tokens."""
    return TokenSet(tuple(sorted(set(tokens), key=lambda token: (str(type(token)), token))))


def literal(token: TokenLiteral) -> str:
    """A token as Python writes it, with double quotes where that is possible."""
    if isinstance(token, int):
        return str(token)
    text = repr(token)
    if text[0] == "'" and '"' not in text and "\\'" not in text:
        text = f'"{text[1:-1]}"'
    return text


@dataclass(frozen=True)
class Expression:
    """Base class of all expressions.

    Attributes:
        is_boolean: whether its values are truth values.
        binding: how tightly it binds; what binds less tightly than its place needs parentheses.
    """

    is_boolean: ClassVar[bool] = False
    binding: ClassVar[int] = NAME

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The expressions that it consists of."""
        found: list[Expression] = []
        for field in fields(self):
            value = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Expression):
                    found.append(part)
        return tuple(found)

    @property
    def size(self) -> int:
        """The number of its symbols: names, functions, operators, numbers and tokens."""
        n_parts = len(self.parts)
        own = n_parts - 1 if isinstance(self, Sum | Product | And | Or) else 1
        return own + self._own_tokens + sum(part.size for part in self.parts)

    @property
    def n_tokens(self) -> int:
        """How many of its symbols are tokens."""
        return self._own_tokens + sum(part.n_tokens for part in self.parts)

    @property
    def _own_tokens(self) -> int:
        sets = [getattr(self, field.name) for field in fields(self)]
        return sum(len(tokens.tokens) for tokens in sets if isinstance(tokens, TokenSet))

    def walk(self) -> Iterator[Expression]:
        """This expression and all that it consists of."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def within(self, binding: int) -> str:
        """Its text as part of an expression, in parentheses where it binds less tightly."""
        return f"({self})" if self.binding < binding else str(self)


# --- numbers


@dataclass(frozen=True)
class Number(Expression):
    """A constant."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value) + 0.0)  # -0.0 becomes 0.0

    def __str__(self) -> str:
        if self.value.is_integer() and abs(self.value) < 1e15:
            return str(int(self.value))
        return repr(self.value)


@dataclass(frozen=True)
class Position(Expression):
    """The number of tokens before the present one."""

    def __str__(self) -> str:
        return "position"


@dataclass(frozen=True)
class Count(Expression):
    """How many tokens of a set there are up to the present one, which counts too."""

    tokens: TokenSet

    def __str__(self) -> str:
        return f"count({self.tokens})"


@dataclass(frozen=True)
class Distance(Expression):
    """How many tokens ago the last token of a set was: 0 for the present one.

    Where there was none, it is as if one had been before the first token.
    """

    tokens: TokenSet

    def __str__(self) -> str:
        return f"distance({self.tokens})"


@dataclass(frozen=True)
class Share(Expression):
    """The share of those in the first set among the tokens so far in either of two; 0 of none."""

    tokens: TokenSet
    others: TokenSet

    def __str__(self) -> str:
        return f"share({self.tokens}, {self.others})"


@dataclass(frozen=True)
class Depth(Expression):
    """How many brackets of these kinds are open after the present token."""

    brackets: str

    def __str__(self) -> str:
        return f"depth({literal(self.brackets)})"


@dataclass(frozen=True)
class Ref(Expression):
    """The value of another node's expression, by the name of that node."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sum(Expression):
    """The sum of two or more expressions; made by `add`."""

    terms: tuple[Expression, ...]
    binding: ClassVar[int] = SUM

    def __str__(self) -> str:
        text = _term(self.terms[0])
        for term in self.terms[1:]:
            written = _term(term)
            text += f" - {written[1:]}" if written.startswith("-") else f" + {written}"
        return text


def _term(term: Expression) -> str:
    return term.within(PRODUCT)


@dataclass(frozen=True)
class Product(Expression):
    """The product of two or more expressions; made by `times`."""

    factors: tuple[Expression, ...]
    binding: ClassVar[int] = PRODUCT

    def __str__(self) -> str:
        first, *others = self.factors
        written = [factor.within(NAME) for factor in others]
        if first == Number(-1):
            return "-" + " * ".join(written)
        return " * ".join([first.within(NAME), *written])


@dataclass(frozen=True)
class Call(Expression):
    """A function of one number: `gelu(x)`, `abs(x)`, or `positive`, written `max(0, x)`."""

    function: str
    argument: Expression

    def __str__(self) -> str:
        if self.function == "positive":
            return f"max(0, {self.argument})"
        return f"{self.function}({self.argument})"


@dataclass(frozen=True)
class Cut(Expression):
    """A number where it is at least so large in size, otherwise 0, as AbsTopK leaves it."""

    argument: Expression
    least: Expression

    def __str__(self) -> str:
        return f"cut({self.argument}, {self.least})"


@dataclass(frozen=True)
class Latest(Expression):
    """The value of an expression at the last token of a set that came; 0 where none has."""

    value: Expression
    tokens: TokenSet

    def __str__(self) -> str:
        return f"latest({self.value}, {self.tokens})"


@dataclass(frozen=True)
class Average(Expression):
    """A mean over the tokens so far, weighted by exp(score), as attention takes it.

    In the score, `here(x)` is the value of x at the present token; all else is that of the earlier
    token that is looked at. The third part is the score of looking at nothing, which counts as 0;
    it is evaluated at the present token.
    """

    value: Expression
    score: Expression
    nothing: Expression

    def __str__(self) -> str:
        return f"average({self.value}, {self.score}, {self.nothing})"


@dataclass(frozen=True)
class Here(Expression):
    """In the score of `average`: the value at the present token."""

    value: Expression

    def __str__(self) -> str:
        return f"here({self.value})"


@dataclass(frozen=True)
class If(Expression):
    """One of two numbers."""

    then: Expression
    condition: Expression
    otherwise: Expression
    binding: ClassVar[int] = CONDITIONAL

    def __str__(self) -> str:
        then, condition = self.then.within(DISJUNCTION), self.condition.within(DISJUNCTION)
        return f"{then} if {condition} else {self.otherwise}"


# --- truth values


@dataclass(frozen=True)
class Is(Expression):
    """Whether one of the tokens of `TOKEN_NAMES` is in a set; false where there is none."""

    which: str
    tokens: TokenSet
    is_boolean: ClassVar[bool] = True
    binding: ClassVar[int] = COMPARISON

    def __str__(self) -> str:
        if len(self.tokens.tokens) == 1:
            return f"{self.which} == {literal(self.tokens.tokens[0])}"
        return f"{self.which} in {self.tokens}"


@dataclass(frozen=True)
class Same(Expression):
    """Whether two of the tokens of `TOKEN_NAMES` are the same."""

    first: str
    second: str
    is_boolean: ClassVar[bool] = True
    binding: ClassVar[int] = COMPARISON

    def __str__(self) -> str:
        return f"{self.first} == {self.second}"


@dataclass(frozen=True)
class Repeated(Expression):
    """Whether the present token has occurred before."""

    is_boolean: ClassVar[bool] = True

    def __str__(self) -> str:
        return "repeated"


@dataclass(frozen=True)
class Seen(Expression):
    """Whether a token of a set has come, the present one included."""

    tokens: TokenSet
    is_boolean: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"seen({self.tokens})"


@dataclass(frozen=True)
class Last(Expression):
    """Whether the last token that came of two sets was in the first; false where none came."""

    tokens: TokenSet
    others: TokenSet
    is_boolean: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"last({self.tokens}, {self.others})"


@dataclass(frozen=True)
class Inside(Expression):
    """Whether, after the present token, a string that this quote has opened is still open."""

    quote: str
    is_boolean: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"inside({literal(self.quote)})"


@dataclass(frozen=True)
class Compare(Expression):
    """Whether one number is less than another, or not less: `<` or `>=`."""

    left: Expression
    operator: str
    right: Expression
    is_boolean: ClassVar[bool] = True
    binding: ClassVar[int] = COMPARISON

    def __str__(self) -> str:
        return f"{self.left.within(SUM)} {self.operator} {self.right.within(SUM)}"


@dataclass(frozen=True)
class Not(Expression):
    """The opposite of a truth value."""

    argument: Expression
    is_boolean: ClassVar[bool] = True
    binding: ClassVar[int] = NEGATION

    def __str__(self) -> str:
        return f"not {self.argument.within(NEGATION)}"


@dataclass(frozen=True)
class And(Expression):
    """Whether all are true; made by `both`."""

    arguments: tuple[Expression, ...]
    is_boolean: ClassVar[bool] = True
    binding: ClassVar[int] = CONJUNCTION

    def __str__(self) -> str:
        return " and ".join(argument.within(NEGATION) for argument in self.arguments)


@dataclass(frozen=True)
class Or(Expression):
    """Whether at least one is true; made by `either`."""

    arguments: tuple[Expression, ...]
    is_boolean: ClassVar[bool] = True
    binding: ClassVar[int] = DISJUNCTION

    def __str__(self) -> str:
        return " or ".join(argument.within(CONJUNCTION) for argument in self.arguments)
