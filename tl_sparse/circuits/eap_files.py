"""Reading and writing the files of EAP-IG's graphs, in JSON and in the .pt form."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.circuits.component_layout import ComponentLayout
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.files import read_json, read_torch, write_text, write_torch
from tl_sparse.outputs import check_ending

GRAPH_ENDINGS = (".json", ".pt")
#: Entry of the .pt form → field of `EapGraph`.
_TENSORS = {
    "edges_scores": "scores",
    "edges_in_graph": "in_graph",
    "nodes_in_graph": "nodes_in_graph",
    "nodes_scores": "nodes_scores",
    "neurons_in_graph": "neurons_in_graph",
    "neurons_scores": "neurons_scores",
}
_REQUIRED = ("edges_scores", "edges_in_graph", "nodes_in_graph")


def write_graph(graph: EapGraph, path: Path, overwrite: bool) -> None:
    """Write a graph in the form that the ending of the file names; see `EapGraph.save`."""
    check_ending(path, GRAPH_ENDINGS, "a graph of components")
    if path.suffix.lower() == ".pt":
        write_torch(path, _as_tensors(graph), overwrite)
    else:
        write_text(path, json.dumps(_as_json(graph)), overwrite)


def read_graph(path: Path) -> EapGraph:
    """Read a graph in either form; see `EapGraph.load`."""
    try:
        if path.suffix.lower() == ".json":
            return _from_json(path, read_json(path))
        return _from_tensors(path, read_torch(path))
    except CircuitError as error:
        raise CircuitError(f"{path}: {error}") from error


def _layout(path: Path, cfg: Any) -> ComponentLayout:
    """The sizes of the model in a file."""
    if not isinstance(cfg, dict):
        raise CheckpointError(f"{path} is not a graph of EAP-IG: it has no cfg with the sizes")
    sizes = {}
    for name in ("n_layers", "n_heads", "d_model"):
        if name not in cfg:
            raise CheckpointError(f"{path} is not a graph of EAP-IG: its cfg has no {name}")
        sizes[name] = cfg[name]
    return ComponentLayout(**sizes, parallel_attn_mlp=cfg.get("parallel_attn_mlp", False))


# The .pt form


def _as_tensors(graph: EapGraph) -> dict[str, Any]:
    layout = graph.layout
    values: dict[str, Any] = {
        "cfg": layout.to_json(),
        "src_nodes": layout.sources,
        "dst_nodes": layout.targets,
    }
    for entry, field in _TENSORS.items():
        tensor = getattr(graph, field)
        if tensor is not None:
            values[entry] = tensor.detach().cpu().contiguous()
    return values


def _from_tensors(path: Path, values: Mapping[str, Any]) -> EapGraph:
    layout = _layout(path, values.get("cfg"))
    _check_names(values, layout)
    fields = {}
    for entry, field in _TENSORS.items():
        if entry in values:
            fields[field] = _tensor(path, entry, values[entry])
        elif entry in _REQUIRED:
            raise CheckpointError(f"{path} is not a graph of EAP-IG: it has no {entry}")
    real = layout.real_edges()
    for field in ("scores", "in_graph"):
        if fields[field].shape == real.shape:
            # EAP-IG marks pairs that are no edges when it chooses whole nodes.
            fields[field] = torch.where(real, fields[field], torch.zeros_like(fields[field]))
    return EapGraph(layout, **fields)


def _check_names(values: Mapping[str, Any], layout: ComponentLayout) -> None:
    """Raise `CircuitError` if the file numbers its nodes in another order."""
    expected = {"src_nodes": layout.sources, "dst_nodes": layout.targets}
    for entry, names in expected.items():
        found = values.get(entry, names)
        if not isinstance(found, list | tuple) or list(found) != names:
            raise CircuitError(
                f"{entry} must be the {len(names)} names from {names[0]!r} to {names[-1]!r}, in "
                "the order of EAP-IG"
            )


def _tensor(path: Path, entry: str, value: Any) -> Tensor:
    """A tensor of a file, as `EapGraph` wants it."""
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not is_plain or value.nbytes > value.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {entry} must be a dense tensor with values")
    if value.is_complex():
        raise CheckpointError(f"{path}: {entry} must not have complex values")
    if not entry.endswith("in_graph"):
        return value.detach().float()
    if not bool(((value == 0) | (value == 1)).all()):
        raise CheckpointError(f"{path}: {entry} must have no other values than true and false")
    return value.detach().bool()


# JSON


def _as_json(graph: EapGraph) -> dict[str, Any]:
    layout = graph.layout
    nodes: dict[str, Any] = {}
    for i, name in enumerate(layout.sources):
        nodes[name] = {"in_graph": bool(graph.nodes_in_graph[i])}
        if graph.nodes_scores is not None and not bool(graph.nodes_scores[i].isnan()):
            nodes[name]["score"] = float(graph.nodes_scores[i])
        if graph.neurons_in_graph is not None:
            nodes[name]["neurons"] = graph.neurons_in_graph[i].tolist()
        if graph.neurons_scores is not None:
            nodes[name]["neurons_scores"] = graph.neurons_scores[i].tolist()
    nodes["logits"] = {"in_graph": True}
    sources, targets = layout.sources, layout.targets
    scores, in_graph = graph.scores.tolist(), graph.in_graph.tolist()
    edges = {}
    for source, target in layout.real_edges().nonzero().tolist():
        edges[f"{sources[source]}->{targets[target]}"] = {
            "score": scores[source][target],
            "in_graph": in_graph[source][target],
        }
    return {"cfg": layout.to_json(), "nodes": nodes, "edges": edges}


def _from_json(path: Path, values: Mapping[str, Any]) -> EapGraph:
    layout = _layout(path, values.get("cfg"))
    nodes, edges = values.get("nodes"), values.get("edges")
    if not isinstance(nodes, dict) or not isinstance(edges, dict):
        raise CheckpointError(f"{path} is not a graph of EAP-IG: it has no nodes, or no edges")
    fields = _nodes_from_json(path, nodes, layout)
    shape = (layout.n_sources, layout.n_targets)
    scores, in_graph = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for name, entry in edges.items():
        numbers = layout.edge_number(name)
        info = _entry(path, name, entry)
        scores[numbers] = _score(name, info.get("score", 0.0))
        in_graph[numbers] = _flag(name, info)
    return EapGraph(layout, scores, in_graph, **fields)


def _nodes_from_json(
    path: Path, nodes: Mapping[str, Any], layout: ComponentLayout
) -> dict[str, Tensor]:
    """The fields of `EapGraph` that the entries of the nodes give."""
    n_sources, d_model = layout.n_sources, layout.d_model
    in_graph = torch.zeros(n_sources, dtype=torch.bool)
    scores: Tensor | None = None
    neurons: dict[int, Tensor] = {}
    neurons_scores: dict[int, Tensor] = {}
    for name, entry in nodes.items():
        info = _entry(path, name, entry)
        if name == "logits":  # always in the graph
            continue
        number = layout.source_number(name)
        in_graph[number] = _flag(name, info)
        if "score" in info:
            if scores is None:
                scores = torch.full((n_sources,), torch.nan)
            scores[number] = _score(name, info["score"])
        if "neurons" in info:
            neurons[number] = _row(name, "neurons", info["neurons"], d_model)
        if "neurons_scores" in info:
            row = _row(name, "neurons_scores", info["neurons_scores"], d_model)
            neurons_scores[number] = row
    fields = {"nodes_in_graph": in_graph}
    if scores is not None:
        fields["nodes_scores"] = scores
    if neurons:
        fields["neurons_in_graph"] = _of_rows(neurons, layout, 0.0) != 0
    if neurons_scores:
        fields["neurons_scores"] = _of_rows(neurons_scores, layout, math.nan)
    return fields


def _of_rows(rows: Mapping[int, Tensor], layout: ComponentLayout, missing: float) -> Tensor:
    """The values of all channels, of which some nodes have a row."""
    values = torch.full((layout.n_sources, layout.d_model), missing)
    for number, row in rows.items():
        values[number] = row
    return values


def _entry(path: Path, name: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{path}: {name[:60]} must have an object with in_graph, not a {type(entry).__name__}"
        )
    return entry


def _flag(name: str, info: Mapping[str, Any]) -> bool:
    value = info.get("in_graph")
    if type(value) is not bool:
        raise CircuitError(f"{name}: in_graph is {value!r}, which must be true or false")
    return value


def _score(name: str, value: Any) -> float:
    # `isinstance` would accept booleans as integers. NaN and infinities are found by `EapGraph`.
    if type(value) not in (int, float):
        raise CircuitError(f"{name}: the score is {str(value)[:60]!r}, which must be a number")
    return float(value)


def _row(name: str, entry: str, values: Any, size: int) -> Tensor:
    """The values of all channels of a node."""
    is_row = isinstance(values, list) and len(values) == size
    if not is_row or not all(type(value) in (bool, int, float) for value in values):
        raise CircuitError(f"{name}: {entry} must be a list of {size} numbers")
    return torch.tensor([float(value) for value in values])
