"""Circuits made from other circuits by |, &, -, restricted, without and of_size."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparse
from helpers import random_tokens, tiny_config, tiny_model
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.nodes import Edge, Node
from tl_sparse.errors import ArgumentError, CircuitError
from tl_sparse.hooks import mean_activations

pytestmark = pytest.mark.any_line

SIZES = dict(n_layers=2, d_model=3, n_heads=1, d_head=2, d_mlp=3)
MODEL = tiny_model(**SIZES)
MEANS = mean_activations(MODEL, list(node_hooks(MODEL).values()), [random_tokens(MODEL)])
EMPTY = Circuit(
    {n: torch.zeros(m.shape, dtype=torch.bool) for n, m in MEANS.items()}, MEANS, fingerprint(MODEL)
)
ALL = dataclasses.replace(EMPTY, kept={name: ~mask for name, mask in EMPTY.kept.items()})
N_NODES = 2 * (3 + 2 + 2 + 2 + 3 + 3 + 3 + 3)
seeds = st.integers(0, 10_000)
shares = st.sampled_from([0.0, 0.3, 0.7, 1.0])


def made(seed, share=0.5, edges=None, task="t"):
    """A circuit of random nodes and a random subset of the edges between them."""
    generator = torch.Generator().manual_seed(seed)
    kept = {
        name: torch.rand(mask.shape, generator=generator) < share
        for name, mask in EMPTY.kept.items()
    }
    circuit = dataclasses.replace(EMPTY, kept=kept, task=task, measured={"heldout": 1})
    if edges is None:
        return circuit
    ends = [(e.source, e.target) for e in circuit.edges(MODEL)]
    left = torch.rand(len(ends), generator=generator) < edges
    return dataclasses.replace(
        circuit, edge_set=frozenset(pair for pair, x in zip(ends, left, strict=True) if x)
    )


def nodes(circuit):
    return set(circuit.nodes)


def ends(circuit):
    return {(e.source, e.target) for e in circuit.edges(MODEL)}


def between(chosen):
    """All nonzero weights between the chosen nodes."""
    return {pair for pair in ends(ALL) if chosen.issuperset(pair)}


def sound(circuit):
    """Checks that all edges join kept nodes, and that no measurements of another circuit remain."""
    assert circuit.edge_set is None or circuit.edge_set == ends(circuit)
    assert ends(circuit) <= between(nodes(circuit))
    assert circuit.measured == {}
    assert circuit.model == EMPTY.model
    return circuit


circuits = st.builds(made, seeds, shares, st.none() | shares)
pruned = st.builds(made, seeds, shares, shares)
quick = settings(max_examples=10)


def test_all_nodes_and_weights_are_there():
    assert ALL.n_nodes == N_NODES
    assert len(ends(ALL)) == 2 * (3 * 3 * 2 + 2 * 3 + 3 * 3 * 2)


@quick
@given(circuits, circuits)
def test_nodes_are_those_of_sets(a, b):
    assert nodes(sound(a | b)) == nodes(a) | nodes(b)
    assert nodes(sound(a & b)) == nodes(a) & nodes(b)
    assert nodes(sound(a - b)) == nodes(a) - nodes(b)


@quick
@given(pruned, pruned)
def test_edges_of_edge_pruned_circuits(a, b):
    assert ends(a | b) == ends(a) | ends(b)
    assert ends(a & b) == ends(a) & ends(b)
    assert ends(a - b) == ends(a) & between(nodes(a) - nodes(b))


@quick
@given(pruned, st.builds(made, seeds, shares))
def test_edges_where_one_circuit_has_all_weights(a, whole):
    for both in (a & whole, whole & a):
        assert ends(both) == ends(a) & ends(whole)
    assert ends(a - whole) == ends(a) & between(nodes(a) - nodes(whole))
    assert (whole - a).edge_set is None
    for either in (a | whole, whole | a):  # the union with a circuit that cuts no edge cuts none
        assert either.edge_set is None
        assert ends(either) == between(nodes(a) | nodes(whole))


@quick
@given(pruned, pruned, pruned)
def test_edges_do_not_come_back_with_their_nodes(a, b, c):
    """An edge that was removed with a node of b is in (a - b) | c only if it is in c."""
    assert ends(sound((a - b) | c)) == ends(a - b) | ends(c)
    assert ends(sound(a.restricted([0]) | c)) == ends(a.restricted([0])) | ends(c)


@quick
@given(circuits, circuits)
def test_laws(a, b):
    for x, y in (
        (a | b, b | a),
        (a & b, b & a),
        (a | a, a),
        (a & a, a),
        (a - a, EMPTY),
        ((a - b) & b, EMPTY),
    ):
        assert nodes(x) == nodes(y)
        assert ends(x) == ends(y)
    assert nodes((a - b) | (a & b)) == nodes(a)


@quick
@given(circuits, st.sets(st.integers(0, 1)))
def test_restricted(circuit, layers):
    found = sound(circuit.restricted(layers))
    assert nodes(found) == {node for node in circuit.nodes if node.layer in layers}
    assert ends(found) == {pair for pair in ends(circuit) if pair[0].layer in layers}
    assert (found.edge_set is None) == (circuit.edge_set is None)
    assert found.task == circuit.task


@pytest.mark.parametrize("layers", ["0", 0, {0: 1}, None])
def test_restricted_takes_numbers_of_layers(layers):
    with pytest.raises(ArgumentError, match=r"collection of numbers of layers, such as \{0\}, not"):
        EMPTY.restricted(layers)


def test_restricted_to_a_layer_that_is_not_there():
    with pytest.raises(CircuitError, match="there is no layer 7; the circuit's layers are 0, 1"):
        EMPTY.restricted({0, 7})


def test_circuits_are_combined_with_circuits():
    with pytest.raises(
        ArgumentError, match="circuit & other: other must be a Circuit, not the int 3"
    ):
        EMPTY & 3
    with pytest.raises(ArgumentError, match=r"circuit \| other: .* a Circuit, not the str 'x'"):
        EMPTY | "x"
    with pytest.raises(ArgumentError, match=r"circuit - other: .*not the NoneType None"):
        EMPTY - None


@quick
@given(circuits, st.data())
def test_without(circuit, data):
    parts = [*circuit.nodes, *circuit.edges(MODEL)]
    gone = data.draw(st.lists(st.sampled_from(parts), max_size=8)) if parts else []
    before = {name: mask.clone() for name, mask in circuit.kept.items()}
    found = sound(circuit.without(gone, MODEL))
    gone_nodes = {part for part in gone if isinstance(part, Node)}
    gone_edges = {(part.source, part.target) for part in gone if isinstance(part, Edge)}
    assert nodes(found) == nodes(circuit) - gone_nodes
    assert ends(found) == {
        p for p in ends(circuit) if p not in gone_edges and gone_nodes.isdisjoint(p)
    }
    assert (found.edge_set is None) == (circuit.edge_set is None and not gone_edges)
    assert all(torch.equal(mask, before[name]) for name, mask in circuit.kept.items())
    names = [str(part) if isinstance(part, Node) else part for part in gone]
    by_name = circuit.without(names, MODEL)
    assert (nodes(by_name), ends(by_name)) == (nodes(found), ends(found))


@pytest.mark.parametrize("part", [Node(0, "attn_q", 1), Node(0, "attn_q", 9), Node(5, "attn_q", 0)])
def test_without_what_is_not_there(part):
    circuit = ALL.without([Node(0, "attn_q", 1)], MODEL)
    with pytest.raises(CircuitError, match=rf"^{part} is not in this circuit$"):
        circuit.without([part], MODEL)
    with pytest.raises(
        CircuitError, match=rf"^0\.attn_in 0 → {part}  .1\.000 is not in this circuit$"
    ):
        circuit.without([Edge(Node(0, "attn_in", 0), part, 1.0)], MODEL)
    with pytest.raises(CircuitError, match="'seven'"):
        circuit.without(["seven"], MODEL)


def test_tasks_name_what_was_combined():
    a, b = made(0, task="quotes"), made(1, task="brackets")
    tasks = [circuit.task for circuit in (a | b, a & b, a - b, (a | b) - b)]
    assert tasks == [
        "(quotes | brackets)",
        "(quotes & brackets)",
        "(quotes - brackets)",
        "((quotes | brackets) - brackets)",
    ]


@pytest.mark.parametrize("sign", ["|", "&", "-"])
def test_circuits_of_different_models_are_refused(sign):
    combine = {"|": Circuit.__or__, "&": Circuit.__and__, "-": Circuit.__sub__}[sign]
    other = dataclasses.replace(EMPTY, model=fingerprint(tiny_model(**SIZES, seed=1)))
    message = (
        rf"circuits of different models cannot be combined with \{sign}: "
        r"the second circuit's model has other weights in "
    )
    with pytest.raises(CircuitError, match=message):
        combine(EMPTY, other)
    wide = dataclasses.replace(
        EMPTY, model=fingerprint(tl_sparse.create(tiny_config(), seed=0, device="cpu"))
    )
    with pytest.raises(
        CircuitError, match=rf"with \{sign}: the second circuit's model has another architecture"
    ):
        combine(EMPTY, wide)
    one = "blocks.0.hook_mlp_out"
    fewer = dataclasses.replace(EMPTY, kept={one: EMPTY.kept[one]}, means={one: EMPTY.means[one]})
    with pytest.raises(
        CircuitError, match=rf"circuits over different hook points cannot be combined with \{sign}"
    ):
        combine(EMPTY, fewer)


# of_size


def scored(circuit, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.randn(mask.shape, generator=generator) for name, mask in circuit.kept.items()
    }
    return dataclasses.replace(circuit, scores=scores)


def ranking(circuit):
    """All nodes by score, those of the circuit before all others."""
    hooks = circuit.hooks
    by_score = {
        node: circuit.scores[hooks[node.layer, node.location]].flatten()[node.index]
        for node in ALL.nodes
    }
    return sorted(ALL.nodes, key=lambda node: (node not in nodes(circuit), -by_score[node]))


@quick
@given(circuits, st.integers(0, N_NODES))
def test_of_size_keeps_the_nodes_ranked_highest(circuit, size):
    circuit = scored(circuit)
    found = sound(circuit.of_size(size))
    assert nodes(found) == set(ranking(circuit)[:size])
    assert found.edge_set is None
    assert circuit.of_size(circuit.n_nodes).nodes == circuit.nodes
    assert found.of_size(size).nodes == found.nodes


@pytest.mark.parametrize("size", [-1, N_NODES + 1])
def test_impossible_sizes(size):
    with pytest.raises(CircuitError, match=rf"n_nodes = {size}; it must be in \[0, {N_NODES}\]"):
        scored(EMPTY).of_size(size)


def test_without_scores_there_is_no_size():
    with pytest.raises(CircuitError, match="and the circuit must have scores"):
        EMPTY.of_size(3)


def test_scores_must_be_of_the_same_hook_points():
    with pytest.raises(CircuitError, match="kept nodes and scores must name the same hook points"):
        dataclasses.replace(EMPTY, scores={"blocks.0.hook_mlp_out": torch.zeros(3)})
