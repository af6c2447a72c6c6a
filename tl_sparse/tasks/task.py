"""Binary next-token tasks over Python code: pairs of prompts that differ minimally (Gao et al.
2025, arXiv 2511.13653, Table 1).

The two prompts of a pair share two candidate tokens, and each candidate is the right answer to one
of the prompts. The loss of a task is the cross-entropy between the two candidates after the last
token, averaged over both prompts of all pairs. All tasks in `TASKS` except the first are filled in
from the templates in tasks.yaml. Other tasks can be made from a function (`Task`) or a file
(`Task.from_jsonl`), for any model with a tokenizer.

The context of a prompt holds distractors, such as other strings in both quote styles that are
already closed. They are the same in both prompts of a pair, so only the cue that the task tests
tells which candidate is right. Both prompts end in the same token, except where that token is
itself the cue.
"""

import difflib
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tl_sparse.arguments import checked, described
from tl_sparse.errors import ArgumentError, TaskError
from tl_sparse.tasks.idioms import PAIRS, Writer, prompts_of_text
from tl_sparse.tasks.pairs import PARTS, Pair, TaskPairs, paired, read_pairs


@dataclass(frozen=True)
class Task:
    """A choice between two next tokens.

    A task is made from a function, `Task("plural", "is or are?", (" is", " are"), lambda rng: ("The
    cat", "The cats"), False)`, from a file, `Task.from_jsonl("pairs.jsonl")`, or from a list of
    prompts, `Task.from_examples("plural", [("The cat", " is", " are"), …])`.

    Attributes:
        name: the name of the task; a built-in task has it as its key in `TASKS`.
        description: what the model has to do, in one line.
        candidates: the two answers, or None if each pair has its own.
        sample: draws one pair and returns a tuple of its two prompts, followed by its two answers
            if `candidates` is None. The right answer to prompt i is answer i.
        same_end: whether both prompts of a pair end in the same token.
        split: the pairs, if they are already split into those that find a circuit and those that
            judge it. `prune` then uses these, and `sample` draws from the held-out ones alone.

    Raises:
        ArgumentError: if a field has the wrong type.
        TaskError: if the name or a candidate is empty, or the candidates are the same.
    """

    name: str
    description: str
    candidates: tuple[str, str] | None
    sample: Callable[[random.Random], tuple[str, str] | tuple[str, str, str, str]]
    same_end: bool = True
    split: TaskPairs | None = None

    def __post_init__(self) -> None:
        for field, kind in (("name", str), ("description", str), ("same_end", bool)):
            self._check_type(field, isinstance(getattr(self, field), kind), f"a {kind.__name__}")
        self._check_type("sample", callable(self.sample), "a function of a random.Random")
        is_split = isinstance(self.split, TaskPairs | None)
        self._check_type("split", is_split, "a TaskPairs, or None")
        if not self.name:
            raise TaskError("the name of a task is empty")
        if self.candidates is None:
            return
        texts = self.candidates if isinstance(self.candidates, tuple) else ()
        are_two_texts = len(texts) == 2 and all(isinstance(text, str) for text in texts)
        self._check_type("candidates", are_two_texts, "a tuple of two texts, or None")
        first, second = texts
        if not first or not second or first == second:
            raise TaskError(
                f"the candidates of task {self.name} are {first!r} and {second!r}; they must be "
                "two different texts that are not empty"
            )

    def _check_type(self, field: str, is_right: bool, expected: str) -> None:
        if not is_right:
            value = described(getattr(self, field))
            raise ArgumentError(f"Task: {field} must be {expected}, not {value}")

    @classmethod
    def from_jsonl(cls, path: str | Path, name: str | None = None) -> "Task":
        """The task whose pairs are in a file, one on each line: `{"prompts": ["…", "…"], "answers":
        ["…", "…"]}`.

        `make_task_data` draws the pairs in an order that the seed decides, and no pair twice. A
        line may also have `"same_end": false`, which then holds for the task. If one line has a
        `"split"`, which is "training", "selection" or "heldout", each must have one; `prune` then
        splits the pairs in this way. The file `pairs.jsonl` of a saved circuit is of this kind.
        Other keys and empty lines are ignored.

        Args:
            path: the file.
            name: the name of the task; by default that of the file, without `.jsonl`.

        Raises:
            DataError: if the file cannot be read, has no pairs, has the same two prompts twice, has
                a line that is not a pair, or splits the pairs only in part.
        """
        file = read_pairs(path)
        name = name or Path(path).stem
        description = f"the pairs in {path}"
        if None in file.parts:
            sample = partial(_one_of, file.parts[None])
            return cls(name, description, None, sample, file.same_end)
        training, selection, heldout = [file.parts[part] for part in PARTS]
        return cls.from_pairs(
            TaskPairs(name, description, training, selection, heldout, same_end=file.same_end)
        )

    @classmethod
    def from_examples(
        cls,
        name: str,
        examples: Iterable[tuple[str, str, str]],
        description: str = "",
        same_end: bool = True,
    ) -> "Task":
        """The task of prompts that each have a right and a wrong answer.

        A task consists of pairs of prompts: the right answer to one is the wrong answer to the
        other. So a prompt is paired with the first one left for which it is the other way round.
        Prompts for which none is left are not used.

        Args:
            name: the name of the task.
            examples: a prompt, its right answer and its wrong answer, any number of times.
            description: what the model has to do, in one line.
            same_end: whether both prompts of a pair end in the same token.

        Raises:
            DataError: if an example is not three texts that are not empty, with two different
                answers, a prompt occurs twice, or no two examples make a pair.
        """
        pairs = paired(examples)
        description = description or f"{len(pairs)} pairs of examples"
        return cls(name, description, None, partial(_one_of, pairs), same_end)

    @classmethod
    def from_pairs(cls, pairs: TaskPairs) -> "Task":
        """The task of pairs that are already split, such as those that a circuit keeps.

        For pairs that are not split, use `from_examples`, or a file and `from_jsonl`.
        """
        sample = _one_of if pairs.candidates is None else _prompts_of_one
        return cls(
            pairs.name,
            pairs.description,
            pairs.candidates,
            partial(sample, pairs.heldout),
            pairs.same_end,
            split=pairs,
        )

    def pair(self, rng: random.Random) -> Pair:
        """Draw a pair with `sample`; its answers are `candidates`, unless that is None.

        Raises:
            TaskError: if `sample` does not return two prompts, followed by two answers if
                `candidates` is None.
        """
        drawn = self.sample(rng)
        if isinstance(drawn, tuple | list):  # a text would be taken for its letters
            texts = (*drawn, *(self.candidates or ()))
            if len(texts) == 4 and all(isinstance(text, str) for text in texts):
                return Pair(*texts)
        wanted = "two prompts"
        if self.candidates is None:
            wanted += " and two answers, since candidates is None"
        raise TaskError(
            f"sample of task {self.name} must return a tuple of {wanted}, not {repr(drawn)[:200]}"
        )


def get_task(name: str | Path) -> Task:
    """The built-in task of that name, or the task from that file if `name` ends in `.jsonl`.

    Raises:
        TaskError: if there is no such task; the message gives the nearest name and all names.
        DataError: if `Task.from_jsonl` cannot read the file.
    """
    if isinstance(name, Path):
        name = str(name)
    if not isinstance(name, str):
        raise TaskError(f"a task is a Task or the name of one, not a {type(name).__name__}")
    if name in TASKS:
        return TASKS[name]
    if name.lower().endswith(".jsonl"):
        return Task.from_jsonl(name)
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    if nearest:
        hint = f"; did you mean {nearest[0]!r}?"
    elif re.fullmatch(r"[\w./\\-]*", name):
        hint = "."
    else:
        hint = ": the argument is a task or the name of one, and this looks like a prompt."
    raise TaskError(
        f"no task {name!r}{hint} Tasks: {', '.join(sorted(TASKS))}, or a file of pairs, *.jsonl"
    )


@checked()
def is_task_name(name: str) -> bool:
    """Whether this is a built-in task, or can be a file of pairs."""
    return name in TASKS or name.lower().endswith(".jsonl")


def as_task(task: Task | str) -> Task:
    """The task itself, or the task of that name; see `get_task`.

    Raises:
        TaskError: if it is neither a task nor the name of one.
        DataError: if `Task.from_jsonl` cannot read the file.
    """
    return task if isinstance(task, Task) else get_task(task)


def _one_of(pairs: tuple[Pair, ...], rng: random.Random) -> Pair:
    return rng.choice(pairs)


def _prompts_of_one(pairs: tuple[Pair, ...], rng: random.Random) -> tuple[str, str]:
    return rng.choice(pairs).prompts


# The built-in tasks


def _closed_strings(rng: random.Random) -> tuple[str, str]:
    """Lines with closed strings in both quote styles, and then a call whose string is still open:
    `print('the red house`.
    """
    writer = Writer(rng)
    context = ""
    while "'" not in context or '"' not in context:
        n_lines = rng.randint(1, 4)
        lines = [writer.fill(writer.choose("closed_strings")) for _ in range(n_lines)]
        context = "\n".join(lines) + "\n"
    call = writer.fill(writer.choose("open_calls"))
    return context + call.replace("(", "('"), context + call.replace("(", '("')


def _from_templates(name: str, rng: random.Random) -> tuple[str, str]:
    """The prompts of a pair of this task in tasks.yaml."""
    return prompts_of_text(Writer(rng).pair(name))


def _task_from_yaml(name: str) -> Task:
    entry = PAIRS[name]
    return Task(
        name=name,
        description=entry["description"],
        candidates=tuple(entry["candidates"]),
        sample=partial(_from_templates, name),
        same_end=entry.get("same_end", True),
    )


_QUOTE_TASK = Task(
    name="single_double_quote",
    description="close the string of a call with the quote that opened it",
    candidates=("')", '")'),
    sample=_closed_strings,
)
#: The built-in tasks, which are those of the paper, by name.
TASKS: dict[str, Task] = {task.name: task for task in (_QUOTE_TASK, *map(_task_from_yaml, PAIRS))}


@checked()
def is_built_in(task: Task) -> bool:
    """Whether this is one of `TASKS`, and not another task of the same name."""
    return TASKS.get(task.name) == task
