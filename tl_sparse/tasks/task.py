"""Binary next-token tasks over Python code: pairs of prompts that differ minimally (paper, Table
1).

In a pair each prompt has its own right answer among the same two candidate tokens. The loss of a
task is the cross-entropy between the two candidates after the last token, a mean over both prompts
of all pairs. All tasks in `TASKS` but the first are filled in from the templates in tasks.yaml;
others can be made of a function (`Task`) or a file (`Task.from_jsonl`), for any model with a
tokenizer.

A prompt's context has distractors, such as other strings, already closed, in both quote styles.
They are the same in both prompts of a pair, so only what the task is about tells which candidate is
right. Both prompts end in the same token, except where that token is what the task is about.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.errors import DataError, TaskError, TokenizerError
from tl_sparse.tasks.idioms import PAIRS, Writer, both_sides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


#: The two prompts of a pair, then the right answer to each.
Pair = tuple[str, str, str, str]


@dataclass(frozen=True)
class Task:
    """A choice between two next tokens.

    A function makes one, `Task("plural", "is or are?", (" is", " are"), lambda rng: ("The cat",
    "The cats"), False)`, or a file, `Task.from_jsonl("pairs.jsonl")`.

    Attributes:
        name: its key in `TASKS`, if it is there.
        description: one line.
        candidates: the two answers, or None if each pair has its own.
        sample: draws one pair of prompts, and behind it the two answers if `candidates` is None.
            The right answer to prompt i is answer i.
        same_end: both prompts of a pair end in the same token.
    """

    name: str
    description: str
    candidates: tuple[str, str] | None
    sample: Callable[[random.Random], tuple[str, str] | Pair]
    same_end: bool = True

    @classmethod
    def from_jsonl(cls, path: str | Path, name: str | None = None) -> Task:
        """The task with the pairs in a file, a line each: `{"prompts": ["…", "…"], "answers": ["…",
        "…"]}`.

        They are drawn in any order, which the seed decides, and none twice. Other keys are ignored,
        as are empty lines. Without `name` it is the file's, without `.jsonl`.

        Raises:
            DataError: the file cannot be read, or has no pairs, a line that is none, or the same
                prompts twice.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
        pairs: dict[frozenset[str], Pair] = {}
        for number, line in enumerate(lines, 1):
            if line.strip():
                pair = _pair_in(line, f"{path}, line {number}")
                if pairs.setdefault(frozenset(pair[:2]), pair) is not pair:
                    raise DataError(
                        f"{path}, line {number}: an earlier line has the same two prompts; leave one out"
                    )
        if not pairs:
            raise DataError(f"{path} is empty; it must have a pair in each line, {_LINE}")
        sample = partial(random.Random.choice, seq=tuple(pairs.values()))
        return cls(name or Path(path).stem, f"the pairs in {path}", None, sample)

    def pair(self, rng: random.Random) -> Pair:
        """A pair that `sample` draws, with its answers; `TaskError` if that is not what it
        gives.
        """
        texts = (*self.sample(rng), *(self.candidates or ()))
        if len(texts) != 4 or not all(isinstance(text, str) for text in texts):
            wanted = (
                "two prompts"
                if self.candidates
                else "two prompts and two answers, as candidates is None"
            )
            raise TaskError(
                f"sample of task {self.name} must give {wanted}; with the candidates it gave {texts}"
            )
        return texts


_LINE = '{"prompts": ["…", "…"], "answers": ["…", "…"]}'


def _pair_in(line: str, where: str) -> Pair:
    """The pair that a line of a file is; DataError, which says `where` that is, if it is none."""
    try:
        value = json.loads(line)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # half a surrogate pair is no text that has tokens
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    match value:
        case {"prompts": [str(a), str(b)], "answers": [str(x), str(y)]} if (
            all((a, b, x, y)) and a != b and x != y
        ):
            return a, b, x, y
    raise DataError(f"{where} must be {_LINE}, no text empty and no two alike, not {line[:80]}")


def _closed_strings(rng: random.Random) -> tuple[str, str]:
    """Closed strings in both quote styles, then a call whose string is open: `print('the red
    house`.
    """
    writer = Writer(rng)
    context = ""
    while "'" not in context or '"' not in context:
        context = "".join(
            writer.fill(writer.choose("closed_strings")) + "\n" for _ in range(rng.randint(1, 4))
        )
    call = writer.fill(writer.choose("open_calls"))
    return context + call.replace("(", "('"), context + call.replace("(", '("')


def _from_templates(name: str, rng: random.Random) -> tuple[str, str]:
    """A pair of tasks.yaml up to where the answer stands, its last `«a|b»`."""
    text = Writer(rng).pair(name)
    return both_sides(text[: text.rindex("«")])


TASKS: dict[str, Task] = {
    "single_double_quote": Task(
        "single_double_quote",
        "close the string of a call with the quote that opened it",
        ("')", '")'),
        _closed_strings,
    )
} | {
    name: Task(
        name,
        pair["description"],
        tuple(pair["candidates"]),
        partial(_from_templates, name),
        pair.get("same_end", True),
    )
    for name, pair in PAIRS.items()
}


def get_task(name: str) -> Task:
    """The task of that name, or that with the pairs in a file, if `name` ends in `.jsonl`.

    Raises:
        TaskError: there is none; the message has the nearest name and all names.
        DataError: the file is not one that `Task.from_jsonl` reads.
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


@dataclass(frozen=True, eq=False)  # eq: tensors have no single truth value
class TaskData:
    """The pairs of a task as tokens; pair i is the prompts 2i and 2i + 1.

    Attributes:
        task: the name of the task.
        prompts: the text of each prompt.
        tokens: each prompt's tokens after the beginning-of-text token, padded on the right. A
            causal model needs no mask for that: no position up to `last` sees the padding.
        last: the position of each prompt's last token, where the answer is predicted.
        candidates: the ids of each prompt's two candidates, the same for both prompts of a pair.
        correct: which candidate is right for each prompt, 0 or 1.
    """

    task: str
    prompts: tuple[str, ...]
    tokens: Int[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]
    candidates: Int[Tensor, "prompt 2"]
    correct: Int[Tensor, " prompt"]

    @property
    def n_pairs(self) -> int:
        return len(self.prompts) // 2

    def to(self, device: torch.device | str) -> TaskData:
        """The same data with its tensors on `device`."""
        return replace(self, **self._each(lambda tensor: tensor.to(device)))

    def trimmed(self) -> TaskData:
        """The same data without the padding that no prompt needs."""
        return replace(self, tokens=self.tokens[:, : int(self.last.max()) + 1])

    def pairs(self, indices: Sequence[int] | Int[Tensor, " chosen"]) -> TaskData:
        """The pairs at `indices`, in that order; the padding keeps its width."""
        chosen = torch.as_tensor(indices, dtype=torch.long, device=self.tokens.device)
        rows = torch.stack((2 * chosen, 2 * chosen + 1), dim=1).flatten()
        prompts = tuple(self.prompts[row] for row in rows.tolist())
        return replace(self, prompts=prompts, **self._each(lambda tensor: tensor[rows]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {
            name: change(getattr(self, name))
            for name in ("tokens", "last", "candidates", "correct")
        }


def make_task_data(
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    n_pairs: int,
    seed: int,
    n_ctx: int | None = None,
    exclude: Collection[str] = (),
) -> TaskData:
    """Draw `n_pairs` pairs of prompts, all different, and check that each is a fair pair for this
    tokenizer.

    Where an answer is not one token after its prompt, its longest beginning that is stands for it:
        `)` for `):\\n`.

    Args:
        seed: the same arguments give the same pairs.
        n_ctx: the model's context; a prompt must fit it together with the beginning-of-text token.
        exclude: prompts not to draw. With `exclude=selection.prompts` the pairs to judge a circuit
            by are disjoint from those it was selected with.

    Raises:
        TaskError: `n_pairs` is below 1, the task cannot give so many pairs, or the two prompts of a
            pair have the same tokens, or end in different tokens and the task is not about that or
            they begin so, too.
        TokenizerError: the answers to a pair, whole or shortened, are not two different tokens that
            leave those of the prompts as they are, or the tokenizer has no beginning-of-text token.
        DataError: a prompt is longer than `n_ctx`.
    """
    if n_pairs < 1:
        raise TaskError(f"n_pairs is {n_pairs}; it must be at least 1")
    if getattr(tokenizer, "bos_token_id", None) is None:
        begin = "with a beginning-of-text token (bos_token) to begin prompts with"
        raise TokenizerError(f"task {task.name} needs the model's tokenizer, {begin}")
    pairs = _distinct_pairs(task, n_pairs, random.Random(seed), exclude)
    prompts = tuple(prompt for pair in pairs for prompt in pair[:2])
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    candidates = [
        _candidates(task, tokenizer, pair, ids[2 * i : 2 * i + 2]) for i, pair in enumerate(pairs)
    ]
    width, longest = max(zip(map(len, ids), prompts, strict=True))
    if n_ctx is not None and width > n_ctx:
        why = f"has {width} tokens, more than the context of {n_ctx}"
        raise DataError(f"a prompt of task {task.name} {why}: {longest!r}")
    padding = tokenizer.bos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return TaskData(
        task=task.name,
        prompts=prompts,
        tokens=torch.tensor([row + [padding] * (width - len(row)) for row in ids]),
        last=torch.tensor([len(row) - 1 for row in ids]),
        candidates=torch.tensor(candidates).repeat_interleave(2, dim=0),
        correct=torch.arange(2).repeat(n_pairs),
    )


def candidate_logits(
    logits: Float[Tensor, "prompt pos vocab"], data: TaskData
) -> Float[Tensor, "prompt 2"]:
    """The logits of the two candidates after each prompt's last token."""
    data = data.to(logits.device)
    rows = torch.arange(len(data.last), device=logits.device)
    return logits[rows[:, None], data.last[:, None], data.candidates]


def task_loss_and_accuracy(
    logits: Float[Tensor, "prompt 2"], correct: Int[Tensor, " prompt"]
) -> tuple[Float[Tensor, " prompt"], Bool[Tensor, " prompt"]]:
    """The cross-entropy between the two candidates, and whether the right one is ahead, for each
    prompt.

    The loss of the task is the mean of the first, its accuracy the mean of the second. A tie is not
    ahead.
    """
    losses = torch.nn.functional.cross_entropy(logits, correct, reduction="none")
    right, wrong = logits.gather(1, torch.stack((correct, 1 - correct), dim=1)).unbind(1)
    return losses, right > wrong


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def _distinct_pairs(
    task: Task, n_pairs: int, rng: random.Random, exclude: Collection[str]
) -> list[Pair]:
    """`n_pairs` pairs whose prompts are all different and none in `exclude`."""
    taken, pairs = set(exclude), list[Pair]()
    # So many that of a file, drawn from at random, none is left: missing one of N in 100 N draws
    # has odds of e^-100.
    for _ in range(100 * (n_pairs + len(exclude)) + 1000):
        pair = task.pair(rng)
        if taken.isdisjoint(pair[:2]):
            taken.update(pair[:2])
            pairs.append(pair)
        if len(pairs) == n_pairs:
            return pairs
    found = f"{len(pairs)} of {n_pairs} pairs of distinct prompts, {len(exclude)} prompts excluded"
    raise TaskError(f"task {task.name} gave only {found}; ask for fewer")


def _candidates(
    task: Task, tokenizer: PreTrainedTokenizerFast, pair: Pair, ids: Sequence[list[int]]
) -> list[int]:
    """The tokens of the answers to a fair pair; else TaskError or TokenizerError. `ids` are those
    of its prompts.
    """
    a, b, x, y = pair
    faults = {
        "have the same tokens": ids[0] == ids[1],
        "end in different tokens": task.same_end and ids[0][-1] != ids[1][-1],
        "neither begin nor end in the same token": ids[0][-1] != ids[1][-1]
        and ids[0][:2] != ids[1][:2],
    }
    for fault in (text for text, there in faults.items() if there):
        raise TaskError(f"the prompts of a pair of task {task.name} {fault}: {a!r} and {b!r}")
    first, first_id = _first_token(tokenizer, a, x, ids[0])
    second, second_id = _first_token(tokenizer, b, y, ids[1])
    if first and second and first_id != second_id:
        return [first_id, second_id]
    raise TokenizerError(
        f"the answers {x!r} and {y!r} of task {task.name} are, whole or shortened, not two different single tokens "
        f"after {a!r} and {b!r}: the longest that are one token are {first or None!r} and {second or None!r}"
    )


def _first_token(
    tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str, ids: list[int]
) -> tuple[str, int]:
    """The longest beginning of `answer` that is one more token after `prompt`, whose tokens are
    `ids`, and its id.
    """
    for text in (answer[:end] for end in range(len(answer), 0, -1)):
        *before, last = _encode(tokenizer, prompt + text)
        if before == ids and (last != tokenizer.unk_token_id or text == tokenizer.unk_token):
            return text, last
    return "", -1
