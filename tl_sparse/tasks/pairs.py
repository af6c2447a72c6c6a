"""Pairs of prompts, the parts into which a task's pairs are split, and files of pairs."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tl_sparse.arguments import checked
from tl_sparse.errors import ArgumentError, DataError, TaskError
from tl_sparse.parsing import MAX_JSON_BYTES, parse_json, printable, read_text

#: What pairs are for: training the gates, selecting the size of the circuit, and judging it.
Part = Literal["training", "selection", "heldout"]
PARTS: tuple[Part, ...] = ("training", "selection", "heldout")
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

    @property
    def answers(self) -> tuple[str, str]:
        return self.first_answer, self.second_answer


@dataclass(frozen=True)
class TaskPairs:
    """The pairs of a task, split into those with which a circuit is found and those that judge it.

    Circuits of tasks that are not built in keep them, so that what is measured of a circuit later
    is measured on the same task, and on pairs that the search has not seen. `Task.from_pairs` makes
    the task again.

    Attributes:
        name, description: those of the task.
        training, selection, heldout: the pairs that trained the gates, selected the size of the
            circuit, and judged it. No prompt is in two of them.
        candidates: the two answers, or None if each pair has its own.
        same_end: whether both prompts of a pair end in the same token.

    Raises:
        ArgumentError: if a part is not a tuple of `Pair`s of texts.
        TaskError: if a part is empty.
    """

    name: str
    description: str
    training: tuple[Pair, ...]
    selection: tuple[Pair, ...]
    heldout: tuple[Pair, ...]
    candidates: tuple[str, str] | None = None
    same_end: bool = True

    def __post_init__(self) -> None:
        for part in PARTS:
            pairs = self.part(part)
            if not isinstance(pairs, tuple) or not all(map(_is_pair, pairs)):
                raise ArgumentError(f"{part} pairs must be a tuple of `Pair`s of four texts")
            if not pairs:
                raise TaskError(f"task {self.name} has no {part} pairs; each part needs some")

    def part(self, part: Part) -> tuple[Pair, ...]:
        """The training, selection or held-out pairs."""
        pairs: tuple[Pair, ...] = getattr(self, part)
        return pairs

    @property
    def searched_prompts(self) -> set[str]:
        """The prompts on which a circuit was searched, so that none of them may judge it."""
        return prompts_of((*self.training, *self.selection))

    def write(self, path: Path) -> None:
        """Write a file that `Task.from_jsonl` reads, with the part of each pair as its "split"."""
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for part in PARTS:
                for pair in self.part(part):
                    line: dict[str, Any] = {
                        "prompts": pair.prompts,
                        "answers": pair.answers,
                        "split": part,
                    }
                    if not self.same_end:
                        line["same_end"] = False
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _is_pair(pair: object) -> bool:
    return isinstance(pair, Pair) and all(isinstance(text, str) for text in pair)


@checked()
def prompts_of(pairs: Iterable[Pair]) -> set[str]:
    """All prompts of these pairs."""
    prompts = set[str]()
    for pair in pairs:
        prompts.update(pair.prompts)
    return prompts


@checked("examples")
def paired(examples: Iterable[tuple[str, str, str]]) -> tuple[Pair, ...]:
    """Pairs of prompts whose answers are the same two, the other way round.

    Args:
        examples: a prompt, its right answer and its wrong answer, any number of times.

    Raises:
        DataError: see `Task.from_examples`.
    """
    pairs = []
    seen = set()
    # The prompts that have no partner yet, by their right and wrong answer.
    waiting: dict[tuple[str, str], deque[str]] = {}
    for number, example in enumerate(examples, 1):
        if not _is_example(example):
            raise DataError(
                f"example {number} must be a prompt, its right answer and its wrong answer, "
                "without empty texts and with two different answers, not "
                f"{printable(repr(example)[:80])}"
            )
        prompt, right, wrong = example
        if prompt in seen:
            raise DataError(
                f"example {number} has the prompt of an earlier one, {printable(repr(prompt)[:80])}"
            )
        seen.add(prompt)
        partners = waiting.get((wrong, right))
        if partners:
            pairs.append(Pair(partners.popleft(), prompt, wrong, right))
        else:
            waiting.setdefault((right, wrong), deque()).append(prompt)
    if not pairs:
        raise DataError(
            "no two examples make a pair: the right answer to one prompt must be the wrong answer "
            "to another, and the other way round"
        )
    return tuple(pairs)


def _is_example(example: object) -> bool:
    if not isinstance(example, tuple | list) or len(example) != 3:
        return False
    if not all(isinstance(text, str) and text for text in example):
        return False
    _, right, wrong = example
    return bool(right != wrong)


@dataclass(frozen=True)
class PairsFile:
    """What a file of pairs holds.

    Attributes:
        parts: the pairs of each part, or all of them under None if the file does not split them.
        same_end: false if a line says so.
    """

    parts: dict[Part | None, tuple[Pair, ...]]
    same_end: bool


class _Line(NamedTuple):
    place: str
    pair: Pair
    part: Part | None
    same_end: bool


@checked()
def read_pairs(path: str | Path) -> PairsFile:
    """Read a file of pairs; for its format and the errors see `Task.from_jsonl`."""
    by_part: dict[Part | None, list[Pair]] = {}
    seen = set()
    same_end = True
    for line in _lines(path):
        prompts = frozenset(line.pair.prompts)
        if prompts in seen:
            raise DataError(
                f"{line.place}: an earlier line has the same two prompts; remove one of them"
            )
        seen.add(prompts)
        same_end = same_end and line.same_end
        by_part.setdefault(line.part, []).append(line.pair)
        if None in by_part and len(by_part) > 1:
            raise DataError(
                f'{line.place}: either each line or none must have a "split", and an earlier line '
                "differs from this one"
            )
    if not by_part:
        raise DataError(f"{path} is empty; it must have a pair on each line, {_PAIR_FORMAT}")
    missing = [part for part in PARTS if part not in by_part]
    if missing and None not in by_part:
        raise DataError(
            f'{path} has no pair with the "split" {" or ".join(missing)}; each of '
            f"{', '.join(PARTS)} needs some, or no line has a split"
        )
    return PairsFile({part: tuple(pairs) for part, pairs in by_part.items()}, same_end)


def _lines(path: str | Path) -> Iterator[_Line]:
    """The lines of a file that are not empty."""
    try:
        lines = read_text(Path(path), MAX_JSON_BYTES).split("\n")
    except FileNotFoundError as error:
        raise DataError(str(error)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parsed(line, f"{path}, line {number}")


def _parsed(line: str, place: str) -> _Line:
    """What a line of a file says.

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
    pair = _pair(value)
    if pair is None:
        raise DataError(
            f"{place} must be {_PAIR_FORMAT}, without empty texts, with two different prompts and "
            f"two different answers, not {printable(line[:80])}"
        )
    part = value.get("split")
    if part is not None and part not in PARTS:
        raise DataError(
            f'{place}: "split" must be one of {", ".join(PARTS)}, not {printable(repr(part)[:80])}'
        )
    same_end = value.get("same_end", True)
    if not isinstance(same_end, bool):
        raise DataError(
            f'{place}: "same_end" must be true or false, not {printable(repr(same_end)[:80])}'
        )
    return _Line(place, pair, part, same_end)


def _pair(value: object) -> Pair | None:
    """The pair that a JSON value describes; None if it describes none."""
    match value:
        case {"prompts": [str(), str()] as prompts, "answers": [str(), str()] as answers}:
            pair = Pair(*prompts, *answers)
            if all(pair) and prompts[0] != prompts[1] and answers[0] != answers[1]:
                return pair
    return None
