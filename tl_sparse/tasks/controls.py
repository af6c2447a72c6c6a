"""Control tasks: what a search finds for them is due to the search, not to what the model knows.

Drori, "Weight-sparse circuits may be interpretable yet unfaithful" (LessWrong, February 2026),
finds small circuits for answers that make no sense. Random labels are the control of Zhang et al.
2017 (arXiv 1611.03530): with them, nothing is left to learn but single examples.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tl_sparse.arguments import checked
from tl_sparse.errors import TaskError
from tl_sparse.tasks.pairs import PARTS, Pair, TaskPairs
from tl_sparse.tasks.task import Task, as_task
from tl_sparse.tasks.task_data import check_tokenizer, is_one_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Texts from which `nonsense_task` takes the first two that suit a task.
_NONSENSE = (" in", ":", " +=", "]]", " is", "=", ".", ")", " the")
#: How many pairs `nonsense_task` draws to see which answers a task has.
_N_DRAWN = 32


@checked("task")
def nonsense_task(task: Task | str, tokenizer: PreTrainedTokenizerFast) -> Task:
    """A task with the same prompts, and two answers that make no sense after them.

    The answers are the first two of a fixed list that are single tokens after the prompts, and
    share no beginning with an answer of the task: " in" and ":" for the quote task, for example.
    What is right after the first prompt of each pair is always the first of them. So the two can be
    told apart by what the prompts tell, but the model has no reason to prefer either.

    Args:
        task: the task, or its name. If its pairs are split, so are those of the control.
        tokenizer: the tokenizer of the model.

    Raises:
        TaskError: if fewer than two of the texts suit the task.
        TokenizerError: if the tokenizer has no beginning-of-text token.
    """
    task = as_task(task)
    check_tokenizer(task, tokenizer)
    pairs = _some_pairs(task)
    answers = {answer for pair in pairs for answer in pair.answers}
    suitable = []
    for text in _NONSENSE:
        if any(_share_beginning(text, answer) for answer in answers):
            continue
        if all(is_one_token(tokenizer, prompt, text) for pair in pairs for prompt in pair.prompts):
            suitable.append(text)
    if len(suitable) < 2:
        raise TaskError(
            f"task {task.name}: of the answers without sense that are tried, "
            f"{', '.join(map(repr, _NONSENSE))}, fewer than two are single tokens after its "
            "prompts and no beginning of its answers; make a Task of your own with other candidates"
        )
    first, second = suitable[:2]
    return _changed(
        task,
        "answers without sense",
        partial(_with_answers, answers=(first, second)),
        candidates=(first, second),
    )


@checked("task")
def shuffled_task(task: Task | str, seed: int = 0) -> Task:
    """A task with the same prompts and answers, in which the right answers are random.

    In half of the pairs, the answer that was right after one prompt is now right after the other.
    A hash of the prompts and of `seed` decides this for each pair, so it is the same in every split
    and draw, and nothing but the pair itself tells it: what is learned from some pairs says nothing
    about others. The prompts of such a pair change places, since in a task answer i is right after
    prompt i.

    Args:
        task: the task, or its name. If its pairs are split, so are those of the control.
        seed: another seed changes other pairs.
    """
    task = as_task(task)
    change = partial(_with_random_labels, seed=seed)
    return _changed(task, "shuffled answers", change, task.candidates)


def _changed(
    task: Task, title: str, change: Callable[[Pair], Pair], candidates: tuple[str, str] | None
) -> Task:
    """The task with each of its pairs changed, wherever it takes them from."""
    name = f"{task.name} ({title})"
    split = None
    if task.split is not None:
        split = _changed_split(task.split, name, change, candidates)
    sample = partial(_sample, task, change, candidates is None)
    return replace(task, name=name, candidates=candidates, sample=sample, split=split)


def _changed_split(
    split: TaskPairs, name: str, change: Callable[[Pair], Pair], candidates: tuple[str, str] | None
) -> TaskPairs:
    return replace(
        split,
        name=name,
        training=tuple(map(change, split.training)),
        selection=tuple(map(change, split.selection)),
        heldout=tuple(map(change, split.heldout)),
        candidates=candidates,
    )


def _sample(
    task: Task, change: Callable[[Pair], Pair], with_answers: bool, rng: random.Random
) -> tuple[str, str] | Pair:
    """A pair of the task, changed; its prompts alone if the control has the same two answers."""
    pair = change(task.pair(rng))
    return pair if with_answers else pair.prompts


def _with_answers(pair: Pair, answers: tuple[str, str]) -> Pair:
    return Pair(*pair.prompts, *answers)


def _with_random_labels(pair: Pair, seed: int) -> Pair:
    text = "\0".join((str(seed), *pair.prompts))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=1).digest()
    if digest[0] % 2 == 0:
        return pair
    return Pair(pair.second_prompt, pair.first_prompt, *pair.answers)


def _some_pairs(task: Task) -> Iterable[Pair]:
    """All pairs of a task that is split, else some that are drawn."""
    if task.split is not None:
        return [pair for part in PARTS for pair in task.split.part(part)]
    rng = random.Random(0)
    return [task.pair(rng) for _ in range(_N_DRAWN)]


def _share_beginning(text: str, other: str) -> bool:
    return text.startswith(other) or other.startswith(text)
