"""Asking a compiled circuit and its model for their answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import TaskError
from tl_sparse.evaluation import all_logits
from tl_sparse.hooks import TLModel
from tl_sparse.programs import CompiledCircuit
from tl_sparse.tasks import TaskData, encoding, right_minus_wrong, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: The tokens of a prompt, with the beginning-of-text token.
Row = list[int]


@dataclass(frozen=True, eq=False)
class Asker:
    """A program and its model, which answer the same prompts.

    Attributes:
        program: the compiled circuit, with the logits of the two candidates.
        model: the full model.
        tokenizer: its tokenizer.
        candidates: the tokens of the two answers.
        answers: their texts.
        n_ctx: the number of tokens in the longest context.
        batch_size: the largest number of prompts to run at a time.
    """

    program: CompiledCircuit
    model: TLModel
    tokenizer: PreTrainedTokenizerFast
    candidates: Int[Tensor, " 2"]
    answers: tuple[str, str]
    n_ctx: int
    batch_size: int

    def rows(self, prompts: Sequence[str]) -> list[Row]:
        """The tokens of each prompt, also of those that do not fit the context."""
        if not prompts:
            return []
        with encoding("a prompt of the attack"):
            ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        return [[self.tokenizer.bos_token_id, *row] for row in ids]

    def n_tokens(self, text: str) -> int:
        """The number of tokens of a text."""
        return len(token_ids(self.tokenizer, text))

    def can_ask(self, prompt: str, row: Row) -> bool:
        """Whether a prompt fits the context, and each answer is still one token after it."""
        if len(row) > self.n_ctx:
            return False
        after = self.rows([prompt + answer for answer in self.answers])
        return after == [[*row, token] for token in self.candidates.tolist()]

    def program_differences(
        self, rows: Sequence[Row], sides: Sequence[int]
    ) -> Float[Tensor, " prompt"]:
        """The program's logit of the right answer minus that of the wrong one.

        Args:
            rows: the tokens of each prompt.
            sides: the right answer to each, 0 or 1.
        """
        differences = torch.empty(len(rows))
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(rows), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            tokens, last = self._padded([rows[i] for i in chosen])
            logits = self.program(tokens, last)[:, 0].cpu()
            correct = torch.tensor([sides[i] for i in chosen])
            differences[torch.tensor(chosen)] = right_minus_wrong(logits, correct).float()
        return differences

    def model_differences(
        self, rows: Sequence[Row], sides: Sequence[int]
    ) -> Float[Tensor, " prompt"]:
        """The same of the full model."""
        if not rows:
            return torch.empty(0)
        tokens, last = self._padded([*rows, *rows[: len(rows) % 2]])  # in whole pairs
        n_prompts = len(tokens)
        data = TaskData(
            task="",
            prompts=("",) * n_prompts,
            tokens=tokens,
            last=last,
            candidates=self.candidates.expand(n_prompts, 2),
            correct=torch.zeros(n_prompts, dtype=torch.long),
        )
        logits = all_logits(self.model, data.to(self._device), self.batch_size).cpu()
        return right_minus_wrong(logits[: len(rows)], torch.tensor(list(sides))).float()

    @property
    def _device(self) -> torch.device:
        return self.program.start.device

    def _padded(
        self, rows: Sequence[Row]
    ) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, " prompt"]]:
        """The tokens, padded on the right, and the position of each prompt's last one."""
        width = max(map(len, rows))
        padding = self.tokenizer.bos_token_id
        tokens = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
        return tokens, torch.tensor([len(row) - 1 for row in rows])


def asker_of(
    circuit: Circuit, model: TLModel, data: TaskData, answers: tuple[str, str], batch_size: int
) -> Asker:
    """What asks a circuit, compiled for the two candidates of these pairs, and its model.

    Args:
        answers: the answers of the pairs, of which the candidates may be the beginnings.

    Raises:
        CircuitError: if the circuit is of another model, or has no means.
        UnsupportedError: if it cannot be compiled.
        TaskError: if the pairs do not all have the same two candidates.
        DataError: if a prompt does not fit the context.
    """
    candidates = data.candidates[0]
    if bool((data.candidates != candidates).any()):
        raise TaskError(
            f"the pairs of task {data.task} have different answers, and an attack needs a task "
            "with two answers, the same for all pairs"
        )
    program = circuit.compile(model, candidates)
    data.check_context(program.n_ctx)
    first, second = [data.shortened.get(answer, answer) for answer in answers]
    return Asker(
        program, model, model.tokenizer, candidates, (first, second), program.n_ctx, batch_size
    )
