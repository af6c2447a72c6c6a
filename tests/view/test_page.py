"""The behaviour of the page of a circuit in a real browser."""

import copy
import dataclasses
import html
import json
import math
import os
import re
import shutil
import xml.etree.ElementTree as ET
from contextlib import ExitStack
from urllib.parse import quote

import pytest
import torch

from helpers import word_tokenizer
from micro import (
    LOSS,
    MICRO_TASK,
    NODES,
    VOCABULARY,
    large,
    micro_circuit,
    micro_corpus,
    micro_model,
)
from tl_sparse.certificates import certifying
from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.view import explained as explained_view
from tl_sparse.view.contents import page_data
from tl_sparse.view.limits import LIMITS
from tl_sparse.view.page import SCRIPTS, WEB, Page

pytestmark = pytest.mark.any_line

READ, VALUE, WRITE = NODES
HOSTILE = [
    "<s>", "</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
    "\u202egnp.exe\u2067", "\u2028\u2029", "\x00\x07\x1b[31m\x7f", "e" + "\u0301" * 300,
    "x" * 10_000, "{{data}}", "${window.hacked=1}",
]  # fmt: skip


def judged_by_few(circuit):
    """The circuit as if it had been found and judged with few pairs, so that its page is quick."""
    config = PruneConfig(train_pairs=8, selection_pairs=8, heldout_pairs=16)
    return dataclasses.replace(circuit, measured={"config": dataclasses.asdict(config)})


@pytest.fixture(scope="module")
def data():
    model = micro_model()
    circuit = judged_by_few(micro_circuit(model))
    return page_data(circuit, model, MICRO_TASK, micro_corpus())


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

    def open_page(content, fragment="", **options):
        (tmp_path / "page.html").write_text(
            content if isinstance(content, str) else Page(content).html
        )
        page = browser.new_page(viewport={"width": 1500, "height": 1000}, **options)
        pages.append(page)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{tmp_path}/page.html{fragment}")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []
    assert all(url.startswith(("file:", "about:", "data:", "blob:")) for url in requests)


def count(page, selector):
    return page.locator(selector).count()


def slide(page, name, value):
    move = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }"
    page.locator(f"#{name}").evaluate(move, value)


def click_node(page, name):
    page.click(f"[data-name='{name}'] circle")


def pinned(page):
    return page.locator("#panel h2").inner_text().removesuffix(" #")


def edges_listed(page, title):
    """The cells of the table of edges under a heading in the panel, row by row."""
    table = page.locator(f"#panel h3:has-text('{title}') + table")
    rows = table.locator("tr").all()[1:]
    return [[cell for cell in row.locator("td").all_inner_texts() if cell] for row in rows]


def next_tokens(page, side=0):
    """The rows of the table of next tokens of one prompt, each as its texts."""
    rows = page.locator(".answers").nth(side).locator("tr").all()
    return [
        [cell.replace("\u202f", " ") for cell in row.locator("th, td").all_inner_texts()]
        for row in rows
    ]


def outline_of_graph(page):
    return page.locator("#graph").evaluate("graph => getComputedStyle(graph).outlineStyle")


def test_sources_are_readable():
    """A maintainer reads the scripts and styles as they are; d3 is a build of its own."""
    for path in WEB.iterdir():
        if path.name.startswith("d3."):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 100, path.name
        assert len(lines) <= 450, path.name
    assert {path.name for path in WEB.glob("*.js")} == {*SCRIPTS, "d3.min.js"}


def test_the_page_shows_the_circuit_and_its_scores(data, opened):
    page = opened(data, permissions=["clipboard-read", "clipboard-write"])
    assert page.title() == "micro in micro"
    assert count(page, ".node:not(.terminal)") == 3
    assert count(page, "path.edge") == 2
    assert count(page, ".terminal") == 6
    assert page.locator("#shown").inner_text() == "3 of 3 nodes, 2 of 2 edges"
    assert page.locator("#lede").inner_text() == "3 of 24 nodes and 2 edges: was it A or B?"
    table = [row.split("\t") for row in page.locator("#scores").inner_text().split("\n")]
    assert table[0][1:] == [
        "task loss", "accuracy", "logit difference", "P(answer)", "KL from model", "faithfulness"
    ]  # fmt: skip
    rows = {name: row for name, *row in table[1:]}
    assert list(rows) == ["model", "circuit alone", "no nodes", "without the circuit"]
    assert rows["circuit alone"] == rows["model"]
    assert rows["model"][0] == f"{LOSS:.3f} ± 0.000"
    assert rows["no nodes"][0] == f"{math.log(2):.3f} ± 0.000"
    assert [row[-1] for row in rows.values()] == ["1.00", "1.00", "0.00", "0.00"]
    note = page.locator("#loss-note").inner_text()
    assert "in nats; guessing gives 0.693 (ln 2)" in note
    assert "standard error over" in note
    assert page.locator("#miss").is_hidden()
    page.click("details summary")
    assert (
        "probability of the right answer among all tokens"
        in page.locator("#scores-section details").inner_text()
    )
    assert "Each node has at most 4 passages" in page.locator("#caps").inner_text()
    page.click("#copy")
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("Circuit of micro in micro: 3 of 24 nodes and 2 edges")
    assert "circuit alone: task loss 0.000 ± 0.000, accuracy 100.0\u202f%" in copied


def test_hover_lights_up_paths_and_a_click_pins(data, opened):
    page = opened(data)
    page.hover(f"[data-name='{VALUE}'] circle")
    assert count(page, "path.edge.near") == 2
    # All three nodes, the tokens A and B, and both candidates are highlighted.
    assert count(page, ".node.lit") == 3 + 2 + 2
    page.mouse.move(5, 5)
    assert count(page, ".dimmed") == 0
    click_node(page, VALUE)
    assert outline_of_graph(page) == "none"
    assert pinned(page) == VALUE
    text = page.locator("#panel").inner_text()
    for part in (
        "0.attn.v.0",
        "head 0, channel 0",
        "+0.693",
        f"mean of {data['summary']['n_effect_pairs']} pairs",
    ):
        assert part in text, part
    for heading in ("attention of head 0", "most positive", "most negative"):
        assert heading in text.lower()
    assert count(page, ".passage .token.peak") >= 8
    assert count(page, ".patterns canvas") == 2
    page.locator(".patterns canvas").first.hover()
    assert "attends to" in page.locator("#attention").inner_text()
    page.click(f"#panel .link >> text={WRITE}")
    text = page.locator("#panel").inner_text().lower()
    assert "logits it raises" in text
    assert "logits it lowers" in text
    page.keyboard.press("Escape")
    assert pinned(page) == "Nodes that matter most"
    assert count(page, ".dimmed") == 0


def test_edges_have_weight_and_weight_times_activation(data, opened):
    page = opened(data, fragment="#0.attn_v-h0.0")
    assert pinned(page) == VALUE
    # At the last token, `end`, the read is 0; there the head has moved ±3 from one of six tokens.
    assert edges_listed(page, "Incoming edges") == [[READ, "+1.50", "0", "0"]]
    assert edges_listed(page, "Outgoing edges") == [[WRITE, "+2", "+1.0", "−1.0"]]
    page.locator(".prompt").first.locator(".token").nth(3).click()
    assert edges_listed(page, "Incoming edges") == [[READ, "+1.50", "+3", "−3"]]
    assert edges_listed(page, "Outgoing edges") == [[WRITE, "+2", "+1.5", "−1.5"]]
    # The token can be chosen by keys, too.
    page.locator(".prompt").first.focus()
    page.keyboard.press("ArrowLeft")
    assert edges_listed(page, "Incoming edges") == [[READ, "+1.50", "0", "0"]]


def test_search_by_either_name(data, opened):
    page = opened(data)
    page.keyboard.press("/")
    page.keyboard.type("resid_delta")  # OpenAI's name
    assert count(page, ".node.match") == 1
    assert page.locator("#found").inner_text() == "1"
    page.keyboard.press("Enter")
    assert pinned(page) == WRITE
    page.fill("#search", "no such node")
    assert page.locator("#found").inner_text() == "0"


def test_filters_and_sizes_take_away_and_give_back(data, opened):
    page = opened(data)
    slide(page, "weight", 100)
    assert count(page, "path.edge") == 1
    assert page.locator("#shown").inner_text() == "3 of 3 nodes, 1 of 2 edges"
    assert (
        "Drawn are the 1 edge of absolute weight 2 or more"
        in page.locator("#threshold").inner_text()
    )
    page.click("#all")
    assert page.locator("#threshold").is_hidden()
    for size, (n_nodes, n_edges, loss, accuracy, _) in enumerate(data["ladder"]):
        slide(page, "size", size)
        assert count(page, ".node:not(.terminal)") == n_nodes
        assert count(page, "path.edge") == n_edges
        text = page.locator("#size-value").inner_text()
        assert text.startswith(f"{n_nodes} node")
        assert f"task loss {loss:.3f}, accuracy {100 * accuracy:.1f}" in text
        # What the circuit says is that of the shown size; what the model says stays.
        at_size = data["prompts"][0][0]["at_sizes"][size]
        title, share, probability, *_ = next_tokens(page)
        n = f"{n_nodes} node{'s' * (n_nodes > 1)}"
        assert title[1:] == ["model", "circuit" if n_nodes == 3 else f"circuit of {n}"]
        assert share[1:] == ["100.0 %", f"{100 * at_size['share']:.1f} %"]
        assert probability[2] == f"{100 * at_size['probability']:.1f} %"
    page.keyboard.press("[")
    assert count(page, ".node:not(.terminal)") == 2
    assert "#size=2" in page.url


def test_prompts_stand_side_by_side_with_their_probabilities(data, opened):
    page = opened(data)
    first = page.locator("#sides").inner_text()
    assert page.locator("#pair").inner_text() == "pair 1 of 8"
    assert count(page, ".prompt") == 2
    assert page.locator(".prompt .differs").all_inner_texts() == ["A", "B"]
    run = data["prompts"][0][0]["runs"][1]
    title, share, probability, top, *others = next_tokens(page)
    assert title == ["next token", "model", "circuit"]
    assert share[0] == "yes of the two answers"
    assert probability == ["yes of all tokens"] + [f"{100 * run['probability']:.1f} %"] * 2
    assert top[0] == "the 5 most likely"
    assert top[1].split() == ["yes", *probability[1].split()]
    assert len(others) == 4
    assert next_tokens(page, side=1)[1][0] == "no of the two answers"
    # The answers stand in the order of the prompts, in the graph too.
    answers = page.locator("[data-name='yes'], [data-name='no']").all()
    places = {mark.get_attribute("data-name"): mark.bounding_box() for mark in answers[-2:]}
    assert places["yes"]["x"] < places["no"]["x"]
    page.keyboard.press("n")
    assert page.locator("#pair").inner_text() == "pair 2 of 8"
    assert page.locator("#sides").inner_text() != first
    page.keyboard.press("p")
    page.locator(".prompt").first.locator(".token").nth(3).click()
    assert READ in page.locator("#flow").inner_text()
    numbers = page.locator("#flow tr").first.locator(".number").all_inner_texts()
    assert numbers == ["3", "−3"]
    halves = page.locator(f"[data-name='{READ}'] .half")
    fills = [half.evaluate("half => getComputedStyle(half).fill") for half in halves.all()]
    assert len(set(fills)) == 2
    page.click("#values")
    fills = [half.evaluate("half => getComputedStyle(half).fill") for half in halves.all()]
    assert len(set(fills)) == 1


def test_what_is_special_is_said(data, opened):
    """Own prompts, prompts of different lengths, a missed target, loose and positional nodes."""
    special = copy.deepcopy(data)
    special["edges"] = special["edges"][:1]
    read, _, write = special["nodes"]
    read |= {"name": "0.attn_in p2", "channel": "p2"}
    write["effect"] = 0.0
    special["ends"] |= {"bigram": True, "embed": [], "unembed": []}
    special["summary"]["misses_target"] = True
    special["summary"]["scores"]["target_loss"] = 0.15
    first, second = special["prompts"][0]
    first["tokens"] = first["tokens"][1:]  # `<s>` is missing on the left
    first["values"] = [levels[1:] for levels in first["values"]]
    own = copy.deepcopy(second) | {"right": None, "answer": None, "candidates": []}
    for run in [*own["runs"], *own["at_sizes"]]:
        run |= {"share": None, "probability": None}
    special["prompts"].insert(0, [own])
    page = opened(special, fragment="#0.attn_out-2&pair=2")
    assert "Misses its target" in page.locator("#miss").inner_text()
    assert "above the 0.15" in page.locator("#miss").inner_text()
    assert page.locator(".prompt .differs").all_inner_texts() == ["A", "<s>", "B"]
    text = page.locator(".explanation").inner_text()
    assert "Nothing joins it to another node" in text
    assert "it has no effect" in text
    assert "no node carries its share" in page.locator("#panel").inner_text()
    assert page.locator("#bigram").is_visible()
    assert count(page, ".node.loose") == 1
    page.keyboard.press("p")
    assert page.locator("#pair").inner_text() == "own prompt 1 of 1"
    assert count(page, ".prompt") == 1
    assert next_tokens(page)[1][0] == "the 5 most likely"
    click_node(page, "0.attn_in p2")
    assert "position channel 2" in page.locator("#panel").inner_text()
    assert page.locator("[data-name='0.attn_in p2'] .caption").text_content() == "p2"
    page.keyboard.press("Escape")
    assert "WITHOUT EDGES · 1" in page.locator("#panel").inner_text()


def test_labels_are_shown_kept_and_copied(data, opened):
    labelled = copy.deepcopy(data)
    labelled["nodes"][0]["label"] = "is it A"
    allowed = ["clipboard-read", "clipboard-write"]
    page = opened(labelled, fragment="#0.attn_v-h0.0", permissions=allowed)
    assert page.locator(f"[data-name='{READ}'] .caption").text_content() == "0 is it A"
    page.fill("#label", "carries <b>A</b>")
    assert "v0 carries <b>A" in page.locator(f"[data-name='{VALUE}'] .caption").text_content()
    page.reload()
    assert page.input_value("#label") == "carries <b>A</b>"
    click_node(page, READ)
    assert "carries <b>A</b>" in page.locator("#panel table").first.inner_text()
    page.fill("#label", "")
    page.click("#copy-labels")
    page.wait_for_selector("text=Copied")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied == {READ: "", VALUE: "carries <b>A</b>"}
    circuit = micro_circuit(micro_model()).with_labels(copied)
    assert {str(node): label for node, label in circuit.labels.items()} == {
        VALUE: "carries <b>A</b>"
    }
    page.fill("#search", "CARRIES")
    assert page.locator("#found").inner_text() == "1"
    # Another circuit has its own labels.
    labelled["edges"][0][2] = 1.25
    (other := opened(labelled)).goto(f"{page.url.split('#')[0]}#0.attn_v-h0.0")
    assert other.input_value("#label") == ""


def test_links_restore_node_pair_and_size(data, opened):
    first, second, _ = sorted(data["nodes"], key=lambda node: node["rank"])
    page = opened(data, fragment="#pair=3&size=2")
    assert page.locator("#pair").inner_text() == "pair 3 of 8"
    assert count(page, ".node:not(.terminal)") == 2
    click_node(page, first["name"])
    assert page.url.endswith(f"#{first['name'].replace(' ', '-')}&pair=3&size=2")
    click_node(page, second["name"])
    page.go_back()
    assert pinned(page) == first["name"]
    page.evaluate("location.hash = '0.attn.act_in.0'")  # OpenAI's name
    page.wait_for_function(
        "document.querySelector('#panel h2').textContent.startsWith('0.attn_in')"
    )
    assert page.locator("#pair").inner_text() == "pair 1 of 8"
    page.evaluate("location.hash = 'pair=99&size=77&nonsense%'")
    page.wait_for_function("document.querySelector('#pair').textContent === 'pair 8 of 8'")
    assert pinned(page) == "Nodes that matter most"


def test_the_graph_is_saved_as_svg_and_png(data, opened):
    page = opened(data, color_scheme="dark")
    with page.expect_download() as download:
        page.click("#svg")
    assert download.value.suggested_filename == "micro-micro.svg"
    text = download.value.path().read_text(encoding="utf-8")
    root = ET.fromstring(text)
    shapes = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert shapes.count("circle") == 3
    assert "Circuit of micro in micro" in text
    # It needs no styles of the page, and is light although the page is dark.
    assert not re.search(r"var\(|color-mix|oklab|class=|<style", text)
    back = next(element for element in root.iter() if element.tag.endswith("rect"))
    assert back.get("fill") == "#fff"
    assert 'fill="rgb(28,29,32)"' in text
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 22)"
    # As a file of its own, it looks as it was seen.
    page.goto(f"data:image/svg+xml,{quote(text)}")
    assert page.evaluate("getComputedStyle(document.querySelector('text')).fontSize") == "11px"
    page.go_back()
    with page.expect_download() as download:
        page.click("#png")
    assert download.value.suggested_filename == "micro-micro.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_keys(data, opened):
    page = opened(data)
    page.keyboard.press("ArrowUp")
    assert pinned(page) == READ
    page.keyboard.press("ArrowUp")
    assert pinned(page) == VALUE
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")  # the only node in its row
    assert pinned(page) == READ
    page.locator("#panel .link").first.focus()
    page.keyboard.press("Enter")
    assert pinned(page) == VALUE
    assert page.evaluate("document.activeElement.tagName") == "H2"
    page.locator("#png").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "graph"
    assert outline_of_graph(page) == "solid"
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.keyboard.press("t")
    assert page.evaluate(background) != light
    world = page.locator("#graph > .world")
    before = world.get_attribute("transform")
    page.keyboard.press("+")
    assert world.get_attribute("transform") != before
    page.keyboard.press("0")
    assert world.get_attribute("transform") == before
    page.mouse.move(600, 500)
    page.mouse.wheel(0, -300)
    assert world.get_attribute("transform") != before
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def luminance(color):
    """The relative luminance of an sRGB colour, as WCAG defines it."""
    parts = [part / 255 for part in color]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(
    ("scheme", "background"), [("light", [250, 250, 247]), ("dark", [18, 19, 22])]
)
def test_colours_follow_the_system_and_are_legible(data, opened, scheme, background):
    page = opened(data, color_scheme=scheme)
    color = """css => {
        const ink = document.createElement("canvas").getContext("2d");
        const element = document.body.appendChild(document.createElement("i"));
        element.style.color = css;
        ink.fillStyle = getComputedStyle(element).color;
        ink.fillRect(0, 0, 1, 1);
        return [...ink.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }"""
    colors = {name: page.evaluate(color, f"var(--{name})") for name in (
        "bg", "surface", "band", "ink", "muted", "pos", "neg", "warning", "warning-back"
    )}  # fmt: skip
    assert colors["bg"] == background
    for text in ("ink", "muted", "pos", "neg"):
        for back in ("bg", "surface", "band"):
            assert contrast(colors[text], colors[back]) >= 4.5, (text, back)
    assert contrast(colors["warning"], colors["warning-back"]) >= 4.5
    for sign in ("pos", "neg"):  # text on the strongest shade of an activation
        shade = page.evaluate(color, f"color-mix(in oklab, var(--{sign}) 50%, var(--surface))")
        assert contrast(colors["ink"], shade) >= 4.5, sign


def test_a_hostile_corpus_executes_and_breaks_nothing(opened):
    words = HOSTILE + [f"w{i}" for i in range(len(VOCABULARY) - len(HOSTILE))]
    model = micro_model(word_tokenizer(words, bos_token="<s>"))
    evil = "</script><script>window.hacked=1</script><b>"
    circuit = dataclasses.replace(micro_circuit(model), model_name=evil, task=evil)
    circuit = circuit.with_labels({NODES[0]: evil})
    corpus = torch.arange(40).remainder(len(HOSTILE)).repeat(8).view(40, 8)
    with torch.no_grad():
        found = page_data(circuit, model, None, corpus)
    found["prompts"], found["ends"] = [], found["ends"] | {"tokens": [1, 2], "candidates": [3, 4]}
    found["summary"]["scores"] = {"full": {"loss": "<b>", "accuracy": None}, "circuit": 3}
    page = opened(found)
    assert count(page, ".node:not(.terminal)") == 3
    for name in NODES:
        click_node(page, name)
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
    frame.locator(f"[data-name='{VALUE}'] circle").click()
    assert frame.locator("#panel h2").inner_text().startswith(VALUE)
    assert html.unescape(re.search('srcdoc="(.*)"', shown, re.DOTALL)[1]) == Page(data).html
    # The frame forbids downloads, the clipboard and storage; what is lost by this is said.
    frame.locator("#svg").click()
    assert "allows no downloads" in frame.locator("#text-title").inner_text()
    assert frame.locator("#text").input_value().startswith("<svg")
    page.keyboard.press("Escape")
    frame.locator("#png").click()
    assert "save(" in frame.locator("#text").input_value()
    page.keyboard.press("Escape")
    frame.locator("#label").fill("carries A")
    assert "copy the labels before you leave" in frame.locator("#panel").inner_text()
    frame.locator("#copy-labels").click()
    assert json.loads(frame.locator("#text").input_value()) == {VALUE: "carries A"}


@pytest.mark.parametrize(("n_layers", "width", "keep"), [(1, 8, 0.4), (4, 32, 0.53)])
def test_sizes_and_times(n_layers, width, keep, opened, record_property):
    circuit, model = large(n_layers, width, keep)
    # The effects of hundreds of nodes take a minute to measure, so they are made up.
    unmeasured = dataclasses.replace(judged_by_few(circuit), means={})
    found = page_data(unmeasured, model, MICRO_TASK, micro_corpus())
    for i, node in enumerate(found["nodes"]):
        node["effect"] = 1 / (1 + i)
    page = opened(found)
    n_edges = len(circuit.edges(model))
    page.wait_for_selector("[data-ready]")
    milliseconds, size = int(page.get_attribute("html", "data-ready")), len(Page(found).html)
    measured = f"{circuit.n_nodes} nodes, {n_edges} edges: {size:,} bytes, {milliseconds} ms"
    record_property("page", measured)
    print(measured)
    assert size <= 5_000_000
    assert milliseconds < 3000  # about one second on an idle machine
    if n_edges > 400:  # The strongest edges are drawn first, and the page says so.
        assert count(page, "path.edge") == pytest.approx(250, abs=5)
        assert "Chosen because the circuit is large" in page.locator("#threshold").inner_text()
        drawn = count(page, ".node:not(.terminal)")
        assert count(page, ".caption:not(:empty)") > 10
        page.click("#all")
        assert drawn < count(page, ".node:not(.terminal)")
    assert page.locator("#threshold").is_hidden()
    assert count(page, "path.edge") == n_edges
    assert count(page, ".node:not(.terminal)") == circuit.n_nodes
    page.hover(f"[data-name='{circuit.nodes[0]}'] circle", force=True)


@pytest.fixture(scope="module")
def certified():
    """The contents of the page of a circuit with a certificate, in which little is measured."""
    model = micro_model()
    circuit = judged_by_few(micro_circuit(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "SECTIONS", certifying.SECTIONS[2:3])
        certificate = certifying.certify(
            circuit, model, MICRO_TASK, corpus=micro_corpus(), quick=True, progress=False
        )
    hostile = [dataclasses.replace(each, numbers=HOSTILE[1]) for each in certificate.verdict]
    left_out = {"necessity": HOSTILE[2], "likeness": HOSTILE[3]}
    certificate = dataclasses.replace(certificate, verdict=hostile, left_out=left_out)
    return page_data(circuit, model, MICRO_TASK, micro_corpus(), certificate=certificate)


def test_a_page_without_a_certificate_has_no_such_section(data, opened):
    page = opened(data)
    assert not page.locator("#certificate-section").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_certificate_is_shown_as_text(certified, opened, scheme, width):
    page = opened(certified, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    assert count(page, "#verdict tr") == 10
    results = page.locator("#verdict td:nth-child(2)").all_inner_texts()
    assert set(results) <= {"✓ met", "✗ not met", "– not tested"}
    assert HOSTILE[1] in page.locator("#verdict tr").first.inner_text()
    page.click("#certificate-texts summary:has-text('3. Is it like the model inside?')")
    shown = page.locator("#certificate-texts details[open] pre").inner_text()
    assert "0.attn_out 2" in shown
    assert "hacked" not in page.evaluate("Object.keys(window)")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0


def test_the_certificate_of_another_circuit_is_not_shown(tmp_path):
    model = micro_model()
    circuit = judged_by_few(micro_circuit(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "SECTIONS", ())
        folder = tmp_path / "certificate"
        made = certifying.certify(
            circuit, model, MICRO_TASK, corpus=micro_corpus(), folder=folder, progress=False
        )
    own = page_data(circuit, model, MICRO_TASK, micro_corpus(), source=str(tmp_path))
    assert own["certificate"]["verdict"][0]["code"] == "C1"
    kept = {name: mask.clone() for name, mask in circuit.kept.items()}
    kept["blocks.0.ln1.hook_read"][1] = True
    other = dataclasses.replace(circuit, kept=kept)
    with pytest.warns(UserWarning, match="is of another circuit"):
        shown = page_data(other, model, MICRO_TASK, micro_corpus(), source=str(tmp_path))
    assert shown["certificate"] is None
    with pytest.raises(CircuitError, match="of another circuit"):
        page_data(other, model, MICRO_TASK, micro_corpus(), certificate=made)
    with pytest.raises(CheckpointError, match="there is no file"):
        page_data(circuit, model, MICRO_TASK, micro_corpus(), certificate=tmp_path / "none.json")


@pytest.fixture(scope="module")
def explanation():
    """An explanation of the circuit, in which one expression and one head are hostile."""
    model = micro_model()
    circuit = judged_by_few(micro_circuit(model))
    found = circuit.explain(model, MICRO_TASK, corpus=micro_corpus(), progress=False)
    read, *others = found.nodes
    read = dataclasses.replace(read, expression=HOSTILE[1], name="letter")
    heads = [dataclasses.replace(head, phrase=HOSTILE[2]) for head in found.heads]
    assert heads
    return dataclasses.replace(found, nodes=[read, *others], heads=heads)


@pytest.fixture(scope="module")
def explained(explanation):
    model = micro_model()
    circuit = judged_by_few(micro_circuit(model))
    return page_data(circuit, model, MICRO_TASK, micro_corpus(), explanation=explanation)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_explanations_are_shown_as_text(explained, opened, scheme, width):
    page = opened(explained, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    assert count(page, "#expressions tbody tr") == len(NODES)
    assert page.locator("#expressions code").first.inner_text() == HOSTILE[1]
    assert HOSTILE[2] in page.locator("#looks-at li").first.inner_text()
    assert page.locator("#replaced tbody th").all_inner_texts()[:2] == ["full model", "circuit"]
    assert "hacked" not in page.evaluate("Object.keys(window)")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0


def test_nodes_have_the_names_of_the_explanation(explained, opened):
    page = opened(explained)
    captions = page.locator("#graph .caption").all_text_contents()
    assert any("letter" in caption for caption in captions)
    node = page.locator(f'#graph .node[data-name="{READ}"]')
    assert node.get_attribute("aria-label") == f"{READ} “letter”"
    assert node.locator("title").text_content() == f"{READ} “letter”\nletter = {HOSTILE[1]}"
    page.fill("#search", "letter")
    assert page.locator("#found").inner_text() == "1"
    page.click(f"#expressions .link:has-text('{READ}')")
    assert pinned(page) == READ
    assert page.locator("#panel #expression").inner_text() == f"letter = {HOSTILE[1]}"
    page.fill("#label", "mine")  # a word of the reader's own comes first
    assert node.get_attribute("aria-label") == f"{READ} “mine”"


def test_the_program_is_shown_and_copied(explained, opened):
    page = opened(explained, permissions=["clipboard-read", "clipboard-write"])
    assert not page.locator("#program-source").is_visible()
    page.click("#program-summary")
    source = page.locator("#program-source").text_content()
    assert source == explained["program"]["source"]
    assert "def logits(" in source
    assert "letter" in source
    compile(source, "circuit.py", "exec")
    page.click("#copy-program")
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == source


def test_what_is_missing_is_not_shown(data, opened):
    page = opened(data)
    assert not page.locator("#explanation-section").is_visible()
    assert "letter" not in data["program"]["source"]
    page = opened(data | {"program": None})
    assert not page.locator("#program-section").is_visible()
    page = opened(data | {"program": {"about": "Too large.", "source": ""}})
    assert page.locator("#program-about").inner_text() == "Too large."
    assert not page.locator("#copy-program").is_visible()


def test_whose_explanation_is_shown(explanation, tmp_path):
    model = micro_model()
    circuit = judged_by_few(micro_circuit(model))
    explanation.save(tmp_path)
    arguments = (model, MICRO_TASK, micro_corpus())
    shown = page_data(circuit, *arguments, source=str(tmp_path))["explanation"]
    assert [node["node"] for node in shown["nodes"]] == NODES
    kept = {name: mask.clone() for name, mask in circuit.kept.items()}
    kept["blocks.0.ln1.hook_read"][1] = True
    other = dataclasses.replace(circuit, kept=kept)
    with pytest.warns(UserWarning, match="is of another circuit"):
        assert page_data(other, *arguments, source=str(tmp_path))["explanation"] is None
    with pytest.raises(CircuitError, match="explanation is of another circuit"):
        page_data(other, *arguments, explanation=explanation)
    with pytest.raises(CheckpointError, match="there is no file"):
        page_data(circuit, *arguments, explanation=tmp_path / "none.json")


def test_circuits_without_a_program():
    model = micro_model()
    circuit = judged_by_few(micro_circuit(model))
    without_means = dataclasses.replace(circuit, means={})
    assert page_data(without_means, model, MICRO_TASK, micro_corpus())["program"] is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explained_view, "LIMITS", dataclasses.replace(LIMITS, program_nodes=2))
        shown = page_data(circuit, model, MICRO_TASK, micro_corpus())["program"]
    assert shown["source"] == ""
    assert "too many nodes" in shown["about"]
