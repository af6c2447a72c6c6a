"""The prompts of a page, with the answers, activations and attention patterns that it shows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.errors import DataError, TokenizerError
from tl_sparse.hooks import TLModel
from tl_sparse.precision import in_float32
from tl_sparse.tasks import TaskData, token_ids
from tl_sparse.view.activations import NodePoint, NodeRun, run_nodes
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.writing import Vocabulary, activation_levels, four_digits


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt that the page shows.

    Attributes:
        tokens: all its tokens.
        candidates: the token ids of the two answers; empty for a prompt of the user's own.
        right: the index of the right answer; None for a prompt of the user's own.
    """

    tokens: Int[Tensor, " pos"]
    candidates: list[int] = field(default_factory=list)
    right: int | None = None


def task_prompts(pairs: TaskData) -> list[ShownPrompt]:
    """The prompts of some pairs of a task."""
    prompts = []
    for row in range(len(pairs.prompts)):
        tokens = pairs.tokens[row, : int(pairs.last[row]) + 1]
        candidates = pairs.candidates[row].tolist()
        prompts.append(ShownPrompt(tokens, candidates, int(pairs.correct[row])))
    return prompts


def own_prompts(model: TLModel, texts: Sequence[str]) -> list[ShownPrompt]:
    """Prompts of the user's own, which have no answers.

    Raises:
        TokenizerError: if the model has no tokenizer, or the tokenizer has no bos_token, or no
            tokens for a part of a prompt.
        DataError: if a prompt is empty, or does not fit the context of the model.
    """
    if texts and getattr(model.tokenizer, "bos_token_id", None) is None:
        raise TokenizerError(
            "prompts need the model's tokenizer, with a beginning-of-text token (bos_token)"
        )
    device = next(model.parameters()).device
    prompts = []
    for text in texts:
        tokens = token_ids(model.tokenizer, text)
        if not tokens:
            raise DataError(f"the prompt {text!r} has no tokens")
        tokens = [model.tokenizer.bos_token_id, *tokens]
        if len(tokens) > model.cfg.n_ctx:
            raise DataError(
                f"the prompt {text[:40]!r} has {len(tokens)} tokens, more than the context of "
                f"{model.cfg.n_ctx}"
            )
        prompts.append(ShownPrompt(torch.tensor(tokens, device=device)))
    return prompts


@dataclass(frozen=True)
class PromptRun:
    """How a model, or the circuit, continues one prompt. The fields are keys of the page's JSON.

    Attributes:
        name: "model" or "circuit".
        logits: the logits of the two answers.
        share: the probability of the right answer, if only the two answers were possible.
        probability: the probability of the right answer among all tokens.
        top: the most likely tokens, each with its probability.
    """

    name: str
    logits: list[float]
    share: float | None
    probability: float | None
    top: list[list[Any]]


@dataclass
class PromptSide:
    """The last tokens of a prompt. The fields are keys of the page's JSON.

    Attributes:
        tokens: the ids of the tokens.
        right: the index of the right answer, 0 or 1; None if the prompt has no answers.
        answer: the token id of the right answer; None if the prompt has no answers.
        candidates: the token ids of the two answers.
        runs: how the full model and then, if it has means, the circuit continue the prompt.
        values: the activation of each node at each token, as integers; see `activation_levels`.
        patterns: "layer.head" → for each query, the attention in percent to each key up to it.
        at_sizes: how smaller circuits continue the prompt; each has its number of nodes, `share`,
            `probability` and `top`.
    """

    tokens: list[int]
    right: int | None
    answer: int | None
    candidates: list[int]
    runs: list[PromptRun]
    values: list[list[int]]
    patterns: dict[str, list[list[int]]]
    at_sizes: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {**vars(self), "runs": list(map(vars, self.runs))}


@dataclass(frozen=True)
class Batch:
    """Prompts as they run together: padded on the right, where no causal model looks."""

    tokens: Int[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, prompts: Sequence[ShownPrompt]) -> "Batch":
        rows = [prompt.tokens for prompt in prompts]
        last = torch.tensor([len(row) - 1 for row in rows], device=rows[0].device)
        return cls(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), last)

    def is_prompt(self) -> Tensor:
        """Which positions are tokens of the prompts, of shape [prompt, pos]."""
        positions = torch.arange(self.tokens.shape[1], device=self.last.device)
        return positions <= self.last[:, None]

    def next_logits(self, logits: Float[Tensor, "prompt pos vocab"]) -> Tensor:
        """The logits after each prompt, at least in float32."""
        rows = torch.arange(len(self.last), device=logits.device)
        return in_float32(logits[rows, self.last.to(logits.device)])


def run_prompts(
    circuit: Circuit,
    model: TLModel,
    batch: Batch,
    points: Sequence[NodePoint],
    heads: Sequence[tuple[int, int]],
) -> dict[str, NodeRun]:
    """Runs of the full model and, if the circuit has means, of the circuit, by their names."""
    runs = {"model": run_nodes(model, batch.tokens, points, heads)}
    if circuit.means:
        with circuit.applied(model):
            runs["circuit"] = run_nodes(model, batch.tokens, points, heads)
    return runs


def prompt_sides(
    prompts: Sequence[ShownPrompt],
    batch: Batch,
    runs: Mapping[str, NodeRun],
    scales: Float[Tensor, " node"],
    vocabulary: Vocabulary,
) -> list[PromptSide]:
    """The prompts as the page shows them: answers are from all runs, all else is from the last."""
    last_run = list(runs.values())[-1]
    levels = activation_levels(last_run.values, scales)
    answers = {name: batch.next_logits(run.logits) for name, run in runs.items()}
    sides = []
    for row, prompt in enumerate(prompts):
        stop = len(prompt.tokens)
        start = max(0, stop - LIMITS.prompt_tokens)
        tokens = prompt.tokens[start:].tolist()
        vocabulary.add(tokens)
        vocabulary.add(prompt.candidates)
        answer = None
        if prompt.right is not None:
            answer = prompt.candidates[prompt.right]
        side = PromptSide(
            tokens=tokens,
            right=prompt.right,
            answer=answer,
            candidates=prompt.candidates,
            runs=[
                _prompt_run(name, logits[row], prompt, vocabulary)
                for name, logits in answers.items()
            ],
            values=levels[row, start:stop].T.tolist(),
            patterns=_percent_up_to_query(last_run.patterns, row, start, stop),
        )
        sides.append(side)
    return sides


def add_smaller_circuits(
    sides: Sequence[PromptSide],
    prompts: Sequence[ShownPrompt],
    batch: Batch,
    circuits: Iterable[Circuit],
    model: TLModel,
    vocabulary: Vocabulary,
) -> None:
    """Add to each prompt how these circuits continue it."""
    for circuit in circuits:
        with circuit.applied(model):
            logits = batch.next_logits(model(batch.tokens))
        for row, (side, prompt) in enumerate(zip(sides, prompts, strict=True)):
            run = _prompt_run("circuit", logits[row], prompt, vocabulary)
            side.at_sizes.append(
                {
                    "n_nodes": circuit.n_nodes,
                    "share": run.share,
                    "probability": run.probability,
                    "top": run.top,
                }
            )


def _prompt_run(
    name: str, logits: Float[Tensor, " vocab"], prompt: ShownPrompt, vocabulary: Vocabulary
) -> PromptRun:
    probabilities = logits.softmax(0)
    top = probabilities.topk(min(LIMITS.next_tokens, len(probabilities)))
    tokens = top.indices.tolist()
    vocabulary.add(tokens)
    listed: list[list[Any]] = []
    for token, probability in zip(tokens, top.values.tolist(), strict=True):
        listed.append([token, four_digits(probability)])
    share = probability = None
    of_answers = logits[prompt.candidates]
    if prompt.right is not None:
        share = four_digits(of_answers.softmax(0)[prompt.right])
        probability = four_digits(probabilities[prompt.candidates[prompt.right]])
    return PromptRun(name, list(map(four_digits, of_answers)), share, probability, listed)


def in_pairs(sides: Sequence[PromptSide], n_own: int) -> Iterator[list[PromptSide]]:
    """Each of the first `n_own` sides alone, and then the two sides of each pair together."""
    for side in sides[:n_own]:
        yield [side]
    for first, second in zip(sides[n_own::2], sides[n_own + 1 :: 2], strict=True):
        yield [first, second]


def _percent_up_to_query(
    patterns: Mapping[str, Float[Tensor, "batch query key"]], row: int, start: int, stop: int
) -> dict[str, list[list[int]]]:
    """The attention patterns in percent between the positions from `start` to `stop` of a prompt.

    The keys after each query are left out.
    """
    lower_triangles = {}
    for name, pattern in patterns.items():
        shares = pattern[row, start:stop, start:stop]
        percent = (shares * 100).round().int().tolist()
        lower_triangles[name] = [keys[: i + 1] for i, keys in enumerate(percent)]
    return lower_triangles
