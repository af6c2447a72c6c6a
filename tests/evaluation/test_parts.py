"""Necessity, minimality, specificity and backups, on models whose answers are known."""

import dataclasses
import json
import math
import random

import pytest
import torch

from helpers import (
    copied_parameters,
    full_config,
    has_hooks,
    random_circuit,
    random_data,
    stock_model,
    tiny_model,
)
from micro import (
    FILLERS,
    LOSS,
    NODES,
    VOCABULARY,
    W_O,
    W_U,
    W_V,
    WRITTEN,
    micro_circuit,
    micro_data,
    micro_model,
)
from tl_sparse.errors import CircuitError, ConfigError, TokenizerError
from tl_sparse.evaluation.baselines import random_circuits_like, without_nodes
from tl_sparse.evaluation.coablation import Backups, backups, estimated_effects
from tl_sparse.evaluation.holding import holding_circuit
from tl_sparse.evaluation.judge import score
from tl_sparse.evaluation.knockout import Necessity, necessity
from tl_sparse.evaluation.minimal import Minimality, minimality
from tl_sparse.evaluation.removal import effects
from tl_sparse.evaluation.running import task_loss
from tl_sparse.evaluation.specific import Specificity, specificity, specificity_matrix
from tl_sparse.hooks import hooked
from tl_sparse.records import record_from
from tl_sparse.tasks.task import Task
from tl_sparse.tasks.task_data import make_task_data

pytestmark = pytest.mark.any_line

CHANCE = math.log(2)


def loss_if_written(a):
    """The loss of the micro model if a is written after A and -a after B; see micro.py."""
    return math.log1p(math.exp(-2 * W_U * a / math.sqrt((1 + a * a) / 4)))


def our_model():
    return tiny_model(full_config())


MEASURES = [necessity, minimality, specificity, backups]
#: So small that they take no time.
SMALL = {
    necessity: {"n_random": 2, "n_random_pairs": 2, "n_permutations": 99},
    minimality: {"n_random": 4, "max_parts": 4},
    specificity: {"n_random": 2, "tasks": []},
    backups: {"n_candidates": 3, "n_random": 2},
}


def measured(measure, circuit, model, data, **changes):
    return measure(circuit, model, data, **(SMALL[measure] | changes))


# --- all of them


@pytest.mark.parametrize("measure", MEASURES)
def test_circuits_that_cannot_be_measured(measure, micro, circuit):
    data = micro_data(micro)
    other = tiny_model()
    with pytest.raises(CircuitError, match="this circuit belongs to the model 'micro'"):
        measure(circuit, other, random_data(other))
    with pytest.raises(CircuitError, match="has no means"):
        measure(dataclasses.replace(circuit, means={}), micro, data)
    with pytest.raises(CircuitError, match="has no nodes"):
        measure(without_nodes(circuit), micro, data)
    assert not has_hooks(micro)


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (necessity, "n_random"),
        (necessity, "n_random_pairs"),
        (necessity, "n_permutations"),
        (minimality, "n_pairs"),
        (minimality, "n_random"),
        (minimality, "max_parts"),
        (specificity, "n_pairs"),
        (specificity, "n_random"),
        (backups, "n_candidates"),
        (backups, "n_random"),
        (backups, "n_pairs"),
    ],
)
def test_numbers_that_are_too_small(measure, name, micro, circuit):
    with pytest.raises(ConfigError, match=f"{name} = 0 is not possible; it must be at least 1"):
        measure(circuit, micro, micro_data(micro), **{name: 0})


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("make", [stock_model, our_model])
def test_what_is_measured_is_a_record_and_leaves_the_model_alone(measure, make):
    model = make()
    circuit, data = random_circuit(model, share=0.3), random_data(model)
    before = copied_parameters(model)
    with torch.inference_mode():
        found = measured(measure, circuit, model, data)
    assert found == measured(measure, circuit, model, data)  # the same seed
    read = record_from(type(found), json.loads(json.dumps(dataclasses.asdict(found))))
    assert dataclasses.asdict(read) == dataclasses.asdict(found)
    assert not has_hooks(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None


@pytest.mark.parametrize("measure", MEASURES)
def test_of_one_pair_there_are_no_errors_and_no_tests(measure, micro, circuit):
    found = measured(measure, circuit, micro, micro_data(micro, n_pairs=1))
    text = json.dumps(dataclasses.asdict(found))
    if measure is not specificity:  # which tests nothing
        assert "1 pair: too few for a test" in text or "0 pairs: too few for a test" in text


# --- necessity


def test_necessity_on_paper(micro, circuit):
    found = necessity(circuit, micro, micro_data(micro))
    assert found.full_loss.value == pytest.approx(LOSS, abs=1e-6)
    assert found.full_accuracy.value == 1
    # Without the circuit both answers are alike, and a tie is no right answer.
    assert found.mean.loss.value == pytest.approx(CHANCE, abs=1e-6)
    assert found.mean.accuracy.value == 0
    assert found.mean.told_apart.value == 0.5
    assert found.mean.p_knows_nothing.value is None
    assert found.mean.independence.p_value.value == 1
    # The circuit is all that the model has, so that neither is ever better.
    assert found.better.value == 0
    assert found.p_equivalent.problem == "0 pairs: too few for a test"
    assert found.n_pairs == found.n_random_pairs == 8


def test_random_circuits_are_counted(micro, circuit):
    """One of 32 random circuits is the circuit itself; without any of its nodes nothing works."""
    n_random = 40
    found = necessity(circuit, micro, micro_data(micro), n_random=n_random)
    n_the_same = n_overlapping = 0
    for each in random_circuits_like(circuit, n_random, seed=0):
        n_shared = (each & circuit).n_nodes
        n_the_same += n_shared == circuit.n_nodes
        n_overlapping += n_shared > 0
    assert 0 < n_overlapping < n_random
    assert found.sufficiency.share == pytest.approx(n_the_same / n_random)
    assert found.partial_necessity.share == pytest.approx(n_overlapping / n_random)
    random_loss = (n_overlapping * CHANCE + (n_random - n_overlapping) * LOSS) / n_random
    assert found.mean.random_loss.value == pytest.approx(random_loss, abs=1e-5)
    assert found.mean.random_loss.standard_error > 0
    assert found.sufficiency.p_value.is_significant == (n_the_same == 0)
    assert found.partial_necessity.p_value.value == pytest.approx(1, abs=0.01)


def test_a_model_that_still_knows_the_answer(micro):
    """The circuit has one of two paths; the other one tells all pairs apart, and just as well."""
    second_path(micro)
    found = necessity(first_path(micro), micro, micro_data(micro), n_random=2)
    assert found.mean.loss.value == pytest.approx(loss_if_written(WRITTEN), abs=1e-5)
    assert found.mean.told_apart.value == 1
    assert found.mean.p_knows_nothing.value == pytest.approx(2 / 2**8)
    assert found.sufficiency.p_value.problem == "2 random circuits: too few for a test"


@pytest.mark.parametrize("make", [stock_model, our_model])
def test_necessity_against_scores(make):
    model = make()
    circuit, data = random_circuit(model, share=0.3), random_data(model, n_pairs=7)
    found = measured(necessity, circuit, model, data, n_random=6)
    for ablation, without in (("mean", found.mean), ("resample", found.resample)):
        run_context = holding_circuit(circuit, model, ablation, inverted=True)
        expected = score(model, data, run_context=run_context)
        assert without.loss.value == pytest.approx(expected.loss, rel=1e-5)
        assert without.loss.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
        assert without.accuracy.value == pytest.approx(expected.accuracy)
    assert (found.mean.n_random, found.resample.n_random) == (6, 4)
    assert isinstance(found, Necessity)


# --- minimality


def test_minimality_on_paper(micro, circuit):
    """The three nodes and two edges are all needed; a neuron that does nothing is not."""
    circuit.kept["blocks.0.mlp.hook_post"][1] = True
    found = minimality(circuit, micro, micro_data(micro, n_pairs=16))
    rises = {part.name: part.rise.value for part in found.parts}
    assert rises.pop("0.mlp_neuron 1") == pytest.approx(0, abs=1e-6)
    assert len(rises) == 5
    assert rises.keys() >= set(NODES)
    assert list(rises.values()) == pytest.approx([CHANCE - LOSS] * 5, abs=1e-5)
    assert found.indistinct == ["0.mlp_neuron 1"]
    assert found.superfluous == ["0.mlp_neuron 1"]
    assert found.circuit_loss.value == pytest.approx(LOSS, abs=1e-6)
    assert (found.n_pairs, found.n_left_out, found.correction) == (16, 0, "Holm")
    for part in found.parts[:5]:
        assert part.p_no_rise.is_significant
    # The model has no weights but those of the circuit's edges.
    assert 0 < found.random_nodes.n <= 20
    assert found.random_edges.n == 0
    assert found.random_nodes.rise.value == pytest.approx(0, abs=1e-6)
    (edge, _) = [part for part in found.parts if part.kind == "edge"]
    assert edge.exceeds is None
    assert edge.p_matters.problem == "0 random edges: too few for a test"


def test_random_edges_are_cut_from_enlarged_circuits(micro, circuit):
    """Each enlarged circuit has the second path, or a part of it, beside the circuit's."""
    second_path(micro)
    data = micro_data(micro, n_pairs=8)
    found = minimality(micro_circuit(micro), micro, data, n_random=12)
    assert found.random_edges.n > 0
    both, one = loss_if_written(2 * WRITTEN), loss_if_written(WRITTEN)
    # Without one of two equal paths, the loss rises by less than without the only one.
    assert 0 < found.random_edges.rise.value <= one - both + 1e-6
    for part in found.parts:
        assert part.rise.value == pytest.approx(CHANCE - one, abs=1e-5)
        assert part.exceeds == 1


def test_a_circuit_alone_is_held_as_in_its_search(micro, circuit):
    """With false means of what it does not keep, it does the task only with the rest at zero."""
    means = dict(circuit.means)
    for name, mask in circuit.kept.items():
        means[name] = means[name] + 3.0 * ~mask
    circuit = dataclasses.replace(circuit, means=means)
    data = micro_data(micro)
    at_means, at_zero = minimality(circuit, micro, data), minimality(circuit, micro, data, "zero")
    assert at_zero.circuit_loss.value == pytest.approx(LOSS, abs=1e-5)
    assert at_means.circuit_loss.value > 2 * LOSS
    assert necessity(circuit, micro, data, "zero").p_equivalent.n == 0  # it is the model
    assert necessity(circuit, micro, data).p_equivalent.n == data.n_pairs


def test_the_parts_of_a_large_circuit_are_sampled():
    model = our_model()
    circuit, data = random_circuit(model, share=0.1), random_data(model)
    found = minimality(circuit, model, data, n_random=2, max_parts=5)
    exact = {str(part): effect for part, effect in effects(circuit, model, data).items()}
    assert len(found.parts) == 5
    assert found.n_left_out == len(exact) - 5
    for part in found.parts:
        assert part.rise.value == pytest.approx(exact[part.name], abs=1e-5)
    others = minimality(circuit, model, data, n_random=2, max_parts=5, seed=1)
    assert {part.name for part in others.parts} != {part.name for part in found.parts}


def test_an_edge_that_is_cut_stays_cut_in_enlarged_circuits(micro, circuit):
    circuit = circuit.without(circuit.edges(micro)[:1], micro)
    found = minimality(circuit, micro, micro_data(micro), n_random=4)
    assert found.random_nodes.rise.value == pytest.approx(0, abs=1e-6)
    assert isinstance(found, Minimality)
    assert len(found.indistinct) == len(found.parts) == 4  # nothing works without the edge


def test_dense_models_have_no_edges_to_cut():
    model = stock_model()
    found = minimality(random_circuit(model, share=0.1), model, random_data(model), n_random=4)
    assert {part.kind for part in found.parts} == {"node"}
    assert found.random_edges.n == 0


# --- specificity


def sample_of(letters):
    def sample(rng: random.Random) -> tuple[str, str]:
        before, between, after = [rng.choice(FILLERS[:10]) for _ in range(3)]
        return tuple(f"{before} {between} {letter} {after} end" for letter in letters)

    return sample


#: As the micro task, but with fewer fillers; and with other letters, which have their own path.
FIRST = Task("first", "was it A or B?", (" yes", " no"), sample_of("AB"))
SECOND = Task("second", "was it f28 or f29?", (" yes", " no"), sample_of(("f28", "f29")))
#: The model knows nothing of these letters.
THIRD = Task("third", "was it f26 or f27?", (" yes", " no"), sample_of(("f26", "f27")))


@pytest.fixture
def two_tasks(micro):
    """The micro model with a second task, whose path has no node in common with the first."""
    attn = micro.blocks[0].attn
    with torch.no_grad():
        micro.embed.W_E[VOCABULARY["f28"], 3] = 1.0
        micro.embed.W_E[VOCABULARY["f29"], 3] = -1.0
        attn.W_V[0, 3, 1] = W_V
        attn.W_O[0, 1, 3] = W_O
        micro.unembed.W_U[3, VOCABULARY["yes"]] = W_U
        micro.unembed.W_U[3, VOCABULARY["no"]] = -W_U
    return micro


def circuit_of(model, task, channel, head_channel, written):
    circuit = dataclasses.replace(without_nodes(micro_circuit(model)), task=task.name)
    circuit.kept["blocks.0.ln1.hook_read"][channel] = True
    circuit.kept["blocks.0.attn.hook_v"][0, head_channel] = True
    circuit.kept["blocks.0.hook_attn_out"][written] = True
    return circuit


def test_a_specific_circuit(two_tasks):
    circuit = circuit_of(two_tasks, FIRST, 0, 0, 2)
    data = make_data(FIRST, two_tasks)
    found = specificity(circuit, two_tasks, data, [FIRST, SECOND, THIRD, "var_swap"], n_pairs=6)
    assert found.own.full_loss.value == pytest.approx(LOSS, abs=1e-5)
    assert found.own.rise.value == pytest.approx(CHANCE - LOSS, abs=1e-5)
    assert found.own.drop.value == 1
    assert list(found.others) == ["second"]  # the own task is not one of the others
    assert found.others["second"].rise.value == pytest.approx(0, abs=1e-6)
    assert found.others["second"].accuracy.value == 1
    assert found.mean_rise.value == pytest.approx(0, abs=1e-6)
    # Random nodes hit the second task's path as often as the first one's.
    random_nodes = random_circuits_like(circuit, 4, seed=0)
    of_second = circuit_of(two_tasks, SECOND, 3, 1, 3)
    n_hits = sum((each & of_second).n_nodes > 0 for each in random_nodes)
    expected = n_hits / 4 * (CHANCE - LOSS)
    assert found.others["second"].random_rise.value == pytest.approx(expected, abs=1e-5)
    assert found.left_out["third"] == "the model's accuracy is 0%"
    assert "task var_swap" in found.left_out["var_swap"]
    assert isinstance(found, Specificity)


def make_data(task, model):
    return make_task_data(task, model.tokenizer, 6, seed=0)


def test_the_matrix_of_two_tasks(two_tasks):
    circuits = {
        "a": circuit_of(two_tasks, FIRST, 0, 0, 2),
        "b": circuit_of(two_tasks, SECOND, 3, 1, 3),
    }
    found = specificity_matrix(circuits, two_tasks, [FIRST, SECOND, THIRD], n_pairs=6)
    assert found.own_tasks == {"a": "first", "b": "second"}
    assert list(found.left_out) == ["third"]
    for name, own in found.own_tasks.items():
        for task, loss in found.losses[name].items():
            expected = CHANCE - LOSS if task == own else 0
            assert loss.rise.value == pytest.approx(expected, abs=1e-5)


def test_specificity_without_tasks_or_a_tokenizer(micro, circuit):
    found = specificity(circuit, micro, micro_data(micro), tasks=[])
    assert (found.others, found.mean_rise, found.left_out) == ({}, None, {})
    data = micro_data(micro)
    micro.tokenizer = None
    with pytest.raises(TokenizerError, match="the model has no tokenizer"):
        specificity(circuit, micro, data)
    with pytest.raises(CircuitError, match="no circuits are given"):
        specificity_matrix({}, micro)


# --- backups


def second_path(micro):
    """Give the micro model a second path of the same strength, through another value channel."""
    attn = micro.blocks[0].attn
    with torch.no_grad():
        attn.W_V[0, 0, 1] = W_V
        attn.W_O[0, 1, 2] = W_O


def first_path(micro):
    """The circuit of the first path's value channel alone."""
    circuit = without_nodes(micro_circuit(micro))
    circuit.kept["blocks.0.attn.hook_v"][0, 0] = True
    return circuit


def test_a_backup_is_found():
    micro = micro_model()
    second_path(micro)
    found = backups(first_path(micro), micro, micro_data(micro, 32), n_pairs=16)
    both, one = loss_if_written(2 * WRITTEN), loss_if_written(WRITTEN)
    first = found.candidates[0]
    assert first.node == "0.attn_v h0.1"
    assert first.effect.value == pytest.approx(one - both, abs=1e-5)
    assert first.effect_without.value == pytest.approx(CHANCE - one, abs=1e-5)
    assert first.growth.value == pytest.approx(CHANCE - 2 * one + both, abs=1e-5)
    assert first.p_no_growth.is_significant
    assert found.n_found == 1
    assert found.full_loss.value == pytest.approx(both, abs=1e-5)
    assert found.without_loss.value == pytest.approx(one, abs=1e-5)
    assert found.without_found_loss.value == pytest.approx(CHANCE, abs=1e-5)
    assert found.share == pytest.approx(1, abs=1e-4)
    assert found.problem == ""
    assert (found.n_outside, found.n_random, found.n_pairs) == (23, 10, 16)
    assert found.ranked_on_others


def test_a_circuit_without_backups(micro, circuit):
    found = backups(circuit, micro, micro_data(micro, 16), n_random=100)
    assert found.n_found == 0
    assert found.n_random == found.n_outside == 21
    assert found.random_growth.value == pytest.approx(0, abs=1e-6)
    assert found.share is None
    assert "nothing of the task is left, so no node has taken over" in found.problem
    assert not found.ranked_on_others


def test_nodes_that_all_are_in_the_circuit_have_no_backups():
    model = our_model()
    found = backups(random_circuit(model, share=1.0), model, random_data(model))
    assert (found.candidates, found.n_random, found.n_outside) == ([], 0, 0)
    assert (found.random_growth, found.largest_random_growth) == (None, None)
    assert isinstance(found, Backups)


def smooth_model():
    """A model of ours without ReLU and AbsTopK, whose loss has a derivative everywhere."""
    return tiny_model(n_layers=2)


@pytest.mark.parametrize("make", [stock_model, smooth_model])
def test_the_estimate_is_the_derivative_of_the_loss(make):
    """The effect of holding a node, if its mean is so near that the loss is linear."""
    model = make().to(torch.float64)
    data = random_data(model, lengths=torch.full((12,), 7))
    circuit = random_circuit(model, share=0.2)
    held = without_nodes(circuit)
    estimated = estimated_effects(held, model, data, batch_size=4)
    start = 0
    for name, mask in circuit.kept.items():
        number = start + mask.numel() // 2
        start += mask.numel()
        expected = derivative(model, data, name, mask.numel() // 2, circuit.means[name])
        assert float(estimated[number]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def derivative(model, data, name, index, mean):
    """The derivative of the loss as one node moves from its activation towards its mean."""
    step = 1e-5

    def loss(share):
        def move(activation, hook):
            moved = activation.clone()
            flat = moved.flatten(2)
            flat[..., index] += share * (mean.flatten()[index] - flat[..., index])
            return flat.view_as(activation)

        with torch.no_grad(), hooked(model, {name: move}):
            return float(task_loss(model, data))

    return (loss(step) - loss(-step)) / (2 * step)
