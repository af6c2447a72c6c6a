"""Right answers to changed prompts: known only where they can be."""

import ast
import random

import pytest

from tl_sparse.attacks.questions import (
    AFTER_THE_CUE,
    AT_THE_BEGINNING,
    AT_THE_END,
    BEFORE_THE_CUE,
    BEFORE_THE_LAST_WORD,
    BY_PARSER,
    BY_STATEMENTS,
    IN_A_COMMENT,
    Question,
    how_known,
    question_of,
)
from tl_sparse.tasks import TASKS, Pair, whole_pairs, whole_statements

pytestmark = pytest.mark.any_line

QUOTE = Question("x = 1\nprint('the house", 0, (12, 13), "')", '")')
PLACES = [
    AFTER_THE_CUE,
    AT_THE_BEGINNING,
    AT_THE_END,
    BEFORE_THE_CUE,
    BEFORE_THE_LAST_WORD,
    IN_A_COMMENT,
]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_of_every_task_differ_in_their_cues_only(name):
    for drawn in whole_pairs(name, 20, seed=0):
        questions = [question_of(drawn, side) for side in (0, 1)]
        befores, afters = set(), set()
        for question in questions:
            start, end = question.cue
            befores.add(question.prompt[:start])
            afters.add(question.prompt[end:])
            assert how_known(question, question.prompt) == BY_STATEMENTS
        assert len(befores) == len(afters) == 1


@pytest.mark.parametrize("name", TASKS)
def test_comments_and_whole_statements_change_no_answer_of_any_task(name):
    statements = whole_statements(name, 20, seed=0)
    for drawn, statement in zip(whole_pairs(name, 20, seed=1), statements, strict=True):
        for side in (0, 1):
            question = question_of(drawn, side)
            commented = IN_A_COMMENT.changed(question, ' "[] not closed')
            assert how_known(question, commented) == BY_STATEMENTS
            later = AT_THE_BEGINNING.changed(question, f"{statement}\n" * 2)
            assert how_known(question, later) == BY_STATEMENTS


@pytest.mark.parametrize(
    ("place", "text", "prompt", "rule"),
    [
        (AFTER_THE_CUE, '"', "x = 1\nprint('\"the house", BY_PARSER),
        (AFTER_THE_CUE, "a b ", "x = 1\nprint('a b the house", BY_PARSER),
        (AFTER_THE_CUE, "'", "x = 1\nprint(''the house", None),  # no answer makes it valid
        (BEFORE_THE_CUE, " ", "x = 1\nprint( 'the house", BY_STATEMENTS),
        (BEFORE_THE_CUE, "y)\nprint(", "x = 1\nprint(y)\nprint('the house", BY_PARSER),
        (BEFORE_THE_LAST_WORD, " red", "x = 1\nprint('the red house", BY_PARSER),
        (AT_THE_END, "s", "x = 1\nprint('the houses", BY_PARSER),
        (AT_THE_END, "\n", "x = 1\nprint('the house\n", None),
        (IN_A_COMMENT, ' "', "x = 1\n# \"\nprint('the house", BY_STATEMENTS),
        (AT_THE_BEGINNING, "y = 2\n", "y = 2\nx = 1\nprint('the house", BY_STATEMENTS),
        (AT_THE_BEGINNING, '"""', '"""x = 1\nprint(\'the house', None),
    ],
)
def test_what_the_parser_says_of_insertions(place, text, prompt, rule):
    assert place.changed(QUOTE, text) == prompt
    assert how_known(QUOTE, prompt) == rule


def test_an_answer_that_is_as_good_as_the_other_is_not_known():
    question = Question("self.name =", 0, (5, 9), " name", " value")
    assert (
        how_known(question, "self.a = self.name =") is None
    )  # valid with both, and no longer the same
    assert how_known(question, "self.name  =") == BY_STATEMENTS


def test_whenever_an_answer_is_known_counting_brackets_agrees():
    rng = random.Random(0)
    counts = {BY_PARSER: 0, BY_STATEMENTS: 0, None: 0}
    for drawn in whole_pairs("bracket_counting", 60, seed=0):
        for side in (0, 1):
            question = question_of(drawn, side)
            for _ in range(20):
                place = rng.choice(PLACES)
                text = "".join(rng.choices(["[", "]", ", ", "1", "x", " ", "#", "\n"], k=3))
                changed = place.changed(question, text)
                rule = how_known(question, changed)
                counts[rule] += 1
                if rule is not None:
                    closed = changed + "]" * (side + 1)
                    ast.parse(closed)
                    code = "".join(line.split("#")[0] for line in closed.splitlines())
                    assert code.count("[") == code.count("]")
    assert min(counts.values()) > 50


def test_pairs_without_code_behind_them_have_a_cue_too():
    question = question_of(Pair("f1 f2 A f3 end", "f1 f2 B f3 end", " yes", " no"), 1)
    assert question == Question("f1 f2 B f3 end", 1, (6, 7))
    assert AFTER_THE_CUE.changed(question, " f4") == "f1 f2 B f4 f3 end"
    assert BEFORE_THE_CUE.changed(question, " f4") == "f1 f2 f4 B f3 end"
    assert BEFORE_THE_LAST_WORD.changed(question, " f4") == "f1 f2 B f3 f4 end"


def test_cues_are_whole_words():
    question = question_of(Pair("self.name =", "self.value =", " name", " value"), 0)
    assert question.prompt[slice(*question.cue)] == "name"
