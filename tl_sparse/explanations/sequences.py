"""Sequences of tokens, and the values that expressions have on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.explanations.expressions import (
    BRACKETS,
    QUOTES,
    And,
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
    Not,
    Number,
    Or,
    Position,
    Product,
    Ref,
    Repeated,
    Same,
    Seen,
    Share,
    Sum,
    TokenSet,
)
from tl_sparse.explanations.parsing import Vocabulary

Values = Float[Tensor, "seq pos"]


@dataclass(eq=False)
class Sequences:
    """Sequences of tokens on which expressions are evaluated.

    Attributes:
        tokens: the tokens, padded on the right.
        is_real: which of them are no padding.
        vocabulary: their texts.
        refs: name of a node → the values of its expression, to which other expressions refer.
    """

    tokens: Int[Tensor, "seq pos"]
    is_real: Bool[Tensor, "seq pos"]
    vocabulary: Vocabulary
    refs: dict[str, Values] = field(default_factory=dict)
    _last_in: dict[TokenSet, Int[Tensor, "seq pos"]] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Int[Tensor, "seq pos"]:
        """The position of each token."""
        return torch.arange(self.tokens.shape[1]).expand(self.tokens.shape)

    @cached_property
    def named(self) -> dict[str, Int[Tensor, "seq pos"]]:
        """Name, one of `TOKEN_NAMES` → the token of this name at each position; -1 for none."""
        previous = F.pad(self.tokens, (1, 0), value=-1)[:, :-1]
        before_previous = F.pad(self.tokens, (2, 0), value=-1)[:, : self.tokens.shape[1]]
        return {
            "token": self.tokens,
            "previous": previous,
            "before_previous": before_previous,
            "line_start": self._at(self._line_starts),
            "follower": self._at(self.after_earlier),
        }

    def _at(self, positions: Int[Tensor, "seq pos"]) -> Int[Tensor, "seq pos"]:
        """The tokens at these positions; -1 for a negative position."""
        found = self.tokens.gather(1, positions.clamp(min=0))
        return torch.where(positions >= 0, found, -1)

    @cached_property
    def _line_starts(self) -> Int[Tensor, "seq pos"]:
        """The position of the first token of the present line: after a token that has ended one."""
        ends = torch.tensor(["\n" in text for text in self.vocabulary.texts])
        after_end = F.pad(ends[self.tokens], (1, 0), value=True)[:, :-1]
        return torch.where(after_end, self.positions, 0).cummax(1).values

    @cached_property
    def _earlier(self) -> Int[Tensor, "seq pos"]:
        """The position of the last earlier occurrence of the present token; -1 if it is new."""
        n_pos = self.tokens.shape[1]
        same = self.tokens[:, :, None] == self.tokens[:, None, :]
        is_earlier = torch.ones(n_pos, n_pos, dtype=torch.bool).tril(-1)
        where = torch.where(same & is_earlier, torch.arange(n_pos), -1)
        return where.amax(2)

    @cached_property
    def after_earlier(self) -> Int[Tensor, "seq pos"]:
        """The position after the last earlier occurrence of the present token; -1 if it is new."""
        return torch.where(self._earlier >= 0, self._earlier + 1, -1)

    # --- what expressions need

    def among(self, ids: Int[Tensor, "seq pos"], tokens: TokenSet) -> Bool[Tensor, "seq pos"]:
        """Whether each id is that of a token of the set."""
        is_in = torch.zeros(len(self.vocabulary.texts) + 1, dtype=torch.bool)
        is_in[list(map(self.vocabulary.id_of, tokens.tokens))] = True
        return is_in[ids]  # an id of -1 is the last entry, which is never in the set

    def last_in(self, tokens: TokenSet) -> Int[Tensor, "seq pos"]:
        """The position of the last token of the set so far; -1 where there is none."""
        if tokens not in self._last_in:
            here = self.among(self.tokens, tokens)
            self._last_in[tokens] = torch.where(here, self.positions, -1).cummax(1).values
        return self._last_in[tokens]

    def depth(self, brackets: str) -> Int[Tensor, "seq pos"]:
        """How many of these brackets are open; a closing bracket too many counts as none."""
        changes = torch.tensor([_change(text, brackets) for text in self.vocabulary.texts])
        change = changes[self.tokens]
        depth = torch.zeros_like(self.tokens)
        now = torch.zeros(len(self.tokens), dtype=torch.long)
        for position in range(self.tokens.shape[1]):
            now = (now + change[:, position]).clamp(min=0)
            depth[:, position] = now
        return depth

    @cached_property
    def _open_quote(self) -> Int[Tensor, "seq pos"]:
        """After each token: 0 outside of strings, else 1 + the number of the opening quote."""
        rows = []
        for state in range(len(QUOTES) + 1):
            rows.append([_quote_after(text, state) for text in self.vocabulary.texts])
        after = torch.tensor(rows)
        states = torch.zeros_like(self.tokens)
        now = torch.zeros(len(self.tokens), dtype=torch.long)
        for position in range(self.tokens.shape[1]):
            now = after[now, self.tokens[:, position]]
            states[:, position] = now
        return states

    def pattern(self, score: Expression, nothing: float) -> Float[Tensor, "seq query key"]:
        """Attention by this score, as `average` takes it, with a share for nothing."""
        scores = _Evaluation(self, in_pairs=True).of(score).double()
        n_seq, n_pos = self.tokens.shape
        later = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
        scores = scores.expand(n_seq, n_pos, n_pos).masked_fill(later, -torch.inf)
        at_nothing = torch.full((n_seq, n_pos, 1), nothing, dtype=torch.float64)
        return torch.cat([scores, at_nothing], dim=2).softmax(2)[..., :-1]

    def inside(self, quote: str) -> Bool[Tensor, "seq pos"]:
        """Whether a string that this quote has opened is open after each token."""
        return self._open_quote == QUOTES.index(quote) + 1


def _change(text: str, brackets: str) -> int:
    opening = sum(text.count(bracket) for bracket in brackets)
    return opening - sum(text.count(BRACKETS[bracket]) for bracket in brackets)


def _quote_after(text: str, state: int) -> int:
    """The state after a text: a string ends at its quote, or with its line."""
    for char in text:
        if char == "\n":
            state = 0
        elif char in QUOTES:
            number = QUOTES.index(char) + 1
            if state == 0:
                state = number
            elif state == number:
                state = 0
    return state


def values_of(expression: Expression, sequences: Sequences) -> Values:
    """The values of an expression at every position, as numbers."""
    return _Evaluation(sequences).of(expression).double()


@dataclass
class _Evaluation:
    """Evaluates expressions; in the score of an average, for all pairs `[seq, here, earlier]`."""

    sequences: Sequences
    in_pairs: bool = False

    def of(self, expression: Expression) -> Tensor:
        method = getattr(self, f"_{type(expression).__name__.lower()}", None)
        if method is not None:
            value: Tensor = method(expression)
            return value
        plain = self._of_tokens(expression)
        return plain[:, None] if self.in_pairs else plain

    # what combines other expressions

    def _number(self, expression: Number) -> Tensor:
        shape = (1, 1, 1) if self.in_pairs else self.sequences.tokens.shape
        return torch.full(shape, expression.value, dtype=torch.float64)

    def _sum(self, expression: Sum) -> Tensor:
        total = self.of(expression.terms[0]).double()
        for term in expression.terms[1:]:
            total = total + self.of(term).double()
        return total

    def _product(self, expression: Product) -> Tensor:
        total = self.of(expression.factors[0]).double()
        for factor in expression.factors[1:]:
            total = total * self.of(factor).double()
        return total

    def _call(self, expression: Call) -> Tensor:
        argument = self.of(expression.argument).double()
        if expression.function == "abs":
            return argument.abs()
        return F.gelu(argument) if expression.function == "gelu" else F.relu(argument)

    def _cut(self, expression: Cut) -> Tensor:
        argument = self.of(expression.argument).double()
        return argument * (argument.abs() >= self.of(expression.least).double())

    def _if(self, expression: If) -> Tensor:
        then, otherwise = self.of(expression.then), self.of(expression.otherwise)
        return torch.where(self.of(expression.condition), then.double(), otherwise.double())

    def _compare(self, expression: Compare) -> Tensor:
        left, right = self.of(expression.left).double(), self.of(expression.right).double()
        return left < right if expression.operator == "<" else left >= right

    def _not(self, expression: Not) -> Tensor:
        return ~self.of(expression.argument)

    def _and(self, expression: And) -> Tensor:
        return self._joined(expression.arguments, torch.logical_and)

    def _or(self, expression: Or) -> Tensor:
        return self._joined(expression.arguments, torch.logical_or)

    def _joined(self, arguments: Sequence[Expression], join: object) -> Tensor:
        total = self.of(arguments[0])
        for argument in arguments[1:]:
            total = join(total, self.of(argument))  # type: ignore[operator]
        return total

    def _here(self, expression: Here) -> Tensor:
        return _Evaluation(self.sequences).of(expression.value).double()[:, :, None]

    def _average(self, expression: Average) -> Tensor:
        score = _Evaluation(self.sequences, in_pairs=True).of(expression.score).double()
        n_seq, n_pos = self.sequences.tokens.shape
        later = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
        score = score.expand(n_seq, n_pos, n_pos).masked_fill(later, -torch.inf)
        nothing = self.of(expression.nothing).double()
        share = torch.cat([score, nothing[:, :, None]], dim=2).softmax(2)[..., :-1]
        return torch.einsum("sqk,sk->sq", share, self.of(expression.value).double())

    def _latest(self, expression: Latest) -> Tensor:
        plain = _Evaluation(self.sequences).of(expression.value).double()
        where = self.sequences.last_in(expression.tokens)
        found = plain.gather(1, where.clamp(min=0)) * (where >= 0)
        return found[:, None] if self.in_pairs else found

    # what is looked up in the sequences

    def _of_tokens(self, expression: Expression) -> Tensor:
        sequences = self.sequences
        if isinstance(expression, Position):
            return sequences.positions
        if isinstance(expression, Ref):
            return sequences.refs[expression.name]
        if isinstance(expression, Is):
            return sequences.among(sequences.named[expression.which], expression.tokens)
        if isinstance(expression, Same):
            first = sequences.named[expression.first]
            return (first == sequences.named[expression.second]) & (first >= 0)
        if isinstance(expression, Repeated):
            return sequences._earlier >= 0
        if isinstance(expression, Inside):
            return sequences.inside(expression.quote)
        if isinstance(expression, Depth):
            return sequences.depth(expression.brackets)
        return self._of_sets(expression)

    def _of_sets(self, expression: Expression) -> Tensor:
        sequences = self.sequences
        if isinstance(expression, Count):
            return sequences.among(sequences.tokens, expression.tokens).cumsum(1)
        if isinstance(expression, Distance):
            return sequences.positions - sequences.last_in(expression.tokens)
        if isinstance(expression, Seen):
            return sequences.last_in(expression.tokens) >= 0
        if isinstance(expression, Last):
            last = sequences.last_in(expression.tokens)
            return (last >= 0) & (last >= sequences.last_in(expression.others))
        if isinstance(expression, Share):
            first = sequences.among(sequences.tokens, expression.tokens)
            either = first | sequences.among(sequences.tokens, expression.others)
            return first.cumsum(1) / either.cumsum(1).clamp(min=1)
        raise TypeError(f"unknown expression {type(expression).__name__}")
