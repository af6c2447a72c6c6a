"""Control tasks: the same prompts, with answers that make no sense or are random."""

import dataclasses
import random

import pytest

from micro import MICRO_TASK, micro_tokenizer
from tl_sparse.data.tokenizer import train_tokenizer
from tl_sparse.errors import TaskError
from tl_sparse.tasks.controls import nonsense_task, shuffled_task
from tl_sparse.tasks.idioms import idiom_documents
from tl_sparse.tasks.pairs import PARTS, Pair, TaskPairs
from tl_sparse.tasks.task import TASKS, Task, is_built_in
from tl_sparse.tasks.task_data import draw_pairs, make_task_data

pytestmark = pytest.mark.any_line

QUOTES = TASKS["single_double_quote"]
PAIRS = [Pair(f"f({i}", f"f([{i}", ")", "])") for i in range(300)]
SPLIT = TaskPairs("own", "", (*PAIRS[:100],), (*PAIRS[100:200],), (*PAIRS[200:],))


@pytest.fixture(scope="module")
def tokenizer():
    required = [" in", ":", "')", '")', " +=", "]]", "=None", "):\n"]
    return train_tokenizer(idiom_documents(50_000, seed=0), 600, required=required)


@pytest.mark.parametrize("name", ["single_double_quote", "for_while"])
def test_answers_without_sense(name, tokenizer):
    task = nonsense_task(name, tokenizer)
    assert not is_built_in(task)
    expected = {"single_double_quote": (" in", ":"), "for_while": (" +=", "]]")}
    assert task.candidates == expected[name]
    assert task.name == f"{name} (answers without sense)"
    for seed in range(5):
        assert task.sample(random.Random(seed)) == TASKS[name].sample(random.Random(seed))
    data = make_task_data(task, tokenizer, 8, seed=0)
    assert not data.shortened


def test_answers_without_sense_to_pairs_of_the_user(tokenizer):
    own = nonsense_task(Task.from_pairs(SPLIT), tokenizer)
    assert own.candidates == own.split.candidates == (" in", ":")
    for part in PARTS:
        prompts = [pair.prompts for pair in SPLIT.part(part)]
        assert own.split.part(part) == tuple(Pair(*both, " in", ":") for both in prompts)
    answers = iter(range(10**6))
    each = Task("each", "", None, lambda rng: PAIRS[next(answers) % 300])
    assert nonsense_task(each, tokenizer).pair(random.Random(0)).answers == (" in", ":")


def test_no_answers_are_left():
    with pytest.raises(TaskError, match=r"task micro: .* fewer than two are single tokens"):
        nonsense_task(MICRO_TASK, micro_tokenizer())


def is_swapped(pair, original):
    assert pair.answers == original.answers
    assert set(pair.prompts) == set(original.prompts)
    return pair.prompts != original.prompts


def test_half_of_the_pairs_are_swapped_for_good():
    task = shuffled_task("single_double_quote", seed=1)
    assert not is_built_in(task)
    assert task.candidates == QUOTES.candidates
    swapped = []
    for seed in range(300):
        pair = task.pair(random.Random(seed))
        assert pair == task.pair(random.Random(seed))
        swapped.append(is_swapped(pair, QUOTES.pair(random.Random(seed))))
    assert 120 < sum(swapped) < 180
    other = shuffled_task(QUOTES, seed=2)
    others = [other.pair(random.Random(seed)) != QUOTES.pair(random.Random(seed))
              for seed in range(300)]  # fmt: skip
    assert 120 < sum(a != b for a, b in zip(swapped, others, strict=True)) < 180


def test_the_same_pairs_are_swapped_in_every_split():
    task = shuffled_task(Task.from_pairs(SPLIT))
    assert task.candidates is None
    swapped = 0
    for part in PARTS:
        for pair, original in zip(task.split.part(part), SPLIT.part(part), strict=True):
            swapped += is_swapped(pair, original)
    assert 120 < swapped < 180
    unsplit = shuffled_task(Task("own", "", None, lambda rng: rng.choice(PAIRS)))
    drawn = set(draw_pairs(unsplit, 100, seed=0))
    assert drawn <= {pair for part in PARTS for pair in task.split.part(part)}
    heldout = draw_pairs(dataclasses.replace(task), 20, seed=0)
    assert set(heldout) <= set(task.split.heldout)
