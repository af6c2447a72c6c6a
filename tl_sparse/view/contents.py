"""A circuit as one self-contained HTML page: what it shows as a plain dictionary, and the files of
page/ around it.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.circuits import HEAD_LOCATIONS, KINDS, Circuit, Edge, Node, node_label
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation import evaluate, holding_circuit, score, sized_score
from tl_sparse.hooks import TLModel, recording
from tl_sparse.pruning import PruneConfig
from tl_sparse.tasks import TASKS, Task, TaskData, candidate_logits, get_task, make_task_data
from tl_sparse.view.tables import task_tokens

#: What a page holds at most; it states these itself.
MAX_NODES, MAX_EDGES, MAX_BYTES = 1_500, 10_000, 5_000_000
PAIRS, EFFECT_PAIRS, SIZES = (
    8,
    16,
    16,
)  # shown; to measure a cut on; circuits on the faithfulness curve
PASSAGES, BEFORE, AFTER = (
    4,
    20,
    8,
)  # passages of either sign for a node, tokens before and from the strongest on
PROMPT_TOKENS, TOKEN_CHARS, TOP_TOKENS, BINS = 96, 40, 8, 24
CORPUS_VALUES = (
    30_000_000  # activations held in memory: the more nodes, the fewer rows of the corpus
)
LEVELS = 999  # activations are whole numbers of this many levels, times a scale for each node


@torch.no_grad()
def page_data(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    corpus: Int[Tensor, "seq pos"] | None = None,
    min_weight: float = 0.0,
) -> dict[str, Any]:
    """Everything a page of the circuit shows, as JSON values.

    Args:
        task: for prompts, candidates and effects; by default the circuit's, if it is one of
            `TASKS`.
        corpus: tokens for histograms and passages; None: the page has none, and says so.
        min_weight: leave out edges of a smaller absolute weight, and nodes that then have none.

    Raises:
        CircuitError: if the circuit has no nodes, is too large to draw (the message offers a
            `min_weight`), or is another model's.
        TaskError: if there is no such task; TaskError, DataError, TokenizerError: if its prompts do
            not fit the model.
    """
    nodes, edges = drawn(circuit, model, min_weight)
    task = get_task(task) if isinstance(task, str) else task or TASKS.get(circuit.task)
    task = None if model.tokenizer is None else task
    texts, device, means = (
        _Texts(model.tokenizer),
        next(model.parameters()).device,
        bool(circuit.means),
    )
    hooks, at = circuit.hooks, {node: i for i, node in enumerate(nodes)}
    places = [(hooks[node.layer, node.location], node.index) for node in nodes]
    about = [
        _about(circuit, model, node, hook, texts)
        for node, (hook, _) in zip(nodes, places, strict=True)
    ]
    data: dict[str, Any] = {
        "summary": _summary(circuit, model, task, min_weight),
        "nodes": about,
        "prompts": [],
        "ladder": [],
        "edges": [[at[e.source], at[e.target], _short(e.weight)] for e in edges],
        "ends": _ends(model, nodes, task, texts),
        "vocab": texts,
        "caps": {
            "passages": PASSAGES,
            "window": BEFORE + AFTER,
            "tokens": TOP_TOKENS,
            "prompt_tokens": PROMPT_TOKENS,
            "token_chars": TOKEN_CHARS,
            "effect_pairs": EFFECT_PAIRS,
            "corpus_tokens": 0,
            "levels": LEVELS,
            "ranked": "the search" if circuit.scores else "the loss when each is cut alone",
            "sees": "the circuit"
            if means
            else "the full model: without means the circuit cannot run",
        },
    }
    seen = torch.zeros(1, 1, len(nodes), device=device)
    if corpus is not None:
        corpus = corpus[: max(1, CORPUS_VALUES // (len(nodes) * corpus.shape[1]))].long()
        seen = torch.cat([_run(model, rows.to(device), places)[1] for rows in corpus.split(16)])
        data["caps"]["corpus_tokens"] = corpus.numel()
    scales = seen.abs().amax((0, 1))
    if task is not None:
        pairs = make_task_data(task, model.tokenizer, EFFECT_PAIRS, 0, model.cfg.n_ctx).to(device)
        shown = pairs.pairs(range(PAIRS)).trimmed()
        heads = sorted(
            {(entry["layer"], entry["head"]) for entry in about if entry["head"] is not None}
        )
        runs = [_run(model, shown.tokens, places, heads)]
        if means:
            data["summary"]["scores"] = data["summary"]["scores"] or asdict(
                evaluate(circuit, model, pairs)
            )
            with circuit.applied(model):
                runs.append(_run(model, shown.tokens, places, heads))
            data["loss"] = score(model, pairs, run_context=holding_circuit(circuit, model)).loss
            for node, entry in zip(tqdm(nodes, "cutting nodes", disable=None), about, strict=True):
                without = circuit.without([node], model)
                entry["cut_loss"] = score(
                    model, pairs, run_context=holding_circuit(without, model)
                ).loss
            if len(nodes) == circuit.n_nodes:
                data["ladder"] = _faithfulness_curve(circuit, model, nodes, about, pairs)
        _, values, patterns = runs[-1]
        scales = torch.maximum(scales, values.abs().amax((0, 1)))
    scales[scales == 0] = 1.0
    for i, entry in enumerate(about):
        entry["scale"] = _short(scales[i])
        if corpus is not None:
            entry |= _in_corpus(seen[:, :, i], corpus, scales[i], texts)
    if task is not None:
        logits = [candidate_logits(run[0], shown).tolist() for run in runs]
        levels = (values / scales * LEVELS).round().int()
        sides = [
            _side(shown, row, logits, levels[row], patterns, texts) for row in range(2 * PAIRS)
        ]
        data["prompts"] = [sides[row : row + 2] for row in range(0, len(sides), 2)]
    return data


def drawn(
    circuit: Circuit, model: TLModel, min_weight: float = 0.0
) -> tuple[list[Node], list[Edge]]:
    """The nodes and edges to draw, in the order of the forward pass; see `page_data`."""
    nodes, edges = circuit.nodes, circuit.edges(model)
    if not nodes:
        raise CircuitError("the circuit has no nodes, so there is nothing to draw")
    if min_weight > 0:
        edges = [edge for edge in edges if abs(edge.weight) >= min_weight]
        ends = _ends_of(edges)
        nodes = [node for node in nodes if node in ends]
        if not nodes:
            raise CircuitError(
                f"no edge of the circuit has an absolute weight of min_weight = {min_weight:g} or more"
            )
    if len(nodes) > MAX_NODES or len(edges) > MAX_EDGES:
        weights, n = (
            sorted((abs(edge.weight) for edge in edges), reverse=True),
            min(len(edges), MAX_EDGES),
        )
        while (
            len(_ends_of(edge for edge in edges if abs(edge.weight) > weights[n - 1])) > MAX_NODES
        ):
            n = n * 9 // 10
        offer = f"; min_weight = {weights[n * 9 // 10]:.3g} leaves those that can" if edges else ""
        size = f"{len(nodes):,} nodes and {len(edges):,} edges"
        raise CircuitError(
            f"{size} are more than the {MAX_NODES:,} and {MAX_EDGES:,} that can be drawn{offer}"
        )
    return nodes, edges


def _ends_of(edges: Iterable[Edge]) -> set[Node]:
    return {node for edge in edges for node in (edge.source, edge.target)}


class _Texts(dict[int, str]):
    """Token id → its text, shortened, of every token that `noted` was given."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._decode = tokenizer.decode if tokenizer is not None else lambda ids: f"⟨{ids[0]}⟩"

    def noted(self, tokens: Tensor) -> list[int]:
        ids: list[int] = tokens.tolist()
        for token in set(ids) - self.keys():
            text = self._decode([token])
            self[token] = text if len(text) <= TOKEN_CHARS else text[: TOKEN_CHARS - 1] + "…"
        return ids


def _run(
    model: TLModel,
    tokens: Int[Tensor, "batch pos"],
    places: Sequence[tuple[str, int]],
    heads: Iterable[Any] = (),
) -> tuple[Tensor, Float[Tensor, "batch pos node"], dict[str, Float[Tensor, "batch query key"]]]:
    """Logits, the values at `places` (hook point, index), and the attention patterns of `heads`
    (layer, head).
    """
    pattern = "blocks.{}.attn.hook_pattern"
    names = {name for name, _ in places} | {pattern.format(layer) for layer, _ in heads}
    with recording(model, names) as found:
        logits = model(tokens)
    values = torch.stack(
        [found[name].flatten(2)[..., index] for name, index in places], dim=-1
    ).float()
    return (
        logits,
        values,
        {f"{layer}.{head}": found[pattern.format(layer)][:, head].float() for layer, head in heads},
    )


def _about(
    circuit: Circuit, model: TLModel, node: Node, hook: str, texts: _Texts
) -> dict[str, Any]:
    """What is known of a node before anything is run. Reads and writes also have their channel and
    its tokens.
    """
    about: dict[str, Any] = {
        "name": str(node),
        "openai": node.openai_name,
        "label": node_label(model, node),
        "kind": KINDS[node.location],
        "layer": node.layer,
        "location": node.location,
        "index": node.index,
        "head": node.index // model.cfg.d_head if node.location in HEAD_LOCATIONS else None,
        "mean": _short(circuit.means[hook].flatten()[node.index]) if circuit.means else None,
        "cut_loss": None,
        "passages": [[], []],
    }
    if node.location.endswith(("_in", "_out")):
        beyond = node.index - model.cfg.d_model
        about["channel"] = f"p{beyond}" if beyond >= 0 else node.index
        if beyond < 0:
            weights = (
                _unembedding(model, node.index)
                if "out" in node.location
                else model.embed.W_E[:, node.index]
            )
            about["tokens"] = []
            for sign in (1, -1):
                top = (sign * weights).topk(min(TOP_TOKENS, len(weights)))
                found = zip(texts.noted(top.indices), top.values.tolist(), strict=True)
                about["tokens"].append(
                    [[token, _short(sign * weight)] for token, weight in found if weight > 0]
                )
    return about


def _unembedding(model: TLModel, channel: int) -> Float[Tensor, " vocab"]:
    """What a unit in a channel adds to each logit, before the final norm divides."""
    row: Tensor = model.unembed.W_U.detach()[channel]
    norm = getattr(model.ln_final, "w", getattr(model.ln_final, "weight", None))
    return row if norm is None else norm.detach()[channel] * row


def _ends(
    model: TLModel, nodes: Sequence[Node], task: Task | None, texts: _Texts
) -> dict[str, Any]:
    """The task's tokens and candidates, with the entries of embedding and unembedding that join
    them to the nodes.
    """
    tokens, candidates = task_tokens(model, task) if task is not None else ([], [])
    embed = model.embed.W_E[tokens].tolist()
    places = [(i, node) for i, node in enumerate(nodes) if node.index < model.cfg.d_model]
    reads = [(i, node.index) for i, node in places if node.location.endswith("_in")]
    writes = [
        (i, _unembedding(model, node.index)) for i, node in places if node.location.endswith("_out")
    ]
    return {
        "tokens": texts.noted(torch.tensor(tokens)),
        "candidates": texts.noted(torch.tensor(candidates)),
        "embed": [
            [t, i, _short(row[c])] for t, row in enumerate(embed) for i, c in reads if row[c]
        ],
        "unembed": [
            [i, t, _short(w)]
            for i, row in writes
            for t, w in enumerate(row[candidates].tolist())
            if w
        ],
    }


def _in_corpus(
    values: Float[Tensor, "seq pos"], corpus: Int[Tensor, "seq pos"], scale: Tensor, texts: _Texts
) -> dict[str, Any]:
    """The histogram of a node over the corpus, and the passages where it is most positive and most
    negative.
    """
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, BINS, low, high).int().tolist() if high > low else [values.numel()]
    passages: list[list[Any]] = [[], []]
    for sign, found in zip((1, -1), passages, strict=True):
        peaks, places = (sign * values).max(1)
        for row in peaks.argsort(descending=True, stable=True)[:PASSAGES].tolist():
            if peaks[row] > 0:
                part = slice(max(0, int(places[row]) - BEFORE), int(places[row]) + AFTER)
                levels = (values[row, part] / scale * LEVELS).round().int().tolist()
                found.append(
                    [texts.noted(corpus[row, part]), levels, int(places[row]) - part.start]
                )
    return {
        "histogram": {"low": _short(low), "high": _short(high), "counts": counts},
        "passages": passages,
    }


def _side(
    data: TaskData,
    row: int,
    logits: list[Any],
    levels: Tensor,
    patterns: Mapping[str, Tensor],
    texts: _Texts,
) -> dict[str, Any]:
    """One prompt of a pair, its last tokens: logits of the candidates, values of the nodes,
    attention in percent.
    """
    stop = int(data.last[row]) + 1
    part = slice(max(0, stop - PROMPT_TOKENS), stop)
    percent = {
        name: (p[row, part, part] * 100).round().int().tolist() for name, p in patterns.items()
    }
    return {
        "tokens": texts.noted(data.tokens[row, part]),
        "right": int(data.correct[row]),
        "answer": texts.noted(data.candidates[row])[int(data.correct[row])],
        "logits": [[_short(x) for x in each[row]] for each in logits],
        "values": levels[part].T.tolist(),
        "patterns": {
            name: [line[: i + 1] for i, line in enumerate(lines)] for name, lines in percent.items()
        },
    }


def _faithfulness_curve(
    circuit: Circuit,
    model: TLModel,
    nodes: Sequence[Node],
    about: Sequence[dict[str, Any]],
    pairs: TaskData,
) -> list[list[float]]:
    """[nodes, edges, loss, accuracy] of circuits by size, up to eight times as large where the
    search ranked all nodes.

    Otherwise nodes are ranked by the loss when each alone is cut. Each entry of `about` gets its
    rank.
    """
    total, ranks = circuit.n_candidates, circuit.scores
    worth = [entry["cut_loss"] for entry in about]
    if ranks:
        worth = [
            float(ranks[circuit.hooks[node.layer, node.location]].flatten()[node.index])
            for node in nodes
        ]
    order = sorted(range(len(nodes)), key=lambda i: -worth[i])
    for rank, i in enumerate(order):
        about[i]["rank"] = rank
    sizes = {round(len(nodes) ** (step / (SIZES - 1))) for step in range(SIZES)}
    circuits = [circuit.without([nodes[i] for i in order[size:]], model) for size in sorted(sizes)]
    larger = (
        {min(total, round(len(nodes) * 2 ** (i / 2))) for i in range(1, 7)} - {len(nodes)}
        if ranks
        else set()
    )
    circuits += [circuit.of_size(size) for size in sorted(larger)]
    sized_scores = (sized_score(smaller, model, pairs) for smaller in circuits)
    return [[r.n_nodes, r.n_edges, r.circuit.loss, r.circuit.accuracy] for r in sized_scores]


def _summary(
    circuit: Circuit, model: TLModel, task: Task | None, min_weight: float
) -> dict[str, Any]:
    name, command = circuit.model_name or str(getattr(model.cfg, "model_name", "")), ""
    if isinstance(config := circuit.measured.get("config"), dict):
        default = asdict(PruneConfig())
        changed = [
            (key.replace("_", "-"), x) for key, x in config.items() if x != default.get(key, x)
        ]
        flags = [
            f"--{key}={x}" if not isinstance(x, bool) else f"--{'no-' * (not x)}{key}"
            for key, x in changed
        ]
        command = shlex.join(["tl-sparse", "prune", name, circuit.task, "--out", "circuit", *flags])
    return {
        "task": task.name if task else circuit.task,
        "description": task.description if task else "",
        "model": name,
        "command": command,
        "layers": model.cfg.n_layers,
        "min_weight": min_weight,
        "n_nodes": circuit.n_nodes,
        "n_edges": len(circuit.edges(model)),
        "all_nodes": circuit.n_candidates,
        "scores": circuit.measured.get("heldout") or circuit.measured.get("openai") or {},
    }


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.4g}")
