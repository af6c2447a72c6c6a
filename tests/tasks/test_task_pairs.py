"""Pairs that are split: in memory, in files, and as a task; and what a `Task` refuses."""

import dataclasses
import json
import random

import pytest

from micro import micro_tokenizer
from tl_sparse.errors import ArgumentError, DataError, TaskError
from tl_sparse.tasks import TASKS, Pair, Task, TaskPairs, is_built_in, make_task_data, read_pairs

pytestmark = pytest.mark.any_line

PAIRS = [Pair(f"f{i} A end", f"f{i} B end", " yes", " no") for i in range(6)]
SPLIT = TaskPairs("letters", "was it A or B?", (*PAIRS[:3],), (PAIRS[3],), (*PAIRS[4:],))


def with_candidates(split):
    return dataclasses.replace(split, candidates=(" yes", " no"))


@pytest.mark.parametrize("split", [SPLIT, with_candidates(SPLIT)])
def test_a_split_task_draws_its_held_out_pairs(split):
    task = Task.from_pairs(split)
    assert (task.name, task.description, task.candidates) == (
        "letters",
        "was it A or B?",
        split.candidates,
    )
    assert {task.pair(random.Random(seed)) for seed in range(20)} == set(split.heldout)
    data = make_task_data(task, micro_tokenizer(), 2, seed=0)
    assert set(data.prompts) == {*PAIRS[4].prompts, *PAIRS[5].prompts}


def test_prompts_of_the_search_are_those_of_training_and_selection():
    assert SPLIT.searched_prompts == {prompt for pair in PAIRS[:4] for prompt in pair.prompts}


@pytest.mark.parametrize("same_end", [True, False])
def test_a_file_keeps_the_split_and_whether_prompts_end_alike(tmp_path, same_end):
    split = dataclasses.replace(SPLIT, same_end=same_end)
    path = tmp_path / "letters.jsonl"
    split.write(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = {
        "prompts": ["f3 A end", "f3 B end"],
        "answers": [" yes", " no"],
        "split": "selection",
    }
    if not same_end:
        expected["same_end"] = False
    assert lines[3] == expected
    task = Task.from_jsonl(path)
    assert task.split == dataclasses.replace(split, description=f"the pairs in {path}")
    assert task.same_end is same_end


def test_a_file_holds_any_text(tmp_path):
    pair = Pair("é\u2028a\n", "b\r\n\x1b", " \t", " y\\")
    split = TaskPairs("odd", "", (pair,), (PAIRS[0],), (PAIRS[1],))
    split.write(tmp_path / "odd.jsonl")
    assert read_pairs(tmp_path / "odd.jsonl").parts["training"] == (pair,)


def lines_of(*splits):
    """A file with a pair for each split; None stands for a line without one."""
    lines = []
    for pair, split in zip(PAIRS, splits, strict=False):
        line = {"prompts": pair.prompts, "answers": pair.answers}
        if split is not None:
            line["split"] = split
        lines.append(json.dumps(line))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            ("training", "train"),
            ", line 2: \"split\" must be one of training, selection, heldout, not 'train'",
        ),
        ((3,), ', line 1: "split" must be one of training, selection, heldout, not 3'),
        ((["heldout"],), ', line 1: "split" must be one of'),
        (
            ("training", "selection", None, "heldout"),
            ', line 3: either each line or none must have a "split", and an earlier line differs',
        ),
        (
            ("heldout", "heldout", "training"),
            ' has no pair with the "split" selection; each of training, selection, heldout needs',
        ),
        (("heldout",), ' has no pair with the "split" training or selection; each of'),
    ],
)
def test_files_that_split_their_pairs_badly(tmp_path, splits, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines_of(*splits))
    with pytest.raises(DataError) as error:
        Task.from_jsonl(path)
    assert str(error.value).startswith(f"{path}{message}")


def test_a_line_says_whether_prompts_end_alike_by_true_or_false(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines_of(None).replace("}", ', "same_end": "no"}'))
    with pytest.raises(DataError, match="line 1: \"same_end\" must be true or false, not 'no'"):
        Task.from_jsonl(path)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"heldout": ()}, TaskError, "task letters has no heldout pairs; each part needs some"),
        ({"training": PAIRS}, ArgumentError, "training pairs must be a tuple of `Pair`s"),
        ({"selection": (("a", "b", "x", "y"),)}, ArgumentError, "selection pairs must be a tuple"),
        ({"selection": (Pair("a", "b", "x", 1),)}, ArgumentError, "selection pairs must be"),
    ],
)
def test_pairs_that_are_none(changes, kind, message):
    with pytest.raises(kind, match=message):
        dataclasses.replace(SPLIT, **changes)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"name": 3}, ArgumentError, "Task: name must be a str, not the int 3"),
        ({"name": ""}, TaskError, "the name of a task is empty"),
        ({"description": None}, ArgumentError, "Task: description must be a str, not the NoneType"),
        ({"same_end": "no"}, ArgumentError, "Task: same_end must be a bool, not the str 'no'"),
        ({"sample": ("a", "b")}, ArgumentError, "Task: sample must be a function of a random.Ran"),
        ({"split": PAIRS}, ArgumentError, "Task: split must be a TaskPairs, or None, not"),
        ({"candidates": "ab"}, ArgumentError, "Task: candidates must be a tuple of two texts, or"),
        ({"candidates": (" a", 2)}, ArgumentError, "Task: candidates must be a tuple of two texts"),
        ({"candidates": (" a",)}, ArgumentError, "Task: candidates must be a tuple of two texts"),
        ({"candidates": (" a", " a")}, TaskError, "candidates of task letters are ' a' and ' a'"),
        ({"candidates": ("", " a")}, TaskError, "two different texts that are not empty"),
    ],
)
def test_fields_that_a_task_refuses(changes, kind, message):
    with pytest.raises(kind, match=message):
        dataclasses.replace(Task.from_pairs(SPLIT), **changes)


def test_a_task_is_built_in_unless_it_was_changed():
    task = TASKS["var_if"]
    assert is_built_in(task)
    assert is_built_in(dataclasses.replace(task))
    assert not is_built_in(dataclasses.replace(task, same_end=not task.same_end))
    assert not is_built_in(dataclasses.replace(Task.from_pairs(SPLIT), name="var_if"))
