"""Whether a circuit behaves like its model: divergences, logit differences, and errors."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from helpers import has_hooks, random_circuit, random_data, random_tokens, stock_model, tiny_model
from micro import W_O, W_U, W_V, WRITTEN, micro_circuit, micro_corpus, micro_data
from tl_sparse.errors import CircuitError, ConfigError, DataError, TaskError
from tl_sparse.evaluation.baselines import without_nodes
from tl_sparse.evaluation.holding import holding_circuit
from tl_sparse.evaluation.like_model import (
    Likeness,
    _shared_errors,
    likeness,
    probability_of_overlap,
)
from tl_sparse.evaluation.running import all_logits
from tl_sparse.records import record_from

D_VOCAB = 36


def logit_if_written(a):
    """The logit of the right answer if a is written (micro.py); the other has minus it."""
    return W_U * a / math.sqrt((1 + a * a) / 4)


def divergence(logit, other):
    """KL of two distributions in which the two answers have plus and minus this logit."""
    n_others = D_VOCAB - 2
    total = math.exp(logit) + math.exp(-logit) + n_others
    other_total = math.exp(other) + math.exp(-other) + n_others
    mean_logit = logit * (math.exp(logit) - math.exp(-logit)) / total
    mean_other = other * (math.exp(logit) - math.exp(-logit)) / total
    return mean_logit - math.log(total) - mean_other + math.log(other_total)


def test_the_micro_circuit_is_its_model(micro, circuit):
    found = likeness(circuit, micro, micro_data(micro), micro_corpus())
    for part in (found.task, found.corpus):
        assert part.circuit.value == pytest.approx(0, abs=1e-6)
        assert part.no_nodes.value > 0.1
        assert part.random.value > part.circuit.value
    assert found.task.no_nodes.value == pytest.approx(
        divergence(logit_if_written(WRITTEN), 0), rel=1e-4
    )
    assert found.task.no_nodes.standard_error == pytest.approx(0, abs=1e-5)
    assert (found.task.n_distributions, found.corpus.n_distributions) == (16, 40 * 6)
    # All prompts with the same answer are alike: there are two clusters, and nothing within them.
    assert found.logits.between_answers.value == pytest.approx(1)
    assert found.logits.within_answers is None
    assert found.logits.remark == (
        "the model's logit difference is the same at all prompts with the same right answer"
    )
    assert found.errors.p_value is None
    assert found.errors.remark.startswith("the full model errs on 0 of 16 prompts")
    assert record_from(Likeness, json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert not has_hooks(micro)


def test_a_circuit_that_is_right_may_be_far_from_its_model(micro, circuit):
    """A second path of half the strength, which the circuit leaves out."""
    with torch.no_grad():
        micro.blocks[0].attn.W_V[0, 0, 1] = W_V / 2
        micro.blocks[0].attn.W_O[0, 1, 2] = W_O

    circuit = micro_circuit(micro)
    found = likeness(circuit, micro, micro_data(micro))
    logit, other = logit_if_written(1.5 * WRITTEN), logit_if_written(WRITTEN)
    assert found.task.circuit.value == pytest.approx(divergence(logit, other), rel=1e-3)
    assert found.logits.between_answers.value == pytest.approx(1)
    assert found.errors.n_circuit == 0
    assert found.corpus is None
    assert found.no_corpus == "no text was given"


def mixed_data(model, n_pairs):
    """Pairs that all have the same two answers."""
    data = random_data(model, n_pairs)
    candidates = torch.tensor([[2, 3]]).expand(2 * n_pairs, 2)
    return dataclasses.replace(data, candidates=candidates)


def test_agreement_of_logits_with_and_without_the_two_clusters():
    model = tiny_model(n_layers=2)
    circuit, data = random_circuit(model, share=0.8), mixed_data(model, 40)
    found = likeness(circuit, model, data, n_random=3)
    full = all_logits(model, data)
    under = all_logits(model, data, run_context=holding_circuit(circuit, model))
    logits = torch.stack([full, under])
    second_minus_first = logits[:, :, 1] - logits[:, :, 0]
    between = torch.corrcoef(second_minus_first)[0, 1].item()
    assert found.logits.between_answers.value == pytest.approx(between, abs=1e-5)
    by_side = second_minus_first.unflatten(1, (-1, 2))
    signs = torch.tensor([-1.0, 1.0])
    within = (by_side - by_side.mean(1, keepdim=True)) * signs
    expected = torch.corrcoef(within.flatten(1))[0, 1].item()
    assert found.logits.within_answers.value == pytest.approx(expected, abs=1e-5)
    assert found.logits.within_answers.standard_error > 0
    assert found.logits.n_prompts == 80
    assert found.logits.random_within_answers.standard_error is not None


def test_answers_that_occur_once_have_no_prompts_to_compare():
    model = tiny_model(d_vocab=60)
    data = random_data(model, n_pairs=4)
    candidates = torch.arange(8).view(4, 2).repeat_interleave(2, 0)
    data = dataclasses.replace(data, candidates=candidates)
    found = likeness(random_circuit(model), model, data, n_random=0).logits
    assert found.between_answers is not None
    assert found.within_answers is found.random_within_answers is None
    assert found.remark == "too few prompts have the same answers: 8 of 8 kinds"


@pytest.mark.parametrize("make", [stock_model, tiny_model])
@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_likeness_does_not_depend_on_the_batch_size(make, ablation):
    model = make()
    circuit, data = random_circuit(model), random_data(model, n_pairs=5)
    corpus = random_tokens(model, batch=5)
    large = likeness(circuit, model, data, corpus, ablation, n_random=2)
    small = likeness(circuit, model, data, corpus, ablation, n_random=2, batch_size=2)
    for part in ("task", "corpus"):
        for figure in ("circuit", "no_nodes", "random"):
            expected = getattr(getattr(large, part), figure).value
            assert getattr(getattr(small, part), figure).value == pytest.approx(expected, rel=1e-3)
            assert expected > 0
    assert small.errors == large.errors
    assert not has_hooks(model)


def test_a_row_of_the_corpus_is_resampled_from_the_row_before_it(micro, circuit):
    """With no nodes, the answer channel is that of the row before, whose letter is the other."""
    rows = micro_corpus()[:2]  # the same fillers, with A and B
    empty = dataclasses.replace(circuit, kept=dict(circuit.kept))
    empty.kept["blocks.0.hook_attn_out"] = torch.zeros(4, dtype=torch.bool)
    found = likeness(empty, micro, micro_data(micro), rows, "resample", n_random=0)
    logits = micro(rows).log_softmax(-1)
    swapped = logits.flip(0)
    expected = (logits.exp() * (logits - swapped)).sum(-1).mean().item()
    assert found.corpus.circuit.value == pytest.approx(expected, rel=1e-4)
    assert found.corpus.random is found.task.random is found.task.random_median is None


# Errors


@pytest.mark.parametrize(("n", "n_first", "n_second"), [(5, 2, 3), (6, 3, 3), (4, 4, 2), (5, 0, 2)])
def test_the_probability_of_an_overlap_is_that_of_counting(n, n_first, n_second):
    first = set(range(n_first))
    overlaps = [len(first & set(each)) for each in itertools.combinations(range(n), n_second)]
    for n_both in range(min(n_first, n_second) + 1):
        expected = sum(overlap >= n_both for overlap in overlaps) / len(overlaps)
        assert probability_of_overlap(n, n_first, n_second, n_both) == pytest.approx(expected)


def test_shared_errors_by_hand(micro):
    """16 prompts: the model errs on the first 5, and the circuit on 4 of these and on another."""
    data = micro_data(micro)
    right = torch.nn.functional.one_hot(data.correct, 2).float()
    model, run = right.clone(), right.clone()
    model[:5] = 1 - model[:5]
    run[1:6] = 1 - run[1:6]
    found = _shared_errors(data, model, run)
    assert (found.n_prompts, found.n_model, found.n_circuit, found.n_both) == (16, 5, 5, 4)
    assert found.by_chance == pytest.approx(25 / 16)
    assert found.p_value == pytest.approx((5 * 11 + 1) / math.comb(16, 5))
    assert found.remark == ""


# Bad input


def test_circuits_and_settings_that_are_refused(micro, circuit):
    data = micro_data(micro)
    with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
        likeness(circuit, tiny_model(), data)
    with pytest.raises(CircuitError, match="no means"):
        likeness(dataclasses.replace(circuit, means={}), micro, data)
    with pytest.raises(CircuitError, match="has no nodes"):
        likeness(without_nodes(circuit), micro, data)
    with pytest.raises(ConfigError, match="ablation = 'means'"):
        likeness(circuit, micro, data, ablation="means")
    with pytest.raises(ConfigError, match=r"n_random = -1.* at least 0"):
        likeness(circuit, micro, data, n_random=-1)
    with pytest.raises(TaskError, match="at least 2 pairs"):
        likeness(circuit, micro, micro_data(micro, 1), ablation="resample")


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.long), "the corpus has no tokens"),
        (torch.zeros(2, 9, dtype=torch.long), r"have 9 tokens, more than the context of 8; corpus"),
        (torch.full((2, 4), 36), r"from 0 to 35, .* they run from 36 to 36"),
        (torch.zeros(1, 4, dtype=torch.long), "needs at least 2 rows of the corpus"),
    ],
)
def test_a_corpus_that_does_not_fit(micro, circuit, corpus, message):
    with pytest.raises(DataError, match=message):
        likeness(circuit, micro, micro_data(micro), corpus, "resample")
