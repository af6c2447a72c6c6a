"""Figures: they draw the values that were measured."""

import json
import math

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
    return {
        "models": {"sparse": sparse, "dense": dense},
        "geometric_mean_edges": means,
        "solved_by_all": ["p"],
    }


def drawn(axes):
    """The points of each line that has points, as lists."""
    return [
        [*map(list, zip(*line.get_data(), strict=True))]
        for line in axes.lines
        if len(line.get_xdata())
    ]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def title(figure):
    return figure.legends[0].get_title().get_text()


def notes(figure):
    """The text below the panels, in one line."""
    return " ".join(figure.get_supxlabel().split())


def named_lines(axes):
    """The name of each line across the panel that has one → its height."""
    return {text.get_text(): text.xy[1] for text in axes.texts}


#: What the legend of a curve says beside the names of its circuits.
EXPLAINED = [
    "fewer or more of the ranked nodes",
    "random circuits of its size",
    "the full model",
    "± standard error over pairs",
]


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
    assert title(figure) == "Circuits of t in m"
    assert legend(figure) == ["one", "two", *EXPLAINED]
    assert loss.get_xlabel() == accuracy.get_xlabel() == f"number of {against} in the circuit"
    assert loss.get_ylabel() == "task loss on held-out pairs\n(nats, between the two answers)"
    assert accuracy.get_ylabel() == "accuracy on held-out pairs\n(right answer ahead of the other)"
    # The axis is logarithmic even if a circuit has no edges.
    assert (loss.get_xscale(), loss.get_xlim()[0] < 0) == (
        ("log", False) if more else ("symlog", True)
    )
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


def test_each_circuit_is_named_by_task_and_model():
    figure = plots.curve({"a.json": figures()})
    assert (title(figure), legend(figure)) == ("Circuits of t in m", ["the circuit", *EXPLAINED])
    figure = plots.curve({"a": figures(), "b": figures(model="n"), "c": figures(model="")})
    assert title(figure) == "Circuits by their size"
    assert legend(figure)[:3] == ["t in m", "t in n", "t in an unnamed model"]
    figure = plots.curve({"a": figures(), "b": figures(model="n"), "c": figures()})
    assert legend(figure)[:3] == ["t in m (a)", "t in n", "t in m (c)"]
    figure = plots.curve({"a": figures(task="long-" * 12), "b": figures()})
    assert legend(figure)[0] == "long-" * 8 + "\n" + "long-" * 4 + " in m"


def test_lines_across_a_curve_are_named_with_their_values():
    with_target = figures()
    with_target["evaluation"]["target_loss"] = 0.15
    loss, accuracy = plots.curve({"a": with_target, "b": with_target, "c": figures()}).axes
    assert named_lines(loss) == {"chance\n0.693": math.log(2), "target\n0.15": 0.15}
    assert named_lines(accuracy) == {"chance\n50%": 0.5}
    (axes,) = plots.frontier({"a": with_target}).axes
    assert named_lines(axes) == {"chance\n0.693": math.log(2), "target\n0.15": 0.15}
    (axes,) = plots.frontier({"r": results() | {"config": {"target_loss": 0.2}}}).axes
    assert named_lines(axes) == {"chance\n0.693": math.log(2), "target\n0.2": 0.2}


def test_standard_errors_are_drawn():
    axes, _ = plots.curve({"a": figures(faithfulness_curve=[(30, 0.1)])}).axes
    band, bar, *_ = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {
        (30, 0.1 - 0.01),
        (30, 0.11),
    }
    assert bar.get_segments()[0].tolist() == [[12, 0.15 - 0.01], [12, 0.16]]


def test_circuits_without_edges_are_explained():
    said = "Circuits without edges stand at 0, apart from the logarithmic scale."
    assert notes(plots.curve({"a": figures()})) == said
    assert notes(plots.curve({"a": figures()}, "nodes")) == ""
    assert notes(plots.frontier({"a": figures()})) == said
    medians = "Each mark of a suite is a task: its medians over the seeds."
    assert notes(plots.frontier({"a": results()})) == f"{medians} {said}"
    assert notes(plots.frontier({"a": results()}, "nodes")) == medians
    counted = (
        "In the geometric mean they count as 1 edge. Without nodes only the last token itself, "
        "through the bigram table, chooses the answer."
    )
    assert notes(plots.tasks(results())) == f"{said} {counted}"
    assert notes(plots.tasks(results(), "nodes")) == ""


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
    explained = ["median and range over the seeds", "geometric mean over the 1 task all solve"]
    assert legend(figure) == ["sparse", "dense", *explained[: 2 - more]]
    assert title(figure) == "Size of the circuit of each task"
    assert axes.get_xlabel() == f"number of {against} in the node-pruned circuit"
    # The models stand a little apart: one above the middle of the row of its task, one below.
    assert [[4 + more, 0.1], [more, 1.1]] in drawn(axes)
    assert [[200 + more, -0.1]] in drawn(axes)
    ranges = [segment.tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert ranges[0] == [[2 + more, 0.1], [8 + more, 0.1]]
    dotted = [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"]
    explaining = []  # the line in the legend
    assert dotted == ([[4, 4], [200, 200], explaining] if against == "edges" else [])


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
    assert title(figure) == "Loss of circuits by their size"
    explained = ["the least loss up to this size", "± standard error over pairs"]
    assert legend(figure) == ["t in m", "t in other", *explained]
    assert sum(line.get_drawstyle() == "steps-post" for line in axes.lines) == 2
    figure = plots.frontier({"r": results()})
    chance = [[0, math.log(2)], [1, math.log(2)]]
    nodes_pruned, edges_pruned, dense = [[0, 0], [4, 0.04]], [[0, 0], [2, 0.02]], [[200, 2]]
    assert drawn(figure.axes[0]) == [nodes_pruned, edges_pruned, dense, chance]
    assert [label.replace("\n", " ") for label in legend(figure)] == [
        "p, q in sparse, nodes pruned",
        "p, q in sparse, edges pruned too",
        "p in dense, nodes pruned",
    ]
    many = {f"task {i}": results()["models"]["sparse"]["p"] for i in range(4)}
    figure = plots.frontier({"r": results() | {"models": {"sparse": many}}})
    assert legend(figure)[0].replace("\n", " ").startswith("4 tasks in sparse, nodes pruned")


def test_sparsity_is_counted():
    model = micro_model()
    model.cfg.model_name = "micro"
    figure = plots.sparsity(model, micro_corpus())
    assert title(figure) == "Sparsity of micro"
    weights, activations = figure.axes
    assert weights.get_xlabel() == "weights that are not zero\n(share of each matrix)"
    assert activations.get_xlabel() == "activations that are not zero\n(share over 240 tokens)"
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
        ("curve missing.json -o c.png", "there is no file missing.json"),
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
        ("sparsity nowhere -o c.png", "there is no folder 'nowhere'"),
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


# The matrix of circuits and tasks


def matrix():
    """Circuits of two tasks, of which the second has no measurement of a third task."""

    def of(rise, random_rise):
        fields = ("full_loss", "full_accuracy", "loss", "accuracy", "drop", "random_drop")
        loss = {name: {"value": 0.5, "standard_error": 0.1} for name in fields}
        loss["rise"] = {"value": rise, "standard_error": 0.1}
        loss["random_rise"] = {"value": random_rise, "standard_error": None}
        return loss

    return {
        "losses": {
            "first": {"q": of(-0.001, 0.02), "p": of(0.91, 0.03), "r": of(0.1, 0.04)},
            "second": {"q": of(0.7, 0.05), "p": of(0.08, 0.06)},
        },
        "own_tasks": {"first": "p", "second": "q"},
    }


def test_the_matrix_shows_each_rise_and_frames_own_tasks():
    figure = plots.specificity(matrix())
    of_circuits, of_random = figure.axes
    # The tasks that have a circuit come first, in the order of the circuits.
    assert [tick.get_text() for tick in of_circuits.get_xticklabels()] == ["p", "q", "r"]
    assert [tick.get_text() for tick in of_circuits.get_yticklabels()] == ["first", "second"]
    cells = [text.get_text() for text in of_circuits.texts]
    assert cells == ["0.91", "0.00", "0.10", "0.08", "0.70", ""]
    assert [text.get_text() for text in of_random.texts] == [
        *("0.03", "0.02", "0.04"),
        *("0.06", "0.05", ""),
    ]
    for axes in (of_circuits, of_random):
        frames = [(frame.get_x() + 0.5, frame.get_y() + 0.5) for frame in axes.patches]
        assert frames == [(0, 0), (1, 1)]
    assert of_circuits.get_title() == "without the circuit"
    assert "rise of the task loss in nats" in figure.get_supxlabel().replace("\n", " ")


def test_values_that_are_no_matrix():
    with pytest.raises(DataError, match=r"a.json is not what `specificity_matrix` returns.*losses"):
        plots.specificity(figures(), "a.json")
    with pytest.raises(DataError, match="there is nothing to draw"):
        plots.specificity({"losses": {}, "own_tasks": {}})
    with pytest.raises(DataError, match="there is nothing to draw"):
        plots.specificity({"losses": {"a": {}}, "own_tasks": {}})


def test_the_command_draws_a_matrix(tmp_path):
    path, drawn = tmp_path / "matrix.json", tmp_path / "matrix.png"
    path.write_text(json.dumps(matrix()))
    assert main(["plot", "specificity", str(path), "-o", str(drawn)]) == 0
    assert drawn.stat().st_size > 1000
