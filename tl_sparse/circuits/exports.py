"""Circuits in the formats of other tools: networkx, GraphML, DOT, Mermaid, CSV, and
attribution-graph JSON.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.nodes import KINDS, Node, node_at, node_label
from tl_sparse.errors import CircuitError, ConfigError
from tl_sparse.files import replacing
from tl_sparse.hooks import TLModel, frozen, hooked
from tl_sparse.tasks import Task, get_task, make_task_data

if TYPE_CHECKING:
    import networkx


MERMAID_LINKS = 400  # its renderers stop at 500, and nobody can read as many
LEAST_INFLUENCE = 0.005  # of a node of an attribution graph


def export(
    circuit: Circuit, model: TLModel, path: str | Path, task: Task | str | None = None
) -> None:
    """Write the circuit in the format that the file's name ends in: .graphml, .dot, .mmd (Mermaid),
    .csv, .json.

    Raises:
        ConfigError: if the name ends in none of these.
        CheckpointError: if the file cannot be written.
        CircuitError: if `model` is not the circuit's, or the circuit does not fit the format.
        TaskError, TokenizerError, DataError: if .json finds no prompt: `task` is that of
            `attribution_graph`.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        near = difflib.get_close_matches(path.suffix, FORMATS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{path}: nothing is exported as {path.suffix!r}; {hint}Exports end in {', '.join(FORMATS)}"
        )
    with replacing(path) as temporary:
        text = FORMATS[path.suffix](circuit, model, *([task] if path.suffix == ".json" else []))
        temporary.write_text(text + "\n", encoding="utf-8")


def to_networkx(circuit: Circuit, model: TLModel) -> "networkx.DiGraph":
    """Nodes by name with what they are and their means, edges with weights: a multigraph if several
    join two nodes, as in a gated MLP. `CircuitError` for another model."""
    import networkx

    edges, hooks = circuit.edges(model), circuit.hooks
    several = len({(edge.source, edge.target) for edge in edges}) < len(edges)
    graph = (networkx.MultiDiGraph if several else networkx.DiGraph)(
        model=circuit.model_name, task=circuit.task
    )
    for node in circuit.nodes:
        about: dict[str, Any] = {
            "layer": node.layer,
            "location": node.location,
            "index": node.index,
        }
        about |= {
            "openai": node.openai_name,
            "kind": KINDS[node.location],
            "label": node_label(model, node),
        }
        mean = circuit.means.get(hooks[node.layer, node.location])
        about |= {} if mean is None else {"mean": float(mean.flatten()[node.index])}
        graph.add_node(str(node), **about)
    graph.add_weighted_edges_from(
        (str(edge.source), str(edge.target), edge.weight) for edge in edges
    )
    return graph


def to_graphml(circuit: Circuit, model: TLModel) -> str:
    """What `to_networkx` gives, as networkx and most graph programs read it."""
    import networkx

    return "\n".join(networkx.generate_graphml(to_networkx(circuit, model)))


def to_csv(circuit: Circuit, model: TLModel) -> str:
    """One line for each edge: source, target, weight. (No name of a node needs quotes.)"""
    return "\n".join(
        [
            "source,target,weight",
            *(f"{e.source},{e.target},{e.weight!r}" for e in circuit.edges(model)),
        ]
    )


def to_dot(circuit: Circuit, model: TLModel) -> str:
    """For graphviz: bottom to top, colour by sign, width by weight; dashed where a write is read
    further up.
    """
    edges = circuit.edges(model)
    strongest = max((abs(edge.weight) for edge in edges), default=1.0)
    lines = [
        "digraph circuit {",
        "  rankdir=BT; node [shape=box, style=rounded, fontname=Courier, fontsize=10];",
    ]
    for _, nodes in groupby(circuit.nodes, lambda node: (node.layer, node.location)):
        boxes = (f'"{node}" [label="{node_label(model, node)}"];' for node in nodes)
        lines.append(f"  {{ rank=same; {' '.join(boxes)} }}")
    for e in edges:
        color, width = (
            "#1b6cb5" if e.weight > 0 else "#cd4f22",
            0.5 + 3.5 * abs(e.weight) / strongest,
        )
        style = f'color="{color}", penwidth={width:.2f}, tooltip="{e.weight:+.3f}"'
        lines.append(f'  "{e.source}" -> "{e.target}" [{style}];')
    joins = (
        f'  "{write}" -> "{read}" [style=dashed, color=gray];'
        for write, read in residual_joins(circuit.nodes)
    )
    return "\n".join([*lines, *joins, "}"])


def to_mermaid(circuit: Circuit, model: TLModel) -> str:
    """For Markdown: bottom to top, edges with weights; `CircuitError` above `MERMAID_LINKS`
    links.
    """
    names = {node: f"{node.location}_{node.layer}_{node.index}" for node in circuit.nodes}
    links = [
        f"  {names[e.source]} -->|{e.weight:+.2f}| {names[e.target]}" for e in circuit.edges(model)
    ]
    links += [
        f"  {names[write]} -.-> {names[read]}" for write, read in residual_joins(circuit.nodes)
    ]
    if len(links) > MERMAID_LINKS:
        raise CircuitError(
            f"Mermaid is for circuits of at most {MERMAID_LINKS} links, not {len(links)}: use .dot"
        )
    boxes = [f'  {name}["{node_label(model, node)}"]' for node, name in names.items()]
    return "\n".join(["flowchart BT", *boxes, *links])


def residual_joins(nodes: list[Node]) -> list[tuple[Node, Node]]:
    """Each write with the later reads of its residual channel; `nodes` are in the order of the
    forward pass.
    """
    reads = [(i, node) for i, node in enumerate(nodes) if node.location.endswith("_in")]
    writes = [(i, node) for i, node in enumerate(nodes) if node.location.endswith("_out")]
    return [
        (write, read)
        for i, write in writes
        for j, read in reads
        if j > i and read.index == write.index
    ]


def attribution_graph(
    circuit: Circuit, model: TLModel, task: Task | str | None = None, pair: int = 0
) -> dict[str, Any]:
    """How the circuit comes to its answer after one prompt, as circuit-tracer's and Neuronpedia's
    viewers read it.

    Nodes are the circuit's at a position (feature: a million times the number of the location, plus
    the index), the prompt's tokens, and the logits of the candidates. The weight of a link is what
    the source is beyond its mean (a token's embedding: beyond 0) times the derivative of the
    target, all other nodes and the norms' scales held: the direct effect of cutting the source, to
    first order. A node's influence is its share of these effects, handed down from the logits;
    nodes with less than `LEAST_INFLUENCE` are left out.

    Args:
        task: by default the circuit's own; the prompt is the first of its pair number `pair`.

    Raises:
        CircuitError: if the circuit has no means, or is another model's.
        TaskError: if there is no such task; TaskError, DataError, TokenizerError: if its prompts do
            not fit the model.
    """
    task = task if isinstance(task, Task) else get_task(task or circuit.task)
    data = make_task_data(task, model.tokenizer, pair + 1, 0, model.cfg.n_ctx)
    device, last = next(model.parameters()).device, int(data.last[2 * pair])
    ids, values, leaves = (
        data.tokens[2 * pair, : last + 1].tolist(),
        dict[str, Tensor](),
        dict[str, Tensor](),
    )

    def separate(name: str, activation: Tensor, hook: object) -> Tensor:
        # What comes after sees a leaf, so that no gradient goes through a node to what is before
        # it.
        values[name], leaves[name] = activation[0].flatten(1), activation.detach().requires_grad_()
        return leaves[name]

    splits: dict[str, Any] = {
        name: partial(separate, name) for name in ("hook_embed", *circuit.kept)
    }
    # Held: along the whole stream, a norm with its scale has no derivative at all.
    scales = {
        name: lambda scale, hook: scale.detach()
        for name in model.hook_dict
        if name.endswith("hook_scale")
    }
    # A vertex of the graph is the number of its hook, its position, and its index there.
    influence, links = dict[tuple[int, int, int], float](), list[tuple[Any, Any, float]]()
    with circuit.applied(model), frozen(model), torch.enable_grad():
        with hooked(model, splits | scales):
            logits = model(torch.tensor([ids], device=device))[0, last]
        hooks, text = list(leaves), model.tokenizer.decode
        beyond = [leaves["hook_embed"].detach()]
        for name in hooks[1:]:
            beyond.append(
                (leaves[name].detach() - circuit.means[name].to(device))
                * circuit.kept[name].to(device)
            )
        influence |= dict.fromkeys(
            [(len(hooks), last, token) for token in data.candidates[2 * pair].tolist()], 0.5
        )
        for depth in range(len(hooks), 0, -1):  # each source is further down than its targets
            reached = [
                vertex
                for vertex, share in influence.items()
                if vertex[0] == depth and share >= LEAST_INFLUENCE
            ]
            for target in reached:
                value = (
                    logits[target[2]] if depth == len(hooks) else values[hooks[depth]][target[1:]]
                )
                found = _direct_effects(value, [leaves[name] for name in hooks], beyond)
                total = sum(map(abs, found.values()))
                for vertex, weight in found.items():
                    influence[vertex] = (
                        influence.get(vertex, 0.0) + influence[target] * abs(weight) / total
                    )
                    links.append((vertex, target, weight))
    odds = torch.softmax(logits.detach(), 0)
    nodes = dict[tuple[int, int, int], dict[str, Any]]()
    for vertex in sorted(vertex for vertex, share in influence.items() if share >= LEAST_INFLUENCE):
        depth, at, index = vertex
        if depth == 0:
            layer, feature, kind, label = "E", ids[at], "embedding", repr(text([ids[at]]))
        elif depth == len(hooks):
            label, layer = f"{text([index])!r} (p={odds[index]:.2f})", str(model.cfg.n_layers + 1)
            feature, kind = index, "logit"
        else:
            node = node_at(hooks[depth], index)
            feature = 1_000_000 * list(KINDS).index(node.location) + index
            # The only type that the viewers draw as an ordinary node.
            layer, kind, label = str(node.layer), "cross layer transcoder", node_label(model, node)
        nodes[vertex] = {
            "node_id": f"{layer}_{feature}_{at}",
            "feature": feature,
            "layer": layer,
            "ctx_idx": at,
            "clerp": label,
            "feature_type": kind,
            "jsNodeId": f"{layer}_{feature}-{at}",
            "influence": influence[vertex],
        }
        if 0 < depth < len(hooks):
            nodes[vertex]["activation"] = values[hooks[depth]][at, index].item()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{circuit.model_name} {task.name} {pair}".lower()).strip("-")
    return {
        "metadata": {
            "slug": slug,
            "scan": circuit.model_name,
            "prompt": data.prompts[2 * pair],
            "prompt_tokens": [text([token]) for token in ids],
            "info": {
                "generator": {"name": "tl_sparse", "version": version("tl_sparse"), "url": ""}
            },
        },
        "qParams": {},
        "nodes": list(nodes.values()),
        "links": [
            {
                "source": nodes[source]["node_id"],
                "target": nodes[target]["node_id"],
                "weight": effect,
            }
            for source, target, effect in links
            if source in nodes
        ],
    }


def _direct_effects(
    value: Tensor, leaves: Sequence[Tensor], beyond: Sequence[Tensor]
) -> dict[tuple[int, int, int], float]:
    """(number of the leaf, position, index) → effect on `value` of what is beyond the mean; of an
    embedding, as one.
    """
    found = dict[tuple[int, int, int], float]()
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    for source, (gradient, change) in enumerate(zip(gradients, beyond, strict=True)):
        if gradient is not None:
            effect = (gradient * change)[0].flatten(1)
            effect = effect if source else effect.sum(1, keepdim=True)
            found |= {(source, at, i): float(effect[at, i]) for at, i in effect.nonzero().tolist()}
    return found


#: What a file's name ends in → its text.
FORMATS: dict[str, Callable[..., str]] = {
    ".graphml": to_graphml,
    ".dot": to_dot,
    ".mmd": to_mermaid,
    ".csv": to_csv,
    ".json": lambda *args: json.dumps(attribution_graph(*args), indent=1, ensure_ascii=False),
}
