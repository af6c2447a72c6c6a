"""Graphs of components: made from circuits, ranked, connected, and in files."""

import dataclasses
import json

import pytest
import torch

from helpers import random_circuit, stock_model, tiny_model, with_random_cuts
from micro import VOCABULARY, W_O, W_U, W_V
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.component_layout import ComponentLayout
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.circuits.exports import export
from tl_sparse.circuits.prune_scores import from_prune_scores, to_prune_scores
from tl_sparse.errors import CheckpointError, CircuitError, ConfigError, UnsupportedError

pytestmark = pytest.mark.any_line

LAYOUT = ComponentLayout(n_layers=2, n_heads=2, d_model=3)
#: All edges of a model of one layer with one head, as EAP-IG writes them.
ONE_LAYER = [
    "input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>", "input->m0", "input->logits",
    "a0.h0->m0", "a0.h0->logits", "m0->logits",
]  # fmt: skip


def graph(layout=LAYOUT, scores=None, seed=0):
    """A graph without edges, with random scores."""
    real = layout.real_edges()
    if scores is None:
        scores = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed)) * real
    nodes = torch.zeros(layout.n_sources, dtype=torch.bool)
    return EapGraph(layout, scores, torch.zeros_like(real), nodes)


def of_names(*names, layout=LAYOUT):
    in_graph = torch.zeros(layout.n_sources, layout.n_targets, dtype=torch.bool)
    for name in names:
        in_graph[layout.edge_number(name)] = True
    return dataclasses.replace(graph(layout), in_graph=in_graph)


# --- names and numbers


def test_the_edges_of_one_layer():
    layout = ComponentLayout(1, 1, 4)
    assert layout.sources == ["input", "a0.h0", "m0"]
    assert layout.targets == ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "logits"]
    edges = layout.real_edges().nonzero().tolist()
    assert sorted(layout.edge_name(*edge) for edge in edges) == sorted(ONE_LAYER)
    parallel = ComponentLayout(1, 1, 4, parallel_attn_mlp=True).real_edges().nonzero().tolist()
    assert {layout.edge_name(*edge) for edge in parallel} == set(ONE_LAYER) - {"a0.h0->m0"}


@pytest.mark.parametrize("is_parallel", [False, True])
def test_names_and_numbers_are_inverse(is_parallel):
    layout = dataclasses.replace(LAYOUT, parallel_attn_mlp=is_parallel)
    real = layout.real_edges()
    for source in range(layout.n_sources):
        for target in range(layout.n_targets):
            name = layout.edge_name(source, target)
            if real[source, target]:
                assert layout.edge_number(name) == (source, target)
            else:
                with pytest.raises(CircuitError, match="is no edge"):
                    layout.edge_number(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a2.h0->logits", "there is no node 'a2.h0' in a model of 2 layers with 2 heads"),
        ("a0.h2->logits", "there is no node 'a0.h2'.*'a0.h0' to 'a1.h1', 'm0' to 'm1'"),
        ("m0->m2", "there is no node 'm2'"),
        ("logits->m0", "there is no node 'logits'"),
        ("input", "'input' is no edge"),
        ("input->input", "is no edge"),
        ("input->a0.h0", "those to a head name its input, as 'm0->a1.h2<q>' does"),
        ("input->m0<q>", "is no edge"),
        ("m1->a1.h0<q>", "edges lead to a later node"),
    ],
)
def test_names_of_no_edges(name, message):
    with pytest.raises(CircuitError, match=message):
        LAYOUT.edge_number(name)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"n_layers": 0}, "n_layers = 0 is not possible; it must be at least 1"),
        ({"n_heads": True}, "n_heads = True is not possible"),
        ({"d_model": "3"}, "d_model = '3' is not possible"),
        ({"parallel_attn_mlp": 1}, "parallel_attn_mlp = 1 .* must be true or false"),
        ({"n_layers": 10**6}, "1,000,000 layers .* larger than any that this package reads"),
    ],
)
def test_impossible_sizes(size, message):
    with pytest.raises(CircuitError, match=message):
        dataclasses.replace(LAYOUT, **size)


# --- choosing and connecting


def test_the_best_edges_without_what_is_not_connected():
    scores = torch.zeros(LAYOUT.n_sources, LAYOUT.n_targets)
    for name, score in {
        "input->a0.h0<v>": 1.0,
        "a0.h0->m1": -5.0,
        "m1->logits": 2.0,
        "a0.h1->logits": 3.0,  # nothing leads to this head
        "input->m0": 4.0,  # and nothing from this MLP
        "input->logits": -0.5,
    }.items():
        scores[LAYOUT.edge_number(name)] = score
    scored = graph(scores=scores)
    best = scored.top(5)
    assert set(best.edges) == {"input->a0.h0<v>", "a0.h0->m1", "m1->logits"}
    assert best.edges["a0.h0->m1"] == -5
    assert best.nodes == ["input", "a0.h0", "m1"]
    assert set(scored.top(6).edges) == {*best.edges, "input->logits"}
    signed = scored.top(5, absolute=False)  # which prefers an edge without a score
    assert "a0.h0->m1" not in signed.edges
    assert scored.top(0).edges == {}
    assert scored.top(scored.n_scored()).n_edges == int(LAYOUT.real_edges().sum())


def test_the_best_nodes_and_channels():
    unscored = torch.nan
    nodes_scores = torch.tensor([unscored, 1.0, -2.0, 0.0, 0.0, 0.5, 0.0])
    neurons_scores = torch.full((7, 3), unscored)
    neurons_scores[1:] = 0.0
    neurons_scores[2] = torch.tensor([3.0, -4.0, 0.0])
    scored = dataclasses.replace(graph(), nodes_scores=nodes_scores, neurons_scores=neurons_scores)
    assert scored.n_scored("node") == 6
    assert scored.top(2, "node").nodes == ["input", "a0.h0", "a0.h1"]
    assert scored.top(2, "node", absolute=False).nodes == ["input", "a0.h0", "a1.h1"]
    assert "a0.h0->a1.h0<q>" not in scored.top(2, "node").edges  # which is not in the graph
    chosen = scored.top(2, "neuron")
    assert chosen.nodes == ["input", "a0.h1"]
    assert chosen.neurons_in_graph[2].tolist() == [True, True, False]
    assert chosen.edges.keys() == {
        "input->logits", "a0.h1->logits", "input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>",
    }  # fmt: skip
    assert chosen.weighted_edges == pytest.approx(4 + 2 / 3)


def test_what_cannot_be_chosen():
    with pytest.raises(CircuitError, match="n is 99; the graph has 46 edges"):
        graph().top(99)
    with pytest.raises(CircuitError, match="no nodes_scores to rank by"):
        graph().top(1, "node")
    with pytest.raises(ConfigError, match="level = 'layer' is not possible; it must be one of"):
        graph().top(1, "layer")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scores", torch.full((7, 15), torch.nan), "the score of input->a0.h0<q> is nan"),
        ("scores", torch.zeros(7, 14), r"scores must be a float tensor of \[7, 15\], not"),
        ("in_graph", torch.ones(7, 15, dtype=torch.bool), "a0.h0->a0.h0<q> is in the graph, but"),
        ("in_graph", torch.zeros(7, 15), "in_graph must be a boolean tensor"),
        ("nodes_scores", torch.full((7,), torch.inf), "nodes_scores must be finite, or NaN for"),
        ("nodes_in_graph", [True] * 7, "nodes_in_graph must be a boolean tensor, not a list"),
        ("neurons_in_graph", torch.ones(7, 2, dtype=torch.bool), r"of \[7, 3\], not"),
    ],
)
def test_impossible_graphs(field, value, message):
    with pytest.raises(CircuitError, match=message):
        dataclasses.replace(graph(), **{field: value})


# --- circuits


def test_the_graph_of_the_circuit_on_paper(circuit, micro):
    found = circuit.to_eap(micro)
    n_tokens = len(VOCABULARY)
    assert found.edges == {
        "input->a0.h0<v>": pytest.approx(2 / n_tokens * W_V),  # A and B have 1 in channel 0
        "a0.h0->logits": pytest.approx(W_O * 2 * W_U / n_tokens),
    }
    assert found.nodes == ["input", "a0.h0"]
    assert found.connected().edges == found.edges
    assert found.nodes_scores.tolist() == pytest.approx([3 / n_tokens, W_O, 0])


def test_scores_by_ranking_are_those_of_circuits_of_each_size():
    """An edge is in the circuit of the n best nodes exactly if it scores above 1 - n/N."""
    model = tiny_model(n_layers=2, positions="concatenated", d_pos=2)
    circuit = random_circuit(model, share=0.1)
    ranked = circuit.to_eap(model, scores="ranking")
    n_all = circuit.n_candidates
    for n_nodes in (3, 20, 60, 100, 150, n_all):
        expected = circuit.of_size(n_nodes).to_eap(model)
        is_above = ranked.scores > 1 - (n_nodes + 0.5) / n_all + 1 / n_all
        assert torch.equal(is_above, expected.in_graph)
        nodes_above = ranked.nodes_scores > 1 - (n_nodes + 0.5) / n_all + 1 / n_all
        assert torch.equal(nodes_above, expected.nodes_in_graph)
    with pytest.raises(CircuitError, match="no scores of its nodes"):
        dataclasses.replace(circuit, scores={}).to_eap(model, scores="ranking")


def paths_by_hand(circuit, model):
    """(head or MLP, residual channel, reader) of every path, from the lists of nodes and edges."""
    writes, reads = [], []
    for edge in circuit.edges(model):
        layer = edge.source.layer
        inner = edge.target if edge.source.is_read else edge.source
        head = f"a{layer}.h{inner.index // model.cfg.d_head}"
        component = f"m{layer}" if inner.location == "mlp_neuron" else head
        if edge.target.is_write:
            writes.append((component, edge.target.index, abs(edge.weight)))
        else:
            letter = f"<{inner.location[-1]}>" if component[0] == "a" else ""
            reads.append((edge.source.index, component + letter, abs(edge.weight)))
    return writes, reads


def test_scores_by_weights_are_the_sums_over_paths():
    model = tiny_model(n_layers=2)
    circuit = with_random_cuts(random_circuit(model, share=0.5), model, share=0.3, seed=0)
    writes, reads = paths_by_hand(circuit, model)
    expected = {}
    layout = ComponentLayout.of_model(model)
    real = layout.real_edges()
    for source, written, weight in writes:
        for read, target, other in reads:
            name = f"{source}->{target}"
            if written == read and real[layout.source_number(source), layout.targets.index(target)]:
                expected[name] = expected.get(name, 0) + weight * other
    found = circuit.to_eap(model).edges
    between = {name: score for name, score in found.items() if is_inner(name)}
    assert len(expected) == 20
    assert between == pytest.approx(expected, rel=1e-4)


def is_inner(name):
    return not name.startswith("input") and not name.endswith("logits")


def test_scores_of_another_graph(circuit, micro):
    scored = dataclasses.replace(EapGraph.full(micro), scores=torch.ones(3, 5))
    assert set(circuit.to_eap(micro, scores=scored).edges.values()) == {1.0}
    with pytest.raises(CircuitError, match="belongs to a model with n_layers = 2; the given one"):
        circuit.to_eap(micro, scores=graph())
    with pytest.raises(ConfigError, match=r"scores = 'gates' .* one of weights, ranking"):
        circuit.to_eap(micro, scores="gates")
    with pytest.raises(CircuitError, match="this circuit belongs to the model"):
        circuit.to_eap(tiny_model())


def test_a_circuit_from_a_graph(micro, circuit):
    found = Circuit.from_eap(circuit.to_eap(micro), micro, circuit.means, task="micro")
    assert found.nodes_by_location() == {
        (0, "attn_in"): [0, 1, 2, 3],
        (0, "attn_v"): [0, 1],
        (0, "attn_out"): [0, 1, 2, 3],
    }
    assert found.task == "micro"
    with found.applied(micro):
        micro(torch.tensor([[0, 1, 3]]))
    one_channel = torch.zeros(3, 4, dtype=torch.bool)
    one_channel[1, 2] = True
    narrow = dataclasses.replace(circuit.to_eap(micro), neurons_in_graph=one_channel)
    assert Circuit.from_eap(narrow, micro).nodes_by_location()[0, "attn_out"] == [2]
    only_nodes = of_names(layout=ComponentLayout(1, 1, 4))
    only_nodes.nodes_in_graph[2] = True
    assert {node.location for node in Circuit.from_eap(only_nodes, micro).nodes} == {
        "mlp_in", "mlp_neuron", "mlp_out",
    }  # fmt: skip
    with pytest.raises(CircuitError, match=r"nothing is in this graph.*top"):
        Circuit.from_eap(of_names(layout=ComponentLayout(1, 1, 4)), micro)


def test_heads_that_share_keys_and_values():
    model = stock_model(
        n_layers=2, d_model=8, n_heads=4, d_head=2, n_key_value_heads=2,
        normalization_type="RMS", gated_mlp=True, positional_embedding_type="rotary", rotary_dim=2,
    )  # fmt: skip
    layout = ComponentLayout.of_model(model)
    kept = of_names(
        "input->a0.h1<q>", "input->a0.h1<v>", "a0.h1->logits", "a0.h1->a1.h3<k>", "a1.h3->logits",
        layout=layout,
    ).connected()  # fmt: skip
    circuit = Circuit.from_eap(kept, model)
    kept_heads = {}
    for node in circuit.nodes:
        if node.location in ("attn_q", "attn_k", "attn_v"):
            place = (node.layer, node.location)
            kept_heads.setdefault(place, set()).add(node.index // model.cfg.d_head)
    assert kept_heads == {(0, "attn_q"): {1}, (0, "attn_v"): {0}, (1, "attn_k"): {1}}
    again = circuit.to_eap(model)
    # The value channels are those of heads 0 and 1 alike, and both write all channels.
    assert again.nodes == ["input", "a0.h0", "a0.h1", "a1.h2", "a1.h3"]
    assert {"a0.h0->a1.h2<k>", "a0.h1->a1.h3<k>", "input->a0.h1<q>"} <= set(again.edges)
    assert not any(name.startswith(("a1", "m")) for name in again.edges)


def test_component_circuits():
    """There and back; edges where weights join kept components."""
    model = tiny_model(n_layers=2)
    layout = ComponentLayout.of_model(model)
    chosen = of_names(
        "input->a0.h1<v>", "a0.h1->m1", "m1->logits", layout=layout
    ).connected()  # fmt: skip
    circuit = Circuit.from_eap(chosen, model, nodes="components")
    assert [str(node) for node in circuit.nodes] == ["0.head 1", "1.mlp"]
    graph = circuit.to_eap(model)
    assert graph.nodes == ["input", "a0.h1", "m1"]
    assert graph.edges.keys() == {
        "input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>", "input->m1", "input->logits",
        "a0.h1->m1", "a0.h1->logits", "m1->logits",
    }  # fmt: skip
    weights = circuit_of_everything(model).to_eap(model)
    assert graph.edges == pytest.approx({name: weights.edges[name] for name in graph.edges})
    scores = {name: torch.rand(mask.shape) for name, mask in circuit.kept.items()}
    ranked = dataclasses.replace(circuit, scores=scores).to_eap(model, scores="ranking")
    # Of six heads and two MLPs, the kept two rank highest: the second best at 7/8.
    best = {name for name, score in all_scores(ranked).items() if score >= 7 / 8}
    assert best == graph.edges.keys()
    with pytest.raises(ConfigError, match=r"nodes = 'heads' .* one of channels, components"):
        Circuit.from_eap(chosen, model, nodes="heads")


def circuit_of_everything(model):
    full = EapGraph.full(model)
    return Circuit.from_eap(full, model)


def all_scores(graph):
    return dataclasses.replace(graph, in_graph=graph.layout.real_edges()).edges


def test_attention_alone_has_no_such_graph():
    with pytest.raises(UnsupportedError, match="has an MLP in each layer, and this model has none"):
        EapGraph.full(stock_model(attn_only=True))


# --- files


def everything():
    """A graph with all that a file can have, among it values that are not scored."""
    scored = graph().top(20)
    nodes_scores = torch.arange(7.0)
    nodes_scores[3] = torch.nan
    neurons_scores = torch.arange(21.0).view(7, 3)
    neurons_scores[0] = torch.nan
    return dataclasses.replace(
        scored,
        nodes_scores=nodes_scores,
        neurons_in_graph=neurons_scores > 4,
        neurons_scores=neurons_scores,
    )


@pytest.mark.parametrize("name", ["graph.json", "graph.pt"])
def test_files_are_read_back(name, tmp_path):
    for saved in (everything(), graph().top(9)):
        saved.save(tmp_path / name, overwrite=True)
        loaded = EapGraph.load(tmp_path / name)
        for field in dataclasses.fields(EapGraph):
            before, after = getattr(saved, field.name), getattr(loaded, field.name)
            if isinstance(before, torch.Tensor):
                assert torch.equal(before.nan_to_num(99.0), after.nan_to_num(99.0))
            else:
                assert before == after
        saved.save(tmp_path / name)  # the same again
    with pytest.raises(ConfigError, match="overwrite"):
        everything().save(tmp_path / name)


def test_json_is_as_eap_ig_writes_it(tmp_path, circuit, micro):
    circuit.to_eap(micro, tmp_path / "g.json")
    values = json.loads((tmp_path / "g.json").read_text())
    assert values.keys() == {"cfg", "nodes", "edges"}
    assert values["cfg"] == {
        "n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 4,
    }  # fmt: skip
    assert values["nodes"].keys() == {"input", "a0.h0", "m0", "logits"}
    assert sorted(values["edges"]) == sorted(ONE_LAYER)
    assert values["edges"]["m0->logits"] == {"score": 0.0, "in_graph": False}
    export(circuit, micro, tmp_path / "again.eap.json")
    assert (tmp_path / "again.eap.json").read_bytes() == (tmp_path / "g.json").read_bytes()


def test_pt_is_as_eap_ig_writes_it(tmp_path, circuit, micro):
    export(circuit, micro, tmp_path / "g.pt")
    values = torch.load(tmp_path / "g.pt", weights_only=True)
    assert values["src_nodes"] == ["input", "a0.h0", "m0"]
    assert values["dst_nodes"] == ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "logits"]
    assert values["edges_scores"].shape == values["edges_in_graph"].shape == (3, 5)
    assert values["edges_in_graph"].sum() == 2
    assert values["nodes_in_graph"].tolist() == [True, True, False]


def test_a_hand_made_file_may_leave_things_out(tmp_path):
    values = {
        "cfg": {"n_layers": 1, "n_heads": 1, "d_model": 2},
        "nodes": {"m0": {"in_graph": True}},
        "edges": {"input->m0": {"in_graph": True}, "m0->logits": {"in_graph": True, "score": 2}},
    }
    (tmp_path / "g.json").write_text(json.dumps(values))
    loaded = EapGraph.load(tmp_path / "g.json")
    assert loaded.edges == {"input->m0": 0.0, "m0->logits": 2.0}
    assert loaded.nodes_scores is None
    assert loaded.connected().nodes == ["input", "m0"]


def changed_json(tmp_path, **changes):
    values = {
        "cfg": {"n_layers": 1, "n_heads": 1, "d_model": 2, "parallel_attn_mlp": False},
        "nodes": {},
        "edges": {},
    }
    (tmp_path / "g.json").write_text(json.dumps(values | changes))
    return tmp_path / "g.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": 3}, "g.json is not a graph of EAP-IG: it has no cfg"),
        ({"cfg": {"n_layers": 1}}, "its cfg has no n_heads"),
        ({"cfg": {"n_layers": 1, "n_heads": -1, "d_model": 2}}, "n_heads = -1 is not possible"),
        ({"edges": None}, "it has no nodes, or no edges"),
        ({"nodes": {"a0.h7": {"in_graph": True}}}, "g.json: there is no node 'a0.h7'"),
        ({"nodes": {"m0": True}}, "m0 must have an object with in_graph, not a bool"),
        ({"nodes": {"m0": {}}}, "m0: in_graph is None, which must be true or false"),
        ({"nodes": {"m0": {"in_graph": True, "neurons": [1]}}}, "neurons must be a list of 2"),
        ({"edges": {"input->m7": {"in_graph": True}}}, "g.json: there is no node 'm7'"),
        ({"edges": {"m0->a0.h0<v>": {"in_graph": True}}}, "is no edge"),
        (
            {"edges": {"input->m0": {"in_graph": True, "score": float("nan")}}},
            "g.json: the score of input->m0 is nan; it must be a finite number",
        ),
        ({"edges": {"input->m0": {"in_graph": True, "score": "1"}}}, "score is '1', which must be"),
    ],
)
def test_wrong_json(changes, message, tmp_path):
    with pytest.raises((CheckpointError, CircuitError), match=message):
        EapGraph.load(changed_json(tmp_path, **changes))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("edges_scores", torch.full((7, 15), torch.nan), "g.pt: the score of input->a0.h0<q> is"),
        ("edges_scores", None, "it has no edges_scores"),
        ("edges_scores", torch.zeros(2, 2), r"scores must be a float tensor of \[7, 15\]"),
        ("edges_scores", [1.0], "edges_scores must be a dense tensor with values"),
        ("edges_scores", torch.zeros(1).expand(7, 15), "edges_scores must be a dense tensor"),
        ("edges_in_graph", torch.full((7, 15), 0.5), "no other values than true and false"),
        (
            "src_nodes",
            ["a0.h0"],
            "src_nodes must be the 7 names from 'input' to 'm1', in",
        ),
        ("cfg", {"n_layers": 3, "n_heads": 2, "d_model": 3}, "src_nodes must be the 10 names"),
    ],
)
def test_wrong_pt(entry, value, message, tmp_path):
    everything().save(tmp_path / "g.pt")
    values = torch.load(tmp_path / "g.pt", weights_only=True) | {entry: value}
    if value is None:
        del values[entry]
    torch.save(values, tmp_path / "g.pt")
    with pytest.raises((CheckpointError, CircuitError), match=message):
        EapGraph.load(tmp_path / "g.pt")


def test_marks_of_pairs_that_are_no_edges_are_left_out(tmp_path):
    """EAP-IG sets them when it chooses whole nodes."""
    everything().save(tmp_path / "g.pt")
    values = torch.load(tmp_path / "g.pt", weights_only=True)
    values["edges_in_graph"] = torch.ones(7, 15, dtype=torch.bool)
    values["edges_scores"] = torch.ones(7, 15)
    torch.save(values, tmp_path / "g.pt")
    loaded = EapGraph.load(tmp_path / "g.pt")
    assert torch.equal(loaded.in_graph, LAYOUT.real_edges())
    assert torch.equal(loaded.scores, LAYOUT.real_edges().float())


def test_other_endings(tmp_path):
    with pytest.raises(ConfigError, match=r"a graph of components cannot be written as '.csv'"):
        everything().save(tmp_path / "g.csv")


def test_the_command_exports_graphs(tmp_path, circuit, micro):
    from tl_sparse.cli.parser import main

    micro.save_pretrained(tmp_path / "model")
    circuit.save(tmp_path / "circuit")
    flags = ["--model", str(tmp_path / "model"), "--quiet", "--device", "cpu"]
    main(["export", str(tmp_path / "circuit"), "-o", str(tmp_path / "g.eap.json"), *flags])
    assert EapGraph.load(tmp_path / "g.eap.json").edges == circuit.to_eap(micro).edges


# --- auto-circuit's prune scores


def test_prune_scores_are_read_back(tmp_path):
    model = tiny_model(n_layers=2)
    layout = ComponentLayout.of_model(model)
    scored = graph(layout)
    scores = to_prune_scores(scored, tmp_path / "scores.pt")
    assert {name: tuple(values.shape) for name, values in scores.items()} == {
        "blocks.0.hook_q_input": (3, 1),
        "blocks.0.hook_k_input": (3, 1),
        "blocks.0.hook_v_input": (3, 1),
        "blocks.0.hook_mlp_in": (4,),
        "blocks.1.hook_q_input": (3, 5),
        "blocks.1.hook_k_input": (3, 5),
        "blocks.1.hook_v_input": (3, 5),
        "blocks.1.hook_mlp_in": (8,),
        "blocks.1.hook_resid_post": (9,),
    }
    head_2, m0 = 2, layout.source_number("m0")
    assert (
        scores["blocks.1.hook_k_input"][head_2, m0]
        == (scored.scores[layout.edge_number("m0->a1.h2<k>")])
    )
    assert torch.equal(from_prune_scores(scores, model).scores, scored.scores)
    assert torch.equal(from_prune_scores(tmp_path / "scores.pt", model).scores, scored.scores)
    by_position = {name: torch.stack([values, 2 * values]) for name, values in scores.items()}
    summed = from_prune_scores(by_position, model).scores
    torch.testing.assert_close(summed, 3 * scored.scores)


def test_wrong_prune_scores(tmp_path):
    model = tiny_model()
    scores = to_prune_scores(graph(ComponentLayout.of_model(model)))
    name = "blocks.0.hook_mlp_in"
    wrong = [
        ({**scores, "blocks.9.hook_mlp_in": torch.zeros(4)}, "no module 'blocks.9.hook_mlp_in'"),
        ({k: v for k, v in scores.items() if k != name}, f"there are no scores at {name}"),
        ({**scores, name: torch.zeros(5)}, rf"{name} must be a float tensor of \[4\]"),
        ({**scores, name: torch.zeros(2, 2, 4)}, f"{name} have 3 axes"),
        ({**scores, name: scores[name] * torch.nan}, "the score of input->m0 is nan"),
    ]
    for values, message in wrong:
        with pytest.raises(CircuitError, match=message):
            from_prune_scores(values, model)
    torch.save(wrong[0][0], tmp_path / "scores.pt")
    with pytest.raises(CircuitError, match=r"scores.pt: .*blocks.9"):
        from_prune_scores(tmp_path / "scores.pt", model)
    with pytest.raises(UnsupportedError, match="separate_qkv=True"):
        from_prune_scores({"blocks.0.hook_attn_in": torch.zeros(3, 1)}, model)
