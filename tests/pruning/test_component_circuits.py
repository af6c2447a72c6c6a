"""Circuits of components: outputs of whole heads and MLPs, in models of this package and dense."""

import dataclasses
import json

import pytest
import torch

from helpers import random_tokens, stock_model, tiny_model
from micro import COMPONENTS, MICRO_TASK, QUICK_SETTINGS, W_O, component_model, micro_corpus
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.component_edges import component_edges
from tl_sparse.circuits.exports import export, to_networkx
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.nodes import Node, weight_matrices
from tl_sparse.errors import (
    ArgumentError,
    CircuitError,
    ConfigError,
    HookNameError,
    PruneError,
    UnsupportedError,
)
from tl_sparse.evaluation.coablation import backups
from tl_sparse.evaluation.inner_values import inside
from tl_sparse.evaluation.interchanging import interchange
from tl_sparse.evaluation.minimal import minimality
from tl_sparse.evaluation.removal import effects
from tl_sparse.files import read_json
from tl_sparse.hooks.ablation import ablating
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.hooks.points import hooked
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.means import corpus_means
from tl_sparse.pruning.pruner import find_circuit, prune, prune_edges
from tl_sparse.tasks.task_data import make_task_data
from tl_sparse.view.contents import page_data
from tl_sparse.view.tables import report

SETTINGS = {
    **QUICK_SETTINGS,
    "nodes": "components",
    "target_loss": 0.05,
    "steps": 6,
    "exchanges": 2,
    "pairs_per_step": 4,
    "ranking_pairs": 4,
}
Z, MLP_OUT = "blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"
MAKERS = {"sparse": tiny_model, "dense": stock_model}


def pruned(model, **changes):
    circuit, _ = prune(model, MICRO_TASK, micro_corpus(), SETTINGS | changes, progress=False)
    return circuit


@pytest.fixture(scope="module", params=list(MAKERS))
def model(request):
    return component_model(MAKERS[request.param])


@pytest.fixture(scope="module")
def circuit(model):
    return pruned(model)


@pytest.fixture
def data(model):
    return make_task_data(MICRO_TASK, model.tokenizer, 6, seed=1)


# Searches


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "any_size"},
        {"robust": "subsets", "subsets": 4},
        {"ablation": "resample"},
        {"objective": "next_token", "target_loss": 1.0, "freeze_norms": True},
    ],
)
def test_the_two_components_of_the_task_are_found(model, changes):
    assert pruned(model, **changes).node_names == COMPONENTS


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"robust": "adversary"},
        {"ablation": "zero"},
        {"objective": "model"},
        {"warm_start": False, "necessity": 1.0},
        {"means_over": "task", "method": "attribution"},
    ],
)
def test_they_are_found_in_every_other_way(model, changes):
    assert pruned(model, **changes).node_names == COMPONENTS


def test_nodes_are_removed_only_in_as_many_tests_as_are_allowed(model):
    everything = {"method": "learned", "warm_start": False, "steps": 1, "exchanges": 0}
    assert pruned(model, **everything, removal_tests=0).n_nodes > len(COMPONENTS)
    with pytest.raises(ConfigError, match=r"removal_tests.*None, or a whole number of at least 0"):
        PruneConfig(removal_tests=-1)


def test_components_can_be_excluded_and_included(model):
    with pytest.raises(PruneError, match="no circuit was found"):
        pruned(model, exclude=("1.mlp",))
    circuit = pruned(model, include=("0.mlp",))
    assert set(circuit.node_names) == {*COMPONENTS, "0.mlp"}


def test_means_for_components_are_enough(model):
    means = corpus_means(model, micro_corpus(), kind="components")
    assert list(means) == list(node_hooks(model, kind="components").values())
    circuit = find_circuit(model, MICRO_TASK, means, SETTINGS)
    assert circuit.node_names == COMPONENTS


def test_what_is_about_channels_is_refused(model, circuit):
    for name in ("tied_qk", "embed_gates"):
        with pytest.raises(ConfigError, match=f'{name}.*False with nodes = "components"'):
            PruneConfig(nodes="components", **{name: True})
    with pytest.raises(ConfigError, match="nodes"):
        PruneConfig(nodes="heads")
    with pytest.raises(ConfigError, match=r"kind.*channels, components"):
        node_hooks(model, kind="heads")
    with pytest.raises(UnsupportedError, match="no single weights and cannot be cut"):
        prune_edges(circuit, model, MICRO_TASK, SETTINGS)
    means = corpus_means(model, micro_corpus(), kind="components")
    with pytest.raises(UnsupportedError, match="no single weights and cannot be cut"):
        find_circuit(model, MICRO_TASK, means, SETTINGS, stage="edges")
    with pytest.raises(CircuitError, match=r"no means at .*kind='channels'\) gives all"):
        find_circuit(model, MICRO_TASK, means, QUICK_SETTINGS)


def test_models_in_which_attention_is_no_sum_of_heads_are_refused():
    model = stock_model()
    norm_after = {"blocks.0.hook_attn_out": lambda out, hook: out / out.norm(dim=-1, keepdim=True)}
    with (
        hooked(model, norm_after),
        pytest.raises(HookNameError, match="in layer 0, attn_out is not a linear function"),
    ):
        node_hooks(model, kind="components")


# The circuit itself


def test_components_outside_are_held_at_their_mean_vectors(model, circuit):
    tokens = micro_corpus()[:2]
    with circuit.applied(model):
        logits = model(tokens)

    def hold_first_head(z, hook):
        z = z.clone()
        z[:, :, 0] = circuit.means[Z][0]
        return z

    def hold_all(name):
        return lambda activation, hook: circuit.means[name].expand_as(activation)

    hooks = [(Z, hold_first_head)]
    for name in ("blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"):
        hooks.append((name, hold_all(name)))
    torch.testing.assert_close(logits, model.run_with_hooks(tokens, fwd_hooks=hooks))


def test_names_and_shapes(circuit):
    assert circuit.node_kind == "components"
    assert circuit.n_candidates == 6
    assert circuit.kept[Z].shape == (2, 1)
    assert circuit.kept[MLP_OUT].shape == (1,)
    for name in ("0.head 1", "1.mlp"):
        node = circuit.node(name)
        assert str(node) == name
        assert circuit.node(node.indexed_name) == circuit.node(node.openai_name) == node
        assert node.is_component
    with pytest.raises(CircuitError, match=r"the indices at 0\.head run from 0 to 1"):
        circuit.node("0.head 2")
    with pytest.raises(CircuitError, match=r"the circuit's nodes are at 0\.head, 0\.mlp"):
        circuit.node("0.attn_v 0")
    assert "1 head, 1 mlp" in repr(circuit)


def test_a_circuit_is_the_same_after_saving(circuit, model, tmp_path):
    labelled = circuit.with_labels({"1.mlp": "answers"})
    labelled.save(tmp_path / "circuit")
    read = Circuit.load(tmp_path / "circuit")
    assert read.nodes == circuit.nodes
    assert read.labels == {circuit.node("1.mlp"): "answers"}
    assert read.kept.keys() == circuit.kept.keys()
    assert all(torch.equal(read.means[name], mean) for name, mean in circuit.means.items())
    tokens = micro_corpus()[:2]
    with circuit.applied(model):
        expected = model(tokens)
    with read.applied(model):
        assert torch.equal(model(tokens), expected)


def test_circuits_are_combined(circuit, model):
    all_of_them = circuit.of_size(6)
    assert (all_of_them - circuit).n_nodes == 4
    assert (all_of_them & circuit).nodes == circuit.nodes
    assert circuit.restricted({1}).node_names == ("1.mlp",)
    assert circuit.without([circuit.node("1.mlp")], model).node_names == ("0.head 1",)


def test_channels_and_components_do_not_mix(circuit):
    kept = {**circuit.kept, MLP_OUT: torch.ones(6, dtype=torch.bool)}
    with pytest.raises(CircuitError, match="either channels or components; there are components"):
        dataclasses.replace(circuit, kept=kept, scores={})
    with pytest.raises(CircuitError, match=r"must be a boolean mask of the components' shape \[2"):
        dataclasses.replace(circuit, kept={Z: torch.ones(2, 3, dtype=torch.bool)}, scores={})


# Edges


def test_the_only_edge_is_the_only_path_of_nonzero_weights(circuit, model):
    (edge,) = circuit.edges(model)
    assert (str(edge.source), str(edge.target)) == COMPONENTS
    # W_O writes to the channel that the rows 1 and -1 of W_in read.
    assert edge.weight == pytest.approx(W_O * 2**0.5)
    assert [other.ends for other in circuit.of_size(6).edges(model)] == [edge.ends]
    assert circuit.n_edges(model) == 1
    with pytest.raises(UnsupportedError, match="paths in the residual stream"):
        circuit.edge_shares(model)


def test_edges_between_components_are_not_cut(circuit, model):
    cut = circuit.without(circuit.edges(model), model)
    with pytest.raises(PruneError, match="edges between components cannot be cut"):
        cut.applied(model).__enter__()


@pytest.mark.parametrize("changes", [{}, {"gated_mlp": True, "n_key_value_heads": 2}])
def test_weights_of_edges_are_norms_of_products(changes):
    model = stock_model(n_layers=2, n_heads=4, d_head=2, **changes)
    names = [f"{layer}.{name}" for layer in (0, 1) for name in ("head 0", "head 3", "mlp")]
    edges = component_edges(map(Node.parse, names), model)
    assert len(edges) == 3 + 3 + 3 + 2 + 2  # from all to later ones; heads of a layer are parallel
    matrices = {(s, t): w.detach() for s, t, w in weight_matrices(model, 1)}
    written = model.blocks[0].mlp.W_out.detach()
    n_shared = 4 // changes.get("n_key_value_heads", 4)
    of_head = []
    for location, head in (("attn_q", 3), ("attn_k", 3 // n_shared), ("attn_v", 3 // n_shared)):
        of_head.append(matrices["attn_in", location][:, 2 * head : 2 * head + 2])
    into = {(str(edge.source), str(edge.target)): edge.weight for edge in edges}
    expected = (written @ torch.cat(of_head, dim=1)).norm()
    assert into["0.mlp", "1.head 3"] == pytest.approx(float(expected), rel=1e-5)
    mlp = [w.detach() for s, t, w in weight_matrices(model, 1) if t == "mlp_neuron"]
    expected = (written @ torch.cat(mlp, dim=1)).norm()
    assert into["0.mlp", "1.mlp"] == pytest.approx(float(expected), rel=1e-5)
    expected = (model.blocks[0].attn.W_O[3].detach() @ torch.cat(mlp, dim=1)).norm()
    assert into["0.head 3", "1.mlp"] == pytest.approx(float(expected), rel=1e-5)


def test_in_parallel_blocks_no_head_leads_to_the_mlp_of_its_layer():
    model = stock_model(n_layers=2, parallel_attn_mlp=True)
    edges = component_edges(map(Node.parse, ["0.head 0", "0.mlp", "1.mlp"]), model)
    assert [tuple(map(str, edge.ends)) for edge in edges] == [
        ("0.head 0", "1.mlp"),
        ("0.mlp", "1.mlp"),
    ]


# What is measured and shown


def test_every_measurement_takes_components(circuit, model, data):
    rises = effects(circuit, model, data)
    assert list(map(str, rises)) == list(COMPONENTS)
    assert all(rise > 0.1 for rise in rises.values())
    followed = inside(circuit, model, data, n_random=1).nodes
    assert [node.node for node in followed] == list(COMPONENTS)
    assert all(node.correlation.value > 0.9 for node in followed)
    exchanged = interchange(circuit, model, data)
    assert exchanged.all_nodes.other_answer.model.flips.value == 1.0
    parts = minimality(circuit, model, data, n_random=2).parts
    assert {part.name for part in parts} == set(COMPONENTS)
    assert backups(circuit, model, data, n_random=1).n_found == 0


def test_inside_counts_all_entries_of_a_vector(model, data):
    circuit = pruned(model, ablation="zero")
    names = (Z,)
    tokens = data.trimmed().tokens
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
    with circuit.applied(model):
        _, under = model.run_with_cache(tokens, names_filter=lambda name: name in names)
    reference = cache[Z][:, 1:, 1].flatten(0, 1).double()
    error = (under[Z][:, 1:, 1].flatten(0, 1).double() - reference).square().sum()
    error /= (reference - reference.mean(0)).square().sum()
    first = inside(circuit, model, data, n_random=0).nodes[0]
    assert first.error.value == pytest.approx(float(error), abs=1e-9)
    assert first.model_mean == pytest.approx(float(reference.mean(0).norm()), abs=1e-6)


def test_page_and_exports(circuit, model, tmp_path):
    page = page_data(circuit, model, MICRO_TASK, micro_corpus(), progress=False)
    head, mlp = page["nodes"]
    assert (head["name"], head["head"], head["mean"]) == ("0.head 1", 1, None)
    assert (mlp["name"], mlp["head"]) == ("1.mlp", None)
    assert page["edges"] == [[0, 1, pytest.approx(2.828)]]
    assert page["program"] is None
    for ending in ("dot", "mmd", "csv", "graphml"):
        export(circuit, model, tmp_path / f"circuit.{ending}", MICRO_TASK)
        assert "1.mlp" in (tmp_path / f"circuit.{ending}").read_text()
    assert list(to_networkx(circuit, model).edges) == [COMPONENTS]


def test_what_needs_a_number_for_each_node_is_refused(model, circuit, tmp_path):
    with pytest.raises(UnsupportedError, match="components, whole heads and MLPs; search for"):
        export(circuit, model, tmp_path / "graph.json", MICRO_TASK)
    with pytest.raises(UnsupportedError, match="an expression is the value of a node"):
        circuit.explain(model, MICRO_TASK, corpus=micro_corpus(), progress=False)


def test_in_models_of_this_package(tmp_path):
    model = component_model(tiny_model)
    circuit = pruned(model)
    text = report(circuit, model, MICRO_TASK)
    assert "2 nodes of 6" in text
    assert "0.head 1  →  1.mlp" in text
    assert "1 edge: the later component reads what the earlier one writes, and the weight" in text
    assert "nonzero weights" not in text
    with pytest.raises(UnsupportedError, match="computes each node as one number"):
        circuit.compile(model)
    with pytest.raises(UnsupportedError, match="computes each node as one number"):
        circuit.to_python(model)
    path = tmp_path / "edges.json"
    circuit.save_edge_list(path, model)
    read = Circuit.from_edge_list(path, model, circuit.means)
    assert read.nodes == circuit.nodes
    values = read_json(path)
    path.write_text(json.dumps({**values, "nodes": ["0.head.1", "0.attn_v.0"], "edges": []}))
    with pytest.raises(CircuitError, match=r"0\.attn_v is a channel, and other nodes are comp"):
        Circuit.from_edge_list(path, model)
    # The means for channels include those for components.
    means = corpus_means(model, micro_corpus())
    assert find_circuit(model, MICRO_TASK, means, SETTINGS).node_names == COMPONENTS


# Hooks


def test_masks_of_vectors(model):
    tokens = micro_corpus()[:2]
    whole, by_entry = torch.tensor([[True], [False]]), torch.zeros(2, 3, dtype=torch.bool)
    by_entry[0] = True
    values = {Z: torch.full((2, 3), 0.7)}
    with ablating(model, {Z: whole}, values):
        logits = model(tokens)
    with ablating(model, {Z: by_entry}, values):
        assert torch.equal(model(tokens), logits)
    with ablating(model, {Z: whole}, {Z: torch.full((2, 6, 2, 3), 0.7)}):
        assert torch.equal(model(tokens), logits)
    with pytest.raises(ArgumentError), ablating(model, {Z: whole}, {Z: torch.zeros(2, 1)}):
        model(tokens)
    with pytest.raises(ArgumentError), ablating(model, {Z: whole[:1]}, values):
        model(tokens)


def test_a_gate_of_a_vector_learns_from_all_its_entries():
    model = tiny_model(n_layers=1)
    name, mean = "blocks.0.attn.hook_z", torch.randn(3, 5)
    gates = NodeGates({name: mean}, init_bias=1.0, init_scale=0.0, seed=0, vectors=[name])
    assert gates.index[name].shape == (3, 1)
    by_entry = NodeGates({name: mean}, init_bias=1.0, init_scale=0.0, seed=0)
    tokens = random_tokens(model)
    gradients = []
    for each in (gates, by_entry):
        with each.attached(model):
            model(tokens).square().mean().backward()
        gradients.append(each.tau.grad)
    torch.testing.assert_close(gradients[0], gradients[1].view(3, 5).sum(1))
