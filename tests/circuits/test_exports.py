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
from tl_sparse.circuits.dot import to_dot
from tl_sparse.circuits.ends import residual_joins, task_tokens
from tl_sparse.circuits.exports import DATA_FORMATS, DRAWINGS, export, to_graphml, to_networkx
from tl_sparse.circuits.mermaid import to_mermaid
from tl_sparse.circuits.nodes import Node
from tl_sparse.errors import (
    CheckpointError,
    CircuitError,
    ConfigError,
    TaskError,
    TokenizerError,
    UnsupportedError,
)
from tl_sparse.parsing import printable
from tl_sparse.tasks.task import Task

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


def test_labels_are_in_graphml(circuit, micro):
    labelled = circuit.with_labels({"0.attn_v h0.0": "inside\ta\nstring", "0.attn_out 2": "\x00\r"})
    graph = networkx.parse_graphml(to_graphml(labelled, micro))
    assert dict(graph.nodes(data="label")) == {
        "0.attn_in 0": None,
        "0.attn_v h0.0": "inside\ta\nstring",
        "0.attn_out 2": "\ufffd\ufffd",
    }


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


DOT = """\
digraph circuit {
  label="micro in micro\\n3 nodes, 2 edges\\nblue arrows: positive weights; orange bars: negative \
weights\\ndashed: the residual stream, from a write to a later read of its channel"; labelloc=t; \
fontname=Helvetica; fontsize=12;
  rankdir=BT; newrank=true; ranksep=0.7; nodesep=0.2;
  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Courier,
    fontsize=10, margin=0.06, height=0.3];
  edge [fontname=Helvetica, fontsize=8, arrowsize=0.6];
  subgraph "cluster tokens" {
    label="tokens"; style=dotted; labeljust=l;
    "token 1" [label="'A'", shape=ellipse, style=filled];
    "token 2" [label="'B'", shape=ellipse, style=filled];
  }
  subgraph "cluster 0.attn" {
    label="layer 0: attention"; style="rounded,filled";
    labeljust=l; color="#cccccc"; fillcolor="#f7f7f7";
    "0.attn_in 0" [label="0.attn_in 0", tooltip="read by attention"];
    "0.attn_out 2" [label="0.attn_out 2", tooltip="written by attention"];
    subgraph "cluster 0.h0" {
      label="head 0"; fillcolor=white;
      "0.attn_v h0.0" [label="0.attn_v h0.0\\nwas it A?", tooltip="value channels"];
    }
  }
  subgraph "cluster logits of the answers" {
    label="logits of the answers"; style=dotted; labeljust=l;
    "answer 4" [label="'yes'", shape=ellipse, style=filled];
    "answer 5" [label="'no'", shape=ellipse, style=filled];
  }
  { rank=same; "token 1"; "token 2"; }
  { rank=same; "0.attn_in 0"; }
  { rank=same; "0.attn_v h0.0"; }
  { rank=same; "0.attn_out 2"; }
  { rank=same; "answer 4"; "answer 5"; }
  "token 1" -> "0.attn_in 0" [style=invis, weight=0];
  "0.attn_in 0" -> "0.attn_v h0.0" [style=invis, weight=0];
  "0.attn_v h0.0" -> "0.attn_out 2" [style=invis, weight=0];
  "0.attn_out 2" -> "answer 4" [style=invis, weight=0];
  "0.attn_in 0" -> "0.attn_v h0.0" [tooltip="0.attn_in 0 → 0.attn_v h0.0: +1.50", \
label=" +1.50 ", penwidth="2.75", color="#1b6cb5", fontcolor="#1b6cb5"];
  "0.attn_v h0.0" -> "0.attn_out 2" [tooltip="0.attn_v h0.0 → 0.attn_out 2: +2.00", \
label=" +2.00 ", penwidth="3.50", color="#1b6cb5", fontcolor="#1b6cb5"];
  "token 1" -> "0.attn_in 0" [tooltip="token 1 → 0.attn_in 0: +1.00", \
label=" +1.00 ", penwidth="3.50", color="#1b6cb5", fontcolor="#1b6cb5"];
  "token 2" -> "0.attn_in 0" [tooltip="token 2 → 0.attn_in 0: -1.00", \
label=" -1.00 ", penwidth="3.50", color="#cd4f22", fontcolor="#cd4f22", arrowhead="tee"];
  "0.attn_out 2" -> "answer 4" [tooltip="0.attn_out 2 → answer 4: +3.00", \
label=" +3.00 ", penwidth="3.50", color="#1b6cb5", fontcolor="#1b6cb5"];
  "0.attn_out 2" -> "answer 5" [tooltip="0.attn_out 2 → answer 5: -3.00", \
label=" -3.00 ", penwidth="3.50", color="#cd4f22", fontcolor="#cd4f22", arrowhead="tee"];
}"""

MERMAID = """\
---
title: "micro in micro: 3 nodes, 2 edges"
---
flowchart BT
  token_1(["#39;A#39;"])
  token_2(["#39;B#39;"])
  answer_4(["logit of #39;yes#39;"])
  answer_5(["logit of #39;no#39;"])
  attn_in_0_0["0.attn_in 0"]
  attn_v_0_0["0.attn_v h0.0<br/>was it A#63;"]
  attn_out_0_2["0.attn_out 2"]
  attn_in_0_0 -->|"+1.50"| attn_v_0_0
  attn_v_0_0 -->|"+2.00"| attn_out_0_2
  token_1 -->|"+1.00"| attn_in_0_0
  token_2 -->|"-1.00"| attn_in_0_0
  attn_out_0_2 -->|"+3.00"| answer_4
  attn_out_0_2 -->|"-3.00"| answer_5"""


def test_drawings_of_the_circuit_on_paper(circuit, micro, tmp_path):
    labelled = circuit.with_labels({"0.attn_v h0.0": "was it A?"})
    assert to_dot(labelled, micro, MICRO_TASK) == DOT
    assert to_mermaid(labelled, micro, MICRO_TASK) == MERMAID
    export(labelled, micro, tmp_path / "c.dot", MICRO_TASK)
    export(labelled, micro, tmp_path / "c.mmd", MICRO_TASK)
    assert (tmp_path / "c.dot").read_text() == DOT + "\n"
    assert (tmp_path / "c.mmd").read_text() == MERMAID + "\n"


def test_drawings_show_the_losses_that_are_measured(circuit, micro):
    heldout = {"circuit": {"loss": 0.1234}, "full": {"loss": 0.0456}}
    measured = dataclasses.replace(circuit, measured={"heldout": heldout})
    said = "3 nodes, 2 edges, task loss 0.123 nats (the full model: 0.046)"
    assert f"\\n{said}\\n" in to_dot(measured, micro)
    assert f'title: "micro in micro: {said}"' in to_mermaid(measured, micro)


@pytest.mark.parametrize(("write", "mark"), [(to_dot, "//"), (to_mermaid, "  %%")])
def test_drawings_without_a_known_task_or_tokenizer_say_so(write, mark, circuit, micro):
    text = write(circuit, micro)
    assert f"{mark} Without tokens and answers: the circuit has no pairs, and the task" in text
    assert "'A'" not in text
    assert "answer" not in text.replace("answers:", "")
    with pytest.raises(TaskError, match="no task 'micro'"):
        write(circuit, micro, "micro")
    micro.tokenizer = None
    built_in = dataclasses.replace(circuit, task="var_swap")
    text = write(built_in, micro)
    assert f"{mark} Without tokens and answers: task var_swap needs the model's tokenizer" in text
    with pytest.raises(TokenizerError, match="needs the model's tokenizer"):
        write(built_in, micro, MICRO_TASK)


def test_the_residual_stream_is_drawn_by_channel(circuit, micro):
    kept = dict(circuit.kept)
    kept["blocks.0.ln2.hook_read"] = torch.tensor([False, False, True, False])
    joined = dataclasses.replace(circuit, kept=kept)
    assert (
        '"0.attn_out 2" -> "0.mlp_in 2" [tooltip="0.attn_out 2 → 0.mlp_in 2: channel 2", '
        'label=" channel 2 ", style="dashed", color="#777777", fontcolor="#777777"];'
    ) in to_dot(joined, micro)
    assert '  attn_out_0_2 -.->|"channel 2"| mlp_in_0_2' in to_mermaid(joined, micro).splitlines()


#: Texts that would end a label, or be taken for markup, an escape or a comment.
HOSTILE = [
    'a "quote") ] } | end',
    "back\\slash \\n \\N",
    "line\nbreak\r\x00\x1b[31m",
    "<b>&amp;</b> &#34; #quot; #35;",
    "`**bold**` __init__ - 1. %%{init: {}}%%",
    "é 😀 \ud800",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_labels_and_tokens_end_nothing(text, circuit, micro, monkeypatch):
    monkeypatch.setattr(micro.tokenizer, "decode", lambda tokens: text)
    named = dataclasses.replace(circuit, task=text, model_name=text)
    named = named.with_labels({"0.attn_v h0.0": text})
    plain = to_dot(circuit, micro, MICRO_TASK)
    drawn = to_dot(named, micro, MICRO_TASK)
    assert len(drawn.splitlines()) == len(plain.splitlines())
    drawn.encode()
    # With the texts in quotes taken out, what is left is the same as for harmless names.
    quoted = r'"(?:[^"\\]|\\.)*"'
    assert re.sub(quoted, "", drawn) == re.sub(quoted, "", plain)
    lines = to_mermaid(named, micro, MICRO_TASK).splitlines()
    assert len(lines) == len(MERMAID.splitlines())
    title = json.loads(lines[1].removeprefix("title: "))
    assert title == f"{printable(text)} in {printable(text)}: 3 nodes, 2 edges"
    for line, plain_line in zip(lines[4:], MERMAID.splitlines()[4:], strict=True):
        assert re.sub('"[^"]*"', "", line) == re.sub('"[^"]*"', "", plain_line)
        for label in re.findall('"([^"]*)"', line):
            assert re.fullmatch(r"(?:[\w .+-]|<br/>|#[0-9]+;)*", label)
    if shutil.which("dot"):
        checked = subprocess.run(
            ["dot", "-Tcanon"], input=drawn, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def test_what_no_node_carries_is_said(circuit, micro):
    empty = dataclasses.replace(circuit - circuit, task="micro")
    none = "0 nodes, 0 edges; the circuit has no nodes: with every node at its mean, the embedding"
    assert f'"micro in micro: {none}' in to_mermaid(empty, micro)
    assert "0 nodes, 0 edges\\nthe circuit has no nodes: with every" in to_dot(empty, micro)


def test_the_token_of_a_newline_breaks_no_line(circuit, micro, monkeypatch):
    monkeypatch.setattr(micro.tokenizer, "decode", lambda tokens: "\n")
    assert r"""token 1" [label="'\\n'",""" in to_dot(circuit, micro, MICRO_TASK)
    # Mermaid would take a backslash and an n for a new line, so U+2060 stands between them.
    assert 'token_1(["#39;#92;#8288;n#39;"])' in to_mermaid(circuit, micro, MICRO_TASK)


def test_dot_draws_the_strongest_edges_of_a_large_circuit(circuit, micro, monkeypatch):
    monkeypatch.setattr("tl_sparse.circuits.dot.DOT_EDGES", 1)
    text = to_dot(circuit, micro)
    assert "3 nodes, 2 edges\\ndrawn: the 1 strongest edges; .graphml and .csv have all" in text
    assert '"0.attn_v h0.0" -> "0.attn_out 2" [tooltip' in text
    assert '"0.attn_in 0" -> "0.attn_v h0.0" [tooltip' not in text
    monkeypatch.setattr("tl_sparse.circuits.dot.MAX_WRITTEN_WEIGHTS", 0)
    assert 'label=" +2.00 "' not in to_dot(circuit, micro)


def test_mermaid_is_for_small_circuits(circuit, micro, monkeypatch):
    monkeypatch.setattr("tl_sparse.circuits.mermaid.MERMAID_LINKS", 1)
    with pytest.raises(CircuitError, match=r"at most 1 links, not 2: use \.dot, or the page"):
        to_mermaid(circuit, micro)


def test_tokens_of_prompts_of_different_lengths_are_those_that_differ(micro):
    inserted = Task("more", "", (" yes", " no"), lambda rng: ("f1 A f2 end", "f1 A B f2 end"))
    tokens, answers = task_tokens(micro, inserted)
    names = list(VOCABULARY)
    assert [names[token] for token in tokens] == ["B", "yes", "no"]
    assert [names[token] for token in answers] == ["yes", "no"]
    swapped = Task("swap", "", (" yes", " no"), lambda rng: ("f1 A B end", "f1 B A end"))
    tokens, _ = task_tokens(micro, swapped)
    assert [names[token] for token in tokens] == ["A", "B", "yes", "no"]


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


def test_attribution_graphs_that_would_show_something_else_are_refused(circuit, micro):
    held_norms = dataclasses.replace(circuit, frozen_norms=True)
    with pytest.raises(UnsupportedError, match="the norm scales of the full model"):
        attribution_graph(held_norms, micro, MICRO_TASK)
    with pytest.raises(TaskError, match="pair is -1; it must be at least 0"):
        attribution_graph(circuit, micro, MICRO_TASK, pair=-1)


def test_labels_are_in_attribution_graphs(circuit, micro):
    labelled = circuit.with_labels({"0.attn_v h0.0": "was it A?"})
    names = [node["clerp"] for node in attribution_graph(labelled, micro, MICRO_TASK)["nodes"]]
    assert "0.attn_v h0.0: was it A?" in names
    assert "0.attn_in 0" in names


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
    for write in (*DATA_FORMATS.values(), *DRAWINGS.values()):
        with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
            write(circuit, micro)
    with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
        attribution_graph(circuit, micro, MICRO_TASK)
    micro.tokenizer = None
    with pytest.raises(TokenizerError, match="needs the model's tokenizer"):
        attribution_graph(circuit, micro, MICRO_TASK)
