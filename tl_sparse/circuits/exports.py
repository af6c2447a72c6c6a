"""Exporting circuits to the formats of other tools.

The formats are networkx, GraphML, DOT, Mermaid, CSV, the JSON of attribution graphs, and EAP-IG's
graphs of components.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tl_sparse.arguments import checked
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.dot import to_dot
from tl_sparse.circuits.export_endings import check_export, is_eap_export
from tl_sparse.circuits.mermaid import to_mermaid
from tl_sparse.circuits.nodes import LOCATIONS
from tl_sparse.files import write_text
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import Task

if TYPE_CHECKING:
    import networkx


#: Characters that XML cannot hold, and the carriage return, which its readers take for a newline.
_NOT_IN_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@checked()
def export(
    circuit: Circuit,
    model: TLModel,
    path: str | Path,
    task: Task | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the circuit in the format that the file's extension names.

    The extensions are .graphml, .dot, .mmd (Mermaid), .csv, .json (an attribution graph), and
    .eap.json or .pt (the graph of components that `Circuit.to_eap` makes).

    Args:
        task: for .dot and .mmd, the task whose tokens and answers are shown, and for .json the one
            whose prompt is shown; by default the circuit's own. The other formats have neither.
        overwrite: whether a file with other contents is replaced.

    Raises:
        ConfigError: if the extension is none of these, or there is a file with other contents and
            `overwrite` is False.
        CheckpointError: if the file cannot be written.
        CircuitError: if `model` is not the circuit's model, or the circuit does not fit the format.
        TaskError, TokenizerError, DataError: if there is no such task, or no prompt of it fits the
            model. Without `task`, drawings then leave out its tokens and answers.
    """
    check_export(path)
    if is_eap_export(path):
        circuit.to_eap(model, path, overwrite=overwrite)
        return
    ending = Path(path).suffix.lower()
    if ending == ".json":
        graph = attribution_graph(circuit, model, task)
        text = json.dumps(graph, indent=1, ensure_ascii=False)
    elif ending in DRAWINGS:
        text = DRAWINGS[ending](circuit, model, task)
    else:
        text = DATA_FORMATS[ending](circuit, model)
    write_text(path, text + "\n", overwrite)


@checked()
def to_networkx(circuit: Circuit, model: TLModel) -> "networkx.DiGraph":
    """The circuit as a networkx graph.

    Nodes are named as in `str(Node)`; their attributes are their layer, location, index, OpenAI's
    name, kind and, where there is one, the user's label and the mean of a channel. Edges have
    weights. The graph is a multigraph if several edges join the same two nodes, as in a gated MLP.

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
        if node in circuit.labels:
            attributes["label"] = circuit.labels[node]
        mean = circuit.means.get(hooks[node.layer, node.location])
        if mean is not None and circuit.node_kind == "channels":
            attributes["mean"] = float(mean.flatten()[node.index])
        graph.add_node(str(node), **attributes)
    for edge in edges:
        graph.add_edge(str(edge.source), str(edge.target), weight=edge.weight)
    return graph


def to_graphml(circuit: Circuit, model: TLModel) -> str:
    """The graph of `to_networkx` in GraphML, which networkx and most graph programs read.

    Characters in names and labels that XML cannot represent become U+FFFD.
    """
    import networkx

    graph = to_networkx(circuit, model)
    for name in ("model", "task"):
        graph.graph[name] = _NOT_IN_XML.sub("\ufffd", graph.graph[name])
    for attributes in graph.nodes.values():
        if "label" in attributes:
            attributes["label"] = _NOT_IN_XML.sub("\ufffd", attributes["label"])
    return "\n".join(networkx.generate_graphml(graph))


def to_csv(circuit: Circuit, model: TLModel) -> str:
    """One line for each edge: source, target, weight. The names of nodes need no quoting."""
    lines = ["source,target,weight"]
    for edge in circuit.edges(model):
        lines.append(f"{edge.source},{edge.target},{edge.weight!r}")
    return "\n".join(lines)


#: File extension → the function that returns the text of the file.
DATA_FORMATS = {".graphml": to_graphml, ".csv": to_csv}
#: The same for drawings, whose functions also take the task.
DRAWINGS = {".dot": to_dot, ".mmd": to_mermaid}
