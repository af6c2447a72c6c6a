"""From a model in half precision to a circuit, its scores, exports and page.

The model that is worked out on paper has about the same numbers in every dtype.
"""

import dataclasses

import pytest
import torch

from helpers import has_hooks
from micro import (
    EDGES,
    LOSS,
    MICRO_TASK,
    NODES,
    QUICK_SETTINGS,
    micro_circuit,
    micro_corpus,
    micro_model,
    triples,
)
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.exports import export
from tl_sparse.evaluation.judge import evaluate, full_evaluation, score
from tl_sparse.hooks import NodeGates, mean_activations
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.pruner import prune, prune_edges
from tl_sparse.tasks.task_data import make_task_data

HALVES = [torch.bfloat16, torch.float16]
#: Rounding changes the losses on paper by less than this.
ROUNDING = 0.01


@pytest.fixture(params=HALVES, ids=["bfloat16", "float16"])
def half(request):
    return micro_model().to(request.param)


@pytest.fixture
def data(half):
    return make_task_data(MICRO_TASK, half.tokenizer, 20, seed=0)


def test_scores_are_those_on_paper(half, data):
    circuit = micro_circuit(micro_model())  # found in float32
    measured = evaluate(circuit, half, data)
    assert measured.full.loss == pytest.approx(LOSS, abs=ROUNDING)
    assert measured.circuit.loss == pytest.approx(LOSS, abs=ROUNDING)
    assert measured.ablated.loss == pytest.approx(0.6931, abs=ROUNDING)
    assert triples(circuit.edges(half)) == EDGES
    everything = full_evaluation(circuit, half, data)
    for effect in everything["effects"].values():  # without any part, both answers are alike
        assert effect == pytest.approx(0.6931 - LOSS, abs=ROUNDING)


def test_scores_and_means_are_in_float32(half, data):
    name = "blocks.0.hook_attn_out"
    means = mean_activations(half, [name], [micro_corpus()])
    assert means[name].dtype == torch.float32
    # 2^-9 more than 1 is not a number of bfloat16, but the loss over many pairs is not rounded.
    assert score(half, data).loss * 2**12 % 1 != 0


@pytest.mark.parametrize("method", ["learned", "attribution", "integrated_gradients"])
def test_pruning_finds_the_circuit_on_paper(half, method, tmp_path):
    settings = QUICK_SETTINGS | {"method": method, "steps": 60}
    config = PruneConfig(**settings)
    circuit, measured = prune(half, MICRO_TASK, micro_corpus(), config, progress=False)
    assert [str(node) for node in circuit.nodes] == NODES
    assert measured.circuit.loss == pytest.approx(LOSS, abs=ROUNDING)
    assert {mean.dtype for mean in circuit.means.values()} == {torch.float32}
    circuit.save(tmp_path)
    Circuit.load(tmp_path).check_model(micro_model())
    assert not has_hooks(half)


def test_edges_can_be_pruned(half):
    circuit = micro_circuit(half)
    config = PruneConfig(**QUICK_SETTINGS)
    pruned, measured = prune_edges(circuit, half, MICRO_TASK, config, progress=False)
    assert triples(pruned.edges(half)) == EDGES
    assert measured.circuit.loss == pytest.approx(LOSS, abs=ROUNDING)


def test_a_cut_edge_contributes_its_mean(half, data):
    circuit = dataclasses.replace(micro_circuit(half), edge_set=frozenset())
    assert len(circuit.cut_edges(half)) == len(EDGES)
    assert evaluate(circuit, half, data).circuit.loss == pytest.approx(0.6931, abs=ROUNDING)


def test_exports_graphs_and_pages(half, tmp_path):
    circuit = micro_circuit(half)
    export(circuit, half, tmp_path / "circuit.graphml")
    export(circuit, half, tmp_path / "circuit.dot")
    circuit.save_edge_list(tmp_path / "edges.json", half)
    again = Circuit.from_edge_list(tmp_path / "edges.json", half, circuit.means)
    assert [str(node) for node in again.nodes] == NODES
    graph = attribution_graph(circuit, half, MICRO_TASK)
    of_32 = attribution_graph(micro_circuit(micro_model()), micro_model(), MICRO_TASK)
    assert [node["node_id"] for node in graph["nodes"]] == [n["node_id"] for n in of_32["nodes"]]
    for ours, theirs in zip(graph["links"], of_32["links"], strict=True):
        assert ours["weight"] == pytest.approx(theirs["weight"], rel=0.02)
    circuit.view(half, task=MICRO_TASK, corpus=micro_corpus()).save(tmp_path / "page.html")


@pytest.mark.parametrize("dtype", HALVES)
def test_small_steps_of_gates_are_not_rounded_away(dtype):
    means = {"hook": torch.zeros(4, dtype=dtype)}
    gates = NodeGates(means, init_bias=0.5, init_scale=0.0, seed=0)
    with torch.no_grad():
        gates.tau += 1e-4
    assert gates.tau.tolist() == pytest.approx([0.5001] * 4)


def test_the_gradient_of_a_gate_is_that_of_float32():
    """Each of 4096 positions adds 1 to the sums, of which bfloat16 would lose the last digits."""
    model = micro_model()
    name = "blocks.0.ln1.hook_read"
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        gates = NodeGates({name: torch.full((4,), 1 / 3)}, init_bias=0.5, init_scale=0.0, seed=0)
        with gates.attached(model):
            out = model(micro_corpus(), stop_at_layer=1)
        out.float().sum().backward()
        gradients[dtype] = gates.tau.grad
    torch.testing.assert_close(
        gradients[torch.bfloat16], gradients[torch.float32], rtol=5e-3, atol=1e-5
    )
