"""Expressions: their text is read back as the same, their values, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparse.errors import DataError
from tl_sparse.explanations.building import add, both, either, opposite, times
from tl_sparse.explanations.expressions import (
    TOKEN_NAMES,
    Average,
    Call,
    Compare,
    Count,
    Cut,
    Depth,
    Distance,
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
    token_set,
)
from tl_sparse.explanations.parsing import Vocabulary, check_name, parse
from tl_sparse.explanations.sequences import Sequences, values_of

pytestmark = pytest.mark.any_line

TEXTS = ["<s>", "(", ")", "[", "'", '"', "\n", "x", " y", "('", "\\", "�", "�", "a'b\"c"]
VOCABULARY = Vocabulary.of_texts(TEXTS)
NAMES = ("read_x", "value_2")


# --- round trip

tokens = st.sampled_from([VOCABULARY.literal_of(token) for token in range(len(TEXTS))])
token_sets = st.lists(tokens, max_size=4).map(lambda texts: token_set(*texts))
floats = st.floats(allow_nan=False, allow_infinity=False, width=32).map(Number)
leaves_of_numbers = st.one_of(
    floats,
    st.just(Position()),
    st.sampled_from(NAMES).map(Ref),
    token_sets.map(Count),
    token_sets.map(Distance),
    st.builds(Share, token_sets, token_sets),
    st.sampled_from(["(", "[", "([{", "({"]).map(Depth),
)
which = st.sampled_from(TOKEN_NAMES)
leaves_of_truth = st.one_of(
    st.builds(Is, which, token_sets),
    st.builds(Same, which, which),
    st.just(Repeated()),
    token_sets.map(Seen),
    st.builds(Last, token_sets, token_sets),
    st.sampled_from(["'", '"']).map(Inside),
)


def longer_truth(truth, numbers):
    two = st.lists(truth, min_size=2, max_size=3)
    return st.one_of(
        truth.map(opposite),
        two.map(lambda parts: both(*parts)),
        two.map(lambda parts: either(*parts)),
        st.builds(Compare, numbers, st.sampled_from(["<", ">="]), numbers),
    )


def longer_numbers(numbers, truth):
    some = st.lists(st.one_of(numbers, truth), min_size=2, max_size=3)
    return st.one_of(
        some.map(lambda parts: add(*parts)),
        some.map(lambda parts: times(*parts)),
        st.builds(Call, st.sampled_from(["gelu", "abs", "positive"]), numbers),
        st.builds(Cut, numbers, numbers),
        st.builds(If, numbers, truth, numbers),
        st.builds(Latest, numbers, token_sets),
    )


truth = leaves_of_truth
numbers = leaves_of_numbers
for _ in range(2):
    truth, numbers = (
        st.one_of(truth, longer_truth(truth, numbers)),
        st.one_of(numbers, longer_numbers(numbers, truth)),
    )
scores = st.one_of(
    numbers, numbers.map(Here), st.builds(lambda x, y: add(Here(x), y), truth, numbers)
)
whole = st.one_of(truth, numbers, st.builds(Average, numbers, scores, numbers))


@settings(max_examples=150, deadline=None)
@given(whole)
def test_the_text_of_an_expression_is_read_back_as_the_same(expression):
    again = parse(str(expression), VOCABULARY, NAMES)
    assert again == expression
    assert str(again) == str(expression)
    assert again.size == expression.size


def test_texts_are_python():
    for text in (
        'token in {" y", "x"} and not repeated',
        '2 - 0.5 * position if token == "x" else max(0, read_x - 1)',
        "-(position + 1) * 2",
        'last({\'"\'}, {"\'"}) or inside("\'")',
    ):
        assert parse(str(parse(text, VOCABULARY, NAMES)), VOCABULARY, NAMES) == parse(
            text, VOCABULARY, NAMES
        )


def test_sizes_count_symbols_and_tokens():
    def size(text):
        return parse(text, VOCABULARY, NAMES).size

    assert size("position") == 1
    assert size('token == "x"') == 2
    assert size('token in {"x", " y", "("}') == 4
    assert size("1 + 2 * position") == 5
    assert size('3 if token == "x" else 0') == 5


# --- values


def values(text, *rows, refs=None):
    """The values of an expression on rows of token texts."""
    ids = torch.tensor([[TEXTS.index(token) for token in row] for row in rows])
    sequences = Sequences(ids, torch.ones_like(ids, dtype=torch.bool), VOCABULARY, refs or {})
    return values_of(parse(text, VOCABULARY, refs or {}), sequences)[0].tolist()


ROW = ["<s>", "x", "(", "'", ")", "x", "'", "\n", " y", "x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("position", range(10)),
        ('token == "x"', [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]),
        ('previous == "x"', [0, 0, 1, 0, 0, 0, 1, 0, 0, 0]),
        ('before_previous == "x"', [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]),
        ('previous != "x"', [1, 1, 0, 1, 1, 1, 0, 1, 1, 1]),
        ('line_start == " y"', [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
        ('follower == "("', [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
        ("repeated", [0, 0, 0, 0, 0, 1, 1, 0, 0, 1]),
        ('count({"x"})', [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]),
        ('distance({"x"})', [1, 0, 1, 2, 3, 0, 1, 2, 3, 0]),
        ('seen({"("})', [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ('last({"("}, {")"})', [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]),
        ('share({"("}, {")"})', [0, 0, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ('depth("(")', [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]),
        ("inside(\"'\")", [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
        ("latest(position, {\"'\"})", [0, 0, 0, 3, 3, 3, 6, 6, 6, 6]),
        ("cut(position - 4, 3)", [-4, -3, 0, 0, 0, 0, 0, 3, 4, 5]),
        ("max(0, position - 8)", [0] * 9 + [1]),
        ("abs(2 - position)", [2, 1, 0, 1, 2, 3, 4, 5, 6, 7]),
        ("-position if position < 2 else 7", [0, -1] + [7] * 8),
        ("1 + (position >= 8)", [1] * 8 + [2, 2]),
        ("average(position, 0, -1000)", [i / 2 for i in range(10)]),
        ("average(position, 1000 * (token == \"'\"), 500)", [0, 0, 0, 3, 3, 3, 4.5, 4.5, 4.5, 4.5]),
        ("average(position, 900 * here(token == \"x\") * (token == \"(\"), 500)",
         [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]),
    ],
)  # fmt: skip
def test_values(text, expected):
    assert values(text, ROW) == pytest.approx(list(expected))


def test_a_string_ends_with_its_line_and_holds_the_other_quote():
    assert values("inside('\"')", ["'", '"', "'", '"', "\n", "x"]) == [0, 0, 0, 1, 0, 0]
    assert values('depth("([{")', ["(", "[", ")", "('", ")", ")"]) == [1, 2, 1, 2, 1, 0]


def test_names_of_nodes_stand_for_their_values():
    refs = {"read_x": torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)}
    assert values("2 * read_x - 1", ["x", "x", "x"], refs=refs) == [1, 3, 7]


# --- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toke in {'x'}", "'toke' at character 1: unknown name; did you mean token"),
        ("token in {'z'}", "at character 11: no token has the text 'z'"),
        ("token == 99", "no token 99: ids run from 0 to 13"),
        ("token == '�'", "several tokens have the text '�'; give an id instead"),
        ("position + * 2", "is not an expression at character 12: invalid syntax"),
        ("position ** 2", r"of the operators, only \+, - and \* are known"),
        ("position / 2", r"of the operators, only \+, - and \* are known"),
        ("1 < position < 3", "compare two at a time"),
        ("position > 3", "numbers are compared with < and >="),
        ("token < 3", "tokens are compared with ==, !=, in and not in"),
        ("token", "it is a token; compare it"),
        ("position and repeated", "'position' at character 1: it is a number; a truth value"),
        ("not 3", "a truth value is needed"),
        ("cout({'x'})", "unknown function; did you mean count"),
        ("__import__('os')", "unknown function; there are count, "),
        ("position.real", "'position.real' at character 1: expressions have no such part"),
        ("[position for x in y]", "expressions have no such part"),
        ("lambda: 1", "expressions have no such part"),
        ("count('x')", r"a set of tokens is needed here, such as \{"),
        ("count({'x'}, {'x'})", "count takes a set of tokens"),
        ("inside('x')", "inside takes a quote"),
        ("depth(')')", "depth takes opening brackets"),
        ("max(1, position)", "max takes 0 and a number"),
        ("here(position)", r"stands only in the score of average"),
        ("average(1, average(1, 2, 3), 3)", "has no average"),
        ("'x'", "only numbers stand alone"),
        ("True", "only numbers stand alone"),
        ("1e999", "the number is too large"),
        ("+".join(["1"] * 300), "nested at most 60 deep|at most"),
        ("(" * 300 + "1" + ")" * 300, "is not an expression|nested"),
        ("", "is not an expression"),
        ("x" * 200_000, "has 200,000 characters; at most 100,000"),
    ],
)  # fmt: skip
def test_what_is_no_expression_is_refused_with_the_place(text, message):
    with pytest.raises(DataError, match=message):
        parse(text, VOCABULARY, NAMES)


@pytest.mark.parametrize("name", ["token", "position", "if", "2x", "a b", "", "max", "é"])
def test_impossible_names(name):
    with pytest.raises(DataError, match="cannot be a name"):
        check_name(name)
