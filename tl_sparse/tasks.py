"""Binary next-token tasks over Python code: pairs of prompts that differ minimally (paper, Table 1).

In a pair each prompt has its own right answer among the same two candidate tokens. The loss of a task is the
cross-entropy between the two candidates after the last token, a mean over both prompts of all pairs. All tasks
but the first are filled in from the templates in tasks.yaml.

A prompt's context has distractors, such as other strings, already closed, in both quote styles. They are the
same in both prompts of a pair, so only what the task is about tells which candidate is right. Both prompts end in
the same token, except where that token is what the task is about.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.errors import DataError, TaskError, TokenizerError
from tl_sparse.idioms import PAIRS, Writer, both_sides
from tl_sparse.tokenizer import single_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Task:
    """A choice between two next tokens.

    Attributes:
        name: its key in `TASKS`.
        description: one line.
        candidates: the two answers, each one token of the tokenizer in use.
        sample: draws one pair of prompts; the right answer to prompt i is `candidates[i]`.
        same_end: both prompts of a pair end in the same token.
    """

    name: str
    description: str
    candidates: tuple[str, str]
    sample: Callable[[random.Random], tuple[str, str]]
    same_end: bool = True


def _single_double_quote(rng: random.Random) -> tuple[str, str]:
    """Closed strings in both quote styles, then a call whose string is open: `print('the red house`."""
    writer = Writer(rng)
    context = ""
    while "'" not in context or '"' not in context:
        context = "".join(writer.fill(writer.choose("closed_strings")) + "\n" for _ in range(rng.randint(1, 4)))
    call = writer.fill(writer.choose("open_calls"))
    return context + call.replace("(", "('"), context + call.replace("(", '("')


def _from_templates(name: str, rng: random.Random) -> tuple[str, str]:
    """A pair of tasks.yaml up to where the answer stands, its last `«a|b»`."""
    text = Writer(rng).pair(name)
    return both_sides(text[: text.rindex("«")])


TASKS: dict[str, Task] = {
    "single_double_quote": Task(
        name="single_double_quote",
        description="close the string of a call with the quote that opened it",
        candidates=("')", '")'),
        sample=_single_double_quote,
    )
} | {
    name: Task(
        name=name,
        description=pair["description"],
        candidates=tuple(pair["candidates"]),
        sample=partial(_from_templates, name),
        same_end=pair.get("same_end", True),
    )
    for name, pair in PAIRS.items()
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        TaskError: there is none; the message has the nearest name and all names.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise TaskError(f"no task {name!r}{hint} Tasks: {', '.join(sorted(TASKS))}")


@dataclass(frozen=True, eq=False)  # eq: tensors have no single truth value
class TaskData:
    """The pairs of a task as tokens; pair i is the prompts 2i and 2i + 1.

    Attributes:
        task: the name of the task.
        prompts: the text of each prompt.
        tokens: each prompt's tokens after the beginning-of-text token, padded on the right. A causal model
            needs no mask for that: no position up to `last` sees the padding.
        last: the position of each prompt's last token, where the answer is predicted.
        candidates: the ids of the two candidates.
        correct: which candidate is right for each prompt, 0 or 1.
    """

    task: str
    prompts: tuple[str, ...]
    tokens: Int[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]
    candidates: Int[Tensor, " 2"]
    correct: Int[Tensor, " prompt"]

    @property
    def n_pairs(self) -> int:
        return len(self.prompts) // 2

    def to(self, device: torch.device | str) -> TaskData:
        """The same data with its tensors on `device`."""
        names = ("tokens", "last", "candidates", "correct")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def trimmed(self) -> TaskData:
        """The same data without the padding that no prompt needs."""
        return replace(self, tokens=self.tokens[:, : int(self.last.max()) + 1])

    def pairs(self, indices: Sequence[int] | Int[Tensor, " chosen"]) -> TaskData:
        """The pairs at `indices`, in that order; the padding keeps its width."""
        chosen = torch.as_tensor(indices, dtype=torch.long, device=self.tokens.device)
        rows = torch.stack((2 * chosen, 2 * chosen + 1), dim=1).flatten()
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows.tolist()),
            tokens=self.tokens[rows],
            last=self.last[rows],
            correct=self.correct[rows],
        )


def make_task_data(
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    n_pairs: int,
    seed: int,
    n_ctx: int | None = None,
    exclude: Collection[str] = (),
) -> TaskData:
    """Draw `n_pairs` pairs of prompts, all different, and check that each is a fair pair for this tokenizer.

    Args:
        seed: the same arguments give the same pairs.
        n_ctx: the model's context; a prompt must fit it together with the beginning-of-text token.
        exclude: prompts not to draw. With `exclude=selection.prompts` the pairs to judge a circuit by are
            disjoint from those it was selected with.

    Raises:
        TaskError: `n_pairs` is below 1, the task cannot give so many pairs, or the two prompts of a pair have
            the same tokens, end in different tokens and the task is not about that, or change their tokens
            when the answer is added.
        TokenizerError: a candidate is not one token, or the tokenizer has no beginning-of-text token.
        DataError: a prompt is longer than `n_ctx`.
    """
    if n_pairs < 1:
        raise TaskError(f"n_pairs is {n_pairs}; it must be at least 1")
    if tokenizer.bos_token_id is None:
        raise TokenizerError(
            "the tokenizer has no beginning-of-text token (bos_token) to begin a prompt with"
        )
    candidates = [single_token(tokenizer, text) for text in task.candidates]
    prompts = _distinct_prompts(task, n_pairs, random.Random(seed), exclude)
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    for first in range(0, len(prompts), 2):
        pair = slice(first, first + 2)
        _check_pair(task, tokenizer, prompts[pair], ids[pair], candidates)
    longest = max(range(len(ids)), key=lambda row: len(ids[row]))
    if n_ctx is not None and len(ids[longest]) > n_ctx:
        raise DataError(
            f"a prompt of task {task.name} has {len(ids[longest])} tokens, more than the context of {n_ctx}: "
            f"{prompts[longest]!r}"
        )
    padding = tokenizer.bos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return TaskData(
        task=task.name,
        prompts=prompts,
        tokens=torch.tensor([row + [padding] * (len(ids[longest]) - len(row)) for row in ids]),
        last=torch.tensor([len(row) - 1 for row in ids]),
        candidates=torch.tensor(candidates),
        correct=torch.arange(2).repeat(n_pairs),
    )


def candidate_logits(logits: Float[Tensor, "prompt pos vocab"], data: TaskData) -> Float[Tensor, "prompt 2"]:
    """The logits of the two candidates after each prompt's last token."""
    rows = torch.arange(len(data.last), device=logits.device)
    return logits[rows, data.last.to(logits.device)][:, data.candidates.to(logits.device)]


def task_loss_and_accuracy(
    logits: Float[Tensor, "prompt 2"], correct: Int[Tensor, " prompt"]
) -> tuple[Float[Tensor, " prompt"], Bool[Tensor, " prompt"]]:
    """The cross-entropy between the two candidates, and whether the right one is ahead, for each prompt.

    The loss of the task is the mean of the first, its accuracy the mean of the second. A tie is not ahead.
    """
    losses = torch.nn.functional.cross_entropy(logits, correct, reduction="none")
    right = logits.gather(1, correct[:, None]).squeeze(1)
    wrong = logits.gather(1, 1 - correct[:, None]).squeeze(1)
    return losses, right > wrong


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def _distinct_prompts(
    task: Task, n_pairs: int, rng: random.Random, exclude: Collection[str]
) -> tuple[str, ...]:
    """The prompts of `n_pairs` pairs, all different and none in `exclude`."""
    taken = set(exclude)
    prompts: list[str] = []
    for _ in range(100 * n_pairs + 1000):
        pair = task.sample(rng)
        if taken.isdisjoint(pair):
            taken.update(pair)
            prompts += pair
        if len(prompts) == 2 * n_pairs:
            return tuple(prompts)
    raise TaskError(
        f"task {task.name} gave only {len(prompts) // 2} of {n_pairs} pairs of distinct prompts, "
        f"{len(exclude)} prompts excluded; ask for fewer"
    )


def _check_pair(
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    candidates: Sequence[int],
) -> None:
    """Raise TaskError unless the tokens of a pair differ, end alike, and stay when the answers are added."""
    fault = ""
    if ids[0] == ids[1]:
        fault = "have the same tokens"
    elif task.same_end and ids[0][-1] != ids[1][-1]:
        fault = "end in different tokens"
    elif any(
        _encode(tokenizer, prompt + answer) != [*tokens, candidate]
        for prompt, answer, tokens, candidate in zip(prompts, task.candidates, ids, candidates, strict=True)
    ):
        fault = f"with their answers {task.candidates} are not the same tokens and one more"
    if fault:
        raise TaskError(
            f"the prompts of a pair of task {task.name} {fault}: {prompts[0]!r} and {prompts[1]!r}"
        )
