"""Circuits from and to other formats: OpenAI's `viz_data.pt`, and plain lists of edges.

What is read comes back in parts, of which `Circuit.from_openai` and `Circuit.from_edge_list` make
circuits.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits.edges import edges_between
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import ABSOLUTE_TOLERANCE, TOLERANCE, fingerprint
from tl_sparse.circuits.nodes import LOCATIONS, Edge, Node, indices_by_location
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.files import read_json, read_torch
from tl_sparse.hooks import TLModel

EDGES_FORMAT = "tl_sparse edges"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Sizes of a model that decide which nodes it has: OpenAI's name → TransformerLens'.
_SIZES = {
    "n_layer": "n_layers",
    "d_model": "d_model",
    "n_head": "n_heads",
    "d_head": "d_head",
    "d_mlp": "d_mlp",
}


# OpenAI's circuits


def read_openai_circuit(path: Path, model: TLModel, task: str) -> CircuitParts:
    """A circuit that OpenAI published; see `Circuit.from_openai`."""
    values = read_torch(path)
    data = values.get("circuit_data")
    importances = values.get("importances", {})
    if not isinstance(data, dict) or not isinstance(importances, dict):
        raise CheckpointError(
            f"{path} has no dictionary circuit_data: it is not a viz_data.pt of OpenAI's"
        )
    _check_sizes(path, importances.get("beeg_model_config"), model)
    indices = {}
    for location_name, kept_indices in data.items():
        if location_name != "final_resid":
            # With any index added, a location reads as a node.
            node = Node.parse(f"{location_name}.0")
            indices[node.layer, node.location] = kept_indices
    return CircuitParts(
        kept=_masks(model, indices),
        means={},
        model=fingerprint(model),
        model_name=str(getattr(model.cfg, "model_name", "")),
        task=task,
        measured={"openai": _measured_by_openai(path, values, importances)},
    )


def _check_sizes(path: Path, config: Any, model: TLModel) -> None:
    """Raise `CircuitError` if the model's configuration in the file is of other sizes."""
    if not isinstance(config, dict):
        return
    for openai_name, name in _SIZES.items():
        size = config.get(openai_name)
        expected = getattr(model.cfg, name)
        if isinstance(size, int) and size != expected:
            raise CircuitError(
                f"{path} belongs to a model with {openai_name} {size}; the given one has {expected}"
            )


def _measured_by_openai(
    path: Path, values: Mapping[str, Any], importances: Mapping[str, Any]
) -> dict[str, Any]:
    """What OpenAI measured, as JSON values. Their losses are sums over both sides of a pair."""
    measured: dict[str, Any] = {}
    losses = {"full": importances.get("loss"), "circuit": importances.get("interv_loss")}
    try:
        for name, loss in losses.items():
            if loss is not None:
                measured[name] = {"loss": float(loss) / 2}
        measured["pruning_losses"] = []
        for step, loss in values.get("all_loss") or ():
            measured["pruning_losses"].append([int(step), float(loss) / 2])
        for name in ("num_total_nodes", "prune_config"):
            if name in values:
                measured[name] = json.loads(json.dumps(values[name], default=_json_value))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the measurements are not as OpenAI writes them: {error}"
        ) from error
    return measured


def _json_value(value: Any) -> Any:
    """What stands in JSON for a value that JSON does not have."""
    return value.tolist() if isinstance(value, Tensor) else str(value)


# Edge lists


@dataclass(frozen=True)
class _ListedEdge:
    """An edge in a list."""

    source: Node
    target: Node
    weight: float | None

    @property
    def ends(self) -> tuple[Node, Node]:
        return self.source, self.target


def edge_list(circuit: CircuitParts, edges: Sequence[Edge], model: TLModel) -> dict[str, Any]:
    """The values of an edge list, of a circuit with these edges; see `Circuit.edge_list`."""
    missing = node_hooks(model).values() - circuit.kept.keys()
    if missing:
        raise CircuitError(
            f"an edge list is of all node locations; "
            f"this circuit lacks {', '.join(sorted(missing))}"
        )
    edge_values = []
    for edge in edges:
        source, target = map(str, edge.ends)
        edge_values.append({"source": source, "target": target, "weight": edge.weight})
    return {
        "format": EDGES_FORMAT,
        "model_name": circuit.model_name,
        "task": circuit.task,
        "nodes": list(map(str, circuit.nodes)),
        "edges": edge_values,
    }


def read_edge_list(path: Path, model: TLModel) -> CircuitParts:
    """The circuit of the nodes in an edge list; see `Circuit.from_edge_list`."""
    values = read_json(path)
    entries = values.get("edges")
    names = values.get("nodes", [])
    has_format = values.get("format", EDGES_FORMAT) == EDGES_FORMAT
    if not has_format or not isinstance(entries, list) or not isinstance(names, list):
        raise CheckpointError(
            f"{path} is no edge list: its format is not {EDGES_FORMAT!r}, "
            f"or its edges or nodes are no lists"
        )
    edges = [_listed_edge(entry) for entry in entries]
    if "nodes" in values:
        nodes = [Node.parse(str(name)) for name in names]
    else:
        nodes = []
        for edge in edges:
            nodes.extend(edge.ends)
        nodes = list(dict.fromkeys(nodes))
    indices = {}
    for place, place_indices in indices_by_location(nodes).items():
        indices[place] = torch.tensor(place_indices)
    kept = _masks(model, indices)
    _check_listed_edges(path, edges, edges_between(nodes, model))
    return CircuitParts(
        kept=kept,
        means={},
        model=fingerprint(model),
        model_name=str(values.get("model_name", "")),
        task=str(values.get("task", "")),
    )


def _listed_edge(entry: Any) -> _ListedEdge:
    """The edge that an entry of a list stands for; `CircuitError` if it stands for none."""
    values: dict[Any, Any] = entry if isinstance(entry, dict) else {}
    source = values.get("source")
    target = values.get("target")
    weight = values.get("weight")
    if not isinstance(source, str) or not isinstance(target, str) or not _is_weight(weight):
        raise CircuitError(
            f"an edge has a source and a target node and a number as weight, "
            f"unlike {str(entry)[:80]}"
        )
    return _ListedEdge(Node.parse(source), Node.parse(target), weight)


def _is_weight(value: Any) -> bool:
    """Whether a value of JSON is a finite number, or None, where a list gives no weight."""
    if value is None:
        return True
    # By type, since isinstance takes booleans for integers. The limit is for integers that no float
    # can hold.
    return type(value) in (int, float) and abs(value) < 1e300


def _check_listed_edges(path: Path, listed: Sequence[_ListedEdge], edges: Sequence[Edge]) -> None:
    """Raise `CircuitError` if a listed edge is not among the edges between the kept nodes, and warn
    if the list leaves out some of these.
    """
    weights = {edge.ends: edge.weight for edge in edges}
    left_out = set(weights)
    for edge in listed:
        left_out.discard(edge.ends)
        actual = weights.get(edge.ends, 0.0)
        is_same = edge.weight is None or math.isclose(
            edge.weight, actual, rel_tol=TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE
        )
        if not actual or not is_same:
            expected = "a nonzero one" if edge.weight is None else edge.weight
            raise CircuitError(
                f"{path} does not fit this model: {edge.source} → {edge.target} has weight "
                f"{actual:g} between the kept nodes, not {expected}"
            )
    if left_out:
        warnings.warn(
            f"{path} leaves out {len(left_out)} edges between its nodes; "
            f"the circuit, which keeps nodes, has them"
        )


# Both


def _masks(model: TLModel, indices: Mapping[tuple[int, str], Any]) -> dict[str, Tensor]:
    """Hook point → the mask that keeps the nodes whose indices are given at (layer, location).

    The indices are as a file has them; `CircuitError` if they are not indices of nodes.
    """
    hooks = node_hooks(model)
    missing = sorted(indices.keys() - hooks.keys())
    if missing:
        # The layer is wrong, since `Node.parse` has checked the location.
        layer, location = missing[0]
        raise CircuitError(
            f"{layer}.{location} does not exist: the model has {model.cfg.n_layers} layers, from 0"
        )
    masks = {}
    for (layer, location), hook in hooks.items():
        size = model.sparse_cfg.location_size(location)
        place_indices = indices.get((layer, location), torch.arange(0))
        mask = _mask(f"{layer}.{location}", size, place_indices)
        if LOCATIONS[location].is_by_head:
            mask = mask.view(model.cfg.n_heads, -1)
        masks[hook] = mask
    return masks


def _mask(name: str, size: int, indices: Any) -> Bool[Tensor, " node"]:
    """A mask that is true at `indices`; `name` is that of the location, for errors."""
    is_plain = (
        isinstance(indices, Tensor) and indices.layout == torch.strided and not indices.is_meta
    )
    if not is_plain:
        raise _wrong_indices(name, type(indices).__name__)
    if indices.ndim != 1 or indices.dtype not in _INTEGERS:
        raise _wrong_indices(name, f"{indices.dtype} of {list(indices.shape)}")
    # If there are more than `size`, one of the first `size + 1` is wrong already; all of them might
    # not fit into memory, since a small file can hold one index repeated without end.
    indices = indices[: size + 1].long()
    for index, times in Counter(indices.tolist()).items():
        if not 0 <= index < size:
            raise CircuitError(
                f"{name}: index {index} is out of range; they run from 0 to {size - 1}"
            )
        if times > 1:
            raise CircuitError(f"{name}: index {index} is there twice")
    return torch.zeros(size, dtype=torch.bool).index_fill(0, indices, True)


def _wrong_indices(name: str, actual: str) -> CircuitError:
    return CircuitError(
        f"{name}: the indices of kept nodes must be a 1-D tensor of integers, not {actual}"
    )
