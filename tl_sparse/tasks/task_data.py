"""The pairs of a task as tokens, which are checked to be fair, and the loss on them."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import DataError, TaskError, TokenizerError, counted, warn_user
from tl_sparse.precision import in_float32
from tl_sparse.tasks.pairs import Pair
from tl_sparse.tasks.task import Task, as_task, is_built_in
from tl_sparse.tasks.text_tokens import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single truth value
class Partners:
    """For each prompt of a `TaskData`, another prompt of the task, for resample ablation.

    Attributes:
        tokens: the tokens of each prompt's partner, padded like those of the prompts.
        last: the position of each partner's last token.
    """

    tokens: Int[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]

    def to(self, device: torch.device | str) -> Partners:
        """The same partners with their tensors on `device`."""
        return Partners(self.tokens.to(device), self.last.to(device))

    def rows(self, rows: Int[Tensor, " chosen"]) -> Partners:
        """The partners of the prompts in these rows."""
        return Partners(self.tokens[rows], self.last[rows])


@dataclass(frozen=True, eq=False)
class TaskData:
    """The pairs of a task as tokens; prompts 2i and 2i + 1 are pair i.

    Attributes:
        task: the name of the task.
        prompts: the text of each prompt.
        tokens: the beginning-of-text token and the tokens of each prompt, padded on the right. A
            causal model needs no mask for the padding, since no position up to `last` attends to
            it.
        last: the position of each prompt's last token, where the answer is predicted.
        candidates: the ids of each prompt's two candidates, the same for both prompts of a pair.
        correct: the index of the right candidate for each prompt, 0 or 1.
        partners: each prompt's partner in resample ablation, if `with_partners` has drawn them.
        shortened: each answer that is not a single token → its beginning that stands for it.
        reference: the full model's log-probabilities of the next token, if they have been measured.
    """

    task: str
    prompts: tuple[str, ...]
    tokens: Int[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]
    candidates: Int[Tensor, "prompt 2"]
    correct: Int[Tensor, " prompt"]
    partners: Partners | None = None
    shortened: Mapping[str, str] = field(default_factory=dict)
    reference: Float[Tensor, "prompt d_vocab"] | None = None

    @property
    def n_pairs(self) -> int:
        return len(self.prompts) // 2

    def to(self, device: torch.device | str) -> TaskData:
        """The same data with its tensors on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            last=self.last.to(device),
            candidates=self.candidates.to(device),
            correct=self.correct.to(device),
            partners=self.partners and self.partners.to(device),
            reference=None if self.reference is None else self.reference.to(device),
        )

    def trimmed(self) -> TaskData:
        """The same data without the positions that are padding in every prompt."""
        return replace(self, tokens=self.tokens[:, : int(self.last.max()) + 1])

    def check_context(self, n_ctx: int) -> None:
        """Raise `DataError` if the longest prompt does not fit the context."""
        row = int(self.last.argmax())
        longest = int(self.last[row]) + 1
        if longest > n_ctx:
            prompt = self.prompts[row]
            beginning = prompt if len(prompt) <= 60 else f"{prompt[:60]}…"
            raise DataError(
                f"a prompt of task {self.task} has {longest} tokens, more than the context of "
                f"{n_ctx}: {beginning!r}"
            )

    def pairs(self, indices: Sequence[int] | Int[Tensor, " chosen"]) -> TaskData:
        """The pairs at `indices`, in that order, padded to the same length as before."""
        chosen = torch.as_tensor(indices, dtype=torch.long, device=self.tokens.device)
        rows = torch.stack((2 * chosen, 2 * chosen + 1), dim=1).flatten()
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows.tolist()),
            tokens=self.tokens[rows],
            last=self.last[rows],
            candidates=self.candidates[rows],
            correct=self.correct[rows],
            partners=self.partners and self.partners.rows(rows),
            reference=None if self.reference is None else self.reference[rows],
        )

    def first(self, n_pairs: int) -> TaskData:
        """The first `n_pairs` pairs, or all of them if there are fewer."""
        return self.pairs(range(min(n_pairs, self.n_pairs)))

    def with_partners(self, seed: int) -> TaskData:
        """The same data, in which each prompt has a partner: the prompt it is resampled from.

        Every prompt is the partner of exactly one other prompt, which is never the other prompt of
        its own pair. A prompt keeps its partner when pairs are selected or batched.

        Args:
            seed: the seed of the draw, which does not depend on the device.

        Raises:
            TaskError: if there is only one pair.
        """
        return replace(self, partners=self.drawn_partners(seed))

    def partnered(self, seed: int) -> TaskData:
        """The same, but partners that there are stay, and a single pair has none."""
        if self.partners is not None or self.n_pairs < 2:
            return self
        return self.with_partners(seed)

    def drawn_partners(self, seed: int) -> Partners:
        """The partners that `with_partners` gives the prompts."""
        if self.n_pairs < 2:
            raise TaskError(
                f"resample ablation of task {self.task} needs at least 2 pairs, because the partner"
                f" of a prompt is from another pair; there is {self.n_pairs}"
            )
        partner_rows = _partner_rows(self.n_pairs, seed).to(self.tokens.device)
        return Partners(self.tokens, self.last).rows(partner_rows)


def _partner_rows(n_pairs: int, seed: int) -> Int[Tensor, " prompt"]:
    """For each prompt, the row of its partner."""
    generator = torch.Generator().manual_seed(seed)
    of_first = _predecessors(n_pairs, generator)
    of_second = _predecessors(n_pairs, generator)
    # Which prompt of each pair becomes the partner of a first prompt; the other one becomes that of
    # a second prompt.
    side = torch.randint(2, (n_pairs,), generator=generator, device=generator.device)
    first_partners = 2 * of_first + side[of_first]
    second_partners = 2 * of_second + 1 - side[of_second]
    return torch.stack((first_partners, second_partners), dim=1).flatten()


def _predecessors(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """The predecessor of each of 0, …, n − 1 in a random cyclic order: never the number itself."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


@checked("task")
def make_task_data(
    task: Task | str,
    tokenizer: PreTrainedTokenizerFast,
    n_pairs: int,
    seed: int,
    n_ctx: int | None = None,
    exclude: Collection[str] = (),
) -> TaskData:
    """Draw `n_pairs` pairs whose prompts are all different, and check that each pair is fair for
    this tokenizer.

    If an answer is not a single token after its prompt, its longest prefix that is a single token
    becomes the candidate: `)` for `):\\n`.

    Args:
        task: the task to draw from, or its name; see `get_task`.
        tokenizer: the model's tokenizer.
        n_pairs: the number of pairs.
        seed: the seed of the draws; the same arguments give the same pairs.
        n_ctx: the model's context length, into which each prompt must fit together with the
            beginning-of-text token; None does not check this.
        exclude: prompts that must not be drawn. With `exclude=selection.prompts` the pairs that
            judge a circuit are disjoint from those it was selected with.

    Raises:
        TaskError: if `n_pairs` is below 1; if the task cannot give that many pairs; if the two
            prompts of a pair have the same tokens; if they end in different tokens although the
            task has `same_end`; or if they neither begin nor end in the same token.
        TokenizerError: if the answers to a pair, whole or shortened, are not two different tokens
            that leave the tokens of the prompts unchanged, or if the tokenizer has no
            beginning-of-text token.
        DataError: if a prompt is longer than `n_ctx`.

    Warns if an answer is shortened, unless the task is one of `TASKS`.
    """
    task = as_task(task)
    if n_pairs < 1:
        raise TaskError(f"n_pairs (--pairs) is {n_pairs}; it must be at least 1")
    pairs = draw_pairs(task, n_pairs, seed, exclude)
    if len(pairs) < n_pairs:
        raise too_few_pairs(task, len(pairs), n_pairs, len(exclude))
    data = encode_pairs(task, pairs, tokenizer, n_ctx)
    warn_of_shortened(task, [data])
    return data


@checked()
def draw_pairs(task: Task, n_pairs: int, seed: int, exclude: Collection[str] = ()) -> list[Pair]:
    """`n_pairs` pairs whose prompts are all different and not in `exclude`, or fewer if the task
    has no more.
    """
    rng = random.Random(seed)
    taken = set(exclude)
    pairs: list[Pair] = []
    # A task from a file draws its N pairs at random with replacement. The probability that a given
    # pair is missing from 100 N draws is e^-100, so these draws are enough to see all of them.
    for _ in range(100 * (n_pairs + len(exclude)) + 1000):
        pair = task.pair(rng)
        if taken.isdisjoint(pair.prompts):
            taken.update(pair.prompts)
            pairs.append(pair)
        if len(pairs) == n_pairs:
            break
    return pairs


@checked()
def too_few_pairs(task: Task, n_found: int, n_wanted: int, n_excluded: int) -> TaskError:
    """The error if a task has not as many pairs as were asked for."""
    has = counted(n_found, "pair") if n_found else "no pairs"
    message = f"task {task.name} has {has} of distinct prompts"
    if n_excluded:
        is_or_are = "is" if n_excluded == 1 else "are"
        message += f" besides the {counted(n_excluded, 'prompt')} that {is_or_are} excluded"
    if n_found:
        message += f"; n_pairs (--pairs) is {n_wanted}, and must be at most {n_found}"
    return TaskError(message)


@checked()
def encode_pairs(
    task: Task, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, n_ctx: int | None
) -> TaskData:
    """These pairs of a task as tokens; for the checks see `make_task_data`."""
    check_tokenizer(task, tokenizer)
    if not pairs:
        raise TaskError(f"task {task.name}: no pairs are given, so there is nothing to encode")
    prompts: list[str] = []
    rows: list[list[int]] = []
    candidates: list[list[int]] = []
    shortened: dict[str, str] = {}
    for pair in pairs:
        pair_rows = [_encode(tokenizer, prompt) for prompt in pair.prompts]
        _check_fair(task, pair, *pair_rows)
        prompts += pair.prompts
        rows += pair_rows
        prefixes = _candidates(task, tokenizer, pair, *pair_rows)
        candidates.append([prefix.token for prefix in prefixes])
        for answer, prefix in zip(pair.answers, prefixes, strict=True):
            if prefix.text != answer:
                shortened[answer] = prefix.text
    lengths = list(map(len, rows))
    data = TaskData(
        task=task.name,
        prompts=tuple(prompts),
        tokens=_padded(rows, max(lengths), tokenizer),
        last=torch.tensor(lengths) - 1,
        candidates=torch.tensor(candidates).repeat_interleave(2, dim=0),
        correct=torch.arange(2).repeat(len(pairs)),
        shortened=shortened,
    )
    if n_ctx is not None:
        data.check_context(n_ctx)
    return data


@checked()
def warn_of_shortened(task: Task, parts: Sequence[TaskData]) -> None:
    """Warn of the answers of a task, with pairs in these parts, that are not a single token.

    It does not warn of built-in tasks, whose answers are meant to be shortened.
    """
    shortened: dict[str, str] = {}
    for data in parts:
        shortened.update(data.shortened)
    if not shortened or is_built_in(task):
        return
    answer, beginning = next(iter(shortened.items()))
    message = (
        f"task {task.name}: {answer!r} is not one token of this tokenizer; its beginning "
        f"{beginning!r} stands for it"
    )
    if len(shortened) > 1:
        message += f" (and so for {counted(len(shortened) - 1, 'other answer')})"
    warn_user(message)


@checked()
def candidate_logits(
    logits: Float[Tensor, "prompt pos vocab"], data: TaskData
) -> Float[Tensor, "prompt 2"]:
    """The logits of the two candidates after each prompt's last token, at least in float32."""
    data = data.to(logits.device)
    rows = torch.arange(len(data.last), device=logits.device)
    return in_float32(logits[rows[:, None], data.last[:, None], data.candidates])


@checked()
def right_minus_wrong(
    logits: Float[Tensor, "prompt 2"], correct: Int[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """For each prompt, the logit of the right candidate minus that of the wrong one."""
    second_minus_first = logits[:, 1] - logits[:, 0]
    return torch.where(correct == 1, second_minus_first, -second_minus_first)


@checked()
def task_loss_and_accuracy(
    logits: Float[Tensor, "prompt 2"], correct: Int[Tensor, " prompt"]
) -> tuple[Float[Tensor, " prompt"], Bool[Tensor, " prompt"]]:
    """For each prompt, the cross-entropy between the two candidates, and whether the right one has
    the larger logit.

    The loss of the task is the mean of the former, and its accuracy is the mean of the latter. A
    tie counts as wrong.
    """
    losses = torch.nn.functional.cross_entropy(logits, correct, reduction="none")
    right, wrong = logits.gather(1, torch.stack((correct, 1 - correct), dim=1)).unbind(1)
    return losses, right > wrong


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *token_ids(tokenizer, text)]


def _check_fair(task: Task, pair: Pair, first_ids: list[int], second_ids: list[int]) -> None:
    """Raise `TaskError` if prompts with these tokens do not make a fair pair."""
    same_end = first_ids[-1] == second_ids[-1]
    # The first token of every prompt is the beginning-of-text token, so the second one is compared.
    same_beginning = first_ids[:2] == second_ids[:2]
    if first_ids == second_ids:
        fault = "have the same tokens"
    elif task.same_end and not same_end:
        fault = "end in different tokens"
    elif not same_end and not same_beginning:
        fault = "neither begin nor end in the same token"
    else:
        return
    raise TaskError(
        f"the prompts of a pair of task {task.name} {fault}: "
        f"{pair.first_prompt!r} and {pair.second_prompt!r}"
    )


class _Prefix(NamedTuple):
    """The longest prefix of an answer that is a single token; its text is "" if there is none."""

    text: str
    token: int


def _candidates(
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    pair: Pair,
    first_ids: list[int],
    second_ids: list[int],
) -> tuple[_Prefix, _Prefix]:
    """What stands for the two answers of a pair whose prompts have these tokens.

    Raises:
        TokenizerError: if the answers are not two different tokens.
    """
    first = _one_token(tokenizer, pair.first_prompt, pair.first_answer, first_ids)
    second = _one_token(tokenizer, pair.second_prompt, pair.second_answer, second_ids)
    if first.text and second.text and first.token != second.token:
        return first, second
    raise TokenizerError(
        f"the answers {pair.first_answer!r} and {pair.second_answer!r} of task {task.name} are, "
        "whole or shortened, not two different single tokens "
        f"after {pair.first_prompt!r} and {pair.second_prompt!r}: "
        f"the longest that are one token are {first.text or None!r} and {second.text or None!r}"
    )


def check_tokenizer(task: Task, tokenizer: object) -> None:
    """Raise `TokenizerError` unless prompts of `task` can be encoded with this tokenizer."""
    if getattr(tokenizer, "bos_token_id", None) is None:
        raise TokenizerError(
            f"task {task.name} needs the model's tokenizer, "
            "with a beginning-of-text token (bos_token) to begin prompts with"
        )


def is_one_token(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> bool:
    """Whether an answer is a single token after a prompt, and leaves the prompt's tokens alone."""
    return _one_token(tokenizer, prompt, answer, _encode(tokenizer, prompt)).text == answer


def _one_token(
    tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str, prompt_ids: list[int]
) -> _Prefix:
    """The longest prefix of `answer` that adds exactly one token to those of `prompt`."""
    for length in range(len(answer), 0, -1):
        text = answer[:length]
        *before, token = _encode(tokenizer, prompt + text)
        is_known = token != tokenizer.unk_token_id or text == tokenizer.unk_token
        if before == prompt_ids and is_known:
            return _Prefix(text, token)
    return _Prefix("", -1)


def _padded(
    rows: Sequence[list[int]], width: int, tokenizer: PreTrainedTokenizerFast
) -> Int[Tensor, "prompt pos"]:
    """The rows, padded on the right to `width`."""
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.bos_token_id
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows])
