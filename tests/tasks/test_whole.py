"""Pairs with the code that follows their prompts."""

import pytest

from micro import MICRO_TASK
from tl_sparse.errors import TaskError
from tl_sparse.tasks import TASKS, context_tells_sides, whole_pairs, whole_statements

pytestmark = pytest.mark.any_line


@pytest.mark.parametrize("name", TASKS)
def test_prompts_with_their_endings_are_valid_python(name):
    drawn = whole_pairs(name, 40, seed=0)
    assert drawn == whole_pairs(name, 40, seed=0)
    assert len({each.pair.prompts for each in drawn}) == 40
    for each in drawn:
        assert each.pair.answers == TASKS[name].candidates
        for prompt, answer, ending in zip(
            each.pair.prompts, each.pair.answers, each.endings, strict=True
        ):
            assert ending.startswith(answer)
            compile(prompt + ending, name, "exec")


def test_all_lines_of_context_can_show_one_answer():
    assert context_tells_sides("bracket_brace")
    assert not context_tells_sides("set_or_string")
    for side, shown in enumerate("{["):
        for each in whole_pairs("bracket_brace", 20, seed=0, n_lines=4, side=side):
            *context, _ = each.pair.first_prompt.splitlines()
            assert len(context) == 4
            assert all(shown in line for line in context)
    (longer,) = whole_pairs("bracket_brace", 1, seed=0, n_lines=9)
    assert longer.pair.first_prompt.count("\n") == 9


def test_statements_are_whole():
    for name in TASKS:
        statements = whole_statements(name, 30, seed=0)
        assert len(statements) == 30
        for statement in statements:
            compile(f"def f():\n    while 1:\n        pass\n{statement}\n", name, "exec")


def test_what_cannot_be_drawn():
    with pytest.raises(TaskError, match="micro is not built in"):
        whole_pairs(MICRO_TASK, 2, seed=0)
    with pytest.raises(TaskError, match="micro is not built in"):
        whole_statements(MICRO_TASK, 2, seed=0)
    with pytest.raises(TaskError, match="n_lines is 2; it must be at least 0, and odd without"):
        whole_pairs("with_as", 2, seed=0, n_lines=2)
    with pytest.raises(TaskError, match="side is 2; it must be 0 or 1"):
        whole_pairs("with_as", 2, seed=0, side=2)
