"""The report of a circuit as text."""

import dataclasses
import re

import pytest
import torch

from helpers import random_circuit
from micro import (
    MICRO_TASK,
    NODES,
    VOCABULARY,
    micro_circuit,
    micro_corpus,
    micro_data,
    micro_model,
    save_micro,
    save_pairs,
)
from tl_sparse.checkpoints.loading import create
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.cli import main
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation.judge import evaluate
from tl_sparse.explanations import explanation_text
from tl_sparse.network.config import SparseConfig
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.view.tables import STRONGEST, explained_report, report

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
    [name] = re.findall(r"^  p(\d) is positional channel \1: ", text, flags=re.MULTILINE)
    assert f"p{name}" in {node.shown_index for node in circuit.nodes}


def quickly_judged(circuit):
    config = PruneConfig(train_pairs=8, selection_pairs=8, heldout_pairs=8)
    return dataclasses.replace(circuit, measured={"config": dataclasses.asdict(config)})


@pytest.fixture(scope="module")
def explanation(micro):
    circuit = quickly_judged(micro_circuit(micro))
    return circuit.explain(micro, MICRO_TASK, corpus=micro_corpus(), progress=False)


def test_an_explained_circuit_is_printed_with_its_program(micro, explanation):
    circuit = quickly_judged(micro_circuit(micro))
    text = report(circuit, micro, MICRO_TASK, explanation=explanation)
    assert explanation_text(explanation) in text
    names = explanation.names
    program = circuit.to_python(micro, [VOCABULARY["yes"], VOCABULARY["no"]], names)
    assert text.endswith(program.source)
    assert f"    {names['0.attn_in 0']} = " in text
    other = kept_everywhere(circuit, NODES[:2])
    with pytest.raises(CircuitError, match="explanation is of another circuit"):
        report(other, micro, MICRO_TASK, explanation=explanation)


def test_names_that_are_no_variables_are_left_out_of_the_program(micro, explanation):
    circuit = quickly_judged(micro_circuit(micro))
    read = dataclasses.replace(explanation.nodes[0], name="Letter")
    capital = dataclasses.replace(explanation, nodes=[read, *explanation.nodes[1:]])
    text = explained_report(circuit, micro, MICRO_TASK, capital)
    candidates = [VOCABULARY["yes"], VOCABULARY["no"]]
    assert text.endswith(circuit.to_python(micro, candidates).source)


def test_commands_find_the_explanation_beside_the_circuit(micro, explanation, tmp_path, capsys):
    model = save_micro(tmp_path / "model")
    folder = tmp_path / "circuit"
    quickly_judged(micro_circuit(micro)).save(folder)
    task = save_pairs(tmp_path / "micro.jsonl")
    which = [str(folder), "--model", model, "--task", task, "-q"]
    assert main(["evaluate", *which, "--pairs", "4"]) == 0
    assert "def logits(" not in capsys.readouterr().out
    explanation.save(folder)
    assert main(["evaluate", *which, "--pairs", "4"]) == 0
    printed = capsys.readouterr().out
    assert explanation_text(explanation) in printed
    assert "def logits(" in printed
    page = tmp_path / "page.html"
    assert main(["view", *which, "-o", str(page)]) == 0
    assert '"explanation":{"about":"An expression over' in page.read_text()
    elsewhere = str(tmp_path / "none.json")
    assert main(["view", *which, "-o", str(page), "--overwrite", "--explanation", elsewhere]) == 1
    assert "none.json" in capsys.readouterr().err
