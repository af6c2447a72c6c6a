"""Values from other prompts: what they move in the model and under the circuit."""

import dataclasses
import json
import math

import pytest
import torch

from helpers import has_hooks, random_circuit, random_data, stock_model, tiny_model
from micro import NODES, W_O, W_U, W_V, WRITTEN, micro_circuit, micro_data
from tl_sparse.errors import CircuitError, ConfigError, TaskError
from tl_sparse.evaluation.baselines import without_nodes
from tl_sparse.evaluation.interchanging import (
    Interchange,
    _aligned_positions,
    _rows,
    _same_answer,
    interchange,
    other_of_pair,
)
from tl_sparse.records import record_from


def logit_difference(a):
    """Right minus wrong, if a is written; see micro.py."""
    return 2 * W_U * a / math.sqrt((1 + a * a) / 4)


def test_interchange_on_paper(micro, circuit):
    """Each of the three nodes alone carries the answer, so each turns it into the other one."""
    found = interchange(circuit, micro, micro_data(micro))
    assert [each.node for each in found.nodes] == NODES
    turned = -2 * logit_difference(WRITTEN)
    for each in [*found.nodes, found.all_nodes]:
        for run in (each.other_answer.model, each.other_answer.circuit):
            assert run.change.value == pytest.approx(turned, rel=1e-4)
            assert run.size.value == pytest.approx(-turned, rel=1e-4)
            assert run.flips.value == 1
        for run in (each.same_answer.model, each.same_answer.circuit):
            assert run.size.value == pytest.approx(0, abs=1e-4)
            assert run.flips.value == 0
    assert found.everything.model.change.value == pytest.approx(turned, rel=1e-4)
    assert found.everything.circuit.change.value == pytest.approx(turned, rel=1e-4)
    assert len(found.random) == 4
    assert found.correlation is None
    assert found.no_correlation == "all nodes change the logit difference alike in the model"
    assert record_from(Interchange, json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert not has_hooks(micro)


def test_a_part_of_the_answer_moves_by_its_share(micro):
    """A second path of half the strength is left out of the circuit."""
    with torch.no_grad():
        micro.blocks[0].attn.W_V[0, 0, 1] = W_V / 2
        micro.blocks[0].attn.W_O[0, 1, 2] = W_O
    found = interchange(micro_circuit(micro), micro, micro_data(micro))
    nodes = {each.node: each.other_answer for each in found.nodes}
    value = nodes["0.attn_v h0.0"]
    whole = logit_difference(1.5 * WRITTEN)
    left = logit_difference(-0.5 * WRITTEN)
    assert value.model.change.value == pytest.approx(left - whole, rel=1e-4)
    assert value.circuit.change.value == pytest.approx(-2 * logit_difference(WRITTEN), rel=1e-4)
    read = nodes["0.attn_in 0"]
    assert read.model.change.value == pytest.approx(-2 * whole, rel=1e-4)
    assert found.no_correlation == ("all nodes change the logit difference alike under the circuit")


def test_a_node_that_the_model_does_not_use(micro, circuit):
    circuit.kept["blocks.0.mlp.hook_post"][1] = True
    found = interchange(circuit, micro, micro_data(micro))
    unused = found.nodes[-1].other_answer
    assert unused.model.size.value == unused.circuit.size.value == 0
    assert found.correlation.value == pytest.approx(1)


# Which prompts give their values


def test_donors_have_the_same_answer_and_another_pair(micro):
    data = micro_data(micro, 6)
    data = dataclasses.replace(data, last=torch.tensor([3, 4, 5, 5, 3, 4, 5, 5, 5, 5, 5, 5]))
    donors = _same_answer(data, 0)
    for row, donor in enumerate(donors.tolist()):
        assert row != donor
        assert row % 2 == donor % 2
    assert donors[0] == 4  # the other prompt of this length and answer
    assert other_of_pair(data).tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]


def test_prompts_are_aligned_at_their_ends(micro):
    data = micro_data(micro, 2)
    data = dataclasses.replace(data, last=torch.tensor([5, 3, 4, 4]))
    donors = _rows(data, torch.tensor([1, 0, 3, 2]))
    assert _aligned_positions(data, donors).tolist() == [
        [0, 1, 1, 1, 2, 3],
        [0, 3, 4, 5, 5, 5],
        [0, 1, 2, 3, 4, 4],
        [0, 1, 2, 3, 4, 4],
    ]


def test_answers_that_occur_once_have_no_other_prompt():
    model = tiny_model(d_vocab=60)
    data = random_data(model, n_pairs=4)
    data = dataclasses.replace(data, candidates=torch.arange(8).view(4, 2).repeat_interleave(2, 0))
    found = interchange(random_circuit(model, 0.1), model, data, n_random=0)
    assert all(each.same_answer is None for each in [*found.nodes, found.all_nodes])
    assert found.no_same_answer == "some prompts are the only ones with their answers"
    assert found.random == []


@pytest.mark.parametrize("make", [stock_model, tiny_model])
@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_interchange_does_not_depend_on_the_batch_size(make, ablation):
    model = make()
    circuit = random_circuit(model, share=0.1)
    data = random_data(model, n_pairs=5)
    data = dataclasses.replace(data, candidates=torch.tensor([[2, 3]]).expand(10, 2))
    large = interchange(circuit, model, data, ablation, n_random=1)
    small = interchange(circuit, model, data, ablation, n_random=1, batch_size=4)
    for one, other in zip(large.nodes, small.nodes, strict=True):
        for kind in ("other_answer", "same_answer"):
            for run in ("model", "circuit"):
                expected = getattr(getattr(one, kind), run).size.value
                found = getattr(getattr(other, kind), run).size.value
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert small.random[0].size.value == pytest.approx(large.random[0].size.value, rel=1e-3)
    assert large.all_nodes.other_answer.model.size.value > 0
    assert not has_hooks(model)


def test_all_nodes_of_the_model_bring_the_other_prompts_answer():
    """With the same last token, whose embedding is no node, the run is that of the other prompt."""
    model = tiny_model(n_layers=2)
    data = random_data(model, n_pairs=4, lengths=torch.full((8,), 7))
    data.tokens[:, -1] = 1
    found = interchange(random_circuit(model, share=1.0), model, data, n_pairs=3, n_random=0)
    assert found.n_pairs == 3
    for run in ("model", "circuit"):
        moved = getattr(found.all_nodes.other_answer, run)
        everything = getattr(found.everything, run)
        assert moved.change.value == pytest.approx(everything.change.value, abs=1e-4)
        assert moved.flips == everything.flips


def test_what_is_refused(micro, circuit):
    data = micro_data(micro)
    with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
        interchange(circuit, tiny_model(), data)
    with pytest.raises(CircuitError, match="no means"):
        interchange(dataclasses.replace(circuit, means={}), micro, data)
    with pytest.raises(CircuitError, match="has no nodes"):
        interchange(without_nodes(circuit), micro, data)
    with pytest.raises(ConfigError, match="ablation = 'means'"):
        interchange(circuit, micro, data, "means")
    with pytest.raises(ConfigError, match="n_pairs = 0"):
        interchange(circuit, micro, data, n_pairs=0)
    with pytest.raises(ConfigError, match="n_random = -1"):
        interchange(circuit, micro, data, n_random=-1)
    with pytest.raises(TaskError, match="at least 2 pairs"):
        interchange(circuit, micro, micro_data(micro, 1), "resample")
    assert not has_hooks(micro)
