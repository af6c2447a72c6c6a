"""Binary next-token tasks over Python code: pairs of prompts that differ minimally (Gao et al.
2025, arXiv 2511.13653, Table 1).

In a pair each prompt has its own right answer among the same two candidate tokens. The loss of a
task is the cross-entropy between the two candidates after the last token, averaged over both
prompts of all pairs. All tasks in `TASKS` but the first are filled in from the templates in
tasks.yaml; others can be made from a function (`Task`) or a file (`Task.from_jsonl`), for any model
with a tokenizer.

A prompt's context has distractors, such as other strings, already closed, in both quote styles.
They are the same in both prompts of a pair, so only what the task is about tells which candidate is
right. Both prompts end in the same token, except where that token is what the task is about.
"""

import difflib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tl_sparse.errors import DataError, TaskError
from tl_sparse.tasks.idioms import PAIRS, Writer, both_sides

_PAIR_FORMAT = '{"prompts": ["…", "…"], "answers": ["…", "…"]}'


class Pair(NamedTuple):
    """Two prompts, then the right answer to each."""

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

    A function makes one, `Task("plural", "is or are?", (" is", " are"), lambda rng: ("The cat",
    "The cats"), False)`, or a file, `Task.from_jsonl("pairs.jsonl")`.

    Attributes:
        name: its key in `TASKS`, if it is there.
        description: one line.
        candidates: the two answers, or None if each pair has its own.
        sample: draws one pair: a tuple of its two prompts, followed by its two answers if
            `candidates` is None. The right answer to prompt i is answer i.
        same_end: both prompts of a pair end in the same token.
    """

    name: str
    description: str
    candidates: tuple[str, str] | None
    sample: Callable[[random.Random], tuple[str, str] | tuple[str, str, str, str]]
    same_end: bool = True

    @classmethod
    def from_jsonl(cls, path: str | Path, name: str | None = None) -> "Task":
        """The task with the pairs in a file, one on each line: `{"prompts": ["…", "…"], "answers":
        ["…", "…"]}`.

        The pairs are drawn in an order that the seed decides, and none twice. Other keys and empty
        lines are ignored. Without `name` the task is named after the file, without `.jsonl`.

        Raises:
            DataError: the file cannot be read, has no pairs or the same prompts twice, or one of
                its lines is not a pair.
        """
        sample = partial(_one_of, _pairs_in_file(path))
        return cls(name or Path(path).stem, f"the pairs in {path}", None, sample)

    def pair(self, rng: random.Random) -> Pair:
        """Draw a pair with `sample`, and add the candidates as its answers if it has none.

        Raises:
            TaskError: `sample` does not return what it must.
        """
        texts = (*self.sample(rng), *(self.candidates or ()))
        if len(texts) == 4 and all(isinstance(text, str) for text in texts):
            return Pair(*texts)
        wanted = "two prompts"
        if self.candidates is None:
            wanted += " and two answers, as candidates is None"
        raise TaskError(
            f"sample of task {self.name} must give {wanted}; with the candidates it gave {texts}"
        )


def get_task(name: str) -> Task:
    """The built-in task of that name, or the task from a file if `name` ends in `.jsonl`.

    Raises:
        TaskError: there is no such task; the message has the nearest name and all names.
        DataError: `Task.from_jsonl` cannot read the file.
    """
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".jsonl"):
        return Task.from_jsonl(name)
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise TaskError(
        f"no task {name!r}{hint} Tasks: {', '.join(sorted(TASKS))}, or a file of pairs, *.jsonl"
    )


def _one_of(pairs: tuple[Pair, ...], rng: random.Random) -> Pair:
    return rng.choice(pairs)


def _pairs_in_file(path: str | Path) -> tuple[Pair, ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
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
            raise DataError(f"{place}: an earlier line has the same two prompts; leave one out")
        pairs[prompts] = pair
    if not pairs:
        raise DataError(f"{path} is empty; it must have a pair in each line, {_PAIR_FORMAT}")
    return tuple(pairs.values())


def _pair_in_line(line: str, place: str) -> Pair:
    """The pair on a line of a file; `place` names file and line in the `DataError` for a line that
    is not a pair.
    """
    try:
        value = json.loads(line)
        # Half a surrogate pair is valid JSON but cannot be encoded, and so has no tokens.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}") from error
    match value:
        case {"prompts": [str(), str()] as prompts, "answers": [str(), str()] as answers}:
            pair = Pair(*prompts, *answers)
            if all(pair) and prompts[0] != prompts[1] and answers[0] != answers[1]:
                return pair
    raise DataError(
        f"{place} must be {_PAIR_FORMAT}, no text empty and no two alike, not {line[:80]}"
    )


# The built-in tasks


def _closed_strings(rng: random.Random) -> tuple[str, str]:
    """Closed strings in both quote styles, then a call whose string is open: `print('the red
    house`.
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
    """A pair of tasks.yaml up to where the answer stands, its last `«a|b»`."""
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
#: The tasks of the paper by name.
TASKS: dict[str, Task] = {task.name: task for task in (_QUOTE_TASK, *map(_task_from_yaml, PAIRS))}
