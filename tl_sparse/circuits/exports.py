"""Exporting circuits to the formats of other tools.

The formats are networkx, GraphML, DOT, Mermaid, CSV, and the JSON of attribution graphs.
"""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tl_sparse.arguments import checked
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.export_endings import check_export
from tl_sparse.circuits.nodes import LOCATIONS, Node
from tl_sparse.errors import CircuitError
from tl_sparse.files import write_text
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task

if TYPE_CHECKING:
    import networkx


_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: The largest number of links in a Mermaid graph: its renderers refuse more than 500, and such a
#: large graph is unreadable anyway.
MERMAID_LINKS = 400


@checked()
def export(
    circuit: Circuit,
    model: TLModel,
    path: str | Path,
    task: Task | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the circuit in the format that the file's extension names.

    The extensions are .graphml, .dot, .mmd (Mermaid), .csv, and .json (an attribution graph).

    Args:
        task: for .json, the task whose prompt is shown; see `attribution_graph`.
        overwrite: whether a file with other contents is replaced.

    Raises:
        ConfigError: if the extension is none of these, or there is a file with other contents and
            `overwrite` is False.
        CheckpointError: if the file cannot be written.
        CircuitError: if `model` is not the circuit's model, or the circuit does not fit the format.
        TaskError, TokenizerError, DataError: for .json, if no prompt of the task fits the model.
    """
    check_export(path)
    ending = Path(path).suffix.lower()
    if ending == ".json":
        graph = attribution_graph(circuit, model, task)
        text = json.dumps(graph, indent=1, ensure_ascii=False)
    else:
        text = TEXT_FORMATS[ending](circuit, model)
    write_text(path, text + "\n", overwrite)


@checked()
def to_networkx(circuit: Circuit, model: TLModel) -> "networkx.DiGraph":
    """The circuit as a networkx graph.

    Nodes are named as in `str(Node)`; their attributes are their layer, location, index, OpenAI's
    name, kind and, if it is known, mean. Edges have weights. The graph is a multigraph if
    several edges join the same two nodes, as in a gated MLP.

    Raises:
        CircuitError: if `model` is not the circuit's model.
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
        }
        mean = circuit.means.get(hooks[node.layer, node.location])
        if mean is not None:
            attributes["mean"] = float(mean.flatten()[node.index])
        graph.add_node(str(node), **attributes)
    for edge in edges:
        graph.add_edge(str(edge.source), str(edge.target), weight=edge.weight)
    return graph


def to_graphml(circuit: Circuit, model: TLModel) -> str:
    """The graph of `to_networkx` in GraphML, which networkx and most graph programs read.

    Characters in names that XML cannot represent become U+FFFD.
    """
    import networkx

    graph = to_networkx(circuit, model)
    for name in ("model", "task"):
        graph.graph[name] = _NOT_IN_XML.sub("\ufffd", graph.graph[name])
    return "\n".join(networkx.generate_graphml(graph))


def to_csv(circuit: Circuit, model: TLModel) -> str:
    """One line for each edge: source, target, weight. The names of nodes need no quoting."""
    lines = ["source,target,weight"]
    for edge in circuit.edges(model):
        lines.append(f"{edge.source},{edge.target},{edge.weight!r}")
    return "\n".join(lines)


def to_dot(circuit: Circuit, model: TLModel) -> str:
    """The circuit in DOT, the language of Graphviz, drawn from bottom to top.

    The colour of an edge shows the sign of its weight, and its width the absolute weight. Dashed
    lines lead from each write to the later reads of the same residual channel.
    """
    edges = circuit.edges(model)
    strongest = max((abs(edge.weight) for edge in edges), default=1.0)
    lines = [
        "digraph circuit {",
        "  rankdir=BT; node [shape=box, style=rounded, fontname=Courier, fontsize=10];",
    ]
    for _, nodes in groupby(circuit.nodes, lambda node: (node.layer, node.location)):
        boxes = [f'"{node}" [label="{node}"];' for node in nodes]
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
    """The circuit as a Mermaid flowchart for Markdown, drawn from bottom to top.

    Edges are labelled with their weights. Dotted lines lead from each write to the later reads of
    the same residual channel.

    Raises:
        CircuitError: if there are more than `MERMAID_LINKS` links.
    """
    names = {}
    boxes = []
    for node in circuit.nodes:
        names[node] = f"{node.location}_{node.layer}_{node.index}"
        boxes.append(f'  {names[node]}["{node}"]')
    links = []
    for edge in circuit.edges(model):
        links.append(f"  {names[edge.source]} -->|{edge.weight:+.2f}| {names[edge.target]}")
    for write, read in residual_joins(circuit.nodes):
        links.append(f"  {names[write]} -.-> {names[read]}")
    if len(links) > MERMAID_LINKS:
        raise CircuitError(
            f"Mermaid can show at most {MERMAID_LINKS} links, not {len(links)}: use .dot"
        )
    return "\n".join(["flowchart BT", *boxes, *links])


#: File extension → the function that returns the text of the file.
TEXT_FORMATS = {".graphml": to_graphml, ".dot": to_dot, ".mmd": to_mermaid, ".csv": to_csv}


@checked()
def residual_joins(nodes: list[Node]) -> list[tuple[Node, Node]]:
    """The pairs of a write and a later read of the same residual channel.

    `nodes` must be in the order of the forward pass.
    """
    joins = []
    for i, write in enumerate(nodes):
        if not write.location.endswith("_out"):
            continue
        for read in nodes[i + 1 :]:
            if read.location.endswith("_in") and read.index == write.index:
                joins.append((write, read))
    return joins
