"""Held-out contexts: fair pairs that fit the bundled models, and differ as their kind says."""

import random
import re

import pytest

import tl_sparse
from micro import MICRO_TASK
from tl_sparse.errors import TaskError
from tl_sparse.tasks.held_out import _filled_in, _held_out, _other_words, held_out_contexts
from tl_sparse.tasks.idioms import WORDS, both_sides
from tl_sparse.tasks.pairs import prompts_of
from tl_sparse.tasks.task import TASKS, is_built_in
from tl_sparse.tasks.task_data import draw_pairs, make_task_data

pytestmark = pytest.mark.any_line

KINDS = ["names", "length", "distractors", "wording"]


@pytest.fixture(scope="module")
def bundled():
    return tl_sparse.load("tiny-python-sparse", device="cpu")


@pytest.mark.parametrize("name", TASKS)
def test_pairs_are_fair_and_no_prompts_of_the_task(name, bundled):
    usual = TASKS[name]
    seen = prompts_of(draw_pairs(usual, 200, seed=0))
    contexts = held_out_contexts(name)
    assert list(contexts) == KINDS
    for task in contexts.values():
        assert not is_built_in(task)
        assert task.name.startswith(f"{name} (")
        assert (task.candidates, task.same_end) == (usual.candidates, usual.same_end)
        data = make_task_data(task, bundled.tokenizer, 64, seed=1, n_ctx=bundled.cfg.n_ctx)
        assert not data.shortened
        assert seen.isdisjoint(data.prompts)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_answers_begin_python_that_is_valid(name):
    for kind, task in held_out_contexts(name).items():
        for seed in range(40):
            whole = both_sides(_filled_in(name, kind, random.Random(seed)))
            prompts = task.sample(random.Random(seed))
            for text, prompt, answer in zip(whole, prompts, task.candidates, strict=True):
                assert text.startswith(prompt + answer)
                compile(text, name, "exec")


def test_other_names_are_none_of_the_usual_words():
    usual = set().union(*(words for kind, words in WORDS.items() if kind not in ("op", "cmp")))
    assert WORDS.keys() == _other_words().keys()
    for kind, words in _other_words().items():
        if kind not in ("op", "cmp"):
            assert usual.isdisjoint(words), kind
    assert not set(_other_words()["var"]) & set(_other_words()["vars"])


@pytest.mark.parametrize("name", TASKS)
def test_names_have_no_usual_word_and_longer_ones_more_lines(name):
    contexts = held_out_contexts(name)
    own = {"name", "value", "current", "self", "index", "open", "True", "False"}
    usual_words = set(WORDS["var"]) | set(WORDS["vars"]) | set(WORDS["noun"])
    for pair in draw_pairs(contexts["names"], 50, seed=0):
        words = set(re.findall(r"\w+", pair.first_prompt))
        assert not (words & usual_words) - own
    usual = [pair.first_prompt.count("\n") for pair in draw_pairs(TASKS[name], 50, seed=0)]
    longer = [pair.first_prompt.count("\n") for pair in draw_pairs(contexts["length"], 50, seed=0)]
    assert sum(longer) > sum(usual)


def test_each_task_says_what_is_other_in_each_kind():
    assert _held_out()["tasks"].keys() == TASKS.keys()
    for entry in _held_out()["tasks"].values():
        assert [kind for kind in entry if kind != "usual"] == KINDS
        assert "lines" in entry["length"]
        assert "context" in entry["distractors"]
        assert "templates" in entry["wording"]
        assert all(material.get("lines", 3) % 2 == 1 for material in entry.values())


def test_tasks_of_the_user_have_none():
    with pytest.raises(TaskError, match=r"task micro is not built in, .* make a Task of your own"):
        held_out_contexts(MICRO_TASK)
