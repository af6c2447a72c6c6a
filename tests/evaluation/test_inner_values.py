"""Whether nodes have the values of the model under a circuit, and heads its patterns."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch

from helpers import full_config, has_hooks, random_circuit, random_data, stock_model, tiny_model
from micro import FILLERS, NODES, VOCABULARY, micro_circuit, micro_data
from tl_sparse.errors import CircuitError, ConfigError, TaskError
from tl_sparse.evaluation.baselines import without_nodes
from tl_sparse.evaluation.holding import holding_circuit
from tl_sparse.evaluation.inner_values import Inside, inside
from tl_sparse.evaluation.judge import score
from tl_sparse.evaluation.like_model import likeness
from tl_sparse.hooks import recording
from tl_sparse.records import record_from


def test_the_micro_circuit_is_its_model_inside(micro, circuit):
    found = inside(circuit, micro, micro_data(micro))
    assert [each.node for each in found.nodes] == NODES
    for each in found.nodes:
        assert each.correlation.value == pytest.approx(1)
        assert each.error.value == pytest.approx(0, abs=1e-9)
        assert each.remark == ""
    assert found.summary.n_varying == 3
    assert (found.summary.median_correlation, found.summary.share) == (pytest.approx(1), 1.0)
    assert found.n_samples == 16 * 5  # without the first of six tokens
    assert found.random_share.value < 1
    (head,) = found.heads
    assert (head.layer, head.head, head.locations) == (0, 0, ["attn_v"])
    assert head.distance.value == pytest.approx(0, abs=1e-6)
    assert head.remark == (
        "spreads its attention evenly over all tokens, in the model and under the circuit"
    )
    assert record_from(Inside, json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert not has_hooks(micro)


def add_noise_that_cancels(micro):
    """Fillers have noise in channel 3, which both value channels read with opposite signs; what
    they write to the answer's channel adds up to what the letter alone writes.
    """
    noise = torch.linspace(-1, 1, len(FILLERS))
    block = micro.blocks[0]
    with torch.no_grad():
        micro.embed.W_E[VOCABULARY[FILLERS[0]] :, 3] = noise
        block.attn.W_V[0, 3, 0] = 1.0
        block.attn.W_V[0, 3, 1] = -1.0
        block.attn.W_O[0, 1, 2] = block.attn.W_O[0, 0, 2]


def test_errors_that_cancel_are_seen_inside(micro):
    """A circuit that ignores the noise is right, and like the model in all that it says."""
    add_noise_that_cancels(micro)
    circuit = micro_circuit(micro)
    circuit.kept["blocks.0.attn.hook_v"][0, 1] = True
    data = micro_data(micro)
    full = score(micro, data)
    alone = score(micro, data, run_context=holding_circuit(circuit, micro))
    assert alone.loss == pytest.approx(full.loss, rel=1e-4)
    assert likeness(circuit, micro, data).task.circuit.value == pytest.approx(0, abs=1e-5)

    nodes = {each.node: each for each in inside(circuit, micro, data).nodes}
    assert nodes["0.attn_out 2"].correlation.value == pytest.approx(1)
    assert nodes["0.attn_v h0.0"].correlation.value < 0.9
    assert nodes["0.attn_v h0.0"].error.value > 0.3
    noisy = nodes["0.attn_v h0.1"]
    assert noisy.correlation is None
    assert noisy.remark == "constant under the circuit, but not in the model"
    assert noisy.error.value >= 1

    # With the noise's channel, nothing has to cancel.
    circuit.kept["blocks.0.ln1.hook_read"][3] = True
    found = inside(circuit, micro, data)
    assert found.summary.share == 1.0
    assert all(each.error.value == pytest.approx(0, abs=1e-9) for each in found.nodes)


def test_nodes_that_do_not_vary(micro, circuit):
    circuit.kept["blocks.0.mlp.hook_post"][1] = True
    found = inside(circuit, micro, micro_data(micro))
    constant = found.nodes[-1]
    assert constant.remark == "constant in the model and under the circuit"
    assert constant.correlation is constant.error is None
    assert (constant.model_mean, constant.circuit_mean) == (0, 0)
    assert found.summary.n_varying == 3


VALUES, PATTERN = "blocks.0.attn.hook_v", "blocks.0.attn.hook_pattern"


def recorded_by_prompt(model, circuit, data, ablation):
    """For each prompt: values and patterns, in the model and under the circuit, without padding
    and at all queries but the first.
    """
    under = holding_circuit(circuit, model, ablation)
    found = []
    for i in range(data.n_pairs):
        pair = data.pairs([i]).trimmed()
        runs = []
        for context in (nullcontext(), under(pair)):
            with torch.no_grad(), context, recording(model, [VALUES, PATTERN]) as activations:
                model(pair.tokens)
            runs.append(activations)
        for row, last in enumerate(pair.last.tolist()):
            values = [run[VALUES][row, 1 : last + 1] for run in runs]
            patterns = [run[PATTERN][row, :, 1 : last + 1, : last + 1] for run in runs]
            found.append((values, patterns))
    return found


@pytest.mark.parametrize("make", [stock_model, lambda: tiny_model(full_config())])
@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_values_and_patterns_by_hand(make, ablation):
    model = make()
    circuit = random_circuit(model, share=0.7)
    data = random_data(model, n_pairs=4).with_partners(0)
    found = inside(circuit, model, data, ablation, n_random=1, batch_size=4)
    by_prompt = recorded_by_prompt(model, circuit, data, ablation)

    values = [torch.cat([each[run] for each, _ in by_prompt]) for run in (0, 1)]
    reference, value = (each[:, circuit.kept[VALUES]].T for each in values)
    nodes = [each for each in found.nodes if each.node.startswith("0.attn_v")]
    assert len(nodes) == len(value)
    for node, x, y in zip(nodes, reference, value, strict=True):
        expected = torch.corrcoef(torch.stack([x, y]))[0, 1].item()
        assert node.correlation.value == pytest.approx(expected, abs=1e-4)
        error = (y - x).square().sum() / (x - x.mean()).square().sum()
        assert node.error.value == pytest.approx(error.item(), rel=1e-3)

    distances = []  # [prompt, head]
    for _, (of_model, of_circuit) in by_prompt:
        sinks = (of_model.sum(-1) - of_circuit.sum(-1)).abs()
        distances.append((((of_model - of_circuit).abs().sum(-1) + sinks) / 2).mean(-1))
    expected = torch.stack(distances).mean(0)
    for head in found.heads:
        if head.layer == 0:
            assert head.distance.value == pytest.approx(expected[head.head].item(), abs=1e-4)
    assert found.n_samples == int(data.last.sum())
    assert not has_hooks(model)


def test_grouped_heads_share_their_keys():
    model = stock_model(n_key_value_heads=1)
    circuit = without_nodes(random_circuit(model))
    circuit.kept["blocks.0.attn.hook_k"][0, 1] = True
    circuit.kept["blocks.0.attn.hook_q"][1, 2] = True
    found = inside(circuit, model, random_data(model), n_random=0)
    assert [each.locations for each in found.heads] == [["attn_k"], ["attn_q", "attn_k"]]
    assert found.random_share is found.random_median_correlation is None


def test_attention_that_a_circuit_flattens_is_named():
    """With all queries held, a head can only attend by position."""
    model = tiny_model(n_layers=1)
    circuit = random_circuit(model, share=1.0)
    name = "blocks.0.attn.hook_q"
    circuit.kept[name][:] = False
    circuit = circuit.with_means(circuit.means | {name: torch.zeros_like(circuit.means[name])})
    found = inside(circuit, model, random_data(model, 8), n_random=0)
    for head in found.heads:
        assert head.circuit_to_uniform.value == pytest.approx(0, abs=1e-6)
        assert head.distance.value == pytest.approx(head.model_to_uniform.value, abs=1e-6)
        assert head.remark == (
            "attends by what the prompt says; under the circuit it spreads its "
            "attention evenly over all tokens"
        )


def test_attention_by_position_is_named(micro):
    """The head attends to the first token alone, whatever follows."""
    with torch.no_grad():
        micro.blocks[0].attn.b_Q[0, 0] = 30.0
        micro.embed.W_E[VOCABULARY["<s>"], 3] = 1.0
        micro.blocks[0].attn.W_K[0, 3, 0] = 30.0
    (head,) = inside(micro_circuit(micro), micro, micro_data(micro), n_random=0).heads
    assert head.model_spread == pytest.approx(0, abs=1e-3)
    assert head.model_to_uniform.value > 0.5
    assert head.remark.startswith("attends by position alone, whatever the prompt says")


def test_circuits_without_heads_say_so(micro, circuit):
    circuit.kept["blocks.0.attn.hook_v"][:] = False
    found = inside(circuit, micro, micro_data(micro))
    assert found.heads == []
    assert found.no_heads == "no head has kept nodes"


def test_what_is_refused(micro, circuit):
    data = micro_data(micro)
    with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
        inside(circuit, tiny_model(), data)
    with pytest.raises(CircuitError, match="no means"):
        inside(dataclasses.replace(circuit, means={}), micro, data)
    with pytest.raises(CircuitError, match="has no nodes"):
        inside(without_nodes(circuit), micro, data)
    with pytest.raises(ConfigError, match="ablation = 'means'"):
        inside(circuit, micro, data, "means")
    with pytest.raises(ConfigError, match="n_random = -1"):
        inside(circuit, micro, data, n_random=-1)
    with pytest.raises(TaskError, match="at least 2 pairs"):
        inside(circuit, micro, micro_data(micro, 1), "resample")
    assert not has_hooks(micro)
