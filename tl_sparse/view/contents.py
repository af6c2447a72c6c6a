"""The contents of a circuit's page, as JSON values; the module `page` turns them into HTML."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, Edge, Node
from tl_sparse.config import check
from tl_sparse.evaluation import check_padding, evaluate
from tl_sparse.hooks import TLModel, tokens_for
from tl_sparse.pruning import PruneConfig
from tl_sparse.tasks import TASKS, Task, TaskData, as_task, make_task_data
from tl_sparse.view.activations import (
    corpus_values,
    histogram,
    node_points,
    node_scales,
    part_of_corpus,
    strongest_passages,
)
from tl_sparse.view.cuts import circuit_loss, curve_by_size, cut_losses, most_important_first
from tl_sparse.view.drawing import drawn
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.nodes import PageNode, page_nodes, task_ends
from tl_sparse.view.prompts import PromptSide, prompt_pairs, run_prompts
from tl_sparse.view.writing import Vocabulary, four_digits


@dataclass
class PageContents:
    """The contents of a page.

    Attributes:
        summary: the values at the head of the page; see `_summary`.
        nodes: the nodes that are drawn.
        edges: the source, target and weight of each edge that is drawn. Here and in the other
            fields, nodes are identified by their position in `nodes`.
        ends: the tokens and candidates of the task, and their weights; see `task_ends`.
        vocabulary: the texts of all tokens that the page shows.
        prompts: pairs of prompts.
        curve: the faithfulness curve; see `cuts.curve_by_size`.
        corpus_tokens: the number of tokens of the corpus that were run.
        loss: the loss of the circuit on the pairs on which the ablation of each node is measured;
            None if it is not measured.
    """

    summary: dict[str, Any]
    nodes: list[PageNode]
    edges: list[list[float]]
    ends: dict[str, Any]
    vocabulary: Vocabulary
    prompts: list[tuple[PromptSide, PromptSide]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    corpus_tokens: int = 0
    loss: float | None = None

    def as_json(self, circuit: Circuit) -> dict[str, Any]:
        """The JSON values that page.js reads."""
        data: dict[str, Any] = {
            "summary": self.summary,
            "nodes": [node.as_json() for node in self.nodes],
            "prompts": [[vars(first), vars(second)] for first, second in self.prompts],
            "ladder": self.curve,
            "edges": self.edges,
            "ends": self.ends,
            "vocab": self.vocabulary.texts,
            "caps": _stated_limits(circuit, self.corpus_tokens),
        }
        if self.loss is not None:
            data["loss"] = self.loss
        return data


@checked("task", "corpus")
@torch.no_grad()
def page_data(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    corpus: Int[Tensor, "seq pos"] | None = None,
    min_weight: float = 0.0,
) -> dict[str, Any]:
    """The contents of a page about the circuit, as JSON values.

    Args:
        task: the task of the prompts, candidates and effects; by default the circuit's own, if it
            is one of `TASKS`.
        corpus: tokens for histograms and passages. Without them the page has neither, and states
            this.
        min_weight: leave out edges with a smaller absolute weight, and nodes that then have no
            edges.

    Raises:
        ConfigError: if `min_weight` is negative, or not a finite number.
        CircuitError: if the circuit has no nodes, is too large to draw (the message suggests a
            `min_weight`), or belongs to another model.
        TaskError: if there is no such task.
        TaskError, DataError, TokenizerError: if the prompts of the task do not fit the model.
    """
    check(0 <= min_weight < math.inf, "min_weight", min_weight, "a number of at least 0")
    nodes, edges = drawn(circuit, model, min_weight)
    task = _task_to_show(circuit, model, task)
    vocabulary = Vocabulary(model.tokenizer)
    page = PageContents(
        summary=_summary(circuit, model, task, min_weight),
        nodes=page_nodes(circuit, model, nodes, vocabulary),
        edges=_numbered(edges, nodes),
        ends=task_ends(model, nodes, task, vocabulary),
        vocabulary=vocabulary,
    )
    points = node_points(circuit, nodes)
    activations = []
    if corpus is not None:
        corpus = tokens_for(model, corpus, "the corpus")
        corpus = part_of_corpus(corpus, points)
        on_corpus = corpus_values(model, corpus, points)
        activations.append(on_corpus)
    if task is not None:
        pairs = make_task_data(task, model.tokenizer, LIMITS.effect_pairs, 0, model.cfg.n_ctx)
        pairs = pairs.to(next(model.parameters()).device)
        prompts = pairs.pairs(range(LIMITS.prompt_pairs)).trimmed()
        check_padding(model, prompts)
        heads = {(node.layer, node.head) for node in page.nodes if node.head is not None}
        runs = run_prompts(circuit, model, prompts, points, sorted(heads))
        is_prompt = torch.arange(prompts.tokens.shape[1]) <= prompts.last.cpu()[:, None]
        activations.append(runs[-1].values * is_prompt.to(runs[-1].values)[..., None])
        if circuit.means:
            _measure_cuts(page, circuit, model, nodes, pairs)
    scales = node_scales(activations, len(nodes))
    for node, scale in zip(page.nodes, scales, strict=True):
        node.scale = four_digits(scale)
    if corpus is not None:
        _show_corpus(page, corpus, on_corpus, scales)
    if task is not None:
        page.prompts = prompt_pairs(prompts, runs, scales, vocabulary)
    return page.as_json(circuit)


def _task_to_show(circuit: Circuit, model: TLModel, task: Task | str | None) -> Task | None:
    """The given task or, by default, the circuit's own.

    It is None if the circuit's task is not one of `TASKS`, or the model has no tokenizer.
    """
    task = TASKS.get(circuit.task) if task is None else as_task(task)
    return None if model.tokenizer is None else task


def _numbered(edges: Sequence[Edge], nodes: Sequence[Node]) -> list[list[float]]:
    """Each edge as the number of its source, the number of its target, and its weight."""
    number_of = {node: number for number, node in enumerate(nodes)}
    numbered: list[list[float]] = []
    for edge in edges:
        weight = four_digits(edge.weight)
        numbered.append([number_of[edge.source], number_of[edge.target], weight])
    return numbered


def _measure_cuts(
    page: PageContents, circuit: Circuit, model: TLModel, nodes: Sequence[Node], pairs: TaskData
) -> None:
    """Add the scores of the circuit, the effect of each node, and the faithfulness curve.

    The curve is added only if all nodes of the circuit are drawn.
    """
    if not page.summary["scores"]:
        page.summary["scores"] = asdict(evaluate(circuit, model, pairs))
    page.loss = circuit_loss(circuit, model, pairs)
    losses = cut_losses(circuit, model, nodes, pairs)
    for page_node, loss in zip(page.nodes, losses, strict=True):
        page_node.cut_loss = loss
    if len(nodes) == circuit.n_nodes:
        order = most_important_first(circuit, nodes, losses)
        for rank, number in enumerate(order):
            page.nodes[number].rank = rank
        ranked = [nodes[number] for number in order]
        page.curve = curve_by_size(circuit, model, ranked, pairs)


def _show_corpus(
    page: PageContents,
    corpus: Int[Tensor, "seq pos"],
    values: Float[Tensor, "seq pos node"],
    scales: Float[Tensor, " node"],
) -> None:
    """Add the histogram and the passages of each node."""
    page.corpus_tokens = corpus.numel()
    for number, node in enumerate(page.nodes):
        of_node = values[:, :, number]
        node.histogram = histogram(of_node)
        for sign, passages in zip((1, -1), node.passages, strict=True):
            passages.extend(
                strongest_passages(corpus, of_node, sign, scales[number], page.vocabulary)
            )


def _stated_limits(circuit: Circuit, corpus_tokens: int) -> dict[str, Any]:
    """The limits of the page and how it was made, which the page states."""
    full_model = "the full model: without means the circuit cannot run"
    return {
        "passages": LIMITS.passages,
        "window": LIMITS.tokens_before_peak + LIMITS.tokens_from_peak,
        "tokens": LIMITS.top_tokens,
        "prompt_tokens": LIMITS.prompt_tokens,
        "token_chars": LIMITS.token_chars,
        "effect_pairs": LIMITS.effect_pairs,
        "corpus_tokens": corpus_tokens,
        "levels": LIMITS.activation_levels,
        "ranked": "the search" if circuit.scores else "the loss when each is cut alone",
        "sees": "the circuit" if circuit.means else full_model,
    }


def _summary(
    circuit: Circuit, model: TLModel, task: Task | None, min_weight: float
) -> dict[str, Any]:
    """The values at the head of the page; the counts include nodes and edges that are not drawn."""
    model_name = circuit.model_name or str(getattr(model.cfg, "model_name", ""))
    measured = circuit.measured
    return {
        "task": task.name if task else circuit.task,
        "description": task.description if task else "",
        "model": model_name,
        "command": _prune_command(circuit, model_name),
        "layers": model.cfg.n_layers,
        "min_weight": min_weight,
        "n_nodes": circuit.n_nodes,
        "n_edges": len(circuit.edges(model)),
        "all_nodes": circuit.n_candidates,
        "scores": measured.get("heldout") or measured.get("openai") or {},
    }


def _prune_command(circuit: Circuit, model_name: str) -> str:
    """The command line that finds the circuit again; "" if its configuration is not known."""
    config = circuit.measured.get("config")
    if not isinstance(config, dict):
        return ""
    defaults = asdict(PruneConfig())
    words = ["tl-sparse", "prune", model_name, circuit.task, "--out", "circuit"]
    for key, value in config.items():
        if value != defaults.get(key, value):
            words.append(_option(key, value))
    return shlex.join(words)


def _option(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    if not isinstance(value, bool):
        return f"--{name}={value}"
    return f"--{name}" if value else f"--no-{name}"
