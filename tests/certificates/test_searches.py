"""The search of a circuit, repeated with other seeds, on other pairs, and on controls."""

import dataclasses
import json
import random

import pytest

from helpers import copied_parameters, has_hooks, tiny_model
from micro import (
    FILLERS,
    LOSS,
    MICRO_TASK,
    QUICK_SETTINGS,
    micro_circuit,
    micro_corpus,
    micro_model,
    save_pairs,
)
from tl_sparse.certificates import control_searches, stable
from tl_sparse.certificates.again import Found, search_of
from tl_sparse.certificates.control_searches import Controls, controls
from tl_sparse.certificates.searching import controls_text, stability_text
from tl_sparse.certificates.stable import SearchedAgain, Stability, stability
from tl_sparse.errors import CircuitError, ConfigError
from tl_sparse.evaluation.estimates import Estimate
from tl_sparse.pruning.pruner import prune, prune_edges
from tl_sparse.pruning.splits import heldout_pairs, task_splits
from tl_sparse.records import record_from
from tl_sparse.tasks import TASKS
from tl_sparse.tasks.pairs import prompts_of
from tl_sparse.tasks.task import Task

pytestmark = pytest.mark.any_line

CHANCE = 0.6931471805599453
SMALL = {"n_pairs": 4, "n_subsets": 4, "progress": False}


@pytest.fixture(scope="module")
def model():
    return micro_model()


@pytest.fixture(scope="module")
def found(model):
    circuit, _ = prune(model, MICRO_TASK, micro_corpus(), QUICK_SETTINGS, progress=False)
    return circuit


def estimate(value):
    """An estimate of this value, on prompts of which each gives the same."""
    return pytest.approx(value, abs=1e-4)


def test_a_circuit_that_is_all_there_is(model, found):
    """The micro model has one circuit, so every search finds it, and it is perfect everywhere."""
    before = copied_parameters(model)
    result = stability(found, model, MICRO_TASK, n_seeds=2, n_samples=1, **SMALL)
    assert [again.seed for again in result.seeds] == [1, 2]
    assert [again.seed for again in result.samples] == [0]
    for again in (*result.seeds, *result.samples):
        assert again.overlap == 1
        assert again.withstands
        assert again.found == result.first
    first = result.first
    assert (first.n_nodes, first.n_edges, first.not_found) == (3, 2, "")
    assert first.full_loss.value == estimate(LOSS)
    assert first.loss.value == estimate(LOSS)
    assert first.worst_loss.value == estimate(LOSS)
    assert first.empty_loss.value == estimate(CHANCE)
    assert result.loss_interval == [estimate(LOSS), estimate(LOSS)]
    assert [fresh.value for fresh in result.fresh_losses] == [estimate(LOSS)] * 3
    assert list(result.left_out) == ["contexts"]
    assert "make a Task of your own for each kind of context" in result.left_out["contexts"]
    assert result.contexts == {}
    assert not has_hooks(model)
    assert all((before[name] == value).all() for name, value in model.named_parameters())
    written = json.loads(json.dumps(dataclasses.asdict(result)))
    assert record_from(Stability, written) == result


def test_controls_of_the_micro_model(model, found):
    before = copied_parameters(model)
    result = controls(found, model, MICRO_TASK, micro_corpus(), **SMALL)
    assert (result.real.n_nodes, result.real.n_edges) == (3, 2)
    assert result.real.loss.value == estimate(LOSS)
    assert "fewer than two are single tokens" in result.left_out["nonsense"]
    shuffled = result.searches["shuffled"]
    assert shuffled.n_nodes is None
    assert "no circuit was found at any size" in shuffled.not_found
    assert shuffled.full_loss.value > CHANCE
    assert result.max_nodes == 24  # all that there are; ten times the circuit's would be 30
    assert "permuted" in result.searches
    assert all((before[name] == value).all() for name, value in model.named_parameters())
    assert not has_hooks(model)
    written = json.loads(json.dumps(dataclasses.asdict(result)))
    assert record_from(Controls, written) == result


def test_a_search_that_does_not_look_at_answers_has_no_controls(model, found):
    """With any labels, it finds the circuit that says what the model says."""
    config = found.measured["config"] | {"objective": "model", "target_loss": 1e-5}
    like_model = dataclasses.replace(found, measured={"config": config})
    result = controls(like_model, model, MICRO_TASK, micro_corpus(), **SMALL)
    assert result.searches == {}
    assert result.left_out.keys() == {"nonsense", "shuffled", "permuted"}
    assert "whatever the answers are" in result.left_out["shuffled"]
    text = " ".join(" ".join(controls_text(result)).split())
    assert "Losses of searches are what these looked for, the divergence from the model." in text
    assert "Sizes were tried" not in text


def test_section_7_says_what_its_losses_are_and_why_nothing_was_found(model, found):
    first = Found(Estimate(0.4), n_nodes=3, n_edges=2, loss=Estimate(0.4))
    nothing = SearchedAgain(1, Found(Estimate(0.4), not_found="every size fails"))
    measured = Stability(
        first=first,
        seeds=[nothing, nothing],
        samples=[],
        loss_interval=[],
        fresh_losses=[],
        contexts={},
        left_out={},
        target_loss=0.5,
        n_pairs=8,
        n_subsets=4,
        objective="next_token",
    )
    text = " ".join(" ".join(stability_text(measured)).split())
    assert "Losses of searches are what these looked for, the loss among all tokens." in text
    assert text.count("Nothing was found: every size fails.") == 1
    as_usual = dataclasses.replace(measured, objective="candidates")
    assert "Losses of searches" not in " ".join(stability_text(as_usual))


def test_controls_are_not_searched_far_above_the_size_of_the_circuit(model, found, monkeypatch):
    monkeypatch.setattr(control_searches, "LIMIT", 1)
    result = controls(found, model, MICRO_TASK, micro_corpus(), **SMALL)
    assert result.max_nodes == 3
    assert "up to the 3 nodes that max_nodes allows" in result.searches["shuffled"].not_found


def test_edges_are_pruned_again_if_they_were(model, found):
    cut, _ = prune_edges(found, model, MICRO_TASK, QUICK_SETTINGS, progress=False)
    result = stability(cut, model, MICRO_TASK, n_seeds=1, n_samples=0, n_draws=0, **SMALL)
    assert result.seeds[0].found.n_edges == cut.measured.get("edges", 2)
    assert result.samples == []


def test_a_task_of_which_only_the_pairs_are_known(model, tmp_path):
    task = Task.from_jsonl(save_pairs(tmp_path / "pairs.jsonl"))
    circuit, _ = prune(model, task, micro_corpus(), QUICK_SETTINGS, progress=False)
    result = stability(circuit, model, n_seeds=0, n_samples=1, **SMALL)
    assert result.samples == []
    assert "only the pairs are known" in result.left_out["samples"]
    assert result.fresh_losses == []
    assert "to draw other pairs" in result.left_out["fresh_losses"]


def test_a_task_with_too_few_pairs_to_search_on_others(model):
    def sample(rng: random.Random):
        filler, other = rng.choice(FILLERS[:8]), rng.choice(FILLERS[:8])
        return f"{filler} {other} A f0 end", f"{filler} {other} B f0 end"

    task = Task("few", "was it A or B?", MICRO_TASK.candidates, sample)
    circuit, _ = prune(model, task, micro_corpus(), QUICK_SETTINGS, progress=False)
    result = stability(circuit, model, task, n_seeds=0, n_samples=1, **SMALL)
    assert result.samples == []
    assert "task few has 16 pairs of distinct prompts besides" in result.left_out["samples"]


def test_fresh_pairs_are_not_those_that_judge_the_circuit(model, found):
    """Held-out pairs are drawn with the seed 1, which fresh ones have too."""
    data = heldout_pairs(found, model, MICRO_TASK)
    search = search_of(found, model, n_subsets=1, batch_size=8, seed=0)
    subject = stable._Subject(found, model, MICRO_TASK, data, search, Found(Estimate(0.0)))
    fresh = prompts_of(stable._new_pairs(subject, 8, seed=1))
    splits = task_splits(model, MICRO_TASK, search.config)
    assert all(fresh.isdisjoint(part.prompts) for part in splits)


@pytest.mark.parametrize("measure", [stability, controls])
def test_circuits_whose_search_cannot_be_repeated(measure, model, found):
    with pytest.raises(CircuitError, match="this circuit belongs to the model"):
        measure(found, tiny_model(), MICRO_TASK)
    with pytest.raises(CircuitError, match="does not record the settings with which it was found"):
        measure(micro_circuit(model), model, MICRO_TASK)
    with pytest.raises(CircuitError, match="this circuit has no means"):
        measure(dataclasses.replace(found, means={}), model, MICRO_TASK)
    empty = {name: mask & False for name, mask in found.kept.items()}
    with pytest.raises(CircuitError, match="this circuit has no nodes"):
        measure(dataclasses.replace(found, kept=empty), model, MICRO_TASK)
    with pytest.raises(CircuitError, match="give it as the argument task"):
        measure(dataclasses.replace(found, pairs=None), model)
    with pytest.raises(ConfigError, match="n_subsets"):
        measure(found, model, MICRO_TASK, n_subsets=0)


def test_contexts_name_what_the_model_cannot_do():
    assert "single_double_quote" in TASKS
