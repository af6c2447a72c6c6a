"""From circuits to graphs of components, and back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuits.algebra import ranking
from tl_sparse.circuits.component_layout import ComponentLayout
from tl_sparse.circuits.component_paths import (
    LETTERS,
    ComponentPaths,
    Openings,
    summed_paths,
    weakest_parts,
)
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.kinds import NODE_KINDS, NodeKind
from tl_sparse.circuits.nodes import LOCATIONS, location_sizes
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.config import check
from tl_sparse.errors import CircuitError
from tl_sparse.hooks import NodeValues, TLModel

#: How `Circuit.to_eap` scores the edges:
#: - "weights": the sum over all paths in the circuit of the product of their absolute weights;
#: - "ranking": how highly the search ranked the weakest node of the best path.
EdgeScoring = Literal["weights", "ranking"]
EDGE_SCORINGS: tuple[EdgeScoring, ...] = get_args(EdgeScoring)


def graph_of_circuit(
    circuit: CircuitParts, model: TLModel, scores: EdgeScoring | EapGraph
) -> EapGraph:
    """The graph of a circuit; see `Circuit.to_eap`."""
    if isinstance(scores, EapGraph):
        scores.check_model(model)
    else:
        check(scores in EDGE_SCORINGS, "scores", scores, f"one of {', '.join(EDGE_SCORINGS)}")
    layout = ComponentLayout.of_model(model)
    kept = {name: mask.float() for name, mask in circuit.kept.items()}
    paths = _paths(summed_paths, circuit, model, layout, kept)
    is_joined = (paths.written > 0).float() @ (paths.read > 0).float() > 0
    graph = EapGraph(
        layout=layout,
        scores=torch.zeros(is_joined.shape),
        in_graph=is_joined & layout.real_edges(),
        nodes_in_graph=paths.nodes > 0,
    )
    if isinstance(scores, EapGraph):
        return replace(graph, scores=scores.scores, nodes_scores=scores.nodes_scores)
    if scores == "weights":
        products = paths.written @ paths.read * layout.real_edges()
        return replace(graph, scores=products, nodes_scores=paths.written.sum(1))
    ranked = _paths(weakest_parts, circuit, model, layout, _ranks(circuit))
    return replace(graph, scores=_best_paths(ranked, layout), nodes_scores=ranked.nodes)


def _paths(
    followed: Callable[[TLModel, ComponentLayout, Openings], ComponentPaths],
    circuit: CircuitParts,
    model: TLModel,
    layout: ComponentLayout,
    values: NodeValues,
) -> ComponentPaths:
    """The paths of a circuit, followed through channels, or between whole components.

    Args:
        followed: `summed_paths` or `weakest_parts`.
        values: 1 for each kept node and else 0, or the rank of each.
    """
    openings = Openings(circuit, values)
    paths = followed(model, layout, openings)
    if circuit.node_kind == "channels":
        return paths
    # All channels are open, since the circuit has nodes at other places.
    nodes = torch.ones(layout.n_sources)
    for layer in range(layout.n_layers):
        nodes[layout.heads(layer)] = openings.at(layer, "head", layout.n_heads)
        nodes[layout.mlp(layer)] = openings.at(layer, "mlp", 1)
    targets = (layout.inputs_of_sources() * nodes[:, None]).amax(0)
    targets[layout.logits] = 1.0
    if followed is summed_paths:
        return ComponentPaths(paths.written * nodes[:, None], paths.read * targets, nodes)
    return ComponentPaths(paths.written.minimum(nodes[:, None]), paths.read.minimum(targets), nodes)


def _ranks(circuit: CircuitParts) -> dict[str, Float[Tensor, " *node"]]:
    """For each node, the share of all nodes that the search ranked no higher: 1 for the best."""
    best_first = ranking(circuit)
    n_nodes = len(best_first)
    ranks = torch.empty(n_nodes)
    ranks[best_first] = torch.arange(n_nodes, 0, -1) / n_nodes
    sizes = [mask.numel() for mask in circuit.kept.values()]
    values = {}
    for (name, mask), part in zip(circuit.kept.items(), ranks.split(sizes), strict=True):
        values[name] = part.view(mask.shape)
    return values


def _best_paths(paths: ComponentPaths, layout: ComponentLayout) -> Float[Tensor, "source target"]:
    """For each edge, the value of the best path, which is that of its weakest part."""
    rows = []
    for written in paths.written:
        rows.append(torch.minimum(written[:, None], paths.read).amax(0))
    return torch.stack(rows) * layout.real_edges()


def circuit_of_graph(graph: EapGraph, model: TLModel, task: str, nodes: NodeKind) -> CircuitParts:
    """The circuit that a graph stands for; see `Circuit.from_eap`."""
    check(nodes in NODE_KINDS, "nodes", nodes, f"one of {', '.join(NODE_KINDS)}")
    graph.check_model(model)
    if not bool(graph.nodes_in_graph.any()):
        raise CircuitError(
            "nothing is in this graph, which perhaps has scores only; graph.top(n) chooses edges"
        )
    kept = _kept_components(graph, model) if nodes == "components" else _kept_channels(graph, model)
    return CircuitParts(
        kept=kept,
        means={},
        model=fingerprint(model),
        model_name=str(getattr(model.cfg, "model_name", "") or ""),
        task=task,
    )


def _kept_components(graph: EapGraph, model: TLModel) -> dict[str, Tensor]:
    """Hook point → the mask of the heads, or of the MLP, there."""
    kept = {}
    for (layer, location), hook_name in node_hooks(model, kind="components").items():
        if location == "head":
            kept[hook_name] = graph.nodes_in_graph[graph.layout.heads(layer), None].clone()
        else:
            kept[hook_name] = graph.nodes_in_graph[graph.layout.mlp(layer), None].clone()
    return kept


def _kept_channels(graph: EapGraph, model: TLModel) -> dict[str, Tensor]:
    """Hook point → the mask of the channels of the components in the graph."""
    kept = {}
    sizes = location_sizes(model)
    for (layer, location), hook_name in node_hooks(model).items():
        chosen = _chosen_at(graph, layer, location)
        size = sizes[layer, location]
        if LOCATIONS[location].is_by_head:
            # Query heads may share key and value heads, which are kept for any of them.
            n_stored = size // model.cfg.d_head
            of_heads = chosen.unflatten(0, (n_stored, -1)).any(1, keepdim=True)
            kept[hook_name] = of_heads.repeat(1, model.cfg.d_head)
        else:
            kept[hook_name] = chosen.expand(size).clone()
    return kept


def _chosen_at(graph: EapGraph, layer: int, location: str) -> Bool[Tensor, " chosen"]:
    """Which nodes of a location are kept: of a head's channels, one value for each query head; of
    what attention or an MLP writes, one for each residual channel; else one for all.
    """
    layout = graph.layout
    heads = layout.heads(layer)
    sources = heads if location.startswith("attn") else slice(heads.stop, heads.stop + 1)
    nodes = graph.nodes_in_graph[sources]
    if location in LETTERS:
        is_read = graph.in_graph[:, layout.head_inputs(layer, LETTERS[location])].any(0)
        return nodes & is_read if graph.n_edges else nodes
    if location.endswith("_out") and graph.neurons_in_graph is not None:
        return (graph.neurons_in_graph[sources] & nodes[:, None]).any(0)
    return nodes.any(0, keepdim=True)
