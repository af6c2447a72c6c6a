"""Judging graphs of components: faithfulness, and the two numbers of MIB's circuit track.

MIB is Mueller et al. 2025 (arXiv 2504.13151).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import GRAPH_LEVELS, EapGraph, GraphLevel
from tl_sparse.config import check
from tl_sparse.errors import TaskError
from tl_sparse.evaluation.estimates import Estimate, mean_of_pairs, ratio_of_pairs
from tl_sparse.evaluation.graph_runs import GraphRuns, Intervention
from tl_sparse.evaluation.judge import score_next_tokens
from tl_sparse.evaluation.running import all_logits, all_next_token_logits
from tl_sparse.evaluation.scores import LEAST_DIFFERENCE
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Score, TaskData, right_minus_wrong

#: The sizes at which MIB measures circuits, as shares of all edges, nodes or channels.
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class GraphScore:
    """How well a model does under a graph of components.

    Attributes:
        full: the score of the model as it is, which is that with all edges.
        empty: the score without any edge: with "patching", that of the other prompt's run.
        graph: the score under the graph.
        faithfulness: the logit difference under the graph, on a scale from 0 without edges to 1 in
            the full model; None if it cannot be told, see `no_faithfulness`.
        random: the faithfulness of graphs with as many random edges; a chain of edges from tokens
            to logits is rare among them.
        n_edges: the number of edges in the graph.
        n_all_edges: the number of edges of the model.
        weighted_edges: the number of edges in the graph, each counted as the share of its source's
            channels in the graph.
        intervention: what is read where there is no edge; see `Intervention`.
        n_pairs: the number of pairs of prompts.
        no_faithfulness: why `faithfulness` is None; else empty.
    """

    full: Score
    empty: Score
    graph: Score
    faithfulness: Estimate | None
    random: list[Estimate]
    n_edges: int
    n_all_edges: int
    weighted_edges: float
    intervention: str
    n_pairs: int
    no_faithfulness: str = ""


@checked("intervention")
@torch.no_grad()
def graph_score(
    graph: EapGraph,
    model: TLModel,
    data: TaskData,
    intervention: Intervention = "patching",
    n_random: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> GraphScore:
    """Run `model` under a graph of components and measure how well it does a task.

    Args:
        data: the prompts of the task, each the counterfactual of the other of its pair.
        intervention: what is read where there is no edge; see `Intervention`.
        n_random: the number of graphs with as many random edges.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of the random edges.

    Raises:
        ConfigError: for an unknown `intervention`, or a negative `n_random`.
        CircuitError, UnsupportedError: as for `applying_graph`.
    """
    check(n_random >= 0, "n_random", n_random, "at least 0")
    graph.check_model(model)
    runs = GraphRuns.prepared(model, data, intervention)
    full_logits = all_next_token_logits(model, data, batch_size)

    def score_under(each: EapGraph) -> _Measured:
        logits = all_next_token_logits(model, data, batch_size, runs.under(each))
        return _Measured.of(logits, data, full_logits)

    full = _Measured.of(full_logits, data, full_logits)
    empty = score_under(_without_edges(graph))
    measured = score_under(graph)
    scale = _Scale(full.margins, empty.margins)
    random = []
    if not scale.why_none:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n_random):
            like = score_under(_with_random_scores(graph, "edge", generator).top(graph.n_edges))
            random.append(scale.faithfulness(like.margins))
    return GraphScore(
        full=full.score,
        empty=empty.score,
        graph=measured.score,
        faithfulness=None if scale.why_none else scale.faithfulness(measured.margins),
        random=random,
        n_edges=graph.n_edges,
        n_all_edges=graph.n_scored(),
        weighted_edges=graph.weighted_edges,
        intervention=intervention,
        n_pairs=data.n_pairs,
        no_faithfulness=scale.why_none,
    )


@dataclass(frozen=True)
class GraphPoint:
    """A size at which a graph was measured.

    Attributes:
        share: the share of all edges, nodes or channels that were chosen.
        n_chosen: their number.
        n_edges: the number of edges that are then connected, from tokens to logits.
        weighted_edges: the same, each edge counted as the share of its source's channels.
        faithfulness: the logit difference, from 0 without edges to 1 in the full model.
    """

    share: float
    n_chosen: int
    n_edges: int
    weighted_edges: float
    faithfulness: Estimate


@dataclass(frozen=True)
class Areas:
    """The two numbers of MIB.

    Attributes:
        cpr: the circuit performance ratio, the area under the faithfulness: high if a small part of
            the graph does the task, and above 1 if it does it better than the model.
        cmd: the circuit-model distance, the area between the faithfulness and 1: 0 if every size
            does it as well as the model.
    """

    cpr: Estimate
    cmd: Estimate


@dataclass(frozen=True)
class GraphCurve:
    """The faithfulness of the best parts of a graph, by size.

    Attributes:
        points: one for each share, the smallest first.
        areas: CPR and CMD.
        random: the same of graphs whose scores are in random order.
        full_difference: the logit difference of the full model, and
        empty_difference: without any edge.
        level: what was chosen by its scores; see `GraphLevel`.
        absolute: whether absolute scores were ranked.
        intervention: what is read where there is no edge; see `Intervention`.
        n_pairs: the number of pairs of prompts.
    """

    points: list[GraphPoint]
    areas: Areas
    random: list[Areas]
    full_difference: Estimate
    empty_difference: Estimate
    level: str
    absolute: bool
    intervention: str
    n_pairs: int


@checked("level", "intervention")
@torch.no_grad()
def graph_curve(
    graph: EapGraph,
    model: TLModel,
    data: TaskData,
    level: GraphLevel = "edge",
    absolute: bool = True,
    intervention: Intervention = "patching",
    shares: Sequence[float] = MIB_SHARES,
    n_random: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> GraphCurve:
    """CPR and CMD of MIB: the faithfulness of the highest-scored parts of a graph, by their size.

    At each share k, the ⌊k·n⌋ highest of all n edges, nodes or channels are chosen, and what is
    then not connected is left out (`EapGraph.top`). The faithfulness is
    f = (m(C) - m(∅)) / (m(M) - m(∅)), where m is the mean logit difference, right answer minus
    wrong one, under the graph C, without any edge ∅ and in the full model M. CPR is the area under
    f and CMD that under |1 - f|, by trapezoids over the shares, from the smallest to the largest.
    Sizes are shares of the number of edges, nodes or channels, as MIB has them: an edge counts as
    one, whether or not it is then connected, and however many channels its source has.

    MIB reports CPR with `absolute=False` and CMD with `absolute=True` where it has both.

    Args:
        graph: the scores; which edges are in it plays no part.
        data: the prompts of the task, each the counterfactual of the other of its pair.
        level: what is chosen by its scores; see `GraphLevel`.
        absolute: rank by the absolute values of the scores.
        intervention: what is read where there is no edge; see `Intervention`.
        shares: the shares, rising; by default those of MIB.
        n_random: for how many random orders of the scores the areas are measured.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of these orders.

    Raises:
        ConfigError: for unknown settings, or `shares` that do not rise from 0 to at most 1.
        CircuitError: if nothing is scored at this level; for the errors of `applying_graph` too.
        TaskError: if the logit differences of the full model and without edges are so near that
            there is nothing to explain.
    """
    _check_shares(shares)
    check(n_random >= 0, "n_random", n_random, "at least 0")
    check(level in GRAPH_LEVELS, "level", level, f"one of {', '.join(GRAPH_LEVELS)}")
    graph.check_model(model)
    graph.top(0, level)  # it must have scores
    runs = GraphRuns.prepared(model, data, intervention)

    def margins_under(each: EapGraph | None) -> Float[Tensor, " prompt"]:
        run_context = None if each is None else runs.under(each)
        logits = all_logits(model, data, batch_size, run_context)
        return right_minus_wrong(logits, data.correct)

    scale = _Scale(margins_under(None), margins_under(_without_edges(graph)))
    if scale.why_none:
        raise TaskError(f"task {data.task}: {scale.why_none}")

    def curve(scored: EapGraph) -> tuple[list[GraphPoint], Areas]:
        points, margins = [], []
        for share in shares:
            n_chosen = int(share * scored.n_scored(level))
            chosen = scored.top(n_chosen, level, absolute)
            margins.append(margins_under(chosen))
            faithfulness = scale.faithfulness(margins[-1])
            points.append(
                GraphPoint(share, n_chosen, chosen.n_edges, chosen.weighted_edges, faithfulness)
            )
        return points, scale.areas(shares, margins)

    points, areas = curve(graph)
    generator = torch.Generator().manual_seed(seed)
    random = []
    for _ in range(n_random):
        random.append(curve(_with_random_scores(graph, level, generator))[1])
    return GraphCurve(
        points=points,
        areas=areas,
        random=random,
        full_difference=mean_of_pairs(scale.full),
        empty_difference=mean_of_pairs(scale.empty),
        level=level,
        absolute=absolute,
        intervention=intervention,
        n_pairs=data.n_pairs,
    )


# --- parts of both


@dataclass(frozen=True)
class _Measured:
    """The score of a run, and the logit difference at each prompt."""

    score: Score
    margins: Float[Tensor, " prompt"]

    @classmethod
    def of(cls, logits: Tensor, data: TaskData, full_logits: Tensor) -> "_Measured":
        margins = right_minus_wrong(logits.gather(1, data.candidates), data.correct)
        return cls(score_next_tokens(logits, data, full_logits), margins)


@dataclass(frozen=True)
class _Scale:
    """The scale of faithfulness, from 0 to 1: the logit differences at its two ends."""

    full: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]

    @property
    def why_none(self) -> str:
        """Why there is no such scale; empty if there is one."""
        full, empty = float(self.full.mean()), float(self.empty.mean())
        if abs(full - empty) >= LEAST_DIFFERENCE:
            return ""
        return (
            f"the logit differences of the full model, {full:.3f}, and without any edge, "
            f"{empty:.3f}, are too near each other for a graph to explain anything"
        )

    def faithfulness(self, margins: Float[Tensor, " prompt"]) -> Estimate:
        """The faithfulness of a run with these logit differences."""
        return ratio_of_pairs(margins - self.empty, self.full - self.empty)

    def areas(self, shares: Sequence[float], margins: Sequence[Float[Tensor, " prompt"]]) -> Areas:
        """The areas by trapezoids.

        Both are sums over the shares of weight · faithfulness, or weight · |1 - faithfulness|, so
        they are ratios of means over prompts like the faithfulness itself.
        """
        weights = _trapezoids(shares)
        under = torch.zeros_like(self.full)
        beside = torch.zeros_like(self.full)
        for weight, each in zip(weights, margins, strict=True):
            under = under + weight * (each - self.empty)
            sign = 1.0 if self.faithfulness(each).value <= 1 else -1.0
            beside = beside + weight * sign * (self.full - each)
        scale = self.full - self.empty
        return Areas(cpr=ratio_of_pairs(under, scale), cmd=ratio_of_pairs(beside, scale))


def _trapezoids(shares: Sequence[float]) -> list[float]:
    """The weight of the value at each share in the area under the line through all values."""
    weights = []
    for i in range(len(shares)):
        before = shares[max(0, i - 1)]
        after = shares[min(i + 1, len(shares) - 1)]
        weights.append((after - before) / 2)
    return weights


def _check_shares(shares: Sequence[float]) -> None:
    rise = all(first < second for first, second in pairwise(shares))
    in_range = len(shares) >= 2 and shares[0] >= 0 and shares[-1] <= 1
    check(rise and in_range, "shares", list(shares), "two or more rising numbers from 0 to 1")


def _without_edges(graph: EapGraph) -> EapGraph:
    return graph.of_edges(torch.zeros_like(graph.in_graph))


def _with_random_scores(graph: EapGraph, level: GraphLevel, generator: torch.Generator) -> EapGraph:
    """The graph with other scores at this level, none of them equal; what has none keeps none."""
    if level == "edge":
        return replace(graph, scores=_random_like(graph.scores, generator))
    if level == "node" and graph.nodes_scores is not None:
        return replace(graph, nodes_scores=_random_like(graph.nodes_scores, generator))
    if graph.neurons_scores is not None:
        return replace(graph, neurons_scores=_random_like(graph.neurons_scores, generator))
    return graph


def _random_like(scores: Tensor, generator: torch.Generator) -> Tensor:
    random = torch.rand(scores.shape, generator=generator, device=generator.device)
    return torch.where(scores.isnan(), scores, random.to(scores))
