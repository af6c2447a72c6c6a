"""The data that a page contains, and the file; test_page.py is about its behaviour."""

import dataclasses
import json
import math
import re
import shlex

import pytest
import torch

import tl_sparse
from helpers import has_hooks
from micro import (
    EDGES,
    LOSS,
    MICRO_TASK,
    NODES,
    VOCABULARY,
    large,
    micro_circuit,
    micro_corpus,
    micro_model,
)
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.exports import to_networkx
from tl_sparse.cli import main
from tl_sparse.cli.config_flags import given_fields
from tl_sparse.cli.parser import build_parser
from tl_sparse.errors import CheckpointError, CircuitError, DataError, TaskError
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.view import drawing
from tl_sparse.view import page as page_module
from tl_sparse.view.contents import page_data
from tl_sparse.view.drawing import drawn
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.page import Page


@pytest.fixture(scope="module")
def micro():
    return micro_model()


@pytest.fixture(scope="module")
def data(micro):
    return page_data(micro_circuit(micro), micro, MICRO_TASK, micro_corpus())


def test_data_of_the_micro_circuit_on_paper(data, micro):
    assert [node["name"] for node in data["nodes"]] == NODES
    names = {i: node["name"] for i, node in enumerate(data["nodes"])}
    assert [(names[s], names[t], w) for s, t, w in data["edges"]] == EDGES
    read, value, written = data["nodes"]
    assert (read["openai"], value["head"], written["channel"]) == ("0.attn.act_in.0", 0, 2)
    assert [node["mean"] for node in data["nodes"]] == [0, 0, 0]
    # Without any one of its three nodes, the circuit does not distinguish the candidates.
    assert [node["effect"] for node in data["nodes"]] == pytest.approx(
        [math.log(2) - LOSS] * 3, abs=1e-6
    )
    assert data["summary"]["n_effect_pairs"] == LIMITS.effect_pairs
    assert [step[:2] for step in data["ladder"]] == [[1, 0], [2, 1], [3, 2]]
    assert [step[2] for step in data["ladder"]] == pytest.approx(
        [math.log(2)] * 2 + [LOSS], abs=1e-6
    )
    # The circuit has one loss: that of the head of the page is the last one of the curve.
    scores = data["summary"]["scores"]
    assert scores["circuit"]["loss"] == pytest.approx(LOSS, abs=1e-6)
    assert data["ladder"][-1][2:4] == [scores["circuit"]["loss"], scores["circuit"]["accuracy"]]
    assert data["ladder"][-1][4] == scores["circuit"]["next_token"]["kl"]
    assert data["summary"]["faithfulness"] == pytest.approx(1.0)
    assert data["summary"]["answers"] == [" yes", " no"]
    assert data["summary"]["misses_target"] is False
    assert data["summary"]["n_edges"] == 2
    yes, no = VOCABULARY["yes"], VOCABULARY["no"]
    assert written["tokens"] == [[[yes, 3.0]], [[no, -3.0]]]
    assert read["tokens"] == [[[VOCABULARY["A"], 1.0]], [[VOCABULARY["B"], -1.0]]]
    ends = data["ends"]
    words = [data["vocab"][token] for token in ends["tokens"]]
    candidates = [data["vocab"][token] for token in ends["candidates"]]
    assert words == ["A", "B", "yes", "no"]
    assert candidates == ["yes", "no"]
    assert ends["embed"] == [[0, 0, 1.0], [1, 0, -1.0]]
    assert ends["unembed"] == [[2, 0, 3.0], [2, 1, -3.0]]


def test_prompts_and_passages_have_the_values_on_paper(data):
    for pair in data["prompts"]:
        for side, sign in zip(pair, (1, -1), strict=True):
            assert [data["vocab"][token] for token in side["tokens"]][3] == "AB"[sign < 0]
            read, value, _ = side["values"]
            assert read == [0, 0, 0, sign * 999, 0, 0]  # 2, the largest activation
            assert value == read
            assert side["patterns"]["0.0"] == [[round(100 / n)] * n for n in range(1, 7)]
            # The circuit computes what the model computes.
            of_model, of_circuit = side["runs"]
            assert (of_model["name"], of_circuit["name"]) == ("model", "circuit")
            assert of_model | {"name": "circuit"} == of_circuit
    read = data["nodes"][0]
    assert read["scale"] == 2.0
    positive, negative = read["passages"]
    assert len(positive) == len(negative) == 4
    tokens, levels, peak = positive[0]
    assert (data["vocab"][tokens[peak]], levels[peak]) == ("A", 999)
    tokens, levels, peak = negative[0]
    assert (data["vocab"][tokens[peak]], levels[peak]) == ("B", -999)
    histogram = read["histogram"]
    assert (histogram["low"], histogram["high"], sum(histogram["counts"])) == (-2.0, 2.0, 40 * 6)
    assert histogram["counts"][0] == histogram["counts"][-1] == 20


def test_probabilities_are_what_they_are_called(data):
    """Between the two answers, the right one has exp(-LOSS); among all tokens, it has less."""
    side = data["prompts"][0][0]
    run = side["runs"][-1]
    right, wrong = run["logits"]
    others = len(VOCABULARY) - 2
    total = math.exp(right) + math.exp(wrong) + others
    assert run["share"] == pytest.approx(math.exp(-LOSS), rel=1e-3)
    assert run["probability"] == pytest.approx(math.exp(right) / total, rel=1e-3)
    most_likely, probability = run["top"][0]
    assert (most_likely, probability) == (side["answer"], run["probability"])
    assert len(run["top"]) == LIMITS.next_tokens
    # Of one node alone, the answers are as likely as all other tokens.
    smallest = side["at_sizes"][0]
    assert (smallest["n_nodes"], smallest["share"]) == (1, 0.5)
    assert smallest["probability"] == pytest.approx(1 / len(VOCABULARY), rel=1e-3)
    whole = side["at_sizes"][-1]
    assert whole == {"n_nodes": 3} | {key: run[key] for key in ("share", "probability", "top")}


def test_prompts_of_the_users_own(micro):
    found = page_data(micro_circuit(micro), micro, MICRO_TASK, prompts=["f1 f2 B end"])
    (own,), *pairs = found["prompts"]
    assert (own["right"], own["answer"], own["candidates"]) == (None, None, [])
    assert [found["vocab"][token] for token in own["tokens"]] == ["<s>", "f1", "f2", "B", "end"]
    read = own["values"][0]
    assert read == [0, 0, 0, -999, 0]
    run = own["runs"][-1]
    assert (run["share"], run["probability"], run["logits"]) == (None, None, [])
    assert found["vocab"][run["top"][0][0]] == "no"
    assert [len(sides) for sides in pairs] == [2] * LIMITS.prompt_pairs
    alone = page_data(micro_circuit(micro), micro, prompts=["B end"])  # the task is not known
    assert len(alone["prompts"]) == 1
    with pytest.raises(DataError, match=r"the prompt 'A A A A A A A A' has 9 tokens, more than"):
        page_data(micro_circuit(micro), micro, prompts=["A A A A A A A A"])
    with pytest.raises(DataError, match="the prompt '' has no tokens"):
        page_data(micro_circuit(micro), micro, prompts=[""])


def test_it_is_the_same_each_time_and_leaves_the_model_alone(data, micro):
    assert page_data(micro_circuit(micro), micro, MICRO_TASK, micro_corpus()) == data
    assert not has_hooks(micro)
    assert all(p.requires_grad for p in micro.parameters())


def test_the_ranking_of_the_search_is_taken_where_there_is_one(micro):
    circuit = micro_circuit(micro)
    scores = {name: mask.float() for name, mask in circuit.kept.items()}
    scores["blocks.0.hook_attn_out"][2] = 3
    scores["blocks.0.attn.hook_v"][0, 0] = 2
    found = page_data(dataclasses.replace(circuit, scores=scores), micro, MICRO_TASK)
    assert [node["rank"] for node in found["nodes"]] == [2, 1, 0]
    # The largest circuit has all 24 nodes, eight times as many as the circuit.
    assert [step[:2] for step in found["ladder"]][:3] == [[1, 0], [2, 1], [3, 2]]
    assert [step[0] for step in found["ladder"]][3:] == [6, 12, 24]
    assert found["ladder"][-1][2] == pytest.approx(LOSS, abs=1e-6)
    assert found["caps"]["ranked"] == "the search"


def test_cut_edges_are_not_edges_of_the_page_or_an_export(micro):
    """Without the edge from v to the write, the circuit does not distinguish the candidates."""
    circuit = micro_circuit(micro)
    left = circuit.edges(micro)[:1]
    pruned = dataclasses.replace(
        circuit, edge_set=frozenset((edge.source, edge.target) for edge in left)
    )
    found = page_data(pruned, micro, MICRO_TASK)
    assert found["edges"] == [[0, 1, 1.5]]
    assert found["summary"]["scores"]["circuit"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["prompts"][0][0]["values"][2] == [0] * 6
    assert list(to_networkx(pruned, micro).edges) == [EDGES[0][:2]]
    links = attribution_graph(pruned, micro, MICRO_TASK)["links"]
    assert "0_3000000_3" not in {link["source"] for link in links}


def test_dense_models_have_pages_too():
    import test_families as families

    model = families.small("llama")
    circuit = families.with_nodes(model, True)
    found = page_data(circuit, model, corpus=families.TOKENS)
    assert (len(found["nodes"]), len(found["edges"])) == (
        circuit.n_nodes,
        len(circuit.edges(model)),
    )
    assert found["caps"]["corpus_tokens"] == families.TOKENS.numel()
    means = torch.cat([mean.flatten() for mean in circuit.means.values()]).tolist()
    assert [node["mean"] for node in found["nodes"]] == pytest.approx(means, rel=1e-3)
    graph = to_networkx(circuit, model)
    assert graph.number_of_edges() == len(circuit.edges(model))
    assert graph.is_multigraph()  # W_in and W_gate


def test_the_command_makes_the_circuit_again(micro):
    config = PruneConfig(steps=7, method="integrated_gradients", tied_qk=True)
    circuit = dataclasses.replace(
        micro_circuit(micro), measured={"config": dataclasses.asdict(config) | {"old": 1}}
    )
    command = page_data(circuit, micro)["summary"]["command"]
    options = "--method=integrated_gradients --steps=7 --tied-qk"
    assert command == f"tl-sparse prune micro micro --out again {options}"
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert PruneConfig(**given_fields(args, PruneConfig)) == config


def test_a_task_whose_pairs_have_their_own_answers(micro):
    own = dataclasses.replace(
        MICRO_TASK, candidates=None, sample=lambda rng: (*MICRO_TASK.sample(rng), " yes", " no")
    )
    found = page_data(micro_circuit(micro), micro, own)
    assert [[found["vocab"][side["answer"]] for side in pair] for pair in found["prompts"]] == [
        ["yes", "no"]
    ] * 8


def test_without_corpus_means_task_or_tokenizer_there_is_less_to_show(micro):
    circuit = micro_circuit(micro)
    bare = page_data(dataclasses.replace(circuit, means={}), micro)  # "micro" is not in TASKS
    assert (bare["prompts"], bare["ladder"], bare["caps"]["corpus_tokens"]) == ([], [], 0)
    assert bare["nodes"][0]["effect"] is bare["nodes"][0]["mean"] is None
    looked_at = page_data(dataclasses.replace(circuit, means={}), micro, MICRO_TASK)
    assert [run["name"] for run in looked_at["prompts"][0][0]["runs"]] == ["model"]
    assert "without means" in looked_at["caps"]["sees"]
    model = micro_model()
    model.tokenizer = None
    untold = page_data(micro_circuit(model), model, MICRO_TASK, micro_corpus())
    assert (untold["prompts"], untold["vocab"][1]) == ([], "⟨1⟩")
    for page in (bare, looked_at, untold):
        assert "<svg" in Page(page).html


def test_what_cannot_be_drawn(micro, monkeypatch):
    circuit = micro_circuit(micro)
    empty = dataclasses.replace(
        circuit, kept={name: mask & False for name, mask in circuit.kept.items()}
    )
    with pytest.raises(
        CircuitError,
        match="of the last token alone reaches the target loss, so there is nothing to find",
    ):
        page_data(empty, micro)
    with pytest.raises(
        CircuitError,
        match="no edge of the circuit has an absolute weight of min_weight = 9 or more",
    ):
        page_data(circuit, micro, min_weight=9)
    with pytest.raises(TaskError, match="no task 'macro'"):
        page_data(circuit, micro, "macro")
    with pytest.raises(CircuitError, match="belongs to the model"):
        page_data(circuit, large(1, 8)[1])
    circuit, model = large(1, 16)
    for limit, most in (("edges", 100), ("nodes", 50)):
        with monkeypatch.context() as patched:
            patched.setattr(drawing, "LIMITS", dataclasses.replace(LIMITS, **{limit: most}))
            with pytest.raises(CircuitError, match="that can be drawn; min_weight = ") as raised:
                drawn(circuit, model)
            offered = float(re.search(r"min_weight = (\S+)", str(raised.value))[1])
            nodes, edges = drawn(circuit, model, offered)
            assert len(nodes if limit == "nodes" else edges) > most / 2
            assert all(abs(edge.weight) >= offered for edge in edges)


def test_a_page_too_large_has_fewer_prompts_then_passages(data, monkeypatch):
    full = len(Page(data).html)
    without = full - len(json.dumps(data["prompts"][1:], separators=(",", ":"))) + 2
    for limit, prompts in ((full - 10, 7), (without, 1)):
        limits = dataclasses.replace(LIMITS, page_bytes=limit)
        monkeypatch.setattr(page_module, "LIMITS", limits)
        page = Page(data).html
        assert len(page) <= limit
        assert len(embedded(page)["prompts"]) <= prompts
    monkeypatch.setattr(page_module, "LIMITS", dataclasses.replace(LIMITS, page_bytes=1000))
    with pytest.raises(CircuitError, match="draw fewer edges"):
        _ = Page(data).html


def embedded(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


def test_nothing_in_the_page_comes_from_elsewhere(data):
    page = Page(data).html
    assert embedded(page) == json.loads(json.dumps(data))
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "Mike Bostock" in page


def test_command_line(micro, tmp_path, capsys, monkeypatch):
    """The commands from start to end, with a model on disk that has no corpus."""
    monkeypatch.setitem(tl_sparse.tasks.TASKS, "micro", MICRO_TASK)
    monkeypatch.chdir(tmp_path)
    micro.save_pretrained(tmp_path / "micro")
    micro_circuit(micro).save(tmp_path / "circuit")
    own = ["--prompt", "f1 B end"]
    assert main(["view", "circuit", "-o", "page.html", "--device", "cpu", *own]) == 0
    printed = capsys.readouterr()
    assert "Saved page.html" in printed.out
    assert "the page has no passages" in printed.err
    assert "--corpus" in printed.err
    found = embedded((tmp_path / "page.html").read_text())
    assert found["nodes"][0]["name"] == NODES[0]
    assert found["summary"]["source"] == "circuit"
    assert [len(sides) for sides in found["prompts"][:2]] == [1, 2]
    assert main(["export", "circuit", "-o", "c.dot", "--device", "cpu"]) == 0
    assert "digraph" in (tmp_path / "c.dot").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "view nameless -o x.html",
            "nameless does not name its model; give it with --model",
        ),
        ("view homeless -o x.html", "give the circuit's model with --model"),
        ("view homeless -o x.html --model lost", "there is no folder 'lost'"),
        ("view nowhere -o x.html", "nowhere"),
        ("view circuit -o circuit", "cannot write circuit: it is a folder"),
        ("view circuit -o page.html/x.html", "cannot write page.html/x.html"),
        ("view circuit -o x.html --corpus none/*.py", "none/*.py"),
        ("view circuit -o x.html --task macro", "no task 'macro'"),
        ("export circuit -o x.gexf", "nothing is exported as '.gexf'"),
    ],
)
def test_mistakes_leave_no_file(command, message, micro, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tl_sparse.tasks.TASKS, "micro", MICRO_TASK)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").write_text("a page")
    micro.save_pretrained(tmp_path / "micro")
    circuit = micro_circuit(micro)
    circuit.save(tmp_path / "circuit")
    dataclasses.replace(circuit, model_name="").save(tmp_path / "nameless")
    dataclasses.replace(circuit, model_name="gone").save(tmp_path / "homeless")
    assert main(command.split()) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("*x.*"))


def test_saving(data, tmp_path):
    Page(data).save(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == Page(data).html
    with pytest.raises(CheckpointError, match="it is a folder"):
        Page(data).save(tmp_path)
