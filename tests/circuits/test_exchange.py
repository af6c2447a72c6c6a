"""Circuits in OpenAI's files and in edge lists."""

import json

import pytest
import torch

import tl_sparse
from helpers import node_means, random_masks, random_tokens, stock_model
from micro import EDGES, INDEXED_NODES, LOSS, MICRO_TASK, NODES, W_O, W_V, micro_corpus, micro_model
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.evaluation.judge import evaluate
from tl_sparse.files import read_json
from tl_sparse.hooks import mean_activations
from tl_sparse.network.config import SparseConfig
from tl_sparse.tasks.task_data import make_task_data

NONE = torch.tensor([], dtype=torch.int64)
#: The circuit of the hand-calculated micro model, as OpenAI would have stored it.
CIRCUIT_DATA = {
    "0.attn.act_in": torch.tensor([0]), "0.attn.q": NONE, "0.attn.k": NONE,
    "0.attn.v": torch.tensor([0]), "0.attn.resid_delta": torch.tensor([2]), "0.mlp.act_in": NONE,
    "0.mlp.post_act": NONE, "0.mlp.resid_delta": NONE, "final_resid": torch.tensor([2]),
}  # fmt: skip
MICRO_LIST = {
    "format": "tl_sparse edges",
    "model_name": "micro",
    "task": "micro",
    "nodes": INDEXED_NODES,
    "edges": [
        {"source": "0.attn_in.0", "target": "0.attn_v.0", "weight": W_V},
        {"source": "0.attn_v.0", "target": "0.attn_out.2", "weight": W_O},
    ],
}


@pytest.fixture(scope="module")
def micro():
    return micro_model()


@pytest.fixture(scope="module")
def two_heads():
    """A model with two layers of two heads of four channels, and positional channels."""
    config = SparseConfig(2, 16, 2, 4, 24, 30, 12, positions="concatenated", d_pos=4)
    return tl_sparse.create(config, seed=0, device="cpu")


@pytest.fixture(scope="module")
def means(micro):
    return mean_activations(micro, list(node_hooks(micro).values()), [micro_corpus()])


def viz_data(folder, circuit_data, **further):
    path = folder / "viz_data.pt"
    torch.save({"circuit_data": circuit_data, **further}, path)
    return path


def write(folder, values):
    path = folder / "edges.json"
    path.write_text(json.dumps(values))
    return path


def test_openai_circuit_on_paper(micro, means, tmp_path):
    circuit = Circuit.from_openai(viz_data(tmp_path, CIRCUIT_DATA), micro, means, task="micro")
    assert [str(node) for node in circuit.nodes] == NODES
    assert [(str(e.source), str(e.target), e.weight) for e in circuit.edges(micro)] == EDGES
    assert circuit.task == "micro"
    measured = evaluate(circuit, micro, make_task_data(MICRO_TASK, micro.tokenizer, 20, seed=0))
    assert measured.circuit.loss == pytest.approx(LOSS, abs=1e-6)


def test_openai_circuit_without_means_is_viewed_and_counted(micro, means, tmp_path):
    circuit = Circuit.from_openai(viz_data(tmp_path, CIRCUIT_DATA), micro)
    assert (circuit.n_nodes, len(circuit.edges(micro))) == (3, 2)
    assert circuit.nodes_by_location() == {
        (0, "attn_in"): [0],
        (0, "attn_v"): [0],
        (0, "attn_out"): [2],
    }
    assert "without means" in repr(circuit)
    with pytest.raises(CircuitError, match="no means"), circuit.applied(micro):
        pass
    with circuit.with_means(means).applied(micro):
        micro(micro_corpus())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_openai_indices_run_over_all_heads(two_heads, tmp_path, dtype):
    data = {
        "1.attn.q": torch.tensor([6, 0], dtype=dtype),
        "0.attn.act_in": torch.tensor([19], dtype=dtype),
    }
    circuit = Circuit.from_openai(viz_data(tmp_path, data), two_heads)
    assert circuit.kept.keys() == set(node_hooks(two_heads).values())
    query = circuit.kept["blocks.1.attn.hook_q"]
    assert query.shape == (2, 4)
    assert query.nonzero().tolist() == [[0, 0], [1, 2]]
    assert [str(node) for node in circuit.nodes] == [
        "0.attn_in p3",
        "1.attn_q h0.0",
        "1.attn_q h1.2",
    ]
    assert {
        name: tuple(mask.shape)
        for name, mask in circuit.kept.items()
        if name.startswith("blocks.0")
    } == {
        "blocks.0.ln1.hook_read": (20,),
        "blocks.0.attn.hook_q": (2, 4),
        "blocks.0.attn.hook_k": (2, 4),
        "blocks.0.attn.hook_v": (2, 4),
        "blocks.0.hook_attn_out": (16,),
        "blocks.0.ln2.hook_read": (20,),
        "blocks.0.mlp.hook_post": (24,),
        "blocks.0.hook_mlp_out": (16,),
    }


def test_openai_measurements_are_halved_and_plain(micro, tmp_path):
    path = viz_data(
        tmp_path,
        CIRCUIT_DATA,
        importances={
            "loss": torch.tensor(0.25),
            "interv_loss": 0.5,
            "task_samples": (torch.zeros(4, 8), {}),
            "beeg_model_config": {
                "n_layer": 1,
                "d_model": 4,
                "n_head": 1,
                "d_head": 2,
                "d_mlp": None,
                "bias": False,
            },
        },
        all_loss=[(0, 1.0), (1, torch.tensor(0.5))],
        num_total_nodes=22,
        prune_config={
            "lr": torch.tensor([0.5, 0.25]),
            "k": (1, 2),
            "dtype": torch.float32,
            "note": None,
        },
    )
    circuit = Circuit.from_openai(path, micro)
    assert circuit.measured == {
        "openai": {
            "full": {"loss": 0.125},
            "circuit": {"loss": 0.25},
            "pruning_losses": [[0, 0.5], [1, 0.25]],
            "num_total_nodes": 22,
            "prune_config": {
                "lr": [0.5, 0.25],
                "k": [1, 2],
                "dtype": "torch.float32",
                "note": None,
            },
        }
    }
    assert "task loss: full 0.125, circuit 0.250" in repr(circuit)
    circuit.save(tmp_path / "c")
    assert Circuit.load(tmp_path / "c").measured == circuit.measured


@pytest.mark.parametrize(
    ("where", "indices", "message"),
    [
        ("0.attn.v", [0, 8], r"0\.attn_v: index 8 is out of range; they run from 0 to 7"),
        ("0.attn.act_in", [20], r"0\.attn_in: index 20 is out of range; they run from 0 to 19"),
        ("0.mlp.resid_delta", [-1], r"0\.mlp_out: index -1 is out of range; they run from 0 to 15"),
        ("1.mlp.post_act", [3, 4, 3], r"1\.mlp_neuron: index 3 occurs 2 times"),
        (
            "0.attn.k",
            [1.0],
            r"0\.attn_k: .* must be a 1-D tensor of integers, not torch\.float32 of \[1\]",
        ),
        (
            "0.attn.k",
            [True],
            r"0\.attn_k: .* must be a 1-D tensor of integers, not torch\.bool of \[1\]",
        ),
        (
            "0.attn.k",
            [[1]],
            r"0\.attn_k: .* must be a 1-D tensor of integers, not torch\.int64 of \[1, 1\]",
        ),
        (
            "0.attn.k",
            1,
            r"0\.attn_k: .* must be a 1-D tensor of integers, not torch\.int64 of \[\]",
        ),
        ("2.attn.k", [1], r"2\.attn_k does not exist: the model has 2 layers, from 0"),
        ("0.attn.z", [1], r"'0\.attn\.z\.0' is not a node"),
        ("resid_mid", [1], r"'resid_mid\.0' is not a node"),
    ],
)
def test_openai_indices_that_do_not_fit(two_heads, tmp_path, where, indices, message):
    path = viz_data(tmp_path, {"0.attn.act_in": torch.tensor([1]), where: torch.tensor(indices)})
    with pytest.raises(CircuitError, match=message):
        Circuit.from_openai(path, two_heads)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        (
            "edges.json",
            b'{"edges": []}',
            r"is a JSON file, not a \*\.pt file .*; Circuit\.from_edge_list reads edge lists",
        ),
        ("viz_data.pt", b" \n[1, 2]", "is a JSON file, not"),
        ("circuit.safetensors", b"\x10" + bytes(7) + b'{"a": 1}', "is a safetensors file, not"),
    ],
)
def test_openai_circuits_are_not_files_of_other_formats(
    two_heads, tmp_path, name, contents, message
):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"{name} {message}"):
        Circuit.from_openai(path, two_heads)


def test_the_first_wrong_location_is_named(two_heads, tmp_path):
    places = [
        f"{layer}.{name}" for layer in (9, 5, 3, 7) for name in ("mlp.act_in", "attn.k", "attn.v")
    ]
    data = {place: torch.tensor([1]) for place in places}
    with pytest.raises(
        CircuitError, match=r"^3\.attn_k does not exist: the model has 2 layers, from 0"
    ):
        Circuit.from_openai(viz_data(tmp_path, data), two_heads)


def test_openai_indices_that_are_no_plain_tensor(micro, tmp_path):
    sparse, meta = (
        torch.tensor([1, 0]).to_sparse(),
        torch.empty(1, dtype=torch.int64, device="meta"),
    )
    for indices in ([1], None, sparse, meta):
        with pytest.raises(
            CircuitError, match=r"0\.mlp_in: .* must be a 1-D tensor of integers, not \w+"
        ):
            Circuit.from_openai(viz_data(tmp_path, {"0.mlp.act_in": indices}), micro)
    many = torch.zeros(1, dtype=torch.uint8).expand(1 << 40)  # a terabyte if it were copied
    with pytest.raises(CircuitError, match=r"0\.mlp_in: index 0 occurs \d+ times"):
        Circuit.from_openai(viz_data(tmp_path, {"0.mlp.act_in": many}), micro)


def test_openai_circuit_of_another_model(two_heads, tmp_path):
    path = viz_data(tmp_path, {}, importances={"beeg_model_config": {"n_layer": 2, "d_model": 32}})
    with pytest.raises(
        CircuitError, match=r"belongs to a model with d_model 32; the given one has 16"
    ):
        Circuit.from_openai(path, two_heads)


def test_what_is_no_circuit_of_openais(micro, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        Circuit.from_openai(tmp_path / "nothing.pt", micro)
    with pytest.raises(CheckpointError, match=r"viz_data\.pt has no dictionary circuit_data"):
        Circuit.from_openai(viz_data(tmp_path, [1]), micro)
    with pytest.raises(CheckpointError, match="the measurements are not as OpenAI writes them"):
        Circuit.from_openai(viz_data(tmp_path, {}, importances={"loss": torch.zeros(2)}), micro)
    with pytest.raises(CheckpointError, match="the measurements are not as OpenAI writes them"):
        Circuit.from_openai(viz_data(tmp_path, {}, all_loss=[1.0]), micro)
    with pytest.raises(
        CheckpointError, match="besides tensors it holds objects that could run code"
    ):
        Circuit.from_openai(
            viz_data(tmp_path, {}, further=SparseConfig(1, 1, 1, 1, 1, 1, 1)), micro
        )


def test_edge_list_on_paper(micro, means, tmp_path):
    circuit = Circuit.from_edge_list(write(tmp_path, MICRO_LIST), micro, means)
    assert (circuit.model_name, circuit.task) == ("micro", "micro")
    assert circuit.edge_list(micro) == MICRO_LIST
    circuit.save_edge_list(tmp_path / "new" / "list.json", micro)
    assert read_json(tmp_path / "new" / "list.json") == MICRO_LIST
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["list.json"]
    with circuit.applied(micro):
        micro(micro_corpus())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edge_lists_come_back_exactly(two_heads, tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        name: (2, 4) if name[-1] in "qkv" else None for name in node_hooks(two_heads).values()
    }
    _, cache = two_heads.run_with_cache(torch.tensor([[1, 2]]))
    kept = {
        name: torch.rand(shapes[name] or cache[name].shape[2:], generator=generator) < 0.3
        for name in shapes
    }
    circuit = Circuit(kept, {}, fingerprint(two_heads), "a model", "a task")
    circuit.save_edge_list(tmp_path / "edges.json", two_heads)
    rounded = tl_sparse.create(two_heads.sparse_cfg, seed=0, device="cpu").to(dtype)
    again = Circuit.from_edge_list(tmp_path / "edges.json", rounded)
    assert again.kept.keys() == kept.keys()
    assert all(torch.equal(again.kept[name], mask) for name, mask in kept.items())
    assert (again.model_name, again.task) == ("a model", "a task")
    assert len(again.edges(two_heads)) > 100
    assert again.edges(two_heads) == circuit.edges(two_heads)


@pytest.mark.parametrize("n_key_value_heads", [None, 1])
def test_edge_lists_of_models_of_other_packages_come_back(tmp_path, n_key_value_heads):
    """Query heads can share a key and a value head, of which there are fewer then."""
    model = stock_model(n_key_value_heads=n_key_value_heads)
    means = node_means(model, random_tokens(model))
    kept = random_masks(means, 0.3, torch.Generator().manual_seed(0))
    circuit = Circuit(kept, {}, fingerprint(model), "a model", "a task")
    circuit.save_edge_list(tmp_path / "edges.json", model)
    again = Circuit.from_edge_list(tmp_path / "edges.json", model)
    assert again.kept.keys() == kept.keys()
    assert all(torch.equal(again.kept[name], mask) for name, mask in kept.items())


def test_nodes_without_edges_survive(micro, tmp_path):
    nodes = ["0.attn_q h0.1", "0.mlp_out 3"]
    circuit = Circuit.from_edge_list(write(tmp_path, {"nodes": nodes, "edges": []}), micro)
    assert [str(node) for node in circuit.nodes] == nodes


def test_lists_of_other_tools_need_edges_only(micro, tmp_path):
    edges = [
        {"source": "0.attn.v.0", "target": "0.attn.resid_delta.2", "score": 0.1},
        {"source": "0.attn_in.0", "target": "0.attn_v.0", "weight": 1.501},
    ]
    circuit = Circuit.from_edge_list(write(tmp_path, {"edges": edges}), micro)
    assert [str(node) for node in circuit.nodes] == NODES
    assert (circuit.model_name, circuit.task, circuit.means) == ("", "", {})


def test_edges_left_out_are_said(micro, tmp_path):
    path = write(tmp_path, MICRO_LIST | {"edges": MICRO_LIST["edges"][:1]})
    with pytest.warns(
        UserWarning, match="leaves out 1 edge between its nodes; the circuit includes them"
    ):
        circuit = Circuit.from_edge_list(path, micro)
    assert len(circuit.edges(micro)) == 2


def edge(source="0.attn_in.0", target="0.attn_v.0", **further):
    return {"source": source, "target": target, **further}


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (
            [edge(weight=1.6)],
            r"does not fit this model: 0\.attn_in 0 → 0\.attn_v h0\.0 has weight 1\.5 between .* "
            r"nodes, not 1\.6",
        ),
        ([edge(weight=-1.5)], r"has weight 1\.5 between the kept nodes, not -1\.5"),
        (
            [edge(weight=float("nan"))],
            "an edge needs the names of .*, and its weight must be a finite number",
        ),
        ([edge(weight=float("inf"))], "must be a finite number"),
        ([edge(weight=1e305)], "must be a finite number"),
        ([edge(weight="1.5")], "must be a finite number"),
        ([edge(weight=True)], "must be a finite number"),
        ([edge(weight=0)], r"has weight 1\.5 between the kept nodes, not 0"),
        (
            [edge("0.attn_in.1")],
            r"0\.attn_in 1 → 0\.attn_v h0\.0 has weight 0 between the kept nodes, not a nonzero",
        ),
        (
            [edge("0.attn_in.1", weight=0)],
            r"0\.attn_in 1 → 0\.attn_v h0\.0 has weight 0 between the kept nodes, not 0",
        ),
        ([edge("0.attn_v.0", "0.attn_in.0")], r"0\.attn_v h0\.0 → 0\.attn_in 0 has weight 0"),
        ([edge(target="0.mlp_out.1")], r"0\.attn_in 0 → 0\.mlp_out 1 has weight 0"),
        ([edge(target="0.attn_v.2")], r"0\.attn_v: index 2 is out of range; they run from 0 to 1"),
        ([edge(target="1.attn_v.0")], r"1\.attn_v does not exist: the model has 1 layer,"),
        ([edge(target="attn_v")], "'attn_v' is not a node"),
        ([{"source": "0.attn_in.0"}], r"unlike \{'source': '0\.attn_in\.0'\}"),
        ([["0.attn_in.0", "0.attn_v.0"]], "unlike "),
        ([edge(target=3)], "an edge needs the names of a source and a target node"),
    ],
)
def test_edges_that_do_not_fit(micro, tmp_path, edges, message):
    with pytest.raises(CircuitError, match=message):
        Circuit.from_edge_list(write(tmp_path, {"edges": edges}), micro)


def test_nodes_that_do_not_fit(micro, tmp_path):
    with pytest.raises(CircuitError, match=r"0\.attn_in: index 0 occurs 2 times"):
        Circuit.from_edge_list(
            write(tmp_path, MICRO_LIST | {"nodes": [*INDEXED_NODES, "0.attn.act_in.0"]}), micro
        )
    with pytest.raises(
        CircuitError, match=r"has weight 0 between the kept nodes, not 1\.5"
    ):  # an edge from a node that is not kept
        Circuit.from_edge_list(write(tmp_path, MICRO_LIST | {"nodes": NODES[1:]}), micro)
    with pytest.raises(CircuitError, match="'3' is not a node"):
        Circuit.from_edge_list(write(tmp_path, MICRO_LIST | {"nodes": [3]}), micro)


def test_edge_list_of_another_model(micro, tmp_path):
    with torch.no_grad():
        other = micro_model()
        other.blocks[0].attn.W_V[0, 0, 0] = 2 * W_V
    with pytest.raises(CircuitError, match=r"has weight 3 between the kept nodes, not 1\.5"):
        Circuit.from_edge_list(write(tmp_path, MICRO_LIST), other)
    with pytest.raises(CircuitError, match=r"other weights in blocks\.0\.attn\.W_V"):
        Circuit.from_edge_list(write(tmp_path, MICRO_LIST), micro).edge_list(other)


@pytest.mark.parametrize(
    "change", [{"format": "other"}, {"edges": None}, {"edges": {}}, {"nodes": "0.attn_in.0"}]
)
def test_what_is_no_edge_list(micro, tmp_path, change):
    with pytest.raises(
        CheckpointError,
        match=r"edges\.json is not an edge list: its format is not 'tl_sparse edges'",
    ):
        Circuit.from_edge_list(write(tmp_path, MICRO_LIST | change), micro)


def test_edge_list_needs_a_mask_at_every_location(micro):
    kept = {"blocks.0.mlp.hook_post": torch.tensor([True, False])}
    with pytest.raises(
        CircuitError,
        match=r"at every node location; this circuit has none at blocks\.0\.attn\.hook_k, ",
    ):
        Circuit(kept, {}, fingerprint(micro)).edge_list(micro)
