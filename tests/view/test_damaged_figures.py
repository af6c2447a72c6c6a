"""Measurements with odd entries: they are drawn and shown, or refused with an error of ours."""

import io
import random
import warnings

import pytest
from test_plots import figures, results

from damage import ODD, changed, entries
from micro import MICRO_TASK, micro_circuit, micro_model
from tl_sparse.errors import CircuitError, ConfigError, DataError, TLSparseError
from tl_sparse.evaluation.judge import full_evaluation
from tl_sparse.suites.along import steps_table
from tl_sparse.suites.results import results_table
from tl_sparse.tasks.task_data import make_task_data
from tl_sparse.view import circuit_facts, evaluation_tables, plots

pytestmark = pytest.mark.any_line


@pytest.fixture(scope="module")
def measured():
    model = micro_model()
    data = make_task_data(MICRO_TASK, model.tokenizer, 8, 0, model.cfg.n_ctx)
    return full_evaluation(micro_circuit(model), model, data)


def drawn(figure):
    """The figure as SVG; what fonts lack is no mistake of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(io.BytesIO(), format="svg")


def survives(function, values, place, odd):
    """Whether a function takes values with one odd entry; it may only refuse them as we do."""
    try:
        function(changed(values, place, odd))
    except TLSparseError:
        return False
    return True


def along_training():
    """The two models of the suite as two steps of a run."""
    steps = []
    for step, model in enumerate(results()["models"], start=10):
        record = {"step": step, "training_loss": 2.0, "validation_loss": 2.5}
        record |= {"nonzero_weights": 7, "weights": 10}
        steps.append({"model": model, "record": record})
    return results() | {"steps": {"run": steps}, "config": {"target_loss": 0.05}}


DRAWINGS = [
    (lambda values: drawn(plots.training(values)), along_training()),
    (steps_table, along_training()),
    (lambda values: drawn(plots.curve({"a": values})), figures()),
    (lambda values: drawn(plots.frontier({"a": values})), figures()),
    (lambda values: drawn(plots.tasks(values)), results()),
    (lambda values: drawn(plots.frontier({"a": values})), results()),
]


def check_drawings(n_each):
    generator = random.Random(0)
    survived = 0
    for function, values in DRAWINGS:
        places = list(entries(values))
        for _ in range(n_each):
            place = generator.choice(places)
            survived += survives(function, values, place, generator.choice(ODD))
    assert 0 < survived < n_each * len(DRAWINGS)


def test_odd_measurements_are_drawn_or_refused():
    check_drawings(8)


@pytest.mark.slow
def test_many_odd_measurements_are_drawn_or_refused():
    check_drawings(500)


def test_odd_measurements_are_shown_in_tables_or_refused(measured):
    refused = 0
    for place in entries(measured):
        for odd in ODD:
            refused += not survives(evaluation_tables, measured, place, odd)
    assert refused > 500
    for place in entries(results()):
        for odd in ODD:
            survives(results_table, results(), place, odd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"random": 3}, "'random' is 3, which must be a list"),
        ({"evaluation": {}}, "'evaluation.n_nodes' is missing"),
        (
            {"ladder": [{"n_nodes": 1, "n_edges": 1, "circuit": {"loss": "low"}}]},
            r"'ladder\[0\].circuit.loss' is 'low', which must be a number",
        ),
    ],
)
def test_the_malformed_entry_is_named(change, message):
    with pytest.raises(
        DataError, match=f"a.json is not what `tl-sparse evaluate` writes; .* entry: {message}"
    ):
        plots.curve({"a.json": figures() | change})


def test_a_missing_summary_is_named():
    incomplete = results()
    del incomplete["models"]["sparse"]["p"]["node_pruned"]["edges"]["median"]
    for draw in (plots.tasks, lambda values: plots.frontier({"results": values})):
        with pytest.raises(DataError, match=r"results.*: the median of 'edges' is missing"):
            draw(incomplete)


def test_scores_that_are_no_finite_number_are_left_out():
    for loss in (float("nan"), float("inf")):
        drawn(plots.curve({"a": figures(faithfulness_curve=((5, loss), (12, 0.1)))}))
        drawn(plots.curve({"a": figures(circuit=(12, loss), faithfulness_curve=())}))


def test_names_are_no_formulas():
    figure = plots.curve({"$\\frac{": figures(), "x" * 5000: figures()})
    drawn(figure)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == r"\$\frac{"
    assert max(map(len, texts[1].splitlines())) <= 44
    assert len(texts[1]) < 120
    drawn(plots.frontier({"a": figures(model="a$b$", task="c_{")}))


def test_only_edges_and_nodes_are_sizes():
    for draw in (plots.curve, plots.frontier):
        with pytest.raises(ConfigError, match=r"against = 'weights' .* 'edges' or 'nodes'"):
            draw({"a": figures()}, "weights")


def test_a_circuit_with_damaged_scores():
    from dataclasses import replace

    circuit = replace(micro_circuit(micro_model()), measured={"heldout": {"full": 3}})
    with pytest.raises(CircuitError, match=r"'measured.heldout': 'full' is 3, which must be an ob"):
        circuit_facts(circuit)
