"""A graph that EAP-IG found and wrote, and what EAP-IG and MIB measured of it, measured here.

`golden/eap_ig` was made with TransformerLens 3.8 by hannamw/EAP-IG 795f560 (EAP-IG-inputs in five
steps, one prompt at a time; then the 30 best edges, `to_json`, `to_pt`, `evaluate_graph`) and
hannamw/MIB-circuit-track b759df3 (`evaluate_area_under_curve`) from the model and prompts below.
"""

import json

import pytest
import torch
from tool_models import sparse_model

from helpers import GOLDEN, random_data
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.evaluation.edge_attribution import edge_scores
from tl_sparse.evaluation.graph_runs import applying_graph
from tl_sparse.evaluation.graph_scores import graph_curve, graph_score
from tl_sparse.evaluation.running import all_logits
from tl_sparse.tasks.task_data import right_minus_wrong

EXPECTED = json.loads((GOLDEN / "eap_ig/expected.json").read_text())


@pytest.fixture(scope="module")
def model():
    return sparse_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def data(model):
    return random_data(model, 3, seed=EXPECTED["seed"], lengths=torch.full((6,), 5))


@pytest.mark.parametrize("name", ["graph.json", "graph.pt"])
def test_its_graph_does_here_what_it_does_there(name, model, data):
    graph = EapGraph.load(GOLDEN / "eap_ig" / name)
    assert 5 < graph.n_edges <= 30
    logits = all_logits(model, data, run_context=applying_graph(graph, model, data))
    margins = right_minus_wrong(logits, data.correct)
    assert margins.tolist() == pytest.approx(EXPECTED["margins"], abs=1e-5)
    score = graph_score(graph, model, data, n_random=0)
    assert score.graph.logit_difference == pytest.approx(float(margins.mean()), abs=1e-5)


def test_its_scores_and_its_choice_are_ours(model, data):
    graph = EapGraph.load(GOLDEN / "eap_ig/graph.json")
    ours = edge_scores(model, data, "eap_ig", steps=5)
    torch.testing.assert_close(ours.scores, graph.scores, atol=1e-6, rtol=1e-4)
    assert graph.top(30).edges.keys() == graph.edges.keys()


@pytest.mark.parametrize("ranked_by", ["absolute", "signed"])
def test_cpr_and_cmd_are_those_of_mib(ranked_by, model, data):
    graph = EapGraph.load(GOLDEN / "eap_ig/graph.pt")
    curve = graph_curve(graph, model, data, absolute=ranked_by == "absolute", n_random=0)
    expected = EXPECTED[ranked_by]
    found = [point.faithfulness.value for point in curve.points]
    assert found == pytest.approx(expected["faithfulness"], abs=1e-4)
    assert [point.weighted_edges for point in curve.points] == expected["weighted_edges"]
    assert curve.areas.cpr.value == pytest.approx(expected["cpr"], abs=1e-5)
    assert curve.areas.cmd.value == pytest.approx(expected["cmd"], abs=1e-5)
