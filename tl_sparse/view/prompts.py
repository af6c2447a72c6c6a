"""Prompt pairs with the logits, activations and attention patterns that a page shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData, candidate_logits
from tl_sparse.view.activations import NodePoint, NodeRun, run_nodes
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.writing import Vocabulary, activation_levels, four_digits


@dataclass(frozen=True)
class PromptSide:
    """The last tokens of one prompt of a pair. The fields are keys of the page's JSON.

    Attributes:
        tokens: the ids of the tokens.
        right: the index of the correct candidate, 0 or 1.
        answer: the token id of the correct candidate.
        logits: the logits of the two candidates for each run.
        values: the activation of each node at each token, as integers; see `activation_levels`.
        patterns: "layer.head" → for each query, the attention in percent to each key up to it.
    """

    tokens: list[int]
    right: int
    answer: int
    logits: list[list[float]]
    values: list[list[int]]
    patterns: dict[str, list[list[int]]]


def run_prompts(
    circuit: Circuit,
    model: TLModel,
    prompts: TaskData,
    points: Sequence[NodePoint],
    heads: Sequence[tuple[int, int]],
) -> list[NodeRun]:
    """Run the full model on the prompts and then, if the circuit has means, the circuit."""
    runs = [run_nodes(model, prompts.tokens, points, heads)]
    if circuit.means:
        with circuit.applied(model):
            runs.append(run_nodes(model, prompts.tokens, points, heads))
    return runs


def prompt_pairs(
    prompts: TaskData,
    runs: Sequence[NodeRun],
    scales: Float[Tensor, " node"],
    vocabulary: Vocabulary,
) -> list[tuple[PromptSide, PromptSide]]:
    """The pairs as the page shows them: the logits are from all runs, all else is from the last."""
    logits = [candidate_logits(run.logits, prompts) for run in runs]
    levels = activation_levels(runs[-1].values, scales)
    sides = []
    for row in range(len(prompts.prompts)):
        stop = int(prompts.last[row]) + 1
        start = max(0, stop - LIMITS.prompt_tokens)
        tokens = prompts.tokens[row, start:stop].tolist()
        candidates = prompts.candidates[row].tolist()
        vocabulary.add(tokens)
        vocabulary.add(candidates)
        right = int(prompts.correct[row])
        side = PromptSide(
            tokens,
            right,
            answer=candidates[right],
            logits=[_rounded(of_run[row]) for of_run in logits],
            values=levels[row, start:stop].T.tolist(),
            patterns=_percent_up_to_query(runs[-1].patterns, row, start, stop),
        )
        sides.append(side)
    return list(zip(sides[::2], sides[1::2], strict=True))


def _rounded(logits: Float[Tensor, " candidate"]) -> list[float]:
    return [four_digits(logit) for logit in logits]


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
