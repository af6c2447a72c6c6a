"""Figures: they draw the values that were measured."""

import json

import pytest
import torch
from matplotlib.colors import to_hex

from helpers import has_hooks, stock_model
from micro import MICRO_TASK, micro_circuit, micro_corpus, micro_model, save_micro
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, ConfigError, DataError
from tl_sparse.evaluation.judge import full_evaluation
from tl_sparse.tasks.task_data import make_task_data
from tl_sparse.view import plots

pytestmark = pytest.mark.any_line


def score(loss, accuracy=0.9):
    return {"loss": loss, "standard_error": 0.01, "accuracy": accuracy}


def figures(
    circuit=(12, 0.15),
    faithfulness_curve=((0, 0.7), (12, 0.15), (40, 0.2), (90, 0.02)),
    model="m",
    task="t",
):
    """Invented measurements in the form that `evaluate` writes, with one more node than edges."""
    sized_scores = [
        {"n_nodes": n + 1, "n_edges": n, "circuit": score(loss, 1 - loss)}
        for n, loss in (*faithfulness_curve, circuit)
    ]
    whole = sized_scores.pop() | {"full": score(0.001, 1.0)}
    random = [{"n_nodes": 13, "n_edges": n, "circuit": score(0.7, 0.5)} for n in (0, 2)]
    return {
        "model": model,
        "task": task,
        "evaluation": whole,
        "ladder": sized_scores,
        "random": random,
    }


def results():
    def of(low, middle, high):
        sizes = {
            "nodes": {"min": low + 1, "median": middle + 1, "max": high + 1},
            "loss": {"median": middle / 100},
        }
        return sizes | {"edges": {"min": low, "median": middle, "max": high}}

    sparse = {
        "p": {"node_pruned": of(2, 4, 8), "edge_pruned": of(1, 2, 3)},
        "q": {"node_pruned": of(0, 0, 0), "edge_pruned": of(0, 0, 0)},
        "r": {"node_pruned": {}, "edge_pruned": {}},
    }
    dense = {
        "p": {"node_pruned": of(100, 200, 300), "edge_pruned": {}},
        "q": {"node_pruned": {}, "edge_pruned": {}},
    }
    means = {"node_pruned": {"sparse": 4.0, "dense": 200.0}, "edge_pruned": {}}
    return {"models": {"sparse": sparse, "dense": dense}, "geometric_mean_edges": means}


def drawn(axes):
    """The points of each line that has points, as lists."""
    return [
        [*map(list, zip(*line.get_data(), strict=True))]
        for line in axes.lines
        if len(line.get_xdata())
    ]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("against", "more"), [("edges", 0), ("nodes", 1)])
def test_a_curve_has_each_size_the_circuit_and_random_ones(against, more):
    figure = plots.curve(
        {"one": figures(), "two": figures((5, 0.3), faithfulness_curve=())}, against
    )
    loss, accuracy = figure.axes
    points = drawn(loss)
    faithfulness_curve = [[0 + more, 0.7], [12 + more, 0.15], [40 + more, 0.2], [90 + more, 0.02]]
    assert faithfulness_curve in points
    assert [[12 + more, 0.15]] in points
    assert [[5 + more, 0.3]] in points
    assert ([[0, 0.7], [2, 0.7]] if against == "edges" else [[13, 0.7], [13, 0.7]]) in points
    assert [[0, 0.001], [1, 0.001]] in points  # the full model, across the whole panel
    assert [[x, 1 - y] for x, y in faithfulness_curve] in drawn(accuracy)
    assert legend(figure) == ["one", "two", "random circuits", "full model", "chance"]
    assert (loss.get_xlabel(), loss.get_ylabel()) == (
        f"{against} of the circuit",
        "held-out task loss (nats)",
    )
    # The axis is logarithmic even if a circuit has no edges.
    assert (loss.get_xscale(), loss.get_xlim()[0] < 0) == (
        ("log", False) if more else ("symlog", True)
    )
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


def test_a_curve_of_a_real_evaluation():
    model = micro_model()
    circuit, data = (
        micro_circuit(model),
        make_task_data(MICRO_TASK, model.tokenizer, 8, 0, model.cfg.n_ctx),
    )
    found = full_evaluation(circuit, model, data)
    (loss, _) = plots.curve({"micro": found}).axes
    assert [[2, found["evaluation"]["circuit"]["loss"]]] in drawn(loss)


@pytest.mark.parametrize(("against", "more"), [("edges", 0), ("nodes", 1)])
def test_tasks_have_a_mark_for_each_model(against, more):
    figure = plots.tasks(results(), against)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "p",
        "q",
    ]  # no model has a circuit for r
    assert legend(figure) == ["sparse", "dense"]
    assert [[4 + more, 0], [more, 1]] in drawn(axes)
    assert [[200 + more, 0]] in drawn(axes)
    ranges = [segment.tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert ranges[0] == [[2 + more, 0], [8 + more, 0]]
    means = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert means[:2] == [4, 200] if not more else all(x != x for x in means)


def test_a_frontier_is_the_least_loss_by_size():
    sources = {
        "a": figures(),
        "b": figures((10, 0.1), faithfulness_curve=[(30, 0.01)]),
        "c": figures(model="other"),
    }
    figure = plots.frontier(sources)
    (axes,) = figure.axes
    best = [[0, 0.7], [10, 0.1], [12, 0.1], [12, 0.1], [30, 0.01], [40, 0.01], [90, 0.01]]
    assert best in drawn(axes)
    assert legend(figure) == ["m, t", "other, t"]
    assert sum(line.get_drawstyle() == "steps-post" for line in axes.lines) == 2
    figure = plots.frontier({"r": results()})
    assert drawn(figure.axes[0]) == [[[0, 0], [4, 0.04]], [[0, 0], [2, 0.02]], [[200, 2]]]
    assert legend(figure) == [
        "sparse, nodes pruned",
        "sparse, edges pruned too",
        "dense, nodes pruned",
    ]


def test_sparsity_is_counted():
    model = micro_model()
    weights, activations = plots.sparsity(model, micro_corpus()).axes
    shares = dict(
        zip((t.get_text() for t in weights.get_yticklabels()), drawn(weights)[0], strict=False)
    )
    assert shares["attn_in → attn_q"][0] == 0
    assert shares["attn_in → attn_v"][0] == shares["attn_v → attn_out"][0] == 1 / 8
    assert [[pytest.approx(3 / 36 / 4), 6], [pytest.approx(2 / 36 / 4), 7]] in drawn(
        weights
    )  # the embeddings
    # One token in six is A or B, one is `end`, and the value reaches all that come after it.
    names = [text.get_text() for text in activations.get_yticklabels()]
    seen = {name: x for name, (x, _) in zip(names, drawn(activations)[0], strict=True)}
    assert seen["attn_in"] == pytest.approx(2 / 6 / 4)
    assert seen["attn_v"] == pytest.approx(1 / 6 / 2)
    assert seen["attn_out"] == pytest.approx(3 / 6 / 4)
    assert seen["mlp_neuron"] == 0
    assert not has_hooks(model)


def test_sparsity_of_a_model_of_transformer_lens():
    figure = plots.sparsity(stock_model(n_layers=2), torch.arange(20).view(2, 10))
    assert legend(figure) == ["layer 0", "layer 1"]
    for axes in figure.axes:
        assert all(0.9 < x <= 1 for x, _ in [point for line in drawn(axes)[:2] for point in line])


def test_colours_and_marks_tell_many_apart():
    figure = plots.curve({str(i): figures() for i in range(20)})
    styles = {
        (to_hex(line.get_color()), line.get_marker())
        for line in figure.axes[0].lines
        if line.get_ls() == "None"
    }
    assert len(styles) >= 20


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, values in (
        ("a.json", figures()),
        ("b.json", figures(model="n")),
        ("results.json", results()),
    ):
        (tmp_path / name).write_text(json.dumps(values))
    save_micro(tmp_path / "micro")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "curve a.json b.json",
        "tasks results.json",
        "frontier a.json results.json",
        "sparsity micro --device cpu",
    ],
)
@pytest.mark.parametrize(("ending", "beginning"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_commands_write_pictures(command, ending, beginning, files, capsys):
    before = {path.name for path in files.iterdir()}
    assert main(["plot", *command.split(), "-o", f"picture.{ending}"]) == 0
    assert f"Saved picture.{ending}" in capsys.readouterr().out
    assert (files / f"picture.{ending}").read_bytes().startswith(beginning)
    assert {path.name for path in files.iterdir()} == before | {f"picture.{ending}"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "curve missing.json -o c.pdf",
            r"c.pdf: figures cannot be written as '.pdf'; the name must end in .png or .svg",
        ),
        ("curve missing.json -o c", "figures cannot be written as ''"),
        ("curve missing.json -o c.png", "cannot read missing.json"),
        (
            "curve a.json results.json -o c.png",
            "results.json is not what `tl-sparse evaluate` writes; missing or",
        ),
        (
            "tasks a.json -o c.png",
            "a.json is not what `tl-sparse suite` writes; "
            "missing or malformed entry: 'geometric_mean",
        ),
        ("frontier odd.json -o c.png", "odd.json is not what `tl-sparse evaluate or suite` writes"),
        ("tasks none.json -o c.png", "there is nothing to draw in none.json"),
        ("frontier none.json -o c.png", "there is nothing to draw in none.json"),
        (
            "tasks results.json results.json -o c.png",
            "tasks is plotted from one source, not from 2",
        ),
        ("sparsity nowhere -o c.png", "'nowhere' is not a folder"),
        ("curve a.json -o micro/config.json/c.png", "cannot write"),
    ],
)
def test_what_cannot_be_drawn(command, message, files, capsys):
    (files / "odd.json").write_text(
        '{"model": 1, "task": 2, "evaluation": {"circuit": 3}, "ladder": []}'
    )
    (files / "none.json").write_text('{"models": {}, "geometric_mean_edges": {"node_pruned": {}}}')
    before = sorted(files.rglob("*"))
    assert main(["plot", *command.split()]) == 1
    assert message in capsys.readouterr().err
    assert sorted(files.rglob("*")) == before


def test_nothing_and_a_failure_leave_no_file(files, monkeypatch):
    for empty in (plots.curve, plots.frontier):
        with pytest.raises(DataError, match="there is nothing to draw"):
            empty({})
    with pytest.raises(DataError, match="there is nothing to draw"):
        plots.sparsity(micro_model(), micro_corpus()[:0])
    (files / "folder.png").mkdir()
    figure, before = plots.tasks(results()), sorted(files.iterdir())
    monkeypatch.setattr(figure, "savefig", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plots.save(figure, "c.png")
    assert sorted(files.iterdir()) == before
    with pytest.raises(CheckpointError, match="it is a folder"):
        plots.save(figure, "folder.png")


def test_without_matplotlib_it_says_what_to_install(files, monkeypatch, capsys):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"drawing needs matplotlib: pip install 'tl-sparse\[plots\]'"
    ):
        plots.check_drawing("c.png")
    assert main(["plot", "curve", "missing.json", "-o", "c.png"]) == 1
    assert "tl-sparse[plots]" in capsys.readouterr().err
