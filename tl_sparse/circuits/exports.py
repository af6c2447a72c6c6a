"""Circuits in the formats of other tools: networkx, GraphML, DOT, Mermaid, CSV, and the JSON of
attribution graphs.
"""

import difflib
import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.nodes import LOCATIONS, Node, node_label
from tl_sparse.errors import CircuitError, ConfigError
from tl_sparse.files import replacing
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task

if TYPE_CHECKING:
    import networkx


#: Renderers of Mermaid stop at 500 links, and nobody can read as many.
MERMAID_LINKS = 400


def export(
    circuit: Circuit, model: TLModel, path: str | Path, task: Task | str | None = None
) -> None:
    """Write the circuit in the format that the file's name ends in: .graphml, .dot, .mmd (Mermaid),
    .csv, or .json (an attribution graph).

    Args:
        task: the task whose prompt .json shows, as in `attribution_graph`.

    Raises:
        ConfigError: if the name ends in none of these.
        CheckpointError: if the file cannot be written.
        CircuitError: if `model` is not the circuit's, or the circuit does not fit the format.
        TaskError, TokenizerError, DataError: if .json finds no prompt.
    """
    path = Path(path)
    endings = [*TEXT_FORMATS, ".json"]
    if path.suffix not in endings:
        near = difflib.get_close_matches(path.suffix, endings, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{path}: nothing is exported as {path.suffix!r}; {hint}"
            f"Exports end in {', '.join(endings)}"
        )
    with replacing(path) as temporary:
        if path.suffix == ".json":
            graph = attribution_graph(circuit, model, task)
            text = json.dumps(graph, indent=1, ensure_ascii=False)
        else:
            text = TEXT_FORMATS[path.suffix](circuit, model)
        temporary.write_text(text + "\n", encoding="utf-8")


def to_networkx(circuit: Circuit, model: TLModel) -> "networkx.DiGraph":
    """Nodes by name with what they are and their means, edges with weights: a multigraph if several
    edges join the same two nodes, as in a gated MLP.

    Raises:
        CircuitError: if `model` is not the circuit's.
    """
    import networkx

    edges = circuit.edges(model)
    is_multigraph = len({edge.ends for edge in edges}) < len(edges)
    graph_class = networkx.MultiDiGraph if is_multigraph else networkx.DiGraph
    graph = graph_class(model=circuit.model_name, task=circuit.task)
    hooks = circuit.hooks
    for node in circuit.nodes:
        attributes = {
            "layer": node.layer,
            "location": node.location,
            "index": node.index,
            "openai": node.openai_name,
            "kind": LOCATIONS[node.location].description,
            "label": node_label(model, node),
        }
        mean = circuit.means.get(hooks[node.layer, node.location])
        if mean is not None:
            attributes["mean"] = float(mean.flatten()[node.index])
        graph.add_node(str(node), **attributes)
    for edge in edges:
        graph.add_edge(str(edge.source), str(edge.target), weight=edge.weight)
    return graph


def to_graphml(circuit: Circuit, model: TLModel) -> str:
    """What `to_networkx` gives, as networkx and most graph programs read it."""
    import networkx

    return "\n".join(networkx.generate_graphml(to_networkx(circuit, model)))


def to_csv(circuit: Circuit, model: TLModel) -> str:
    """One line for each edge: source, target, weight. (The names of nodes need no quotes.)"""
    lines = ["source,target,weight"]
    for edge in circuit.edges(model):
        lines.append(f"{edge.source},{edge.target},{edge.weight!r}")
    return "\n".join(lines)


def to_dot(circuit: Circuit, model: TLModel) -> str:
    """For graphviz, from bottom to top: the colour of an edge is its sign, the width its weight. A
    dashed line leads from a write to where it is read later.
    """
    edges = circuit.edges(model)
    strongest = max((abs(edge.weight) for edge in edges), default=1.0)
    lines = [
        "digraph circuit {",
        "  rankdir=BT; node [shape=box, style=rounded, fontname=Courier, fontsize=10];",
    ]
    for _, nodes in groupby(circuit.nodes, lambda node: (node.layer, node.location)):
        boxes = [f'"{node}" [label="{node_label(model, node)}"];' for node in nodes]
        lines.append(f"  {{ rank=same; {' '.join(boxes)} }}")
    for edge in edges:
        color = "#1b6cb5" if edge.weight > 0 else "#cd4f22"
        width = 0.5 + 3.5 * abs(edge.weight) / strongest
        style = f'color="{color}", penwidth={width:.2f}, tooltip="{edge.weight:+.3f}"'
        lines.append(f'  "{edge.source}" -> "{edge.target}" [{style}];')
    for write, read in residual_joins(circuit.nodes):
        lines.append(f'  "{write}" -> "{read}" [style=dashed, color=gray];')
    lines.append("}")
    return "\n".join(lines)


def to_mermaid(circuit: Circuit, model: TLModel) -> str:
    """For Markdown, from bottom to top: edges with their weights, and dotted lines from writes to
    where they are read later.

    Raises:
        CircuitError: if there are more than `MERMAID_LINKS` links.
    """
    names = {}
    boxes = []
    for node in circuit.nodes:
        names[node] = f"{node.location}_{node.layer}_{node.index}"
        boxes.append(f'  {names[node]}["{node_label(model, node)}"]')
    links = []
    for edge in circuit.edges(model):
        links.append(f"  {names[edge.source]} -->|{edge.weight:+.2f}| {names[edge.target]}")
    for write, read in residual_joins(circuit.nodes):
        links.append(f"  {names[write]} -.-> {names[read]}")
    if len(links) > MERMAID_LINKS:
        raise CircuitError(
            f"Mermaid is for circuits of at most {MERMAID_LINKS} links, not {len(links)}: use .dot"
        )
    return "\n".join(["flowchart BT", *boxes, *links])


#: The ending of a file's name → what makes its text.
TEXT_FORMATS = {".graphml": to_graphml, ".dot": to_dot, ".mmd": to_mermaid, ".csv": to_csv}


def residual_joins(nodes: list[Node]) -> list[tuple[Node, Node]]:
    """Each write with the later reads of its residual channel; `nodes` are in the order of the
    forward pass.
    """
    joins = []
    for i, write in enumerate(nodes):
        if not write.location.endswith("_out"):
            continue
        for read in nodes[i + 1 :]:
            if read.location.endswith("_in") and read.index == write.index:
                joins.append((write, read))
    return joins
