"""Circuits: identities, the hand-calculated micro model, files, and errors."""

import dataclasses
import json
import math

import pytest
import torch
from huggingface_hub import constants

import tl_sparse
from helpers import has_hooks, node_means, tiny_model
from loopback import cache_snapshot, point_hub_at
from micro import EDGES, LOSS, MICRO_TASK, NODES, micro_circuit, micro_corpus, micro_model
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.nodes import Node
from tl_sparse.errors import ArgumentError, CheckpointError, CircuitError, HookNameError
from tl_sparse.evaluation.judge import evaluate, score
from tl_sparse.files import read_json, read_tensors
from tl_sparse.network.config import SparseConfig, paper_topk
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.pruner import prune
from tl_sparse.tasks.task_data import make_task_data

CONFIG = SparseConfig(
    n_layers=2,
    d_model=16,
    n_heads=2,
    d_head=4,
    d_mlp=24,
    d_vocab=30,
    n_ctx=12,
    abs_topk=paper_topk(0.5),
    attn_sinks=True,
    bigram_table=True,
    positions="concatenated",
    d_pos=4,
)
TOKENS = torch.randint(0, 30, (6, 12), generator=torch.Generator().manual_seed(1))


def with_nodes(model, chosen) -> Circuit:
    """The circuit whose masks are `chosen(hook name, mean)`, with means over TOKENS."""
    means = node_means(model, TOKENS[:, : model.cfg.n_ctx])
    return Circuit(
        {name: chosen(name, mean) for name, mean in means.items()}, means, fingerprint(model)
    )


def everything(name, mean):
    return torch.ones_like(mean, dtype=torch.bool)


def nothing(name, mean):
    return torch.zeros_like(mean, dtype=torch.bool)


def some(name, mean):
    return torch.rand(mean.shape, generator=torch.Generator().manual_seed(len(name))) < 0.5


@pytest.fixture
def model():
    return tl_sparse.create(CONFIG, seed=0, device="cpu")


def test_circuit_with_all_nodes_computes_the_model_exactly(model):
    with with_nodes(model, everything).applied(model):
        under = model(TOKENS)
    assert torch.equal(under, model(TOKENS))


def test_circuit_with_no_nodes_has_every_node_at_its_mean(model):
    circuit = with_nodes(model, nothing)
    with circuit.applied(model):
        _, cache = model.run_with_cache(TOKENS)
    for name, mean in circuit.means.items():
        assert torch.equal(cache[name], mean.expand_as(cache[name])), name


def test_ablated_is_the_inverse_of_applied(model):
    circuit = with_nodes(model, some)
    inverse = dataclasses.replace(
        circuit, kept={name: ~mask for name, mask in circuit.kept.items()}
    )
    with circuit.ablated(model):
        ablated = model(TOKENS)
    with inverse.applied(model):
        assert torch.equal(model(TOKENS), ablated)


def test_any_transformer_lens_call_runs_under_the_circuit_and_nothing_stays(model):
    circuit = with_nodes(model, some)
    name = "blocks.1.attn.hook_k"
    with circuit.applied(model):
        seen = []
        model.run_with_hooks(
            TOKENS, fwd_hooks=[(name, lambda value, hook: seen.append(value.clone()))]
        )
        loss = model(TOKENS, return_type="loss")
    held = ~circuit.kept[name]
    assert torch.equal(seen[0][:, :, held], circuit.means[name][held].expand(6, 12, -1))
    assert not torch.equal(loss, model(TOKENS, return_type="loss"))
    assert not has_hooks(model)


def test_hooks_are_removed_after_an_exception(model):
    with pytest.raises(RuntimeError, match="inside"), with_nodes(model, some).applied(model):
        raise RuntimeError("inside")
    assert not has_hooks(model)


def test_micro_model_loss_on_paper(micro):
    data = make_task_data(MICRO_TASK, micro.tokenizer, 20, seed=0)
    assert score(micro, data).loss == pytest.approx(LOSS, abs=1e-6)
    assert score(micro, data).accuracy == 1.0


def test_micro_circuit_nodes_edges_and_losses_on_paper(micro):
    circuit = micro_circuit(micro)
    assert [str(node) for node in circuit.nodes] == NODES
    assert circuit.n_nodes == 3
    assert [(str(e.source), str(e.target), e.weight) for e in circuit.edges(micro)] == EDGES
    measured = evaluate(circuit, micro, make_task_data(MICRO_TASK, micro.tokenizer, 20, seed=0))
    assert measured.circuit.loss == pytest.approx(LOSS, abs=1e-6)
    # With the circuit held at its means, channel 2 is 0 and both candidates have the same logit.
    assert measured.ablated.loss == pytest.approx(math.log(2), abs=1e-6)
    assert (measured.n_nodes, measured.n_edges, measured.n_pairs) == (3, 2, 20)


def test_pruning_finds_the_micro_circuit(micro):
    config = PruneConfig(
        target_loss=2 * LOSS,
        steps=150,
        train_pairs=64,
        selection_pairs=16,
        heldout_pairs=16,
        pairs_per_step=8,
    )
    circuit, measured = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert [str(node) for node in circuit.nodes] == NODES
    assert measured.circuit.loss == pytest.approx(LOSS, abs=1e-6)
    assert circuit.measured["heldout"] == dataclasses.asdict(measured)


def test_edges_are_all_nonzero_weights_of_a_full_circuit(model):
    with torch.no_grad():
        model.blocks[0].attn.W_Q_pos[0, :2] = 0.0
    circuit = with_nodes(model, everything)
    edges = circuit.edges(model)
    per_layer = (
        3 * 2 * 4 * 20 + 8 * 16 + 20 * 24 + 24 * 16
    )  # q k v (16 + 4 positional rows), W_O, W_in, W_out
    assert len(edges) == circuit.n_edges(model) == 2 * per_layer - 2 * 4
    sample = {(str(e.source), str(e.target)): e.weight for e in edges}
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    assert sample["1.attn_in 5", "1.attn_k h1.2"] == attn.W_K[1, 5, 2].item()
    assert sample["1.attn_in p1", "1.attn_v h0.1"] == attn.W_V_pos[0, 1, 1].item()
    assert sample["1.attn_v h1.3", "1.attn_out 3"] == attn.W_O[1, 3, 3].item()
    assert sample["1.mlp_in p2", "1.mlp_neuron 9"] == mlp.W_in_pos[2, 9].item()
    assert sample["1.mlp_neuron 23", "1.mlp_out 0"] == mlp.W_out[23, 0].item()


def test_save_and_load(model, tmp_path):
    circuit = dataclasses.replace(
        with_nodes(model, some), task="a task", model_name="a model", measured={"x": [1.5]}
    )
    circuit.save(tmp_path / "c")
    again = Circuit.load(tmp_path / "c")
    assert again.nodes == circuit.nodes
    assert again.model == circuit.model
    assert (again.task, again.model_name, again.measured) == ("a task", "a model", {"x": [1.5]})
    with circuit.applied(model):
        expected = model(TOKENS)
    with again.applied(model):
        assert torch.equal(model(TOKENS), expected)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "circuit.json",
        "circuit.safetensors",
    ]


def test_a_repository_of_the_hub_is_loaded_by_name(micro, tmp_path, monkeypatch):
    circuit = micro_circuit(micro)
    circuit.save(tmp_path / "c")
    files = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    snapshot = cache_snapshot(tmp_path / "hub", "user/repo", files)
    point_hub_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", snapshot.name):
        again = Circuit.load("user/repo", revision)
        assert again.edges(micro) == circuit.edges(micro)
    with pytest.raises(CheckpointError, match=r"'user/other' is not \(fully\) in the cache"):
        Circuit.load("user/other")


def without_means(circuit) -> Circuit:
    return dataclasses.replace(circuit, means={})


def test_a_circuit_without_means_can_be_looked_at(micro, tmp_path):
    circuit = micro_circuit(micro)
    without_means(circuit).save(tmp_path)
    again = Circuit.load(tmp_path)
    assert (again.means, again.nodes, again.edges(micro)) == (
        {},
        circuit.nodes,
        circuit.edges(micro),
    )
    assert "mean/" not in "".join(read_tensors(tmp_path / "circuit.safetensors"))


def test_a_circuit_without_means_does_not_run(micro):
    circuit = micro_circuit(micro)
    for run in (without_means(circuit).applied, without_means(circuit).ablated):
        with (
            pytest.raises(
                CircuitError, match=r"no means to hold nodes at; circuit\.with_means\(.*\)"
            ),
            run(micro),
        ):
            pass
    again = without_means(circuit).with_means(circuit.means)
    with circuit.applied(micro):
        expected = micro(micro_corpus())
    with again.applied(micro):
        assert torch.equal(micro(micro_corpus()), expected)


def test_means_must_be_of_the_nodes(micro):
    circuit = micro_circuit(micro)
    further = circuit.with_means(dict(circuit.means) | {"hook_embed": torch.zeros(4)})
    assert further.means.keys() == circuit.means.keys()
    with pytest.raises(CircuitError, match=r"no means at blocks\.0\.attn\.hook_k, blocks"):
        circuit.with_means({"blocks.0.ln1.hook_read": torch.zeros(4)})
    with pytest.raises(
        CircuitError, match=r"hook_post: kept must be a boolean mask of the means' shape \[3\]"
    ):
        circuit.with_means(dict(circuit.means) | {"blocks.0.mlp.hook_post": torch.zeros(3)})


def test_circuits_saved_before_means_could_be_missing_are_read(micro, tmp_path):
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.json"
    about = read_json(path)
    del about["means"]
    path.write_text(json.dumps(about))
    assert Circuit.load(tmp_path).means.keys() == micro_circuit(micro).means.keys()


def test_repr_says_what_matters(micro):
    circuit = micro_circuit(micro)
    assert repr(circuit) == "Circuit(micro in micro: 3 nodes\n  1 attn_in, 1 attn_v, 1 attn_out)"
    measured = evaluate(circuit, micro, make_task_data(MICRO_TASK, micro.tokenizer, 4, seed=0))
    judged = dataclasses.replace(circuit, measured={"heldout": dataclasses.asdict(measured)})
    loss = f"{LOSS:.3f}"
    assert repr(judged).splitlines()[2] == (
        f"  task loss: full {loss}, circuit {loss}, ablated 0.693, zero {loss}, resample {loss}, "
        "empty 0.693)"
    )
    assert repr(without_means(circuit)).endswith(
        "\n  without means: it can be viewed, but not run)"
    )
    empty = dataclasses.replace(
        circuit, kept={k: v & False for k, v in circuit.kept.items()}, task="", model_name=""
    )
    assert repr(empty) == "Circuit(no task in a model: 0 nodes)"
    for odd in (3, {"full": 3}, {"full": {"loss": "low"}}):
        assert "task loss" not in repr(dataclasses.replace(circuit, measured={"heldout": odd}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_circuit_fits_its_model_in_another_dtype(model, dtype):
    circuit = with_nodes(model, some)
    with circuit.applied(model.to(dtype)):
        assert model(TOKENS).dtype == dtype


def test_circuit_refuses_another_model(model):
    circuit = with_nodes(model, some)
    other = tl_sparse.create(CONFIG, seed=1, device="cpu")
    with pytest.raises(CircuitError, match=r"other weights in embed\.W_E"), circuit.applied(other):
        pass
    wider = tl_sparse.create(dataclasses.replace(CONFIG, d_mlp=25), seed=0, device="cpu")
    with pytest.raises(CircuitError, match="another architecture"):
        circuit.edges(wider)


def test_masks_and_means_must_fit():
    mean, mask = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    model = fingerprint(micro_model())
    with pytest.raises(CircuitError, match="no means at a"):
        Circuit({"a": mask}, {"b": mean}, model)
    with pytest.raises(
        CircuitError, match=r"a: kept must be a boolean mask of the means' shape \[3\]"
    ):
        Circuit({"a": mask.float()}, {"a": mean}, model)
    with pytest.raises(CircuitError, match="NaN"):
        Circuit({"a": mask}, {"a": mean * float("nan")}, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is not 'tl_sparse circuit'"),
        (
            {"format_version": 2},
            "format_version is 2; this version of tl_sparse reads format_version 1",
        ),
        ({"edge_mask": True}, "missing or malformed entry"),
        ({"edge_mask": True, "edges": [["0.attn_in.0"]]}, "missing or malformed entry"),
        ({"edge_mask": True, "edges": [["0.attn_in.0", "0.resid.1"]]}, "'0.resid.1' is not a node"),
        ({"model": {}}, "missing or malformed entry"),
        ({"model": {"architecture": "a", "sketch": {}}}, "the sketch must not be empty"),
        (
            {"model": {"architecture": "a", "sketch": {"W": [1.0, math.nan]}}},
            "missing or malformed entry: nan is not a finite number",
        ),
        ({"model": {"architecture": "a", "sketch": {"W": []}}}, "the sketch of W must be finite"),
        ({"edge_mask": False, "edges": []}, "edge_mask must be true if there are edges"),
        ({"means": False}, "tensors do not fit circuit.json: mean/blocks"),
        ({"hooks": ["nowhere"]}, "tensors do not fit circuit.json"),
    ],
)
def test_damaged_circuit_json(micro, tmp_path, change, message):
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(read_json(path) | change))
    with pytest.raises(CheckpointError, match=message):
        Circuit.load(tmp_path)


def test_a_number_of_nodes_that_is_not_that_of_the_masks(micro, tmp_path):
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(read_json(path) | {"n_nodes": 4}))
    with pytest.raises(
        CheckpointError, match=r"circuit\.safetensors: the masks keep 3 nodes, but n_nodes .* is 4"
    ):
        Circuit.load(tmp_path)


def test_scores_must_fit_the_masks(circuit):
    scores = {name: torch.zeros(mask.shape) for name, mask in circuit.kept.items()}
    dataclasses.replace(circuit, scores=scores)
    name = "blocks.0.attn.hook_v"
    for wrong, message in [
        (torch.zeros(1), r"hook_v: scores must have the shape of kept, \[1, 2\], not \[1\]"),
        (torch.tensor([[0.0, math.nan]]), "hook_v: a score is NaN"),
    ]:
        with pytest.raises(CircuitError, match=message):
            dataclasses.replace(circuit, scores=scores | {name: wrong})


def test_what_was_measured_under_other_means_is_dropped(circuit):
    measured = {"config": {"seed": 1}, "heldout": {"circuit": {"loss": 0.1}}}
    circuit = dataclasses.replace(circuit, measured=measured)
    same = {name: mean.clone() for name, mean in circuit.means.items()}
    assert circuit.with_means(same).measured == measured
    other = {name: mean + 1 for name, mean in circuit.means.items()}
    assert circuit.with_means(other).measured == {"config": {"seed": 1}}
    without = dataclasses.replace(circuit, means={})
    assert without.with_means(other).measured == measured


def test_missing_and_truncated_circuit_files(micro, tmp_path):
    with pytest.raises(CheckpointError, match=r"circuit\.json"):
        Circuit.load(tmp_path)
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"circuit\.safetensors is truncated or damaged"):
        Circuit.load(tmp_path)


def test_unknown_location_is_named(model):
    with pytest.raises(
        HookNameError, match=r"unknown node location 'attn_z'; the locations are attn_in"
    ):
        node_hooks(model, ["attn_z"])


def test_node_order_and_names():
    assert str(Node(1, "attn_q", 5)) == "1.attn_q 5"
    assert sorted([Node(1, "attn_in", 0), Node(0, "mlp_out", 9)])[0].layer == 0


@pytest.mark.parametrize(
    ("node", "name", "openai_name"),
    [
        (Node(1, "attn_in", 3), "1.attn_in.3", "1.attn.act_in.3"),
        (Node(0, "attn_q", 5), "0.attn_q.5", "0.attn.q.5"),
        (Node(0, "attn_k", 0), "0.attn_k.0", "0.attn.k.0"),
        (Node(0, "attn_v", 12), "0.attn_v.12", "0.attn.v.12"),
        (Node(23, "attn_out", 1), "23.attn_out.1", "23.attn.resid_delta.1"),
        (Node(2, "mlp_in", 4), "2.mlp_in.4", "2.mlp.act_in.4"),
        (Node(0, "mlp_neuron", 7), "0.mlp_neuron.7", "0.mlp.post_act.7"),
        (Node(0, "mlp_out", 7), "0.mlp_out.7", "0.mlp.resid_delta.7"),
    ],
)
def test_node_names_in_both_notations(node, name, openai_name):
    assert (node.indexed_name, node.openai_name) == (name, openai_name)
    assert Node.parse(name) == Node.parse(openai_name) == Node.parse(str(node)) == node


#: Reads have 16 residual and 4 positional channels, and there are two heads of 4 channels.
NAMES = {
    "1.attn_q h1.2": Node(1, "attn_q", 6),
    "0.attn_v h0.3": Node(0, "attn_v", 3),
    "0.attn_in p3": Node(0, "attn_in", 19),
    "1.mlp_in 15": Node(1, "mlp_in", 15),
    "1.mlp_out 15": Node(1, "mlp_out", 15),
    "0.mlp_neuron 23": Node(0, "mlp_neuron", 23),
}


@pytest.mark.parametrize(("name", "node"), NAMES.items())
def test_a_node_of_a_circuit_has_one_name(name, node, model):
    circuit = with_nodes(model, everything)
    found = circuit.node(name)
    assert (str(found), found) == (name, node)
    assert circuit.node(node.indexed_name) == circuit.node(node.openai_name) == node
    assert str(circuit.node(node.indexed_name)) == name
    assert [str(kept) for kept in circuit.nodes if kept == node] == [name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.attn_v h2.0", r"the indices at 0\.attn_v run from 0 to 7, and this one is 8"),
        ("0.attn_v h0.4", r"'h0\.4' cannot be read there"),
        ("0.attn_out p0", "'p0' cannot be read there; .* positional channels"),
        ("0.mlp_in h0.1", r"'h0\.1' cannot be read there"),
        ("0.mlp_in p4", r"the indices at 0\.mlp_in run from 0 to 19, and this one is 20"),
        ("2.mlp_in 0", r"the circuit's nodes are at 0\.attn_in, 0\.attn_q, "),
    ],
)
def test_a_circuit_has_no_such_node(name, message, model):
    with pytest.raises(CircuitError, match=message):
        with_nodes(model, everything).node(name)


def test_labels_are_kept_with_the_circuit(micro, tmp_path):
    circuit = micro_circuit(micro).with_labels({NODES[1]: "A or B?", NODES[2]: "the answer"})
    circuit.save(tmp_path)
    again = Circuit.load(tmp_path)
    assert {str(micro_name): label for micro_name, label in circuit.labels.items()} == {
        NODES[1]: "A or B?",
        NODES[2]: "the answer",
    }
    assert again.labels == circuit.labels
    changed = again.with_labels({NODES[1]: "", "0.attn_in.0": "<read> ü"})
    assert list(changed.labels.values()) == ["the answer", "<read> ü"]
    with pytest.raises(CircuitError, match=r"the indices at 0\.mlp_in run from 0 to 3"):
        circuit.with_labels({"0.mlp_in 9": "no"})
    with pytest.raises(CircuitError, match=r"the label of '0\.attn_in 0' must be a text, not 3"):
        circuit.with_labels({"0.attn_in 0": 3})


def test_labels_are_of_nodes_of_the_circuit(micro):
    circuit = micro_circuit(micro)
    node = circuit.nodes[1]
    assert circuit.with_labels({node: "A or B?"}).labels == {node: "A or B?"}
    for absent in ("0.mlp_in 3", circuit.node("0.mlp_in 3")):
        with pytest.raises(CircuitError, match=r"0\.mlp_in 3 is not in this circuit"):
            circuit.with_labels({absent: "no"})
    with pytest.raises(
        ArgumentError, match=r"a mapping from nodes to texts, .* not the list \['a'\]"
    ):
        circuit.with_labels(["a"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "attn_q",
        "0.attn_q",
        "0.attn_q.",
        "0.attn_q.-1",
        "0.attn_q.x",
        "a.attn_q.1",
        "0.resid.1",
        "0.attn_q.1.2",
    ],
)
def test_what_is_no_node_is_named(text):
    with pytest.raises(
        CircuitError,
        match=rf"{text!r} is not a node; nodes are written like '0\.mlp_neuron 7', "
        r"'0\.attn_v h3\.7' or '0\.head 3', and the locations are attn_in",
    ):
        Node.parse(text)


def test_biases_sinks_and_shares_of_the_weights():
    model = tiny_model(n_layers=2, attn_sinks=True, d_vocab=30, n_ctx=12)
    with torch.no_grad():
        model.blocks[1].attn.sink.copy_(torch.arange(3.0))
        model.blocks[1].attn.b_V.zero_()[2, 1] = 0.5
        model.blocks[1].mlp.b_in.zero_()[5] = -0.25
        model.blocks[1].mlp.W_in.zero_()[[0, 1, 2, 3], [5, 5, 5, 6]] = 1.0
    chosen = {"attn.hook_v": [11], "ln2.hook_read": [0, 1], "mlp.hook_post": [5]}

    def choose(name, mean):
        mask = torch.zeros(mean.numel(), dtype=torch.bool)
        if name.startswith("blocks.1."):
            mask[chosen.get(name.removeprefix("blocks.1."), [])] = True
        return mask.view(mean.shape)

    circuit = with_nodes(model, choose)
    assert circuit.biases(model) == {Node(1, "attn_v", 11): 0.5, Node(1, "mlp_neuron", 5): -0.25}
    assert circuit.sinks(model) == {(1, 2): 2.0}
    shares = circuit.edge_shares(model)
    assert shares[1, "mlp_in", "mlp_neuron"] == 2 / 4
    assert sorted(shares.values()) == [0.0] * 11 + [0.5]
