"""Explanations of circuits whose truth is known."""

import dataclasses

import pytest
import torch

from helpers import (
    full_config,
    node_means,
    random_circuit,
    random_tokens,
    stock_model,
    tiny_model,
    word_tokenizer,
)
from micro import (
    LOSS,
    MICRO_TASK,
    VOCABULARY,
    micro_circuit,
    micro_corpus,
    micro_model,
    micro_tokenizer,
)
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import CheckpointError, CircuitError, ConfigError, DataError, UnsupportedError
from tl_sparse.explanations.explaining import explain_circuit
from tl_sparse.explanations.record import Explanation
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.tasks.pairs import TaskPairs
from tl_sparse.tasks.task_data import draw_pairs

OPTIONS = {"corpus": micro_corpus(), "progress": False}


#: Few pairs are enough where expressions are exact.
FEW_PAIRS = PruneConfig(train_pairs=2, selection_pairs=2, heldout_pairs=32)


def explained(model=None, circuit=None, task=MICRO_TASK, **options):
    model = model or micro_model()
    circuit = circuit or micro_circuit(model)
    circuit = dataclasses.replace(circuit, measured={"config": FEW_PAIRS.to_json()})
    return circuit.explain(model, task, **(OPTIONS | options))


@pytest.fixture(scope="module")
def micro():
    return micro_model()


@pytest.fixture(scope="module")
def explanation(micro):
    return explained(micro)


def test_the_micro_circuit_in_words(explanation):
    read, value, write = explanation.nodes
    assert read.expression == '-2 if token == "B" else 2 if token == "A" else 0'
    assert value.expression == f"1.5 * {read.name}"
    assert write.expression == f"2 * average({value.name}, 0, -1000)"
    assert [each.depends_on for each in explanation.nodes] == ["token", "token", "earlier tokens"]
    assert [each.size for each in explanation.nodes] == [9, 3, 6]
    assert [each.whole_size for each in explanation.nodes] == [9, 11, 16]
    for each in explanation.nodes:
        assert each.text.explained == pytest.approx(1)
        assert each.prompts.explained == pytest.approx(1)
        assert each.given_others == pytest.approx(1)
        assert each.is_explained
        assert each.in_circuit.loss.value == pytest.approx(LOSS, rel=1e-3)
        assert each.in_model.loss.value == pytest.approx(LOSS, rel=1e-3)
        assert each.held_in_circuit.loss.value == pytest.approx(0.6931, abs=1e-4)
    assert explanation.share_explained == 1
    assert explanation.all_replaced.accuracy.value == 1
    assert explanation.nothing_kept.loss.value == pytest.approx(0.6931, abs=1e-4)


def test_its_head_and_the_swap(explanation):
    (head,) = explanation.heads
    assert (head.layer, head.head, head.score, head.nothing) == (0, 0, "0", 0)
    assert head.phrase == "from any token: all tokens so far, none in particular"
    assert head.covered == pytest.approx(1)
    assert head.overlap == pytest.approx(1)
    swapped = explanation.swapped
    assert (swapped.n_heads, swapped.n_all_heads) == (1, 1)
    assert swapped.swapped == pytest.approx(swapped.model) == pytest.approx(swapped.evenly)
    assert swapped.held == pytest.approx(36, rel=1e-3)  # no token is more likely than another


@pytest.mark.any_line
def test_two_levels_are_judged_by_accuracy():
    model = micro_model()
    with torch.no_grad():
        model.embed.W_E[VOCABULARY["B"], 0] = 0.0
        model.embed.W_E[VOCABULARY["B"], 3] = 1.0
    circuit = micro_circuit(model)
    read = explained(model, circuit).nodes[0]
    assert read.expression == '2 if token == "A" else 0'
    assert read.levels.are_two
    assert (read.levels.low, read.levels.high) == pytest.approx((0, 2), abs=1e-4)
    assert read.levels.explained == pytest.approx(1)
    assert read.text.balanced_accuracy == read.prompts.balanced_accuracy == 1
    wrong = explained(model, circuit, own={"0.attn_in 0": '2 * (token == "B")'}).nodes[0]
    # All 10 A are taken for low, and of the 110 others the 10 B for high.
    assert wrong.text.balanced_accuracy == pytest.approx((0 + 10 / 11) / 2, abs=1e-2)
    assert not wrong.is_explained


def test_a_head_that_looks_at_two_tokens():
    model, circuit = looking_model()
    made = explained(model, circuit, task=None, corpus=None)
    write = made["0.attn_out 2"]
    assert write.prompts.explained > 0.99
    assert made.no_text.startswith("a corpus is needed")
    assert made.n_rows == 0
    assert write.text is None
    (head,) = made.heads
    assert head.phrase == 'from any token: all "A", "B" so far'
    assert head.covered == pytest.approx(0.5)  # three of six tokens come before both
    assert head.overlap > 0.99


def looking_model():
    """The micro model with a key by which A and B get nearly all of the attention."""
    model = micro_model()
    with torch.no_grad():
        block = model.blocks[0]
        model.embed.W_E[VOCABULARY["A"], 3] = 1.0
        model.embed.W_E[VOCABULARY["B"], 3] = 1.0
        block.attn.b_Q[0, 1] = 10.0
        block.attn.W_K[0, 3, 1] = 10.0
    circuit = micro_circuit(model)
    kept = {name: mask.clone() for name, mask in circuit.kept.items()}
    kept["blocks.0.ln1.hook_read"][3] = True
    kept["blocks.0.attn.hook_k"][0, 1] = True
    pairs = tuple(draw_pairs(MICRO_TASK, 20, 0))
    named = TaskPairs("micro", "", pairs[:2], pairs[2:4], pairs[4:])
    return model, dataclasses.replace(circuit, kept=kept, pairs=named)


# --- the user's own words


@pytest.mark.any_line
def test_own_expressions_and_names(micro):
    own = {"0.attn_in 0": '2 * (token == "A") - 2 * (token == "B")', "0.attn_v.0": "3 * sign"}
    made = explained(micro, own=own, names={"0.attn_in 0": "sign"})
    read, value, write = made.nodes
    assert (read.name, read.origin) == ("sign", "own")
    assert read.text.explained == pytest.approx(1)
    assert (value.expression, value.origin) == ("3 * sign", "own")
    assert value.text.explained == pytest.approx(0, abs=1e-5)  # it is twice too large
    assert write.origin == "found"
    assert made.names["0.attn_in 0"] == "sign"


def test_testing_another_expression_changes_nothing(explanation):
    before = explanation.to_json()
    read, value, write = explanation.nodes
    same = explanation.test(value.node, f"1.5 * {read.name}")
    assert same.text.explained == pytest.approx(1)
    wrong = explanation.test(value.name, "position")
    assert wrong.origin == "own"
    assert wrong.text.explained < 0
    assert wrong.in_circuit.loss.value > 0.5
    assert explanation.to_json() == before
    with pytest.raises(DataError, match=f"the expression of 0.attn_in 0: '{write.name}' .*unknown"):
        explanation.test("0.attn_in 0", write.name)  # a later node
    with pytest.raises(DataError, match=r"no node 'x' is explained; there are 0\.attn_in 0"):
        explanation.test("x", "1")


@pytest.mark.any_line
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"own": {"0.attn_in 1": "1"}}, CircuitError, "0.attn_in 1 is not in this circuit"),
        ({"own": {"x": "1"}}, CircuitError, "'x' is not a node"),
        ({"own": {"0.attn_in 0": "later"}}, DataError, "'later' at character 1: unknown name"),
        ({"own": {"0.attn_in 0": "1 +"}}, DataError, "the expression of 0.attn_in 0: '1 \\+' is"),
        ({"own": {"0.attn_in 0": 'token == "Z"'}}, DataError, "no token has the text 'Z'"),
        ({"names": {"0.attn_in 1": "a"}}, CircuitError, "0.attn_in 1 is not in this circuit"),
        ({"names": {"0.attn_in 0": "token"}}, DataError, "'token' cannot be a name, because"),
        ({"names": {"0.attn_in 0": "a b"}}, DataError, "'a b' cannot be a name; names are"),
        (
            {"names": {"0.attn_in 0": "a", "0.attn_v h0.0": "a"}},
            DataError,
            "'a' is given to two nodes, 0.attn_in 0 and 0.attn_v h0.0",
        ),
        ({"seed": -1}, ConfigError, "seed is -1"),
    ],
)
def test_impossible_words(micro, options, error, message):
    with pytest.raises(error, match=message):
        explained(micro, **options)


@pytest.mark.any_line
def test_a_given_name_is_not_taken_by_another_node(micro):
    made = explained(micro, names={"0.attn_out 2": "read_b"})
    assert len(set(made.names.values())) == 3
    assert made.names["0.attn_out 2"] == "read_b"


# --- files


@pytest.mark.any_line
def test_saved_and_read_again(micro, explanation, tmp_path):
    explanation.save(tmp_path)
    read = Explanation.load(tmp_path / "explanation.json")
    assert read == explanation
    assert str(read) == str(explanation)
    assert "3 of 3 nodes are explained" in str(read)
    with pytest.raises(ConfigError, match="has no model; give it the circuit and its model"):
        read.test("0.attn_in 0", "1")
    other = micro_model()
    with torch.no_grad():
        other.blocks[0].attn.W_O[0, 0, 2] = 1.0
    with pytest.raises(CircuitError, match=r"the explanation is of another circuit than"):
        read.test("0.attn_in 0", "1", micro_circuit(other), other)
    for text, message in (("{", "is not valid JSON"), ("{}", "'model' is missing")):
        (tmp_path / "explanation.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Explanation.load(tmp_path)


@pytest.mark.any_line
def test_a_circuit_of_a_named_task_is_tested_from_its_file(tmp_path):
    model, circuit = looking_model()
    made = explained(model, circuit, task=None, corpus=None)
    made.save(tmp_path / "e.json")
    read = Explanation.load(tmp_path / "e.json")
    node = made.nodes[-1]
    again = read.test(node.node, node.expression, made.subject.circuit, model)
    assert again.prompts.explained == pytest.approx(node.prompts.explained, abs=1e-6)
    with pytest.raises(DataError, match="the explanation is of other text or prompts; give"):
        read.test(node.node, "1", made.subject.circuit, model, corpus=micro_corpus())


@pytest.mark.any_line
def test_the_same_seed_gives_the_same_explanation(micro, explanation):
    again = explained(micro)
    assert dataclasses.replace(again, seconds=explanation.seconds) == explanation


# --- what is refused, and other models


def test_circuits_that_cannot_be_explained(micro):
    circuit = micro_circuit(micro)
    other = micro_model()
    with torch.no_grad():
        other.blocks[0].attn.W_V[0, 0, 0] = 7.0
    with pytest.raises(CircuitError, match="this circuit belongs to the model 'micro'"):
        explained(other, circuit)
    with pytest.raises(CircuitError, match="this circuit has no means"):
        explained(micro, dataclasses.replace(circuit, means={}))
    with pytest.raises(UnsupportedError, match="norm scales of the full model"):
        explained(micro, dataclasses.replace(circuit, frozen_norms=True))
    with pytest.raises(DataError, match="the corpus must be integers"):
        explained(micro, circuit, corpus=torch.zeros(2, 3))


def test_a_circuit_without_nodes(micro):
    circuit = micro_circuit(micro)
    made = explained(micro, dataclasses.replace(circuit, kept=circuit.masks_of([])))
    assert (made.nodes, made.heads, made.swapped, made.share_explained) == ([], [], None, 1)
    assert made.all_replaced == made.circuit_alone
    assert "The circuit has no nodes to explain" in str(made)


def test_no_hook_is_left(micro, explanation):
    for hook_point in micro.hook_dict.values():
        assert not hook_point.fwd_hooks
    assert any(parameter.requires_grad for parameter in micro.parameters())


def test_every_feature_and_cut_edges():
    config = full_config(n_layers=1, d_vocab=len(VOCABULARY), normalization="rms", norm_bias=False)
    model = tiny_model(config, tokenizer=micro_tokenizer())
    corpus = micro_corpus()
    circuit = random_circuit(model, 0.12)
    circuit = dataclasses.replace(circuit, task="micro")
    edges = [edge.ends for edge in circuit.edges(model)]
    circuit = dataclasses.replace(circuit, edge_set=frozenset(edges[::2]))
    made = explained(model, circuit, corpus=corpus)
    assert [each.node for each in made.nodes] == list(circuit.node_names)
    assert len(set(made.names.values())) == len(made.nodes)
    assert all(name.isidentifier() for name in made.names.values())
    first_reads = [each for each in made.nodes if each.node.startswith("0.attn_in")]
    assert first_reads
    for each in first_reads:
        assert each.score > 0.9


def test_a_dense_model():
    """Nodes are found there too; its heads have no expression of their own."""
    model = stock_model(d_vocab=len(VOCABULARY))
    model.tokenizer = word_tokenizer(
        list(VOCABULARY), bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )
    means = node_means(model, random_tokens(model, 8))
    generator = torch.Generator().manual_seed(0)
    kept = {
        name: torch.rand(mean.shape, generator=generator) < 0.06 for name, mean in means.items()
    }
    circuit = Circuit(kept, means, fingerprint(model), "dense", "micro")
    made = explain_circuit(circuit, model, MICRO_TASK, **OPTIONS)
    assert [each.node for each in made.nodes] == list(circuit.node_names)
    assert all(head.score is None for head in made.heads)
    assert made.swapped is None
