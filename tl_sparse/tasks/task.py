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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tl_sparse.errors import DataError, TaskError
from tl_sparse.parsing import MAX_JSON_BYTES, parse_json, printable, read_text
from tl_sparse.tasks.idioms import PAIRS, Writer, both_sides

_PAIR_FORMAT = '{"prompts": ["…", "…"], "answers": ["…", "…"]}'


class Pair(NamedTuple):
    """Two prompts, followed by the right answer to each."""

    first_prompt: str
    second_prompt: str
    first_answer: str
    second_answer: str

    @property
    def prompts(self) -> tuple[str, str]:
        return self.first_prompt, self.second_prompt


@dataclass(frozen=True)
class Task:
    """A choice between two next tokens.

    A task is made from a function, `Task("plural", "is or are?", (" is", " are"), lambda rng: ("The
    cat", "The cats"), False)`, or from a file, `Task.from_jsonl("pairs.jsonl")`.

    Attributes:
        name: the name of the task; a built-in task has it as its key in `TASKS`.
        description: what the model has to do, in one line.
        candidates: the two answers, or None if each pair has its own.
        sample: draws one pair and returns a tuple of its two prompts, followed by its two answers
            if `candidates` is None. The right answer to prompt i is answer i.
        same_end: whether both prompts of a pair end in the same token.
    """

    name: str
    description: str
    candidates: tuple[str, str] | None
    sample: Callable[[random.Random], tuple[str, str] | tuple[str, str, str, str]]
    same_end: bool = True

    @classmethod
    def from_jsonl(cls, path: str | Path, name: str | None = None) -> "Task":
        """The task whose pairs are in a file, one on each line: `{"prompts": ["…", "…"], "answers":
        ["…", "…"]}`.

        `make_task_data` draws the pairs in an order that the seed decides, and no pair twice. Other
        keys and empty lines are ignored. Without `name` the task is named after the file, without
        `.jsonl`.

        Raises:
            DataError: if the file cannot be read, has no pairs, has the same two prompts twice, or
                has a line that is not a pair.
        """
        sample = partial(_one_of, _pairs_in_file(path))
        return cls(name or Path(path).stem, f"the pairs in {path}", None, sample)

    def pair(self, rng: random.Random) -> Pair:
        """Draw a pair with `sample`; its answers are `candidates`, unless that is None.

        Raises:
            TaskError: if `sample` does not return two prompts, followed by two answers if
                `candidates` is None.
        """
        texts = (*self.sample(rng), *(self.candidates or ()))
        if len(texts) == 4 and all(isinstance(text, str) for text in texts):
            return Pair(*texts)
        wanted = "two prompts"
        if self.candidates is None:
            wanted += " and two answers, since candidates is None"
        raise TaskError(
            f"sample of task {self.name} must return {wanted}; with the candidates added, it "
            f"returned {texts}"
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
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise TaskError(
        f"no task {name!r}{hint} Tasks: {', '.join(sorted(TASKS))}, or a file of pairs, *.jsonl"
    )


def as_task(task: Task | str) -> Task:
    """The task itself, or the task of that name; see `get_task`.

    Raises:
        TaskError: if it is neither a task nor the name of one.
        DataError: if `Task.from_jsonl` cannot read the file.
    """
    return task if isinstance(task, Task) else get_task(task)


def _one_of(pairs: tuple[Pair, ...], rng: random.Random) -> Pair:
    return rng.choice(pairs)


def _pairs_in_file(path: str | Path) -> tuple[Pair, ...]:
    try:
        lines = read_text(Path(path), MAX_JSON_BYTES).split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
    pairs: dict[frozenset[str], Pair] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        pair = _pair_in_line(line, place)
        prompts = frozenset(pair.prompts)
        if prompts in pairs:
            raise DataError(
                f"{place}: an earlier line has the same two prompts; remove one of them"
            )
        pairs[prompts] = pair
    if not pairs:
        raise DataError(f"{path} is empty; it must have a pair on each line, {_PAIR_FORMAT}")
    return tuple(pairs.values())


def _pair_in_line(line: str, place: str) -> Pair:
    """The pair on a line of a file.

    Args:
        line: the line.
        place: the file and line number, for error messages.

    Raises:
        DataError: if the line is not a pair.
    """
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place} is not valid JSON: {error}") from error
    match value:
        case {"prompts": [str(), str()] as prompts, "answers": [str(), str()] as answers}:
            pair = Pair(*prompts, *answers)
            if all(pair) and prompts[0] != prompts[1] and answers[0] != answers[1]:
                return pair
    raise DataError(
        f"{place} must be {_PAIR_FORMAT}, without empty texts, with two different prompts and two "
        f"different answers, not {printable(line[:80])}"
    )


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
    """The prompts of a pair: its text before the answer, which is the last `«a|b»`."""
    text = Writer(rng).pair(name)
    return both_sides(text[: text.rindex("«")])


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
