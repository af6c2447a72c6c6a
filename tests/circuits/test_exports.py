"""Exports: other tools read the same circuit from them."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import networkx
import pytest
import torch

from helpers import has_hooks
from micro import EDGES, MICRO_TASK, NODES, VOCABULARY, W_U, WRITTEN
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.exports import (
    TEXT_FORMATS,
    export,
    residual_joins,
    to_dot,
    to_graphml,
    to_mermaid,
    to_networkx,
)
from tl_sparse.circuits.nodes import Node
from tl_sparse.errors import CheckpointError, CircuitError, ConfigError, TokenizerError

SCHEMA = json.loads((Path(__file__).parent / "attribution_graph.schema.json").read_text())


def test_networkx_has_the_nodes_and_edges(circuit, micro):
    graph = to_networkx(circuit, micro)
    assert list(graph.nodes) == NODES
    assert [(s, t, w) for s, t, w in graph.edges(data="weight")] == EDGES
    assert graph.nodes["0.attn_v h0.0"] == {
        "layer": 0,
        "location": "attn_v",
        "index": 0,
        "openai": "0.attn.v.0",
        "kind": "value channels",
        "mean": 0.0,
    }
    assert graph.graph == {"model": "micro", "task": "micro"}
    without_means = dataclasses.replace(circuit, means={})
    assert "mean" not in to_networkx(without_means, micro).nodes["0.attn_v h0.0"]


@pytest.mark.parametrize("text", ["a\x00b", "\x1b[31m", "\ufffe", "a < b & 'c' \"d\"", "é\n😀"])
def test_graphml_with_any_text_is_read_back(text, circuit, micro):
    named = dataclasses.replace(circuit, task=text, model_name=text)
    graph = networkx.parse_graphml(to_graphml(named, micro))
    kept = re.sub("[\x00\x1b\ufffe]", "\ufffd", text)
    assert graph.graph["task"] == graph.graph["model"] == kept


def test_endings_in_capitals(circuit, micro, tmp_path):
    export(circuit, micro, tmp_path / "C.DOT")
    assert (tmp_path / "C.DOT").read_text() == to_dot(circuit, micro) + "\n"


def test_graphml_is_read_back_equal(circuit, micro, tmp_path):
    export(circuit, micro, tmp_path / "c.graphml")
    again, graph = networkx.read_graphml(tmp_path / "c.graphml"), to_networkx(circuit, micro)
    assert again.is_directed()
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    assert list(again.edges(data=True)) == list(graph.edges(data=True))
    assert {again.graph["model"], again.graph["task"]} == {"micro"}


def test_csv_is_read_back_equal(circuit, micro, tmp_path):
    export(circuit, micro, tmp_path / "c.csv")
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["source"], row["target"], float(row["weight"])) for row in rows] == EDGES


def test_dot_has_each_node_and_edge(circuit, micro, tmp_path):
    text = to_dot(circuit, micro)
    assert [text.count(f'"{name}" [label=') for name in NODES] == [1, 1, 1]
    assert all(f'"{source}" -> "{target}"' in text for source, target, _ in EDGES)
    if shutil.which("dot") is None:
        return
    export(circuit, micro, tmp_path / "c.dot")
    svg = subprocess.run(
        ["dot", "-Tsvg", tmp_path / "c.dot"], capture_output=True, text=True, check=True
    ).stdout
    assert (svg.count('class="node"'), svg.count('class="edge"')) == (3, 2)


def test_mermaid_is_for_small_circuits(circuit, micro, monkeypatch):
    lines = to_mermaid(circuit, micro).splitlines()
    assert lines[0] == "flowchart BT"
    assert lines[1:] == [
        '  attn_in_0_0["0.attn_in 0"]',
        '  attn_v_0_0["0.attn_v h0.0"]',
        '  attn_out_0_2["0.attn_out 2"]',
        "  attn_in_0_0 -->|+1.50| attn_v_0_0",
        "  attn_v_0_0 -->|+2.00| attn_out_0_2",
    ]
    monkeypatch.setattr("tl_sparse.circuits.exports.MERMAID_LINKS", 1)
    with pytest.raises(CircuitError, match=r"at most 1 links, not 2: use \.dot"):
        to_mermaid(circuit, micro)


def test_residual_joins_go_from_writes_to_later_reads_of_the_channel():
    names = [
        "0.attn_in.7",
        "0.attn_out.7",
        "0.attn_out.8",
        "0.mlp_in.7",
        "0.mlp_out.7",
        "1.attn_in.7",
        "1.mlp_out.7",
    ]
    joins = residual_joins([Node.parse(name) for name in names])
    assert [(str(write), str(read)) for write, read in joins] == [
        ("0.attn_out 7", "0.mlp_in 7"),
        ("0.attn_out 7", "1.attn_in 7"),
        ("0.mlp_out 7", "1.attn_in 7"),
    ]


def test_attribution_graph_on_paper(circuit, micro):
    """A is embedded as 1 and read as 2; v is 3; v/6 · 2 is written; the final norm divides it."""
    graph = attribution_graph(circuit, micro, MICRO_TASK)
    jsonschema.validate(graph, SCHEMA)
    assert graph["metadata"]["prompt_tokens"][0] == "<s>"
    assert graph["metadata"]["prompt"].split()[2] == "A"
    yes, no = VOCABULARY["yes"], VOCABULARY["no"]
    value, written, logits = "0_3000000_3", "0_4000002_5", [f"2_{yes}_5", f"2_{no}_5"]
    scale = ((1 + WRITTEN**2) / 4) ** 0.5
    expected = {
        ("E_1_3", "0_0_3"): 2.0,
        ("0_0_3", value): 3.0,
        (value, written): WRITTEN,
        (written, logits[0]): WRITTEN / scale * W_U,
        (written, logits[1]): -WRITTEN / scale * W_U,
    }
    found = {(link["source"], link["target"]): link["weight"] for link in graph["links"]}
    assert found == pytest.approx(expected)
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert set(nodes) == {name for pair in expected for name in pair}
    assert nodes[value]["activation"] == pytest.approx(3.0)
    assert nodes[value]["clerp"] == "0.attn_v h0.0"
    assert nodes["E_1_3"]["clerp"] == "'A'"
    assert nodes[value]["influence"] == pytest.approx(1.0)
    assert not has_hooks(micro)
    assert all(p.requires_grad and p.grad is None for p in micro.parameters())


def test_attribution_graph_of_a_model_with_everything_fits_the_schema(tmp_path):
    from test_view import large

    circuit, model = large(2, 16)
    export(circuit, model, tmp_path / "c.json", MICRO_TASK)
    graph = json.loads((tmp_path / "c.json").read_text())
    jsonschema.validate(graph, SCHEMA)
    names = [node["node_id"] for node in graph["nodes"]]
    assert len(set(names)) == len(names) > 10
    assert {name for link in graph["links"] for name in (link["source"], link["target"])} <= set(
        names
    )


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "c.graphm",
            ConfigError,
            r"nothing is exported as '\.graphm'; did you mean \.graphml\? Exports end in",
        ),
        (
            "c",
            ConfigError,
            r"nothing is exported as ''; Exports end in \.graphml, \.dot, \.mmd, \.csv, \.json",
        ),
        ("c.json", CircuitError, "the task 'micro' of this circuit is not built in; give it as"),
        (".", ConfigError, "nothing is exported"),
        ("file/c.dot", CheckpointError, "cannot write"),
        ("folder.dot", CheckpointError, "it is a folder"),
    ],
)
def test_what_cannot_be_exported(name, kind, message, circuit, micro, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.dot").mkdir()
    with pytest.raises(kind, match=message):
        export(circuit, micro, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.dot"]


def test_another_model_or_no_means_or_tokenizer_are_refused(circuit, micro):
    with pytest.raises(CircuitError, match="has no means"):
        attribution_graph(dataclasses.replace(circuit, means={}), micro, MICRO_TASK)
    with torch.no_grad():
        micro.blocks[0].attn.W_V[0, 0, 0] = 7
    for write in TEXT_FORMATS.values():
        with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
            write(circuit, micro)
    with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
        attribution_graph(circuit, micro, MICRO_TASK)
    micro.tokenizer = None
    with pytest.raises(TokenizerError, match="needs the model's tokenizer"):
        attribution_graph(circuit, micro, MICRO_TASK)
