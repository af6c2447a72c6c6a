"""Reading and writing circuits in other formats: OpenAI's `viz_data.pt`, and edge lists in JSON.

The readers return `CircuitParts`, from which `Circuit.from_openai` and `Circuit.from_edge_list`
make circuits.
"""

import json
import math
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
from tl_sparse.circuits.kinds import NodeKind
from tl_sparse.circuits.nodes import (
    COMPONENT_NAMES,
    LOCATIONS,
    Edge,
    Node,
    NodeSizes,
    indices_by_location,
    location_sizes,
)
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import CheckpointError, CircuitError, counted, warn_user
from tl_sparse.files import read_json, read_torch
from tl_sparse.hooks import TLModel

EDGES_FORMAT = "tl_sparse edges"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: The sizes that determine which nodes a model has: OpenAI's name → TransformerLens' name.
_SIZES = {
    "n_layer": "n_layers",
    "d_model": "d_model",
    "n_head": "n_heads",
    "d_head": "d_head",
    "d_mlp": "d_mlp",
}


# OpenAI's circuits


def read_openai_circuit(path: Path, model: TLModel, task: str) -> CircuitParts:
    """Read a circuit that OpenAI published; see `Circuit.from_openai`."""
    try:
        values = read_torch(path)
    except CheckpointError as error:
        if path.suffix != ".json":
            raise
        raise CheckpointError(f"{error}; Circuit.from_edge_list reads edge lists") from error
    data = values.get("circuit_data")
    importances = values.get("importances", {})
    if not isinstance(data, dict) or not isinstance(importances, dict):
        raise CheckpointError(
            f"{path} has no dictionary circuit_data: it is not one of OpenAI's viz_data.pt"
        )
    _check_sizes(path, importances.get("beeg_model_config"), model)
    indices = {}
    for location_name, kept_indices in data.items():
        if location_name != "final_resid":
            # `Node.parse` parses locations only as part of a node, so any index is appended.
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
    """Raise `CircuitError` if the sizes of the model in the file differ from those of `model`."""
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
    """OpenAI's measurements as JSON values; their losses, sums over the two prompts of a pair, are
    halved.
    """
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
    """A substitute for a value that JSON cannot represent."""
    return value.tolist() if isinstance(value, Tensor) else str(value)


# Edge lists


@dataclass(frozen=True)
class _ListedEdge:
    """An edge of an edge list; `weight` is None if the list gives none."""

    source: Node
    target: Node
    weight: float | None

    @property
    def ends(self) -> tuple[Node, Node]:
        return self.source, self.target


def edge_list(circuit: CircuitParts, edges: Sequence[Edge], model: TLModel) -> dict[str, Any]:
    """The edge list of a circuit with these edges, as JSON values; see `Circuit.edge_list`."""
    missing = node_hooks(model, kind=circuit.node_kind).values() - circuit.kept.keys()
    if missing:
        raise CircuitError(
            f"an edge list needs a mask at every node location; "
            f"this circuit has none at {', '.join(sorted(missing))}"
        )
    edge_values = []
    for edge in edges:
        edge_values.append(
            {
                "source": edge.source.indexed_name,
                "target": edge.target.indexed_name,
                "weight": edge.weight,
            }
        )
    return {
        "format": EDGES_FORMAT,
        "model_name": circuit.model_name,
        "task": circuit.task,
        "nodes": [node.indexed_name for node in circuit.nodes],
        "edges": edge_values,
    }


def read_edge_list(path: Path, model: TLModel) -> CircuitParts:
    """Read the circuit of the nodes in an edge list; see `Circuit.from_edge_list`."""
    values = read_json(path)
    entries = values.get("edges")
    names = values.get("nodes", [])
    has_format = values.get("format", EDGES_FORMAT) == EDGES_FORMAT
    if not has_format or not isinstance(entries, list) or not isinstance(names, list):
        raise CheckpointError(
            f"{path} is not an edge list: its format is not {EDGES_FORMAT!r}, "
            f"or its edges or nodes are not lists"
        )
    sizes = NodeSizes.of_model(model)
    edges = [_listed_edge(entry, sizes) for entry in entries]
    if "nodes" in values:
        nodes = [Node.parse(str(name), sizes) for name in names]
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


def _listed_edge(entry: Any, sizes: NodeSizes) -> _ListedEdge:
    """The edge that an entry of the list describes; `CircuitError` if the entry is malformed."""
    values: dict[Any, Any] = entry if isinstance(entry, dict) else {}
    source = values.get("source")
    target = values.get("target")
    weight = values.get("weight")
    if not isinstance(source, str) or not isinstance(target, str) or not _is_weight(weight):
        raise CircuitError(
            f"an edge needs the names of a source and a target node, and its weight must be a "
            f"finite number, unlike {str(entry)[:80]}"
        )
    return _ListedEdge(Node.parse(source, sizes), Node.parse(target, sizes), weight)


def _is_weight(value: Any) -> bool:
    """Whether a JSON value is a finite number, or None for a weight that the list leaves out."""
    if value is None:
        return True
    # `isinstance` would accept booleans as integers. The limit excludes infinity and integers that
    # are too large for a float; NaN fails the comparison.
    return type(value) in (int, float) and abs(value) < 1e300


def _check_listed_edges(path: Path, listed: Sequence[_ListedEdge], edges: Sequence[Edge]) -> None:
    """Raise `CircuitError` if a listed edge is not one of `edges`, those between the kept nodes.

    Warns if the list leaves out some of `edges`.
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
        warn_user(
            f"{path} leaves out {counted(len(left_out), 'edge')} between its nodes; "
            f"the circuit includes them, because it is defined by its nodes"
        )


# Masks, for both formats


def _masks(model: TLModel, indices: Mapping[tuple[int, str], Any]) -> dict[str, Tensor]:
    """Hook point → the mask that keeps the nodes whose indices are given at (layer, location).

    The indices come from a file and are checked: `CircuitError` if a location or an index does not
    exist.
    """
    kind: NodeKind = "channels"
    if any(location in COMPONENT_NAMES for _, location in indices):
        kind = "components"
    hooks = node_hooks(model, kind=kind)
    missing = sorted(indices.keys() - hooks.keys())
    if missing:
        layer, location = missing[0]
        if layer < model.cfg.n_layers:
            raise CircuitError(
                f"{layer}.{location} is a channel, and other nodes are components: the nodes of a "
                "circuit are either channels or components"
            )
        raise CircuitError(
            f"{layer}.{location} does not exist: the model has "
            f"{counted(model.cfg.n_layers, 'layer')}, from 0"
        )
    sizes = _component_sizes(model) if kind == "components" else location_sizes(model)
    masks = {}
    for (layer, location), hook in hooks.items():
        place_indices = indices.get((layer, location), torch.arange(0))
        size = sizes[layer, location]
        mask = _mask(f"{layer}.{location}", size, place_indices)
        if location == "head":
            mask = mask[:, None]
        if LOCATIONS[location].is_by_head:
            # Query heads may share key and value heads, of which there are fewer then.
            mask = mask.view(-1, model.cfg.d_head)
        masks[hook] = mask
    return masks


def _component_sizes(model: TLModel) -> dict[tuple[int, str], int]:
    """(layer, location) → the number of components there."""
    sizes = {}
    for layer in range(model.cfg.n_layers):
        sizes[layer, "head"] = int(model.cfg.n_heads)
        sizes[layer, "mlp"] = 1
    return sizes


def _mask(name: str, size: int, indices: Any) -> Bool[Tensor, " node"]:
    """A mask that is true at `indices`; error messages call the location `name`."""
    is_plain = (
        isinstance(indices, Tensor) and indices.layout == torch.strided and not indices.is_meta
    )
    if not is_plain:
        raise _wrong_indices(name, type(indices).__name__)
    if indices.ndim != 1 or indices.dtype not in _INTEGERS:
        raise _wrong_indices(name, f"{indices.dtype} of {list(indices.shape)}")
    # If there are more than `size` indices, one of the first `size + 1` must already be wrong. All
    # of them might not fit into memory: a small file can hold one index, expanded to any length.
    indices = indices[: size + 1].long()
    for index, times in Counter(indices.tolist()).items():
        if not 0 <= index < size:
            raise CircuitError(
                f"{name}: index {index} is out of range; they run from 0 to {size - 1}"
            )
        if times > 1:
            raise CircuitError(f"{name}: index {index} occurs {times} times; each may occur once")
    return torch.zeros(size, dtype=torch.bool).index_fill(0, indices, True)


def _wrong_indices(name: str, actual: str) -> CircuitError:
    return CircuitError(
        f"{name}: the indices of kept nodes must be a 1-D tensor of integers, not {actual}"
    )
