"""Tasks from a list of prompts, each with its right and its wrong answer."""

import pytest

import tl_sparse
from tl_sparse.errors import DataError
from tl_sparse.tasks import Pair, Task
from tl_sparse.tasks.pairs import paired

PLURAL = [("The cat", "is", "are"), ("The cats", "are", "is"), ("A dog", "is", "are")]


def test_prompts_are_paired_by_their_answers_in_order():
    verbs = [("He", "runs", "run"), ("They", "run", "runs"), ("Some dogs", "are", "is")]
    assert paired([*PLURAL, *verbs]) == (
        Pair("The cat", "The cats", "is", "are"),
        Pair("He", "They", "runs", "run"),
        Pair("A dog", "Some dogs", "is", "are"),
    )
    assert paired(iter(PLURAL)) == paired(PLURAL)  # "A dog" has no partner


def test_a_task_of_examples():
    examples = []
    for number in range(12):
        examples.append((f"{number} cat here", ")", "]"))
        examples.append((f"{number} cats here", "]", ")"))
    task = Task.from_examples("plural", examples)
    assert (task.name, task.description) == ("plural", "12 pairs of examples")
    model = tl_sparse.load("tiny-python-sparse", device="cpu")
    data = tl_sparse.make_task_data(task, model.tokenizer, 12, seed=0)
    assert sorted(data.prompts) == sorted(prompt for prompt, *_ in examples)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([PLURAL[0], ("A dog", "is")], r"example 2 must be a prompt, .* not \('A dog', 'is'\)"),
        (["abc"], "example 1 must be .* not 'abc'"),
        ([("A dog", "is", "is")], "example 1 must be .* two different answers"),
        ([("", "is", "are")], "example 1 must be .* without empty texts"),
        ([PLURAL[0], PLURAL[0]], "example 2 has the prompt of an earlier one, 'The cat'"),
        ([], "no two examples make a pair"),
        ([PLURAL[0], PLURAL[2]], "no two examples make a pair: the right answer to one prompt"),
    ],
)
def test_examples_that_are_no_task(examples, message):
    with pytest.raises(DataError, match=message):
        Task.from_examples("plural", examples)
