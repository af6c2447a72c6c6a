"""Cutting edges, edge pruning, and the circuits that it finds."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    circuit_means,
    has_hooks,
    needs_numba,
    random_masks,
    random_tokens,
    stock_model,
    tiny_model,
)
from micro import (
    EDGES,
    LOSS,
    MICRO_TASK,
    NODES,
    VOCABULARY,
    W_O,
    W_U,
    W_V,
    micro_circuit,
    micro_corpus,
    micro_model,
    triples,
)
from tl_sparse.checkpoints.loading import load
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.edges import cutting
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.nodes import Edge, Node
from tl_sparse.errors import CircuitError, PruneError
from tl_sparse.evaluation.judge import evaluate, score
from tl_sparse.hooks import ablating, mean_activations
from tl_sparse.hooks.points import hooked
from tl_sparse.network.products import Product
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.pruner import prune, prune_edges
from tl_sparse.pruning.splits import task_splits
from tl_sparse.tasks.task_data import make_task_data

CONFIG = PruneConfig(
    target_loss=2 * LOSS, steps=30, train_pairs=32, selection_pairs=16, heldout_pairs=16
)
D_MODEL, D_HEAD = 6, 5
POSITIONAL = dict(n_layers=2, positions="concatenated", d_pos=4)

#: Edges of each weight matrix, including edges from positional channels (6 to 9) of the reads.
#: For each of them: the weight parameter, the entry in it, the bias parameter, the entry in it, and
#: the hook point at which the cut shows.
KINDS = {
    ("attn_in", 4, "attn_q", 7): ("attn.W_Q", (1, 4, 2), "attn.b_Q", (1, 2), "attn.hook_q"),
    ("attn_in", 8, "attn_q", 7): ("attn.W_Q_pos", (1, 2, 2), "attn.b_Q", (1, 2), "attn.hook_q"),
    ("attn_in", 0, "attn_k", 14): ("attn.W_K", (2, 0, 4), "attn.b_K", (2, 4), "attn.hook_k"),
    ("attn_in", 6, "attn_k", 14): ("attn.W_K_pos", (2, 0, 4), "attn.b_K", (2, 4), "attn.hook_k"),
    ("attn_in", 5, "attn_v", 3): ("attn.W_V", (0, 5, 3), "attn.b_V", (0, 3), "attn.hook_v"),
    ("attn_in", 9, "attn_v", 3): ("attn.W_V_pos", (0, 3, 3), "attn.b_V", (0, 3), "attn.hook_v"),
    ("attn_v", 11, "attn_out", 5): ("attn.W_O", (2, 1, 5), "attn.b_O", (5,), "hook_attn_out"),
    ("mlp_in", 2, "mlp_neuron", 9): ("mlp.W_in", (2, 9), "mlp.b_in", (9,), "mlp.hook_pre"),
    ("mlp_in", 7, "mlp_neuron", 9): ("mlp.W_in_pos", (1, 9), "mlp.b_in", (9,), "mlp.hook_pre"),
    ("mlp_neuron", 8, "mlp_out", 1): ("mlp.W_out", (8, 1), "mlp.b_out", (1,), "hook_mlp_out"),
}  # fmt: skip
kinds = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: f"{kind[0]}.{kind[1]}-{kind[2]}.{kind[3]}"
)


#: Source location → its hook point, except for attn_v, whose activation has an axis for heads.
SOURCES = {"attn_in": "ln1.hook_read", "mlp_in": "ln2.hook_read", "mlp_neuron": "mlp.hook_post"}


def edge(kind, layer=1, weight=0.0):
    source, i, target, j = kind
    return Edge(Node(layer, source, i), Node(layer, target, j), weight)


def source_mean(means, kind):
    """The mean at the source of an edge of this kind in layer 1."""
    location, index, _, _ = kind
    if location == "attn_v":
        return means["blocks.1.attn.hook_z"].flatten()[index]
    return means[f"blocks.1.{SOURCES[location]}"][index]


def entry(block, path):
    for part in path.split("."):
        block = getattr(block, part)
    return block.data


def means_of(model, batches=3):
    tokens = [random_tokens(model, seed=seed) for seed in range(batches)]
    return circuit_means(model, *tokens)


def state(model):
    """All parameters and buffers, including the zeros that stand for missing biases."""
    tensors = {**dict(model.network.named_parameters()), **dict(model.network.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(model, before):
    now = state(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@torch.no_grad()
def logits(model):
    return model(random_tokens(model, batch=3, seed=9))


# Cutting edges


@kinds
@pytest.mark.parametrize("biases", [True, False])
def test_cutting_is_the_model_with_that_weight_and_bias(kind, biases):
    model = tiny_model(biases=biases, **POSITIONAL)
    by_hand = tiny_model(biases=biases, **POSITIONAL)
    means = means_of(model)
    before = state(model)
    weight, at, bias, of, _ = KINDS[kind]
    block = by_hand.blocks[1]
    entry(block, bias)[of] += entry(block, weight)[at] * source_mean(means, kind)
    entry(block, weight)[at] = 0.0
    with cutting(model, [edge(kind)], means):
        assert same(model, before)
        assert torch.equal(logits(model), logits(by_hand))
    assert not torch.equal(logits(model), logits(by_hand))


@kinds
def test_cutting_replaces_what_the_edge_contributes_by_its_mean(kind):
    """Cutting equals setting the contribution at the target to its mean, with unchanged weights."""
    model = tiny_model(dtype=torch.float64, **POSITIONAL)
    means = means_of(model)
    weight, at, _, of, point = KINDS[kind]
    value = entry(model.blocks[1], weight)[at]
    location, index, _, _ = kind
    mean = source_mean(means, kind)
    seen_at = SOURCES.get(location, "attn.hook_z")
    seen = {}

    def look(activation, hook):
        seen["source"] = activation.flatten(2)[..., index]

    def change(activation, hook):
        activation = activation.clone()
        activation[(..., *of)] -= value * (seen["source"] - mean)
        return activation

    with hooked(model, {f"blocks.1.{seen_at}": look, f"blocks.1.{point}": change}):
        expected = logits(model)
    with cutting(model, [edge(kind)], means):
        torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-12)
    assert (logits(model) - expected).abs().max() > 1e-6


def test_a_cut_edge_that_leaves_a_head_with_a_sink_carries_the_mean_of_z():
    """A sink takes part of the attention, so the mean of z is smaller than that of the values."""
    model = tiny_model(dtype=torch.float64, n_layers=2, attn_sinks=True)
    with torch.no_grad():
        model.blocks[1].attn.sink.fill_(1.0)
    z_hook = "blocks.1.attn.hook_z"
    tokens = torch.arange(12).view(2, 6) % 11
    means = mean_activations(model, [*node_hooks(model).values(), z_hook], [tokens])
    _, full = model.run_with_cache(tokens)
    with cutting(model, [edge(("attn_v", 11, "attn_out", 5))], means):
        _, cache = model.run_with_cache(tokens)
    z = cache[z_hook].flatten(2)[..., 11]
    weight = model.blocks[1].attn.W_O.flatten(0, 1)[11, 5]
    expected = full["blocks.1.hook_attn_out"][..., 5] - weight * (z - z.mean())
    found = cache["blocks.1.hook_attn_out"][..., 5]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_cutting_all_edges_into_a_node_holds_what_it_is_at_mean_sources():
    """Cutting all edges into a value channel sets it to what its sources' means give."""
    model = tiny_model(dtype=torch.float64, **POSITIONAL)
    means = means_of(model)
    into = [edge(("attn_in", i, "attn_v", 3)) for i in range(D_MODEL + 4)]
    attn = model.blocks[1].attn
    rows = torch.cat([attn.W_V[0, :, 3], attn.W_V_pos[0, :, 3]])
    value = means["blocks.1.ln1.hook_read"] @ rows + attn.b_V[0, 3]
    only = torch.zeros(3, D_HEAD, dtype=torch.bool)
    only[0, 3] = True
    with ablating(
        model, {"blocks.1.attn.hook_v": only}, {"blocks.1.attn.hook_v": value.expand(3, D_HEAD)}
    ):
        expected = logits(model)
    with cutting(model, into, means):
        torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def sparsify(model):
    """Set every second entry of each weight matrix to zero, but none of those in KINDS."""
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        for weight, at, _, _, _ in KINDS.values():
            kept = torch.rand(entry(block, weight).shape, generator=generator) < 0.5
            kept[at] = True
            entry(block, weight).mul_(kept)


def cut_by_hand(model, kind, layer, mean):
    """Change the weights of `model` as a cut: no weight, and its mean contribution in the bias."""
    weight, at, bias, of, _ = KINDS[kind]
    block = model.blocks[layer]
    entry(block, bias)[of] += entry(block, weight)[at] * mean
    entry(block, weight)[at] = 0.0


#: The source location of an edge → the hook point at which its mean is taken.
MEANS_AT = {**SOURCES, "attn_v": "attn.hook_z"}


@settings(max_examples=25)
@given(st.data())
def test_any_cuts_are_those_of_weights_changed_by_hand(data):
    """Any number of cuts in any order: several at one bias, repeated ones, nested contexts, and
    contexts that end in another order than they began.
    """
    options = {"biases": data.draw(st.booleans()), "dtype": torch.float64, **POSITIONAL}
    model, by_hand = tiny_model(**options), tiny_model(**options)
    means = means_of(model, 1)
    before = state(model)
    contexts = []
    cuts = data.draw(st.lists(st.tuples(st.sampled_from(list(KINDS)), st.integers(0, 1))))
    for kind, layer in cuts:
        location, index, _, _ = kind
        mean = means[f"blocks.{layer}.{MEANS_AT[location]}"].flatten()[index]
        cut_by_hand(by_hand, kind, layer, mean)
    n_outer = data.draw(st.integers(0, len(cuts)))
    for part in (cuts[:n_outer], cuts[n_outer:]):
        edges = [edge(kind, layer) for kind, layer in part]
        contexts.append(cutting(model, edges, means))
    for context in contexts:
        context.__enter__()
    assert same(model, before)
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-10, atol=1e-12)
    for context in data.draw(st.permutations(contexts)):
        context.__exit__(None, None, None)
    assert torch.equal(logits(model), logits(tiny_model(**options)))


def test_the_cut_ends_with_an_exception():
    model = tiny_model(**POSITIONAL)
    means = means_of(model)
    before = logits(model)

    def interrupted():
        with cutting(model, [edge(kind) for kind in KINDS], means):
            assert not torch.equal(logits(model), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("source", "target", "problem"),
    [
        (Node(1, "mlp_in", 2), Node(1, "mlp_neuron", 99), "its matrix is 10 by 9"),
        (Node(1, "mlp_in", 10), Node(1, "mlp_neuron", 0), "its matrix is 10 by 9"),
        (Node(1, "mlp_in", 2), Node(1, "mlp_out", 1), "no matrix joins its ends"),
        (Node(1, "mlp_out", 2), Node(1, "mlp_in", 1), "no matrix joins its ends"),
        (Node(0, "mlp_in", 2), Node(1, "mlp_neuron", 1), "within one of the model's layers"),
        (Node(2, "mlp_in", 2), Node(2, "mlp_neuron", 1), "within one of the model's layers"),
    ],
)
def test_what_is_no_edge_is_refused(source, target, problem):
    model = tiny_model(**{**POSITIONAL, "d_mlp": 9})
    means = means_of(model)
    before = logits(model)
    nowhere = Edge(source, target, 1.0)
    edges = [edge(("mlp_in", 2, "mlp_neuron", 8)), nowhere]
    with pytest.raises(PruneError, match=problem), cutting(model, edges, means):
        pytest.fail("the context opened")
    assert torch.equal(logits(model), before)


def test_an_edge_from_a_head_needs_the_mean_of_z():
    model = tiny_model(**POSITIONAL)
    means = means_of(model)
    del means["blocks.1.attn.hook_z"]
    message = "needs the mean at blocks.1.attn.hook_z; .*circuit.mean_hooks"
    leaving = edge(("attn_v", 11, "attn_out", 5))
    with pytest.raises(CircuitError, match=message), cutting(model, [leaving], means):
        pytest.fail("the context opened")


@pytest.mark.parametrize("kernels", ["dense", pytest.param("sparse", marks=needs_numba)])
def test_gradients_under_cut_edges_are_those_of_weights_changed_by_hand(kernels):
    """Also if `backward` is called after the context."""
    model = tiny_model(dtype=torch.float64, **POSITIONAL)
    by_hand = tiny_model(dtype=torch.float64, **POSITIONAL)
    means = means_of(model)
    tokens = random_tokens(model, batch=8, seed=9)
    for each in (model, by_hand):
        for module in each.modules():
            if isinstance(module, Product):
                module.kernels = kernels
        for parameter in each.parameters():
            parameter.requires_grad_(True)
    is_cut = {}
    for kind in KINDS:
        location, index, _, _ = kind
        weight, at, _, _, _ = KINDS[kind]
        is_cut.setdefault(f"blocks.1.{weight}", []).append(at)
        mean = means[f"blocks.1.{MEANS_AT[location]}"].flatten()[index]
        cut_by_hand(by_hand, kind, 1, mean)
    with cutting(model, [edge(kind) for kind in KINDS], means):
        loss = model(tokens).pow(2).sum()
    loss.backward()
    by_hand(tokens).pow(2).sum().backward()
    expected = dict(by_hand.network.named_parameters())
    for name, parameter in model.network.named_parameters():
        grad, grad_by_hand = parameter.grad.clone(), expected[name].grad.clone()
        for at in is_cut.get(name, []):
            # A cut weight acts through the bias alone.
            grad[at] = grad_by_hand[at] = 0.0
        torch.testing.assert_close(grad, grad_by_hand, rtol=1e-9, atol=1e-10)


@needs_numba
@kinds
def test_compact_weights_are_cut_too(kind, tmp_path):
    model = tiny_model(**POSITIONAL)
    sparsify(model)
    model.save_pretrained(tmp_path / "model")
    compact = load(tmp_path / "model", device="cpu", dense_weights=False)
    means = means_of(model)
    tokens = random_tokens(model, batch=8, seed=9)
    with cutting(model, [edge(kind)], means), torch.no_grad():
        expected = model(tokens)
    with cutting(compact, [edge(kind)], means), torch.no_grad():
        torch.testing.assert_close(compact(tokens), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(compact(tokens), expected)
    now = compact.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(now[name], weight), name


@kinds
@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in", "use_attn_result"])
def test_edges_are_cut_whatever_the_flags(kind, flag):
    model = tiny_model(dtype=torch.float64, abs_topk={"attn_out": 0.7}, **POSITIONAL)
    means = means_of(model)
    with cutting(model, [edge(kind)], means):
        expected = logits(model)
        getattr(model, f"set_{flag}")(True)
        torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-12)


def test_a_model_that_is_saved_under_a_cut_has_its_own_weights(tmp_path):
    model = tiny_model(**POSITIONAL)
    means = means_of(model)
    with cutting(model, [edge(kind) for kind in KINDS], means):
        model.save_pretrained(tmp_path / "model")
        copied = copy.deepcopy(model)
    assert torch.equal(logits(load(tmp_path / "model", device="cpu")), logits(model))
    assert same(copied, state(model))


def test_stock_models_are_refused_when_there_is_something_to_cut():
    model = stock_model()
    with cutting(model, [], {}):
        pass
    message = f"edges can be cut only in models of tl_sparse, not in a {type(model).__name__}"
    with pytest.raises(PruneError, match=message), cutting(model, [edge(next(iter(KINDS)), 0)], {}):
        pytest.fail("the context opened")


# Circuits that are pruned by edges


def wide_micro():
    """The micro model with additional edges that have almost no effect.

    They copy a small part of `end`, and of A or B, to a channel that only the final norm reads.
    """
    micro = micro_model()
    attn = micro.blocks[0].attn
    mlp = micro.blocks[0].mlp
    with torch.no_grad():
        attn.W_V[0, 1, 1] = 0.25
        attn.W_O[0, 1, 3] = 0.125
        attn.W_V[0, 0, 1] = 0.01
        mlp.W_in[1, 0] = 0.125
        mlp.W_out[0, 3] = 0.25
    return micro


def wider(circuit, *nodes):
    """The circuit with further nodes of the first block, given as (hook point, index)."""
    kept = {name: mask.clone() for name, mask in circuit.kept.items()}
    for name, index in nodes:
        kept[f"blocks.0.{name}"][index] = True
    return dataclasses.replace(circuit, kept=kept)


def wide_circuit(micro):
    """The circuit of all nodes with a nonzero weight, and of one query channel without any."""
    return wider(
        micro_circuit(micro),
        ("ln1.hook_read", 1),
        ("attn.hook_v", (0, 1)),
        ("hook_attn_out", 3),
        ("ln2.hook_read", 1),
        ("mlp.hook_post", 0),
        ("hook_mlp_out", 3),
        ("attn.hook_q", (0, 0)),
    )


WIDE = [
    ("0.attn_in 0", "0.attn_v h0.0"), ("0.attn_in 0", "0.attn_v h0.1"),
    ("0.attn_in 1", "0.attn_v h0.1"),
    ("0.attn_v h0.0", "0.attn_out 2"), ("0.attn_v h0.1", "0.attn_out 3"),
    ("0.mlp_in 1", "0.mlp_neuron 0"), ("0.mlp_neuron 0", "0.mlp_out 3"),
]  # fmt: skip


def names(edges):
    return [(str(e.source), str(e.target)) for e in edges]


def test_useless_edges_and_the_nodes_left_idle_go():
    micro = wide_micro()
    circuit, before = wide_circuit(micro), state(micro)
    assert names(circuit.edges(micro)) == WIDE
    found, evaluation = prune_edges(circuit, micro, MICRO_TASK, CONFIG, progress=False)
    assert triples(found.edges(micro)) == EDGES
    # A node that never had an edge was kept for another reason, so it stays.
    assert [str(node) for node in found.nodes] == [NODES[0], "0.attn_q h0.0", *NODES[1:]]
    assert found.edge_set == {(e.source, e.target) for e in found.edges(micro)}
    assert found.cut_edges(micro) == []
    assert (evaluation.n_nodes, evaluation.n_edges, evaluation.n_pairs) == (4, 2, 16)
    assert evaluation.circuit.loss <= 2 * LOSS
    assert same(micro, before)


def test_nodes_that_are_always_used_stay_when_their_edges_go():
    """Of the useless nodes, the first neuron is in `include`."""
    micro = wide_micro()
    config = dataclasses.replace(CONFIG, include=("0.mlp_neuron 0",))
    found, _ = prune_edges(wide_circuit(micro), micro, MICRO_TASK, config, progress=False)
    assert triples(found.edges(micro)) == EDGES
    assert [str(node) for node in found.nodes] == [
        NODES[0],
        "0.attn_q h0.0",
        *NODES[1:],
        "0.mlp_neuron 0",
    ]


def test_an_edge_between_needed_nodes_is_cut_too():
    """Node pruning cannot remove it, because both of its nodes are needed for other edges."""
    micro = micro_model()
    with torch.no_grad():
        micro.blocks[0].attn.W_V[0, 0, 1] = W_V
        micro.blocks[0].attn.W_O[0, 1, 2] = W_O / 64  # far too little to matter
        micro.blocks[0].attn.W_O[0, 1, 3] = 0.0
    circuit = micro_circuit(micro)
    circuit.kept["blocks.0.attn.hook_v"][0, 1] = True
    found, _ = prune_edges(circuit, micro, MICRO_TASK, CONFIG, progress=False)
    assert triples(found.edges(micro)) == EDGES
    assert [str(node) for node in found.nodes] == NODES


def test_all_edges_stay_that_the_target_needs():
    micro = micro_model()
    found, evaluation = prune_edges(micro_circuit(micro), micro, MICRO_TASK, CONFIG, progress=False)
    assert triples(found.edges(micro)) == EDGES
    assert [str(node) for node in found.nodes] == NODES
    assert evaluation.circuit.loss == pytest.approx(LOSS, abs=1e-6)
    assert evaluation.ablated.loss == pytest.approx(math.log(2), abs=1e-6)


def test_with_a_target_that_a_coin_reaches_nothing_is_left():
    micro = micro_model()
    config = dataclasses.replace(CONFIG, target_loss=1.0)
    found, evaluation = prune_edges(micro_circuit(micro), micro, MICRO_TASK, config, progress=False)
    assert (found.nodes, found.edge_set, found.edges(micro)) == ([], frozenset(), [])
    assert evaluation.circuit.loss == pytest.approx(math.log(2), abs=1e-6)


def two_paths():
    """The micro model with a second path as good as the first, and the circuit of both paths."""
    micro = micro_model()
    attn = micro.blocks[0].attn
    A, B = VOCABULARY["A"], VOCABULARY["B"]
    yes, no = VOCABULARY["yes"], VOCABULARY["no"]
    with torch.no_grad():
        micro.embed.W_E[A, 3] = 1.0
        micro.embed.W_E[B, 3] = -1.0
        attn.W_V[0, 3, 1] = W_V
        attn.W_O[0, 1, 0] = W_O
        micro.unembed.W_U[0, yes] = W_U
        micro.unembed.W_U[0, no] = -W_U
    second_path = [("ln1.hook_read", 3), ("attn.hook_v", (0, 1)), ("hook_attn_out", 0)]
    return micro, wider(micro_circuit(micro), *second_path)


@pytest.mark.parametrize(("accuracy", "n_edges", "n_nodes"), [(1.0, 2, 3), (0.5, 3, 5)])
def test_edges_stay_that_a_necessary_circuit_needs(accuracy, n_edges, n_nodes):
    """Either path is sufficient, but without one path the model still does the task with the other.

    A necessary circuit therefore has two nodes of the other path too, and so an edge between them.
    """
    micro, circuit = two_paths()
    config = dataclasses.replace(CONFIG, target_loss=0.05, ablated_accuracy=accuracy)
    found, evaluation = prune_edges(circuit, micro, MICRO_TASK, config, progress=False)
    assert (len(found.edges(micro)), found.n_nodes) == (n_edges, n_nodes)
    # A tie does not count as right.
    assert evaluation.ablated.accuracy == (1.0 if n_edges == 2 else 0.0)


def test_what_is_measured_of_an_edge_pruned_circuit():
    micro = wide_micro()
    earlier = dataclasses.replace(
        wide_circuit(micro), measured={"heldout": {"n_nodes": 7}, "corpus_tokens": 7}
    )
    found, evaluation = prune_edges(earlier, micro, MICRO_TASK, CONFIG, progress=False)
    assert found.measured.keys() == {
        "config",
        "selection",
        "heldout",
        "calibrated",
    }  # nothing that was measured of the node-pruned circuit
    assert found.measured["heldout"] == dataclasses.asdict(evaluation)
    assert found.measured["config"] == CONFIG.to_json()
    _, selection, heldout = task_splits(micro, MICRO_TASK, CONFIG)
    with found.applied(micro):
        alone = (
            dataclasses.asdict(score(micro, selection)),
            dataclasses.asdict(score(micro, heldout)),
        )
    of_selection = found.measured["selection"]["circuit"]
    assert of_selection["loss"] == pytest.approx(alone[0]["loss"])
    of_circuit = dict(found.measured["heldout"]["circuit"])
    assert of_circuit.pop("next_token")["kl"] >= 0
    alone[1].pop("next_token")
    assert of_circuit == pytest.approx(alone[1])
    assert evaluate(found, micro, heldout) == evaluation


def test_a_circuit_that_misses_the_target_is_refused():
    micro = micro_model()
    circuit = micro_circuit(micro)
    circuit = circuit.without([Node(0, "attn_v", 0)], micro)
    before = state(micro)
    with pytest.raises(
        PruneError,
        match=r"before any edge is cut, the circuit misses the target loss 0\.\d+, or the ",
    ):
        prune_edges(circuit, micro, MICRO_TASK, CONFIG, progress=False)
    assert same(micro, before)
    assert not has_hooks(micro)


def test_another_model_and_a_stock_model_are_refused():
    micro = micro_model()
    circuit = micro_circuit(micro)
    with pytest.raises(CircuitError, match="this circuit belongs to the model 'micro'"):
        prune_edges(circuit, wide_micro(), MICRO_TASK, CONFIG, progress=False)


def test_the_model_is_as_it_was_after_an_exception_in_edge_pruning(monkeypatch):
    micro = wide_micro()
    circuit, before, calls = wide_circuit(micro), state(micro), []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 40:
            raise ZeroDivisionError
        return real(*arguments)

    from tl_sparse.evaluation import objectives

    real = objectives.next_token_logits
    monkeypatch.setattr(objectives, "next_token_logits", failing)
    micro.train()
    micro.blocks[0].attn.W_V.requires_grad_(False)
    config = dataclasses.replace(CONFIG, batch_size=8)
    with pytest.raises(ZeroDivisionError):
        prune_edges(circuit, micro, MICRO_TASK, config, progress=False)
    assert same(micro, before)
    assert micro.training
    assert [name for name, p in micro.named_parameters() if not p.requires_grad] == [
        "blocks.0.attn.W_V"
    ]
    assert not has_hooks(micro)


def test_edge_pruning_of_what_node_pruning_found():
    micro = wide_micro()
    circuit, _ = prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
    found, _ = prune_edges(circuit, micro, MICRO_TASK, CONFIG, progress=False)
    assert triples(found.edges(micro)) == EDGES
    assert found.of_size(found.n_nodes).nodes == found.nodes


# Circuits with an edge set


def random_circuit(model, share=0.5, edges=None, seed=0):
    """A circuit of random nodes and a random subset of their edges."""
    generator = torch.Generator().manual_seed(seed)
    means = means_of(model)
    kept = random_masks(means, share, generator)
    circuit = Circuit(kept, means, fingerprint(model), "model", "task")
    if edges is None:
        return circuit
    ends = [(edge.source, edge.target) for edge in circuit.edges(model)]
    chances = torch.rand(len(ends), generator=generator)
    edge_set = {pair for pair, chance in zip(ends, chances, strict=True) if chance < edges}
    return dataclasses.replace(circuit, edge_set=frozenset(edge_set))


@pytest.fixture(scope="module")
def model():
    return tiny_model(
        abs_topk=dict.fromkeys(["attn_in", "attn_v", "mlp_neuron"], 0.7),
        attn_sinks=True,
        **POSITIONAL,
    )


def test_edges_and_cut_edges_are_all_weights_between_kept_nodes(model):
    circuit = random_circuit(model, edges=0.5)
    whole = dataclasses.replace(circuit, edge_set=None)
    left, cut = circuit.edges(model), circuit.cut_edges(model)
    assert sorted([*left, *cut]) == sorted(whole.edges(model))
    assert {(e.source, e.target) for e in left} == circuit.edge_set
    assert len(left) > 100
    assert len(cut) > 100
    assert whole.cut_edges(model) == []
    positions = {e.source.index for e in cut if e.source.location == "attn_in"}
    assert max(positions) >= D_MODEL  # edges from positional channels are included


def test_applied_is_nodes_at_means_in_a_model_with_weights_cut(model):
    circuit, before = random_circuit(model, edges=0.5), state(model)
    with circuit.applied(model):
        under = logits(model)
    with (
        cutting(model, circuit.cut_edges(model), circuit.means),
        ablating(model, circuit.dropped, circuit.means),
    ):
        assert torch.equal(logits(model), under)
    with dataclasses.replace(circuit, edge_set=None).applied(model):
        assert not torch.allclose(logits(model), under, atol=1e-3)
    assert same(model, before)
    with pytest.raises(ZeroDivisionError), circuit.applied(model):
        _ = 1 / 0
    assert same(model, before)
    assert not has_hooks(model)


def test_ablated_cuts_no_edge(model):
    circuit = random_circuit(model, edges=0.5)
    before = state(model)
    with circuit.ablated(model):
        assert same(model, before)
        under = logits(model)
    with dataclasses.replace(circuit, edge_set=None).ablated(model):
        assert torch.equal(logits(model), under)


@pytest.mark.parametrize("edges", [0.5, 0.0, 1.0, None])
def test_save_and_load(model, edges, tmp_path):
    circuit = random_circuit(model, edges=edges)
    scores = {name: torch.randn(mask.shape) for name, mask in circuit.kept.items()}
    circuit = dataclasses.replace(circuit, scores=scores, measured={"x": 1})
    circuit.save(tmp_path)
    again = Circuit.load(tmp_path)
    assert again.edge_set == circuit.edge_set
    assert again.edges(model) == circuit.edges(model)
    assert again.cut_edges(model) == circuit.cut_edges(model)
    assert all(torch.equal(again.scores[name], score) for name, score in scores.items())
    assert again.of_size(9).nodes == circuit.of_size(9).nodes
    with circuit.applied(model):
        expected = logits(model)
    with again.applied(model):
        assert torch.equal(logits(model), expected)
    assert repr(again) == repr(circuit)
    assert ("pruned to" in repr(again)) == (edges is not None)


def test_the_number_of_edges_is_in_the_repr():
    micro = micro_model()
    circuit = micro_circuit(micro)
    first, second = circuit.edges(micro)
    assert "pruned to" not in repr(circuit)
    assert repr(circuit.without([first], micro)).endswith(
        "1 attn_in, 1 attn_v, 1 attn_out\n  pruned to 1 edge)"
    )
    assert repr(circuit.without([first, second.source], micro)).endswith("pruned to 0 edges)")


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_a_cut_edge_of_the_micro_circuit_on_paper(kept):
    """Without the first edge, a mean of 0 makes the write 0; a mean of 1 makes it a constant."""
    micro = micro_model()
    circuit = micro_circuit(micro)
    circuit = circuit.with_means(
        dict(circuit.means) | {"blocks.0.ln1.hook_read": torch.tensor([kept, 0, 0, 0])}
    )
    cut = circuit.without(circuit.edges(micro)[:1], micro)
    a = kept * W_V * W_O  # at every position, so attention does not dilute it
    difference = 2 * W_U * a / math.sqrt((1 + a * a) / 4)
    expected = (math.log1p(math.exp(-difference)) + math.log1p(math.exp(difference))) / 2
    data = make_task_data(MICRO_TASK, micro.tokenizer, 8, seed=0)
    for context in (cut.applied(micro), cutting(micro, circuit.edges(micro)[:1], circuit.means)):
        with context:
            assert score(micro, data).loss == pytest.approx(expected, abs=1e-5)
    assert score(micro, data).loss == pytest.approx(LOSS, abs=1e-6)
