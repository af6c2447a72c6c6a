"""The contents of a circuit's page, as JSON values; the module `page` turns them into HTML."""

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.certificates import Certificate
from tl_sparse.checkpoints import load_corpus
from tl_sparse.circuits import Circuit, Edge, Node, circuit_task
from tl_sparse.config import check
from tl_sparse.errors import CircuitError, DataError, warn_user
from tl_sparse.evaluation import check_padding, evaluate, removal_rises
from tl_sparse.explanations import Explanation
from tl_sparse.hooks import TLModel, tokens_for
from tl_sparse.pruning import PruneConfig, heldout_pairs
from tl_sparse.tasks import Task, TaskData
from tl_sparse.view.activations import (
    corpus_values,
    histogram,
    node_points,
    node_scales,
    part_of_corpus,
    strongest_passages,
)
from tl_sparse.view.certified import certificate_to_show
from tl_sparse.view.cuts import (
    circuits_by_size,
    faithfulness_by_size,
    most_important_first,
)
from tl_sparse.view.drawing import drawn
from tl_sparse.view.explained import explanation_of, explanation_to_show, program_to_show
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.nodes import PageNode, page_ends, page_nodes
from tl_sparse.view.prompts import (
    Batch,
    PromptSide,
    ShownPrompt,
    add_smaller_circuits,
    in_pairs,
    own_prompts,
    prompt_sides,
    run_prompts,
    task_prompts,
)
from tl_sparse.view.writing import Vocabulary, four_digits


@dataclass
class PageContents:
    """The contents of a page.

    Attributes:
        summary: the values at the head of the page; see `_summary`.
        nodes: the nodes that are drawn.
        edges: the source, target and weight of each edge that is drawn. Here and in the other
            fields, nodes are identified by their position in `nodes`.
        ends: the tokens and candidates of the task, and their weights; see `page_ends`.
        vocabulary: the texts of all tokens that the page shows.
        prompts: single prompts of the user's own, then pairs of the task.
        curve: the faithfulness curve; see `cuts.faithfulness_by_size`.
        corpus_tokens: the number of tokens of the corpus that were run.
        certificate: the circuit's certificate; see `certified.certificate_to_show`.
        explanation: its explanation; see `explained.explanation_to_show`.
        program: its program; see `explained.program_to_show`.
    """

    summary: dict[str, Any]
    nodes: list[PageNode]
    edges: list[list[float]]
    ends: dict[str, Any]
    vocabulary: Vocabulary
    prompts: list[list[PromptSide]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    corpus_tokens: int = 0
    certificate: dict[str, Any] | None = None
    explanation: dict[str, Any] | None = None
    program: dict[str, Any] | None = None

    def as_json(self, circuit: Circuit) -> dict[str, Any]:
        """The JSON values that page.js reads."""
        prompts = []
        for sides in self.prompts:
            prompts.append([side.as_json() for side in sides])
        return {
            "summary": self.summary,
            "nodes": [node.as_json() for node in self.nodes],
            "prompts": prompts,
            "ladder": self.curve,
            "edges": self.edges,
            "ends": self.ends,
            "vocab": self.vocabulary.texts,
            "caps": _stated_limits(circuit, self.corpus_tokens),
            "certificate": self.certificate,
            "explanation": self.explanation,
            "program": self.program,
        }


@checked("task", "corpus", called="view")
@torch.no_grad()
def page_data(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    corpus: Int[Tensor, "seq pos"] | None = None,
    min_weight: float = 0.0,
    prompts: Sequence[str] = (),
    source: str = "",
    progress: bool = True,
    certificate: Certificate | str | Path | None = None,
    explanation: Explanation | str | Path | None = None,
) -> dict[str, Any]:
    """The contents of a page about the circuit, as JSON values.

    Losses, accuracies and divergences are measured on the circuit's held-out pairs (see
    `heldout_pairs`), and the effects of single nodes on the first `LIMITS.effect_pairs` of them.

    Args:
        task: the task of the prompts, candidates and effects; by default the circuit's own. If that
            is not known, the page has none of these.
        corpus: tokens for histograms and passages; by default the sample in the folder that the
            model was loaded from. If there is none, the page has neither, and states this.
        min_weight: leave out edges with a smaller absolute weight, and nodes that then have no
            edges.
        prompts: prompts of the user's own, whose values the page shows too.
        source: the folder or repository of the circuit, for the commands that the page shows.
        progress: show progress bars while the effects of nodes and the sizes are measured.
        certificate: the circuit's certificate, or its file; by default the one in the folder
            `source`, if there is one.
        explanation: the circuit's explanation, or its file; by default the one in the folder
            `source`, if there is one. Its names stand in the graph and in the program.

    Raises:
        CheckpointError: if the file of the certificate or explanation is missing or damaged.
        CircuitError: if one of them is that of another circuit.
        ConfigError: if `min_weight` is negative, or not a finite number.
        CircuitError: if the circuit has no nodes, is too large to draw (the message suggests a
            `min_weight`), or belongs to another model.
        TaskError: if there is no such task.
        TaskError, DataError, TokenizerError: if a prompt does not fit the model.
    """
    check(0 <= min_weight < math.inf, "min_weight", min_weight, "a number of at least 0")
    nodes, edges = drawn(circuit, model, min_weight)
    own = own_prompts(model, prompts)
    shown_certificate = certificate_to_show(circuit, certificate, source)
    explanation = explanation_of(circuit, explanation, source)
    task = _task_to_show(circuit, model, task)
    vocabulary = Vocabulary(model.tokenizer)
    page = PageContents(
        summary=_summary(circuit, model, task, min_weight, source),
        nodes=page_nodes(circuit, model, nodes, vocabulary),
        edges=_numbered(edges, nodes),
        ends=page_ends(model, nodes, task, vocabulary),
        vocabulary=vocabulary,
        certificate=shown_certificate,
        explanation=None if explanation is None else explanation_to_show(explanation),
    )
    answers = page.ends["candidates"] if task is not None and task.candidates else []
    page.program = program_to_show(circuit, model, answers, explanation)
    sizes: list[Circuit] = []
    shown = []
    if task is not None:
        pairs = heldout_pairs(circuit, model, task)
        shown = task_prompts(pairs.first(LIMITS.prompt_pairs))
        if circuit.means:
            sizes = _measure(page, circuit, model, nodes, pairs, progress)
    corpus = _corpus_to_show(model, corpus)
    _show_runs(page, circuit, model, nodes, shown, own, corpus, sizes)
    return page.as_json(circuit)


def _task_to_show(circuit: Circuit, model: TLModel, task: Task | str | None) -> Task | None:
    """The given task or, by default, the circuit's own.

    It is None if the circuit's own is not known, or the model has no tokenizer.
    """
    try:
        task = circuit_task(circuit, task)
    except CircuitError as error:
        warn_user(f"the page has no prompts: {error}")
        return None
    if model.tokenizer is None:
        warn_user("the page has no prompts, because the model has no tokenizer")
        return None
    return task


def _corpus_to_show(
    model: TLModel, corpus: Int[Tensor, "seq pos"] | None
) -> Int[Tensor, "seq pos"] | None:
    """The given tokens or, by default, the sample in the folder of the model, if there is one."""
    folder = getattr(model, "folder", None)
    if corpus is None and folder is not None:
        with suppress(DataError):
            corpus = load_corpus(folder, model.tokenizer, model.cfg.n_ctx)
    return None if corpus is None else tokens_for(model, corpus, "the corpus")


def _numbered(edges: Sequence[Edge], nodes: Sequence[Node]) -> list[list[float]]:
    """Each edge as the number of its source, the number of its target, and its weight."""
    number_of = {node: number for number, node in enumerate(nodes)}
    numbered: list[list[float]] = []
    for edge in edges:
        weight = four_digits(edge.weight)
        numbered.append([number_of[edge.source], number_of[edge.target], weight])
    return numbered


def _measure(
    page: PageContents,
    circuit: Circuit,
    model: TLModel,
    nodes: Sequence[Node],
    pairs: TaskData,
    progress: bool,
) -> list[Circuit]:
    """Add the scores of the circuit, the effect of each node, and the faithfulness curve.

    The curve is added only if all nodes of the circuit are drawn.

    Returns:
        The circuits on the curve that are not larger than the circuit itself.
    """
    evaluation = evaluate(circuit, model, pairs)
    page.summary["scores"] = asdict(evaluation)
    page.summary["faithfulness"] = evaluation.faithfulness(evaluation.circuit)
    page.summary["misses_target"] = evaluation.misses_target
    some_pairs = pairs.first(LIMITS.effect_pairs)
    page.summary["n_effect_pairs"] = some_pairs.n_pairs
    rises = removal_rises(circuit, model, some_pairs, nodes, progress=progress)
    effects = rises.double().mean(1).tolist()
    for page_node, effect in zip(page.nodes, effects, strict=True):
        page_node.effect = effect
    if len(nodes) < circuit.n_nodes:
        return []
    order = most_important_first(circuit, nodes, effects)
    for rank, number in enumerate(order):
        page.nodes[number].rank = rank
    ranked = [nodes[number] for number in order]
    circuits = circuits_by_size(circuit, model, ranked)
    page.curve = faithfulness_by_size(circuits, model, pairs, progress)
    return [smaller for smaller in circuits if smaller.n_nodes <= circuit.n_nodes]


def _show_runs(
    page: PageContents,
    circuit: Circuit,
    model: TLModel,
    nodes: Sequence[Node],
    shown: Sequence[ShownPrompt],
    own: Sequence[ShownPrompt],
    corpus: Int[Tensor, "seq pos"] | None,
    sizes: Sequence[Circuit],
) -> None:
    """Add what the nodes do on the corpus and on the prompts: those of the task, and the user's."""
    points = node_points(circuit, nodes)
    prompts = [*own, *shown]  # the last ones are left out if the page becomes too large
    activations = []
    if corpus is not None:
        corpus = part_of_corpus(corpus, points)
        on_corpus = corpus_values(model, corpus, points)
        activations.append(on_corpus)
    if prompts:
        batch = Batch.of(prompts)
        check_padding(model, batch.last)
        heads = {(node.layer, node.head) for node in page.nodes if node.head is not None}
        runs = run_prompts(circuit, model, batch, points, sorted(heads))
        values = list(runs.values())[-1].values
        activations.append(values * batch.is_prompt().to(values)[..., None])
    scales = node_scales(activations, len(nodes))
    for node, scale in zip(page.nodes, scales, strict=True):
        node.scale = four_digits(scale)
    if corpus is not None:
        _show_corpus(page, corpus, on_corpus, scales)
    if prompts:
        sides = prompt_sides(prompts, batch, runs, scales, page.vocabulary)
        add_smaller_circuits(sides, prompts, batch, sizes, model, page.vocabulary)
        page.prompts = list(in_pairs(sides, n_own=len(own)))


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
        "corpus_tokens": corpus_tokens,
        "levels": LIMITS.activation_levels,
        "ranked": "the search" if circuit.scores else "the loss when each is cut alone",
        "sees": "the circuit" if circuit.means else full_model,
    }


def _summary(
    circuit: Circuit, model: TLModel, task: Task | None, min_weight: float, source: str
) -> dict[str, Any]:
    """The values at the head of the page; the counts include nodes and edges that are not drawn."""
    model_name = circuit.model_name or str(getattr(model.cfg, "model_name", ""))
    return {
        "task": task.name if task else circuit.task,
        "description": task.description if task else "",
        "answers": list(task.candidates) if task and task.candidates else None,
        "model": model_name,
        "command": _prune_command(circuit, model_name, source),
        "source": source,
        "layers": model.cfg.n_layers,
        "min_weight": min_weight,
        "n_nodes": circuit.n_nodes,
        "n_edges": circuit.n_edges(model),
        "all_nodes": circuit.n_candidates,
        "scores": circuit.measured.get("openai") or {},
        "faithfulness": None,
        "misses_target": None,
        "n_effect_pairs": 0,
    }


def _prune_command(circuit: Circuit, model_name: str, source: str) -> str:
    """The command line that finds the circuit again; "" if its configuration is not known."""
    config = circuit.measured.get("config")
    if not isinstance(config, dict):
        return ""
    task = circuit.task
    if circuit.pairs is not None:
        task = f"{source or 'circuit'}/pairs.jsonl"
    defaults = asdict(PruneConfig())
    words = ["tl-sparse", "prune", model_name, task, "--out", "again"]
    for key, value in config.items():
        if value != defaults.get(key, value):
            words.append(_option(key, value))
    return shlex.join(words)


def _option(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    if not isinstance(value, bool):
        return f"--{name}={value}"
    return f"--{name}" if value else f"--no-{name}"
