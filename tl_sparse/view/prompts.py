"""Pairs of prompts with what the model, and the circuit, make of them."""

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
    """One prompt of a pair: its last tokens. The fields are keys of the page's JSON.

    Attributes:
        tokens: their ids.
        right: which of the two candidates is right, 0 or 1.
        answer: the id of the right candidate.
        logits: those of the two candidates, for each run.
        values: the activation of each node at each token, as `activation_levels`.
        patterns: "layer.head" → for each query, the attention to each key up to it in percent.
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
    """Run the prompts through the full model and then, if it has means, the circuit."""
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
    """The pairs as the page shows them: logits of all runs, all else of the last."""
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
    """The attention patterns between some positions of a prompt, in percent, without the keys after
    each query.
    """
    lower_triangles = {}
    for name, pattern in patterns.items():
        shares = pattern[row, start:stop, start:stop]
        percent = (shares * 100).round().int().tolist()
        lower_triangles[name] = [keys[: i + 1] for i, keys in enumerate(percent)]
    return lower_triangles
