"""The built-in tasks in contexts that were not seen in training or in the search for a circuit.

Circuits change with the wording of the prompts on which they are searched (arXiv 2606.16920), so a
circuit is judged on other wordings too. Each kind of context in held_out.yaml differs from the task
in one respect: the names, the length, the distractors, or the wording of the cue.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

from tl_sparse.arguments import checked
from tl_sparse.errors import TaskError
from tl_sparse.tasks.idioms import PAIRS, WORDS, Writer, prompts_of_text, read_yaml, words_by_kind
from tl_sparse.tasks.task import Task, as_task, is_built_in

#: In which respect a context differs from the prompts of its task.
ContextKind = Literal["names", "length", "distractors", "wording"]
#: Kind of context → what the names of its tasks say.
_TITLES: dict[ContextKind, str] = {
    "names": "other names",
    "length": "longer",
    "distractors": "other distractors",
    "wording": "other wording",
}


@checked("task")
def held_out_contexts(task: Task | str) -> dict[ContextKind, Task]:
    """Kind of context → a built-in task in contexts of that kind.

    The kinds are:

    - "names": other variables, functions, classes, files and words; no word of the usual prompts,
      apart from those by which the task itself is defined.
    - "length": more lines before the same end.
    - "distractors": before the same end, other constructs that could mislead.
    - "wording": the same cue, said in another way or with other code around it.

    Answers, and whether both prompts of a pair end in the same token, are those of the task. None
    of their prompts is a prompt of the task. They fit the context of the bundled models.

    Args:
        task: a task of `TASKS`, or its name.

    Raises:
        TaskError: if the task is not built in, since only you can say which other contexts pose the
            same question: make tasks of your own for them.
    """
    task = as_task(task)
    if not is_built_in(task):
        raise TaskError(
            f"task {task.name} is not built in, so it has no held-out contexts; make a Task of "
            "your own for each kind of context, with the same candidates, and use these"
        )
    contexts = {}
    for kind, title in _TITLES.items():
        contexts[kind] = replace(
            task,
            name=f"{task.name} ({title})",
            sample=partial(_from_held_out_templates, task.name, kind),
        )
    return contexts


@cache
def _held_out() -> dict[str, Any]:
    return read_yaml("held_out.yaml")


@cache
def _other_words() -> Mapping[str, tuple[str, ...]]:
    return words_by_kind(_held_out()["words"])


def _from_held_out_templates(name: str, kind: ContextKind, rng: random.Random) -> tuple[str, str]:
    """The prompts of a pair of this task in contexts of that kind."""
    return prompts_of_text(_filled_in(name, kind, rng))


def _filled_in(name: str, kind: ContextKind, rng: random.Random) -> str:
    """A pair of a task in a context of that kind, with its answers, both sides in one text."""
    from_where = material(name, kind)
    writer = Writer(rng, from_where.words)
    return writer.pair_of(from_where.templates, from_where.context, from_where.n_lines)


@dataclass(frozen=True)
class Material:
    """What the pairs of a built-in task are made of.

    Attributes:
        templates: the templates of the pair itself, on both sides.
        context: those of the text before it.
        n_lines: the number of templates of `context` that are drawn.
        words: the names and words by kind.
    """

    templates: Sequence[str]
    context: Sequence[str]
    n_lines: int
    words: Mapping[str, tuple[str, ...]]


def material(name: str, kind: ContextKind | None) -> Material:
    """The material of a built-in task in contexts of that kind, or in its usual ones."""
    entry = _held_out()["tasks"][name]
    found = PAIRS.get(name) or entry["usual"]
    if kind is not None:
        found = found | entry[kind]
    return Material(
        templates=found["templates"],
        context=found.get("context", found["templates"]),
        n_lines=found.get("lines", 3),
        words=_other_words() if kind == "names" else WORDS,
    )
