"""What changes of a circuit's nodes do in the dense model, where it can be told beforehand."""

import dataclasses
import json
import math

import pytest
import torch

from helpers import has_hooks, random_circuit, random_data, stock_model, tiny_config, tiny_model
from micro import NODES, W_U, WRITTEN, micro_circuit, micro_data, micro_model
from tl_sparse.bridges.effects import dense_effects
from tl_sparse.bridges.effects_records import DenseEffects
from tl_sparse.bridges.maps import Maps
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.probes import trained_probe
from tl_sparse.errors import ArgumentError, CircuitError, ConfigError
from tl_sparse.evaluation.interchanging import interchange
from tl_sparse.records import record_from

#: What the micro model's logit difference changes by if the answer turns into the other one.
TURNED = -4 * W_U * WRITTEN / math.sqrt((1 + WRITTEN * WRITTEN) / 4)


def bridged_to_itself(model):
    """A model and itself, with maps that change nothing."""
    width = model.cfg.d_model
    maps = Maps(2 * model.cfg.n_layers + 1, width, width, fraction=1.0)
    maps.to(next(model.parameters()).dtype)
    with torch.no_grad():
        for site in maps.sites:
            for linear in (site.encoder.linear, site.decoder):
                linear.weight.copy_(torch.eye(width))
                linear.bias.zero_()
    return Bridges(model, model, maps)


@pytest.fixture(scope="module")
def micro():
    return micro_model()


@pytest.fixture(scope="module")
def effects(micro):
    """Those of the micro circuit; 8 pairs are measured, and 8 are left for the probes."""
    data = micro_data(micro, 16)
    return dense_effects(micro_circuit(micro), bridged_to_itself(micro), data, 8, n_random=2)


def test_the_micro_circuit_turns_the_answer_where_its_nodes_have_written_it(effects):
    """Its attention writes the answer, so the sites behind it see the change, and the first not."""
    assert effects.n_pairs == effects.n_probe_pairs == 8
    assert effects.sparse == effects.dense
    assert effects.dense.accuracy.value == 1
    assert effects.interchanged.change.value == pytest.approx(TURNED, rel=1e-4)
    assert effects.interchanged.flips.value == 1
    assert effects.ablated.change.value == pytest.approx(TURNED / 2, rel=1e-4)
    before, mid, after = effects.sites
    assert before.interchanged.dense.size.value == 0
    for site in (mid, after):
        for run in (site.interchanged.dense, site.interchanged.sparse):
            assert run.change.value == pytest.approx(TURNED, rel=1e-4)
            assert run.flips.value == 1
        assert site.ablated.dense.change.value == pytest.approx(TURNED / 2, rel=1e-4)
        assert len(site.interchanged.random) == len(site.ablated.random) == 2
    for site in effects.sites:
        assert site.everything.change.value == pytest.approx(TURNED, rel=1e-4)


def test_a_probe_finds_the_channel_that_has_the_answer(effects):
    """At the last position it is written by the attention; before, there is none."""
    before, mid, after = effects.sites
    assert before.probe.accuracy.value == 0.5
    assert before.probe.change.size.value == 0
    for site in (mid, after):
        assert site.probe.accuracy.value == 1
        assert site.probe.change.change.value == pytest.approx(TURNED, rel=1e-3)


def test_single_nodes_are_carried_to_where_they_act(effects):
    """The read, the value and the output each carry the answer alone."""
    sites = {node.node: node.site for node in effects.nodes}
    assert sites == {
        NODES[0]: "blocks.0.hook_resid_pre",
        NODES[1]: "blocks.0.hook_resid_mid",
        NODES[2]: "blocks.0.hook_resid_mid",
    }
    for node in effects.nodes:
        assert node.sparse.change.value == pytest.approx(TURNED, rel=1e-4)
        assert node.dense.change.value == pytest.approx(TURNED, rel=1e-3)
    assert effects.correlation is None
    assert "alike in the sparse model" in effects.no_correlation


def test_records_are_json_and_print_as_tables(effects):
    values = json.loads(json.dumps(dataclasses.asdict(effects)))
    assert record_from(DenseEffects, values) == effects
    text = str(effects)
    assert "in the dense model, on 8 pairs" in text
    assert "it is right at 50% to 100% of the prompts" in text
    for site in effects.sites:
        assert text.count(site.site) >= 2
    for node in NODES:
        assert node in text


def test_a_model_bridged_to_itself_changes_as_itself():
    """Also prompts of different lengths, AbsTopK, and nodes at random."""
    model = tiny_model(
        tiny_config(n_layers=2, abs_topk={"attn_in": 0.7, "mlp_neuron": 0.5}), dtype=torch.float64
    )
    circuit, data = random_circuit(model, 0.1), random_data(model, 4)
    found = dense_effects(circuit, bridged_to_itself(model), data, n_random=1)
    for site in found.sites:
        for change in (site.interchanged, site.ablated):
            assert change.dense.change.value == pytest.approx(change.sparse.change.value)
    last = found.sites[-1]
    assert last.interchanged.dense.change.value == pytest.approx(found.interchanged.change.value)
    assert last.ablated.dense.change.value == pytest.approx(found.ablated.change.value)
    own = interchange(circuit, model, data, n_random=1)
    assert found.interchanged.change.value == pytest.approx(
        own.all_nodes.other_answer.model.change.value
    )
    random = found.sites[-1].interchanged.random[0]
    assert random.change.value == pytest.approx(own.random[0].change.value)
    of_nodes = {node.node: node.other_answer.model for node in own.nodes}
    for node in found.nodes:
        assert node.sparse.change.value == pytest.approx(of_nodes[node.node].change.value)
    assert not has_hooks(model)


def test_a_stock_dense_model_in_batches():
    dense = stock_model(n_layers=2, d_vocab=11)
    sparse = tiny_model(tiny_config(n_layers=2))
    bridges = Bridges(sparse, dense, Maps(5, dense.cfg.d_model, sparse.cfg.d_model))
    circuit, data = random_circuit(sparse, 0.05), random_data(sparse, 5)
    whole = dense_effects(circuit, bridges, data, n_random=1)
    parts = dense_effects(circuit, bridges, data, n_random=1, batch_size=4)
    assert whole.no_probe == (
        "it is trained on pairs that are not measured, at least 8, and there are 0"
    )
    assert f"There is no probe: {whole.no_probe}." in str(whole)
    for one, other in zip(whole.sites, parts.sites, strict=True):
        assert one.probe is None
        for name in ("change", "size", "flips"):
            first = getattr(one.interchanged.dense, name).value
            assert first == pytest.approx(getattr(other.interchanged.dense, name).value, abs=1e-5)
    nothing = dense_effects(circuit, bridges, data, n_random=0, strength=0)
    assert nothing.interchanged == whole.interchanged
    for site in nothing.sites:
        assert site.interchanged.dense.size.value == pytest.approx(0, abs=1e-5)
        assert site.everything.size.value == pytest.approx(0, abs=1e-5)
    assert "differences are multiplied by 0." in str(nothing)


def test_too_many_nodes_to_change_alone(micro, monkeypatch):
    monkeypatch.setattr("tl_sparse.bridges.effects.MAX_NODES_ALONE", 2)
    bridges = bridged_to_itself(micro)
    found = dense_effects(micro_circuit(micro), bridges, micro_data(micro, 2), n_random=0)
    assert found.nodes == []
    assert found.no_nodes == "the circuit has more than 2 nodes"
    assert str(found).endswith("No node is changed alone: the circuit has more than 2 nodes.")


def test_a_probe_on_a_stream_by_hand():
    """The answer is in the first channel, noise in the second, and nothing in the third."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.arange(2).repeat(50)
    stream = torch.stack(
        [3.0 * (2 * answers - 1), torch.randn(100, generator=generator), torch.zeros(100)], dim=1
    )
    probe = trained_probe(stream, answers)
    assert torch.equal(probe.predictions(stream), answers)
    direction = probe.weight / probe.weight.norm()
    assert float(direction[0]) > 0.98
    assert float(direction[2]) == 0
    moved = stream + probe.moved(stream, stream.flip(0))
    expected = stream.flip(0).double() @ direction
    torch.testing.assert_close(moved.double() @ direction, expected)
    assert torch.equal(probe.predictions(moved), 1 - answers)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_pairs": 0}, ConfigError, "n_pairs = 0"),
        ({"n_random": -1}, ConfigError, "n_random = -1"),
        ({"batch_size": 0}, ConfigError, "batch_size = 0"),
        ({"strength": math.inf}, ConfigError, "strength = inf"),
        ({"bridges": "x"}, ArgumentError, "bridges must be a Bridges, not the str 'x'"),
        ({"data": 3}, ArgumentError, "data must be a TaskData, not the int 3"),
    ],
)
def test_wrong_arguments(micro, change, error, message):
    right = {
        "circuit": micro_circuit(micro),
        "bridges": bridged_to_itself(micro),
        "data": micro_data(micro, 2),
    }
    with pytest.raises(error, match=message):
        dense_effects(**(right | change))


def test_the_circuit_of_another_model(micro):
    other = tiny_model()
    with pytest.raises(CircuitError):
        dense_effects(
            random_circuit(other), bridged_to_itself(micro), micro_data(micro, 2), n_random=0
        )
