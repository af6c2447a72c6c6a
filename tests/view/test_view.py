"""The page: the data that it contains, and its behaviour in a real browser."""

import dataclasses
import html
import json
import math
import os
import re
import shlex
import shutil
from contextlib import ExitStack

import pytest
import torch

import tl_sparse
from helpers import has_hooks, node_means, word_tokenizer
from micro import (
    EDGES,
    LOSS,
    MICRO_TASK,
    NODES,
    VOCABULARY,
    micro_circuit,
    micro_corpus,
    micro_model,
    micro_tokenizer,
)
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.exports import to_networkx
from tl_sparse.circuits.fingerprints import fingerprint
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

HOSTILE = [
    "<s>", "</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
    "\u202egnp.exe\u2067", "\u2028\u2029", "\x00\x07\x1b[31m\x7f", "e" + "\u0301" * 300,
    "x" * 10_000, "{{data}}", "${window.hacked=1}",
]  # fmt: skip


def large(n_layers, width, keep=1.0):
    """A circuit of random nodes, a fraction `keep`, of a model with the micro task's tokens."""
    config = tl_sparse.SparseConfig(
        n_layers=n_layers,
        d_model=width,
        n_heads=4,
        d_head=width // 4,
        d_mlp=width,
        d_vocab=len(VOCABULARY),
        n_ctx=8,
        abs_topk=tl_sparse.paper_topk(0.5),
        attn_sinks=True,
        bigram_table=True,
        positions="concatenated",
        d_pos=2,
    )
    model = tl_sparse.create(config, seed=0, tokenizer=micro_tokenizer(), device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and "W_" in name:
                parameter *= torch.rand(parameter.shape, generator=generator) < 0.8
    means = node_means(model, micro_corpus())
    kept = {
        name: torch.rand(mean.shape, generator=generator) < keep for name, mean in means.items()
    }
    return Circuit(kept, means, fingerprint(model), "large", "micro"), model


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
            assert (of_model.pop("name"), of_circuit.pop("name")) == ("model", "circuit")
            assert of_model == of_circuit
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
    assert [step[0] for step in found["ladder"]][3:] == [4, 6, 8, 12, 17, 24]
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
        match="the embedding of the last token alone solves the task, so there is nothing to find",
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
    without = full - len(json.dumps(data["prompts"][1:]))
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
    assert main(["view", "circuit", "-o", "page.html", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "Saved page.html" in printed.out
    assert "the page has no passages" in printed.err
    assert "--corpus" in printed.err
    assert embedded((tmp_path / "page.html").read_text())["nodes"][0]["name"] == NODES[0]
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


# Tests in a browser


@pytest.fixture(scope="module")
def browser():
    """The system's or playwright's Chromium; TL_SPARSE_BROWSER=required forbids skipping."""
    with ExitStack() as stack:
        try:
            from playwright.sync_api import sync_playwright

            playwright = stack.enter_context(sync_playwright())
            path = next(
                filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None,
            )
            root = hasattr(os, "geteuid") and os.geteuid() == 0
            chromium = playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox"] * root
            )
        except Exception as error:  # playwright is missing, or no browser starts
            if os.environ.get("TL_SPARSE_BROWSER") == "required":
                raise
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        stack.callback(chromium.close)
        yield chromium


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page; at the end, checks for errors and for requests other than for the file."""
    pages, errors, requests = [], [], []

    def open_page(content, **options):
        (tmp_path / "page.html").write_text(
            content if isinstance(content, str) else Page(content).html
        )
        page = browser.new_page(viewport={"width": 1500, "height": 1000}, **options)
        pages.append(page)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{tmp_path}/page.html")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []
    assert all(url.startswith(("file:", "about:")) for url in requests)


def count(page, selector):
    return page.locator(selector).count()


def slide(page, name, value):
    move = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }"
    page.locator(f"#{name}").evaluate(move, value)


def pinned(page):
    return page.locator("#panel h2").inner_text()


def test_the_page_shows_the_circuit_and_its_summary(data, opened):
    page = opened(data, permissions=["clipboard-read", "clipboard-write"])
    assert page.title() == "micro in micro"
    assert (
        count(page, ".node:not(.terminal)"),
        count(page, "path.edge"),
        count(page, ".terminal"),
    ) == (3, 2, 6)
    assert page.locator("#shown").inner_text() == "3 of 3 nodes, 2 of 2 edges"
    assert page.locator("#lede").inner_text() == "3 of 24 nodes and 2 edges: was it A or B?"
    scores = page.locator("#scores").inner_text()
    assert all(f"{loss:.3f}" in scores for loss in (LOSS, math.log(2)))
    assert "Each node has at most 4 passages" in page.locator("#caps").inner_text()
    page.click("#copy")
    page.wait_for_selector("text=Copied")
    quote = page.evaluate("navigator.clipboard.readText()")
    assert quote.startswith("Circuit of micro in micro: 3 of 24 nodes and 2 edges")
    assert "circuit alone: task loss 2.1e−4, accuracy 100.0\u202f%" in quote


def test_hover_lights_up_paths_and_a_click_pins(data, opened):
    page = opened(data)
    page.hover("[data-name='0.attn_v h0.0'] circle")
    assert count(page, "path.edge.near") == 2
    # All three nodes, the tokens A and B, and both candidates are highlighted.
    assert count(page, ".node.lit") == 3 + 2 + 2
    page.mouse.move(5, 5)
    assert count(page, ".dimmed") == 0
    page.click("[data-name='0.attn_v h0.0'] circle")
    assert pinned(page) == "0.attn_v h0.0"
    text = page.locator("#panel").inner_text()
    for part in (
        "0.attn.v.0",
        "head 0, channel 0",
        "0.attn_in 0",
        "+1.5",
        "0.attn_out 2",
        "+2",
        "0.693",
    ):
        assert part in text, part
    for heading in (
        "incoming edges",
        "outgoing edges",
        "attention of head 0",
        "most positive",
        "most negative",
    ):
        assert heading in text.lower()
    assert count(page, ".passage .token.peak") >= 8
    assert count(page, ".patterns canvas") == 2
    page.locator(".patterns canvas").first.hover()
    assert "attends to" in page.locator("#attention").inner_text()
    page.click("#panel .link >> text=0.attn_out 2")
    text = page.locator("#panel").inner_text().lower()
    assert "logits it raises" in text
    assert "logits it lowers" in text
    page.keyboard.press("Escape")
    assert pinned(page) == "Nodes that matter most"
    assert count(page, ".dimmed") == 0


def test_search_by_either_name(data, opened):
    page = opened(data)
    page.keyboard.press("/")
    page.keyboard.type("resid_delta")  # OpenAI's name
    assert count(page, ".node.match") == 1
    assert page.locator("#found").inner_text() == "1"
    page.keyboard.press("Enter")
    assert pinned(page) == "0.attn_out 2"
    page.fill("#search", "no such node")
    assert page.locator("#found").inner_text() == "0"


def test_filters_and_sizes_take_away_and_give_back(data, opened):
    page = opened(data)
    slide(page, "weight", 100)
    assert count(page, "path.edge:not(.off)") == 1
    assert page.locator("#shown").inner_text() == "3 of 3 nodes, 1 of 2 edges"
    slide(page, "weight", 0)
    for size, _ in enumerate(data["ladder"]):
        slide(page, "size", size)
        n_nodes, n_edges, *_ = data["ladder"][size]
        assert count(page, ".node:not(.terminal, .off)") == n_nodes
        assert count(page, "path.edge:not(.off)") == n_edges
        assert page.locator("#size-value").inner_text().startswith(f"{n_nodes} node")
    page.keyboard.press("[")
    assert count(page, ".node.off") == 1


def test_prompts_are_shown_side_by_side_and_shaded(data, opened):
    page = opened(data)
    first = page.locator("#sides").inner_text()
    assert page.locator("#pair").inner_text() == "pair 1 of 8"
    assert count(page, ".prompt") == 2
    assert count(page, ".prompt .differs") == 2
    assert "circuit 100" in page.locator(".verdict").first.inner_text()
    page.keyboard.press("n")
    assert page.locator("#pair").inner_text() == "pair 2 of 8"
    assert page.locator("#sides").inner_text() != first
    page.keyboard.press("p")
    page.locator(".prompt").first.locator(".token").nth(3).click()
    assert "0.attn_in 0" in page.locator("#flow").inner_text()
    assert [
        cell.inner_text() for cell in page.locator("#flow tr").first.locator(".number").all()
    ] == ["3", "−3"]
    halves = page.locator("[data-name='0.attn_in 0'] .half")
    fills = [half.evaluate("half => getComputedStyle(half).fill") for half in halves.all()]
    assert len(set(fills)) == 2
    page.click("#values")
    fills = [half.evaluate("half => getComputedStyle(half).fill") for half in halves.all()]
    assert len(set(fills)) == 1


def test_keys(data, opened):
    page = opened(data)
    page.keyboard.press("ArrowUp")
    assert pinned(page) == "0.attn_in 0"
    page.keyboard.press("ArrowUp")
    assert pinned(page) == "0.attn_v h0.0"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")  # the only node in its row
    assert pinned(page) == "0.attn_in 0"
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.keyboard.press("t")
    assert page.evaluate(background) != light
    before = page.locator("#graph > g").first.get_attribute("transform")
    page.keyboard.press("+")
    assert page.locator("#graph > g").first.get_attribute("transform") != before
    page.keyboard.press("0")
    assert page.locator("#graph > g").first.get_attribute("transform") == before
    page.mouse.move(600, 500)
    page.mouse.wheel(0, -300)
    assert page.locator("#graph > g").first.get_attribute("transform") != before
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_light_and_dark_follow_the_system(data, opened):
    backgrounds = [
        opened(data, color_scheme=scheme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for scheme in ("light", "dark")
    ]
    assert backgrounds == ["rgb(250, 250, 247)", "rgb(18, 19, 22)"]


def test_a_hostile_corpus_executes_and_breaks_nothing(opened):
    words = HOSTILE + [f"w{i}" for i in range(len(VOCABULARY) - len(HOSTILE))]
    model = micro_model(word_tokenizer(words, bos_token="<s>"))
    evil = "</script><script>window.hacked=1</script><b>"
    circuit = dataclasses.replace(micro_circuit(model), model_name=evil, task=evil)
    corpus = torch.arange(40).remainder(len(HOSTILE)).repeat(8).view(40, 8)
    with torch.no_grad():
        found = page_data(circuit, model, None, corpus)
    found["prompts"], found["ends"] = [], found["ends"] | {"tokens": [1, 2], "candidates": [3, 4]}
    found["summary"]["scores"] = {"full": {"loss": "<b>", "accuracy": None}, "circuit": 3}
    page = opened(found)
    assert count(page, ".node:not(.terminal)") == 3
    for name in NODES:
        page.click(f"[data-name='{name}'] circle")
        assert pinned(page) == name
    assert page.evaluate("window.hacked") is None
    assert count(page, "script") == 3
    assert count(page, "b, img") == 0
    assert page.locator("#task").inner_text() == evil
    assert max(map(len, page.locator(".passage").all_inner_texts())) < 28 * 45
    passages = "".join(page.locator(".passage").all_inner_texts())
    assert "␀" in passages
    assert "\x00" not in passages
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_in_a_notebook(data, opened):
    shown = Page(data)._repr_html_()
    page = opened(f"<!doctype html><h1>Notebook</h1>{shown}")
    frame = page.frame_locator("iframe")
    frame.locator("[data-name='0.attn_v h0.0'] circle").click()
    assert frame.locator("#panel h2").inner_text() == "0.attn_v h0.0"
    assert html.unescape(re.search('srcdoc="(.*)"', shown, re.DOTALL)[1]) == Page(data).html


@pytest.mark.parametrize(("n_layers", "width", "keep"), [(1, 8, 0.4), (2, 16, 0.5), (4, 32, 0.53)])
def test_sizes_and_times(n_layers, width, keep, opened, record_property):
    circuit, model = large(n_layers, width, keep)
    found = page_data(circuit, model, MICRO_TASK, micro_corpus())
    page = opened(found)
    edges = len(circuit.edges(model))
    assert (count(page, ".node:not(.terminal)"), count(page, "path.edge")) == (
        circuit.n_nodes,
        edges,
    )
    page.wait_for_selector("[data-ready]")
    milliseconds, size = int(page.get_attribute("html", "data-ready")), len(Page(found).html)
    record_property(
        "page", f"{circuit.n_nodes} nodes, {edges} edges: {size:,} bytes, {milliseconds} ms"
    )
    print(f"{circuit.n_nodes} nodes, {edges} edges: {size:,} bytes, {milliseconds} ms")
    assert size <= 5_000_000
    assert milliseconds < 3000  # about one second on an idle machine
    page.hover(f"[data-name='{circuit.nodes[0]}'] circle", force=True)


def test_saving(data, tmp_path):
    Page(data).save(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == Page(data).html
    with pytest.raises(CheckpointError, match="it is a folder"):
        Page(data).save(tmp_path)
