"""Circuits from and to other formats: OpenAI's `viz_data.pt`, and plain lists of edges."""

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import ABSOLUTE_TOLERANCE, TOLERANCE, fingerprint
from tl_sparse.circuits.nodes import HEAD_LOCATIONS, Node
from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.files import read_json, read_torch
from tl_sparse.hooks import NodeValues, TLModel

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


def read_openai(path: Path, model: TLModel, means: NodeValues | None, task: str) -> Circuit:
    """A circuit that OpenAI published (a `viz_data.pt`, from below `viz/` on their public storage),
    onto its model.

    Neither means nor the task's name are in the file; without means the circuit can be viewed and
    counted, until `Circuit.with_means`. Kept entries of `final_resid` are left out: they are no
    nodes here. `measured["openai"]` has the task losses of the `full` model and the `circuit`,
    `pruning_losses` [step, loss] (all as means over both sides of a pair; the file has sums),
    `num_total_nodes` and `prune_config`, as far as the file has them.

    Raises:
        CheckpointError: if the file is missing, damaged, or no circuit of OpenAI's.
        CircuitError: if it, or a mean, does not fit the model; the message names the location.
    """
    values = read_torch(path)
    data, importances = values.get("circuit_data"), values.get("importances", {})
    if not isinstance(data, dict) or not isinstance(importances, dict):
        raise CheckpointError(
            f"{path} has no dictionary circuit_data: it is not a viz_data.pt of OpenAI's"
        )
    described: Any = importances.get("beeg_model_config")
    for theirs, ours in _SIZES.items() if isinstance(described, dict) else ():
        size, expected = described.get(theirs), getattr(model.cfg, ours)
        if isinstance(size, int) and size != expected:
            raise CircuitError(
                f"{path} belongs to a model with {theirs} {size}; the given one has {expected}"
            )
    # With any index added, a location reads as a node.
    nodes = {
        Node.parse(f"{name}.0"): found for name, found in data.items() if name != "final_resid"
    }
    indices = {(node.layer, node.location): found for node, found in nodes.items()}
    name, measured = (
        str(getattr(model.cfg, "model_name", "")),
        {"openai": _measured(path, values, importances)},
    )
    return _circuit(model, indices, means, model_name=name, task=task, measured=measured)


def edge_list(circuit: Circuit, model: TLModel) -> dict[str, Any]:
    """A circuit, without its means, as JSON values that any tool can read: names of nodes, and
    edges with weights.

    Raises:
        CircuitError: if `model` is not the circuit's, or the circuit has no mask at one of its node
            locations.
    """
    edges = circuit.edges(model)
    if missing := node_hooks(model).values() - circuit.kept.keys():
        raise CircuitError(
            f"an edge list is of all node locations; this circuit lacks {', '.join(sorted(missing))}"
        )
    return {
        "format": EDGES_FORMAT,
        "model_name": circuit.model_name,
        "task": circuit.task,
        "nodes": [str(node) for node in circuit.nodes],
        "edges": [
            {"source": str(e.source), "target": str(e.target), "weight": e.weight} for e in edges
        ],
    }


def read_edge_list(path: Path, model: TLModel, means: NodeValues | None) -> Circuit:
    """The circuit of the nodes in an edge list; without `nodes` in it, of the ends of its `edges`.

    Lists of other tools need no more than `edges`. Weights may be left out, and nodes may have
    OpenAI's names.

    Raises:
        CheckpointError: if the file is missing, damaged, or not an edge list.
        CircuitError: if a node does not exist, or an edge is not a weight of the model, to 1 %.
    """
    values = read_json(path)
    listed, names = values.get("edges"), values.get("nodes", [])
    if (
        values.get("format", EDGES_FORMAT) != EDGES_FORMAT
        or not isinstance(listed, list)
        or type(names) is not list
    ):
        raise CheckpointError(
            f"{path} is no edge list: its format is not {EDGES_FORMAT!r}, or edges or nodes no lists"
        )
    edges = [_edge(entry) for entry in listed]
    ends = dict.fromkeys(node for source, target, _ in edges for node in (source, target))
    indices = defaultdict[tuple[int, str], list[int]](list)
    for node in map(Node.parse, map(str, names)) if "nodes" in values else ends:
        indices[node.layer, node.location].append(node.index)
    tensors = {place: torch.tensor(found) for place, found in indices.items()}
    about = {key: str(values.get(key, "")) for key in ("model_name", "task")}
    circuit = _circuit(model, tensors, means, **about)
    weights = {(edge.source, edge.target): edge.weight for edge in circuit.edges(model)}
    for source, target, weight in edges:
        actual = weights.get((source, target), 0.0)
        same = weight is None or math.isclose(
            weight, actual, rel_tol=TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE
        )
        if not actual or not same:
            found = f"{actual:g} between the kept nodes, not {'a nonzero one' if weight is None else weight}"
            raise CircuitError(
                f"{path} does not fit this model: {source} → {target} has weight {found}"
            )
    if further := len(weights.keys() - {(source, target) for source, target, _ in edges}):
        warnings.warn(
            f"{path} leaves out {further} edges between its nodes; the circuit, which keeps nodes, has them"
        )
    return circuit


def _circuit(
    model: TLModel, nodes: Mapping[tuple[int, str], Any], means: NodeValues | None, **about: Any
) -> Circuit:
    """The circuit that keeps, at each (layer, location), the nodes with the given indices."""
    hooks, kept = node_hooks(model), {}
    if wrong := sorted(nodes.keys() - hooks.keys()):  # never a location: `Node.parse` knows them
        layer, location = wrong[0]
        raise CircuitError(
            f"{layer}.{location} does not exist: the model has {model.cfg.n_layers} layers, from 0"
        )
    for (layer, location), hook in hooks.items():
        size, indices = (
            model.sparse_cfg.location_size(location),
            nodes.get((layer, location), torch.arange(0)),
        )
        mask = _mask(f"{layer}.{location}", size, indices)
        kept[hook] = mask.view(model.cfg.n_heads, -1) if location in HEAD_LOCATIONS else mask
    circuit = Circuit(kept, {}, fingerprint(model), **about)
    return circuit if means is None else circuit.with_means(means)


def _mask(name: str, size: int, indices: Any) -> Bool[Tensor, " node"]:
    usable = isinstance(indices, Tensor) and indices.layout == torch.strided and not indices.is_meta
    if not usable or indices.ndim != 1 or indices.dtype not in _INTEGERS:
        found = f"{indices.dtype} of {list(indices.shape)}" if usable else type(indices).__name__
        raise CircuitError(
            f"{name}: the indices of kept nodes must be a 1-D tensor of integers, not {found}"
        )
    first = indices[
        : size + 1
    ].long()  # if there are more than `size`, one of these is wrong already
    if wrong := [
        i for i, times in Counter(first.tolist()).items() if times > 1 or not 0 <= i < size
    ]:
        problem = (
            "there twice"
            if 0 <= wrong[0] < size
            else f"out of range; they run from 0 to {size - 1}"
        )
        raise CircuitError(f"{name}: index {wrong[0]} is {problem}")
    return torch.zeros(size, dtype=torch.bool).index_fill(0, first, True)


def _edge(entry: Any) -> tuple[Node, Node, float | None]:
    """Source, target and weight of an edge in a list."""
    values = entry if isinstance(entry, dict) else {}
    source, target, weight = values.get("source"), values.get("target"), values.get("weight")
    number = weight is None or (type(weight) in (int, float) and abs(weight) < 1e300)
    if not isinstance(source, str) or not isinstance(target, str) or not number:
        raise CircuitError(
            f"an edge has a source and a target node and a number as weight, unlike {str(entry)[:80]}"
        )
    return Node.parse(source), Node.parse(target), weight


def _measured(
    path: Path, values: Mapping[str, Any], importances: Mapping[str, Any]
) -> dict[str, Any]:
    """What OpenAI measured, as JSON has it. Their task losses are sums over the two sides of a
    pair.
    """
    losses = {"full": importances.get("loss"), "circuit": importances.get("interv_loss")}
    try:
        plain = {
            name: values[name] for name in ("num_total_nodes", "prune_config") if name in values
        }
        return {
            **{
                name: {"loss": float(loss) / 2} for name, loss in losses.items() if loss is not None
            },
            "pruning_losses": [
                [int(step), float(loss) / 2] for step, loss in values.get("all_loss") or ()
            ],
            **json.loads(
                json.dumps(plain, default=lambda x: x.tolist() if isinstance(x, Tensor) else str(x))
            ),
        }
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the measurements are not as OpenAI writes them: {error}"
        ) from error
