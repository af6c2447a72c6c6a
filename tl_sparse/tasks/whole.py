"""Pairs of the built-in tasks with the code that follows their prompts.

With it, Python's parser can tell which answer to a changed prompt is right.
"""

import random
from typing import NamedTuple

from tl_sparse.arguments import checked
from tl_sparse.errors import TaskError
from tl_sparse.tasks.held_out import ContextKind, Material, material
from tl_sparse.tasks.idioms import Writer, both_sides, prompts_of_text
from tl_sparse.tasks.pairs import Pair
from tl_sparse.tasks.task import Task, as_task, is_built_in

#: A draw is repeated at most so often, per pair that is wanted, to find prompts that are new.
_DRAWS_PER_PAIR = 100


class WholePair(NamedTuple):
    """A pair, and how its prompts go on.

    Attributes:
        pair: the prompts and their right answers.
        endings: the code that follows each prompt; it begins with the right answer. A prompt with
            its ending is valid Python.
    """

    pair: Pair
    endings: tuple[str, str]


@checked("task")
def whole_pairs(
    task: Task | str,
    n_pairs: int,
    seed: int,
    *,
    kind: ContextKind | None = None,
    n_lines: int | None = None,
    side: int | None = None,
) -> list[WholePair]:
    """Different pairs of a built-in task; fewer if the task has no more.

    Args:
        task: a task of `TASKS`, or its name.
        n_pairs: the number of pairs.
        seed: the seed of the draws.
        kind: the kind of held-out context; by default the usual one. See `held_out_contexts`.
        n_lines: the number of lines of context, an odd number unless `side` is given; by default
            that of the task.
        side: the answer, 0 or 1, that all lines of context show; by default, one more than half of
            them show one answer, and the others the other.

    Raises:
        TaskError: if the task is not built in, or `n_lines` or `side` is impossible.
    """
    task = _built_in(task)
    source = material(task.name, kind)
    n_lines = source.n_lines if n_lines is None else n_lines
    if side not in (None, 0, 1):
        raise TaskError(f"side is {side}; it must be 0 or 1, or None for both")
    if n_lines < 0 or (side is None and n_lines % 2 == 0):
        raise TaskError(f"n_lines is {n_lines}; it must be at least 0, and odd without a side")
    rng = random.Random(seed)
    pairs: dict[tuple[str, str], WholePair] = {}
    for _ in range(_DRAWS_PER_PAIR * n_pairs):
        if len(pairs) == n_pairs:
            break
        drawn = _drawn(task, source, rng, n_lines, side)
        pairs.setdefault(drawn.pair.prompts, drawn)
    return list(pairs.values())


@checked("task")
def whole_statements(task: Task | str, n_statements: int, seed: int) -> list[str]:
    """Whole statements that can stand before every prompt of a built-in task.

    Half of them are lines of the task's own context, and half are those of any Python file.

    Raises:
        TaskError: if the task is not built in.
    """
    task = _built_in(task)
    rng = random.Random(seed)
    context = material(task.name, None).context
    statements: list[str] = []
    for number in range(n_statements):
        writer = Writer(rng)
        if number % 2 == 0:
            statements.append(writer.context_line(rng.randrange(2), context).rstrip("\n"))
        else:
            statements.append(writer.statement())
    return statements


@checked("task")
def context_tells_sides(task: Task | str) -> bool:
    """Whether the lines of context before a prompt of a built-in task show one of its answers.

    Raises:
        TaskError: if the task is not built in.
    """
    context = material(_built_in(task).name, None).context
    return any("«" in template for template in context)


def _built_in(task: Task | str) -> Task:
    task = as_task(task)
    if not is_built_in(task):
        raise TaskError(
            f"task {task.name} is not built in, so it is not known how its prompts go on"
        )
    return task


def _drawn(
    task: Task, source: Material, rng: random.Random, n_lines: int, side: int | None
) -> WholePair:
    writer = Writer(rng, source.words)
    if side is None:
        text = writer.pair_of(source.templates, source.context, n_lines)
    else:
        text = writer.pair_after([side] * n_lines, source.templates, source.context)
    prompts = prompts_of_text(text)
    whole = both_sides(text)
    endings = [each[len(prompt) :] for each, prompt in zip(whole, prompts, strict=True)]
    assert task.candidates is not None
    return WholePair(Pair(*prompts, *task.candidates), (endings[0], endings[1]))
