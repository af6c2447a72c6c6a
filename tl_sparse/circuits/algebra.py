"""Making circuits from other circuits: union, intersection, difference, and other sizes.

Every function returns a circuit of the same class as its first argument.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.arguments import described
from tl_sparse.circuits.edges import uncut_edges
from tl_sparse.circuits.nodes import Edge, Node, place_at
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import ArgumentError, CircuitError
from tl_sparse.hooks import NodeMasks, TLModel

_Circuit = TypeVar("_Circuit", bound=CircuitParts)


def union(circuit: _Circuit, other: CircuitParts) -> _Circuit:
    """The nodes and edges that are in at least one of the two circuits.

    If only one of them has edges that are cut, the union has all edges between its nodes.
    """
    _check_combinable(circuit, other, "|")
    edge_set = None
    if circuit.edge_set is not None and other.edge_set is not None:
        edge_set = circuit.edge_set | other.edge_set
    return _combined(circuit, other, "|", torch.logical_or, edge_set)


def intersection(circuit: _Circuit, other: CircuitParts) -> _Circuit:
    """The nodes and edges that are in both circuits."""
    _check_combinable(circuit, other, "&")
    if circuit.edge_set is None:
        edge_set = other.edge_set
    elif other.edge_set is None:
        edge_set = circuit.edge_set
    else:
        edge_set = circuit.edge_set & other.edge_set
    return _combined(circuit, other, "&", torch.logical_and, edge_set)


def difference(circuit: _Circuit, other: CircuitParts) -> _Circuit:
    """The nodes of `circuit` that are not in `other`, and the edges of `circuit` between them."""
    _check_combinable(circuit, other, "-")
    return _combined(circuit, other, "-", _and_not, circuit.edge_set)


def _check_combinable(circuit: CircuitParts, other: object, sign: str) -> None:
    """Raise an error unless `other` is a circuit of the same model at the same hook points."""
    if not isinstance(other, CircuitParts):
        raise ArgumentError(
            f"circuit {sign} other: other must be a Circuit, not {described(other)}"
        )
    other_model = circuit.model.difference(other.model)
    if other_model is not None:
        raise CircuitError(
            f"circuits of different models cannot be combined with {sign}: "
            f"the second circuit's model has {other_model}"
        )
    if circuit.kept.keys() != other.kept.keys():
        raise CircuitError(f"circuits over different hook points cannot be combined with {sign}")


def _and_not(mask: Tensor, other: Tensor) -> Tensor:
    return mask & ~other


def _combined(
    circuit: _Circuit,
    other: CircuitParts,
    sign: str,
    combine: Callable[[Tensor, Tensor], Tensor],
    edge_set: frozenset[tuple[Node, Node]] | None,
) -> _Circuit:
    """The circuit whose masks are `combine` of the two circuits' masks at each hook point."""
    kept = {name: combine(mask, other.kept[name]) for name, mask in circuit.kept.items()}
    if circuit.pairs != other.pairs:
        # One of the circuits was searched on pairs by which the other was judged.
        circuit = replace(circuit, pairs=None)
    return _derived(circuit, kept, f"({circuit.task} {sign} {other.task})", edge_set)


def restricted(circuit: _Circuit, layers: Collection[int]) -> _Circuit:
    """The nodes of a circuit in `layers`, and its edges between them."""
    _check_layers(circuit, layers)
    kept = {}
    for name, mask in circuit.kept.items():
        layer, _ = place_at(name, mask)
        kept[name] = mask if layer in layers else torch.zeros_like(mask)
    return _derived(circuit, kept, circuit.task, circuit.edge_set)


def _check_layers(circuit: CircuitParts, layers: object) -> None:
    """Raise an error unless these are layers of the circuit."""
    existing = sorted({layer for layer, _ in circuit.hooks})
    if isinstance(layers, str | Mapping) or not isinstance(layers, Collection):
        raise ArgumentError(
            f"layers must be a collection of numbers of layers, such as {{{existing[0]}}}, not "
            f"{described(layers)}"
        )
    for layer in layers:
        if layer not in existing:
            numbers = ", ".join(map(str, existing))
            raise CircuitError(f"there is no layer {layer!r}; the circuit's layers are {numbers}")


def without(circuit: _Circuit, removed: Iterable[Node | Edge | str], model: TLModel) -> _Circuit:
    """The circuit without the nodes and edges in `removed`."""
    nodes = set(circuit.nodes)
    hooks = circuit.hooks
    kept = {name: mask.clone() for name, mask in circuit.kept.items()}
    cut = set()
    for given in removed:
        part = circuit.node(given) if isinstance(given, str) else given
        ends = part.ends if isinstance(part, Edge) else (part,)
        if not nodes.issuperset(ends):
            raise CircuitError(f"{part} is not in this circuit")
        if isinstance(part, Edge):
            cut.add(part.ends)
        else:
            mask = kept[hooks[part.layer, part.location]]
            mask.view(-1)[part.index] = False
    edge_set = circuit.edge_set
    if cut:
        edge_set = frozenset(edge.ends for edge in uncut_edges(circuit, model)) - cut
    return _derived(circuit, kept, circuit.task, edge_set)


def of_size(circuit: _Circuit, n_nodes: int) -> _Circuit:
    """The circuit of the `n_nodes` highest-ranked nodes, with all nonzero weights between them.

    The kept nodes rank above all others; within each group, the scores decide.
    """
    scores = circuit.scores
    if not scores or not 0 <= n_nodes <= circuit.n_candidates:
        raise CircuitError(
            f"n_nodes = {n_nodes}; it must be in [0, {circuit.n_candidates}], "
            f"and the circuit must have scores"
        )
    kept = circuit.masks_of_numbers(ranking(circuit)[:n_nodes])
    return _derived(circuit, kept, circuit.task, None)


def ranking(circuit: CircuitParts) -> Int[Tensor, " candidate"]:
    """The numbers of all nodes, the best first, as `of_size` keeps them.

    Raises:
        CircuitError: if the circuit has no scores.
    """
    if not circuit.scores:
        raise CircuitError("this circuit has no scores of its nodes, by which they can be ranked")
    is_kept = torch.zeros(circuit.n_candidates, dtype=torch.bool)
    is_kept[circuit.numbers_in(circuit.kept)] = True
    scores = torch.cat([circuit.scores[name].flatten().cpu() for name in circuit.kept])
    by_score = scores.argsort(descending=True, stable=True)
    # Kept nodes come first even where nodes with a higher score were dropped after the search.
    return torch.cat([by_score[is_kept[by_score]], by_score[~is_kept[by_score]]])


def _derived(
    circuit: _Circuit,
    kept: NodeMasks,
    task: str,
    edge_set: frozenset[tuple[Node, Node]] | None,
) -> _Circuit:
    """A circuit with other masks, which has the edges of `edge_set` that join its nodes.

    `measured` is emptied, because the measurements of `circuit` do not apply to it.
    """
    derived = replace(circuit, kept=kept, task=task, edge_set=None, measured={})
    if edge_set is None:
        return derived
    nodes = set(derived.nodes)
    remaining = frozenset(ends for ends in edge_set if nodes.issuperset(ends))
    return replace(derived, edge_set=remaining)
