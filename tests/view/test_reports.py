"""The report of a circuit as text."""

import dataclasses

import pytest
import torch

from helpers import random_circuit
from micro import MICRO_TASK, micro_circuit, micro_data, micro_model
from tl_sparse.checkpoints.loading import create
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.evaluation.judge import evaluate
from tl_sparse.network.config import SparseConfig
from tl_sparse.view.tables import STRONGEST, report

pytestmark = pytest.mark.any_line


@pytest.fixture(scope="module")
def micro():
    return micro_model()


def kept_everywhere(circuit: Circuit, names: list[str]) -> Circuit:
    kept = {name: torch.zeros_like(mask) for name, mask in circuit.kept.items()}
    hooks = circuit.hooks
    for name in names:
        node = circuit.node(name)
        kept[hooks[node.layer, node.location]].view(-1)[node.index] = True
    return dataclasses.replace(circuit, kept=kept)


def test_nodes_edges_and_labels_by_name(micro):
    circuit = micro_circuit(micro).with_labels({"0.attn_v h0.0": "A or B?"})
    text = report(circuit, micro, MICRO_TASK, evaluate(circuit, micro, micro_data(micro)))
    assert "3 nodes of 24; every other node is held at its mean" in text
    assert "0.attn_v value channels 1 h0.0" in " ".join(text.split())
    assert "  0.attn_in 0    →  0.attn_v h0.0  +1.500\n" in text
    assert "  0.attn_v h0.0  A or B?" in text
    assert "the circuit alone (sufficient?)" in text
    assert "without edges" not in text


def test_what_is_joined_by_the_stream_alone_and_what_by_nothing(micro):
    names = ["0.attn_q h0.1", "0.attn_out 2", "0.mlp_in 2", "0.mlp_out 3"]
    text = report(kept_everywhere(micro_circuit(micro), names), micro, MICRO_TASK)
    assert "0 edges: the nonzero weights between these nodes" in text
    assert "1 link by the residual stream: written, and read further up" in text
    assert "  0.attn_out 2  →  0.mlp_in 2" in text
    assert "4 nodes without edges to other nodes of the circuit" in text
    still_attends = "nothing kept leads to it, so it is its bias everywhere; it still shapes its"
    assert f"  0.attn_q h0.1  {still_attends} head's attention" in text
    assert "  0.mlp_in 2     nothing kept uses what it reads" in text


def test_a_circuit_without_nodes_says_what_that_means(micro):
    empty = kept_everywhere(micro_circuit(micro), [])
    text = report(empty, micro, MICRO_TASK)
    assert "0 nodes of 24. The circuit has no nodes: with every node at its mean, the" in text
    assert "alone reaches the target loss, so there is nothing to find." in text


def test_scores_of_another_task_are_not_shown(micro):
    circuit = micro_circuit(micro)
    scores = dataclasses.asdict(evaluate(circuit, micro, micro_data(micro)))
    circuit = dataclasses.replace(circuit, measured={"heldout": scores})
    assert "the full model" in report(circuit, micro, MICRO_TASK)
    other = dataclasses.replace(MICRO_TASK, name="another")
    assert "the full model" not in report(circuit, micro, other)


def test_a_large_circuit_is_reported_by_its_strongest_edges(micro):
    config = SparseConfig(1, 16, 2, 4, 32, micro.cfg.d_vocab, 8, positions="concatenated", d_pos=4)
    model = create(config, seed=0, tokenizer=micro.tokenizer, device="cpu")
    circuit = random_circuit(model)
    edges = circuit.edges(model)
    assert len(edges) > STRONGEST
    text = report(circuit, model, MICRO_TASK)
    assert f"{len(edges)} edges: the nonzero weights between these nodes. These are the 40" in text
    assert "`tl-sparse export` and the page (`tl-sparse view`) have all of them" in text
    shown = [line for line in text.splitlines() if " →  " in line and line[-6] in "+-"]
    weights = sorted((abs(edge.weight) for edge in edges), reverse=True)
    assert sorted((abs(float(line.split()[-1])) for line in shown), reverse=True) == pytest.approx(
        weights[:STRONGEST], abs=5e-4
    )
    assert "p8 is positional channel 8" in text
