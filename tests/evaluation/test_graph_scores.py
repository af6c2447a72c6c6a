"""Judging graphs of components: on the model that is worked out on paper, by definition."""

import dataclasses
import math

import pytest
import torch

from micro import LOSS, W_U, WRITTEN, micro_data
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.errors import (
    ArgumentError,
    CircuitError,
    ConfigError,
    TaskError,
    UnsupportedError,
)
from tl_sparse.evaluation.edge_attribution import edge_scores
from tl_sparse.evaluation.estimates import Estimate, ratio_of_pairs
from tl_sparse.evaluation.graph_runs import applying_graph
from tl_sparse.evaluation.graph_scores import (
    MIB_SHARES,
    GraphCurve,
    GraphScore,
    graph_curve,
    graph_score,
)
from tl_sparse.records import record_from

pytestmark = pytest.mark.any_line

#: logit(right) - logit(wrong) in the micro model.
MARGIN = 2 * W_U * WRITTEN / math.sqrt((1 + WRITTEN**2) / 4)
#: Its circuit.
EDGES = ["input->a0.h0<v>", "a0.h0->logits"]


def with_scores(micro, scores):
    graph = EapGraph.full(micro)
    values = torch.zeros_like(graph.scores)
    for name, score in scores.items():
        values[graph.layout.edge_number(name)] = score
    return dataclasses.replace(graph, scores=values)


@pytest.fixture
def data(micro):
    return micro_data(micro, n_pairs=4)


def test_the_graph_of_the_circuit_does_the_task(micro, circuit, data):
    graph = circuit.to_eap(micro)
    found = graph_score(graph, micro, data, seed=1)
    assert found.full.loss == pytest.approx(LOSS, abs=1e-6)
    assert found.graph.loss == pytest.approx(LOSS, abs=1e-6)
    assert found.empty.logit_difference == pytest.approx(-MARGIN, abs=1e-5)  # the other prompt's
    assert found.faithfulness.value == pytest.approx(1)
    assert found.faithfulness.standard_error == pytest.approx(0, abs=1e-6)
    assert [each.value for each in found.random] == pytest.approx([0] * 3)
    assert (found.n_edges, found.n_all_edges, found.n_pairs) == (2, 8, 4)
    assert record_from(GraphScore, dataclasses.asdict(found)) == found
    half = graph.of_edges(with_scores(micro, {EDGES[1]: 1.0}).scores > 0)
    assert half.n_edges == 0  # nothing leads to the head
    assert graph_score(half, micro, data).faithfulness.value == pytest.approx(0)


def test_interventions_on_paper(micro, circuit, data):
    """The logits no longer read the 1 that `end` embeds to, but nothing, or 1/6: the mean of the
    six tokens. The final norm then divides the answer by less.
    """
    for intervention, read in {"zero": 0.0, "mean": 1 / 6}.items():
        found = graph_score(circuit.to_eap(micro), micro, data, intervention, n_random=0)
        # Without an edge, nothing says whether it was A or B.
        assert found.empty.logit_difference == pytest.approx(0, abs=1e-5)
        margin = 2 * W_U * WRITTEN / math.sqrt((read**2 + WRITTEN**2) / 4)
        assert found.graph.logit_difference == pytest.approx(margin, abs=1e-4)
        assert found.faithfulness.value == pytest.approx(margin / MARGIN, abs=1e-5)
        assert (found.intervention, found.random) == (intervention, [])


def test_nothing_to_explain(micro, circuit, data):
    with torch.no_grad():
        micro.unembed.W_U.zero_()
    graph = EapGraph.full(micro)
    found = graph_score(graph, micro, data)
    assert found.faithfulness is None
    assert found.random == []
    assert "full model, 0.000, and without any edge, 0.000, are too near" in found.no_faithfulness
    with pytest.raises(TaskError, match="task micro: the logit differences of the full model"):
        graph_curve(graph, micro, data)


# --- CPR and CMD


def test_areas_by_their_definition(micro, data):
    """Of 8 edges 2 are the circuit; at shares 1/4, 1/2 and 1 there are 2, 4 and 8."""
    best_first = with_scores(micro, {EDGES[0]: -3.0, EDGES[1]: 2.0})
    found = graph_curve(best_first, micro, data, shares=[0.25, 0.5, 1.0])
    assert [point.faithfulness.value for point in found.points] == pytest.approx([1, 1, 1])
    assert [point.n_chosen for point in found.points] == [2, 4, 8]
    assert found.points[0].n_edges == 2
    assert found.areas.cpr.value == pytest.approx(0.75)
    assert found.areas.cmd.value == pytest.approx(0, abs=1e-6)

    others = dict.fromkeys(set(EapGraph.full(micro).edges) - set(EDGES), 1.0)
    worst_first = graph_curve(with_scores(micro, others), micro, data, shares=[0.25, 0.5, 1.0])
    assert [point.faithfulness.value for point in worst_first.points] == pytest.approx([0, 0, 1])
    assert worst_first.areas.cpr.value == pytest.approx(0.5 * (0 + 1) / 2)
    assert worst_first.areas.cmd.value == pytest.approx(0.25 * 1 + 0.5 * (1 + 0) / 2)
    assert record_from(GraphCurve, dataclasses.asdict(found)) == found

    # By signed scores, the edge with a negative one comes last.
    signed = graph_curve(best_first, micro, data, absolute=False, shares=[0.25, 0.5, 1.0])
    assert [point.faithfulness.value for point in signed.points] == pytest.approx([0, 0, 1])


def test_areas_at_the_shares_of_mib(micro, data):
    """With ⌊share · 8⌋ edges there are two for the first time at a half."""
    best_first = with_scores(micro, {EDGES[0]: 3.0, EDGES[1]: 2.0})
    found = graph_curve(best_first, micro, data, n_random=2)
    assert [point.share for point in found.points] == list(MIB_SHARES)
    assert [point.n_chosen for point in found.points] == [0, 0, 0, 0, 0, 0, 0, 1, 4, 8]
    assert found.areas.cpr.value == pytest.approx(0.3 * 0.5 + 0.5)
    assert found.areas.cmd.value == pytest.approx(0.199 * 1 + 0.3 * 0.5)
    assert found.full_difference.value == pytest.approx(MARGIN, abs=1e-5)
    assert found.empty_difference.value == pytest.approx(-MARGIN, abs=1e-5)
    assert len(found.random) == 2


def test_a_graph_that_does_better_than_the_model(micro, data):
    """The MLP takes half of the answer away: without it, faithfulness is above 1."""
    block = micro.blocks[0]
    with torch.no_grad():
        # A neuron that reads the answer, twice for its two signs, and writes it with a minus.
        block.mlp.W_in[2, 0], block.mlp.W_in[2, 1] = 1.0, -1.0
        block.mlp.W_out[0, 2], block.mlp.W_out[1, 2] = -0.3, 0.3
    graph = with_scores(micro, {EDGES[0]: 3.0, EDGES[1]: 2.0})
    found = graph_curve(graph, micro, data, shares=[0.25, 1.0])
    above = found.points[0].faithfulness.value
    assert above > 1.05
    assert found.areas.cpr.value == pytest.approx(0.75 * (above + 1) / 2)
    assert found.areas.cmd.value == pytest.approx(0.75 * (above - 1) / 2)


def test_nodes_and_channels(micro, data):
    graph = EapGraph.full(micro)
    nodes = dataclasses.replace(graph, nodes_scores=torch.tensor([3.0, 2.0, 1.0]))
    found = graph_curve(nodes, micro, data, level="node", shares=[0.34, 0.67, 1.0])
    assert [point.n_chosen for point in found.points] == [1, 2, 3]
    assert [point.faithfulness.value for point in found.points] == pytest.approx([0, 1, 1])
    channels = torch.zeros(3, 4)
    channels[0, 0] = channels[1, 2] = 1.0
    narrow = dataclasses.replace(graph, neurons_scores=channels)
    found = graph_curve(narrow, micro, data, level="neuron", shares=[0.17, 1.0])
    assert found.points[0].n_chosen == 2
    assert found.points[0].faithfulness.value == pytest.approx(1)
    assert found.points[0].weighted_edges == pytest.approx(5 / 4)  # five edges, of a quarter each


def test_scores_on_paper(micro, data):
    """The norm takes the size of the embedding away, so that no gradient flows along it."""
    expected = 2 * WRITTEN * 4 * W_U / (1 + WRITTEN**2) ** 1.5
    for method in ("eap", "eap_ig"):
        scored = edge_scores(micro, data, method)
        scores = {name: score for name, score in scored.edges.items() if abs(score) > 1e-3}
        assert scores == {"a0.h0->logits": pytest.approx(expected, rel=1e-4)}
        assert scored.nodes_scores.tolist() == pytest.approx([0, expected, 0], rel=1e-4, abs=1e-3)


def test_wrong_settings(micro, data):
    graph = EapGraph.full(micro)
    with pytest.raises(ConfigError, match=r"shares .* two or more rising numbers from 0 to 1"):
        graph_curve(graph, micro, data, shares=[0.5, 0.1])
    with pytest.raises(ConfigError, match=r"level = 'layer' .* one of edge, node, neuron"):
        graph_curve(graph, micro, data, level="layer")
    with pytest.raises(ConfigError, match="n_random = -1 is not possible"):
        graph_curve(graph, micro, data, n_random=-1)
    with pytest.raises(CircuitError, match="no neurons_scores to rank by"):
        graph_curve(graph, micro, data, level="neuron")
    with pytest.raises(ConfigError, match="intervention = 'x' is not possible"):
        graph_score(graph, micro, data, "x")


def test_runs_from_a_middle_layer_are_refused(micro, data):
    """What earlier components wrote is not known: neither in a first run, nor from another run."""
    graph = EapGraph.full(micro)
    graph = graph.of_edges(torch.zeros_like(graph.scores) > 0)
    stream = torch.zeros(*data.tokens.shape, 4)
    with applying_graph(graph, micro, data)(data):
        with pytest.raises(UnsupportedError, match="under a graph of components from the tokens"):
            micro(stream, start_at_layer=0, tokens=data.tokens)
        expected = micro(data.tokens)
        with pytest.raises(UnsupportedError, match="under a graph of components from the tokens"):
            micro(stream, start_at_layer=0, tokens=data.tokens)
        assert torch.equal(micro(data.tokens), expected)


def test_the_ratio_of_two_means():
    """Its standard error by hand, over pairs: residuals 0.5, -0.5 of a mean denominator of 1.5."""
    numerators = torch.tensor([1.0, 1.0, 2.0, 4.0])
    denominators = torch.tensor([0.5, 1.5, 2.0, 2.0])
    found = ratio_of_pairs(numerators, denominators)
    ratio = 2 / 1.5
    residuals = [1 - ratio, 3 - 2 * ratio]
    error = abs(residuals[0] - residuals[1]) / 2 / 1.5
    assert found == Estimate(pytest.approx(ratio), pytest.approx(error))
    assert math.isnan(ratio_of_pairs(numerators, torch.zeros(4)).value)
    with pytest.raises(ArgumentError, match="must be as many, not 4 and 2"):
        ratio_of_pairs(numerators, torch.ones(2))
