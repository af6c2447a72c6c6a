"""Judging: logits of the last positions alone, resampling, calibration, curves, random circuits,
effects.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers import cancels, full_config, random_tokens, sparse_configs, stock_model, tiny_model
from micro import (
    EDGES,
    LOSS,
    MICRO_TASK,
    NODES,
    W_O,
    W_U,
    W_V,
    WRITTEN,
    micro_circuit,
    micro_corpus,
    micro_model,
)
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation import judge as evaluation
from tl_sparse.evaluation.judge import (
    all_logits,
    calibration,
    effects,
    evaluate,
    faithfulness_curve,
    holding_circuit,
    random_circuits,
    resampled,
    score,
    score_logits,
    task_logits,
    task_loss,
)
from tl_sparse.hooks import ablating, mean_activations
from tl_sparse.hooks.points import hooked
from tl_sparse.tasks.task import TaskData, make_task_data


def data_of(model, n_pairs=6, seed=0, lengths=None):
    """Random prompts of different lengths, padded with random tokens, and random candidates."""
    generator = torch.Generator().manual_seed(seed)
    cfg = model.cfg
    last = (
        torch.randint(1, cfg.n_ctx, (2 * n_pairs,), generator=generator)
        if lengths is None
        else lengths
    )
    candidates = torch.stack(
        [torch.randperm(cfg.d_vocab, generator=generator)[:2] for _ in range(n_pairs)]
    )
    return TaskData(
        "t", tuple(map(str, range(2 * n_pairs))), random_tokens(model, 2 * n_pairs, cfg.n_ctx, seed), last,
        candidates.repeat_interleave(2, 0), torch.arange(2).repeat(n_pairs),
    )  # fmt: skip


def circuit_of(model, share=0.5, seed=0):
    """Random nodes, with random ranks."""
    means = mean_activations(
        model, list(node_hooks(model).values()), [random_tokens(model, seed=5)]
    )
    generator = torch.Generator().manual_seed(seed)
    kept = {
        name: torch.rand(mean.shape, generator=generator) < share for name, mean in means.items()
    }
    scores = {name: torch.rand(mean.shape, generator=generator) for name, mean in means.items()}
    return Circuit(kept, means, fingerprint(model), "m", "t", scores=scores)


def micro_data(micro, n_pairs=8):
    return make_task_data(MICRO_TASK, micro.tokenizer, n_pairs, seed=0)


def loss_of(a):
    """The loss of the micro model if a, and not WRITTEN, is written after A and -a after B."""
    return math.log1p(math.exp(-2 * W_U * a / math.sqrt((1 + a * a) / 4)))


def untouched(model):
    return all(not point.has_hooks() for point in model.hook_dict.values())


# Logits of the last positions alone


@settings(max_examples=60, deadline=None)
@given(st.data(), sparse_configs())
def test_the_logits_of_one_position_are_those_of_the_full_forward(data, config):
    model = tiny_model(config, seed=data.draw(st.integers(0, 3)), dtype=torch.float64)
    tokens = random_tokens(model, batch=3)
    assume(not cancels(model, tokens))
    last = torch.tensor(
        data.draw(st.lists(st.integers(0, config.n_ctx - 1), min_size=3, max_size=3))
    )
    with torch.no_grad():
        full, one = model.network(tokens), model.network(tokens, last=last)
    assert one.shape == (3, 1, config.d_vocab)
    torch.testing.assert_close(one[:, 0], full[torch.arange(3), last], rtol=1e-9, atol=1e-10)


def test_gradients_of_one_position_are_those_of_the_full_forward():
    model = tiny_model(full_config(), dtype=torch.float64)
    data, gradients = data_of(model), []
    assert hasattr(model, "network")
    for logits in (
        task_logits(model, data),
        evaluation.candidate_logits(model.network(data.tokens), data),
    ):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-8, atol=1e-10)


def test_what_hooks_see_of_one_position():
    """All positions up to the last attention, and one of each row past it."""
    model = tiny_model(full_config())
    tokens, last, seen = random_tokens(model, batch=3), torch.tensor([0, 4, 7]), {}
    _, full = model.run_with_cache(tokens)

    def look(activation, hook):
        seen[hook.name] = activation.detach()

    places = [
        "ln1.hook_read",
        "attn.hook_q",
        "attn.hook_k",
        "attn.hook_v",
        "attn.hook_z",
        "hook_attn_out",
    ]
    places += [
        "hook_resid_mid",
        "ln2.hook_read",
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    names = [f"blocks.{i}.{place}" for i in range(2) for place in ("hook_resid_pre", *places)]
    with hooked(model, dict.fromkeys([*names, "ln_final.hook_normalized", "hook_bigram"], look)):
        model.network(tokens, last=last)
    short = {f"blocks.1.{place}" for place in places[4:]} | {
        "ln_final.hook_normalized",
        "hook_bigram",
    }
    assert {name for name, value in seen.items() if value.shape[:2] == (3, 1)} == short
    for name, value in seen.items():
        expected = full[name] if name not in short else full[name][torch.arange(3), last][:, None]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_hooks_at_the_last_block_act_on_one_position():
    """A circuit scored by the last positions alone is the circuit of the full forward."""
    model = tiny_model(full_config(), dtype=torch.float64)
    circuit, data = circuit_of(model), data_of(model)
    with circuit.applied(model), torch.no_grad():
        expected = evaluation.candidate_logits(model(data.tokens), data)
        torch.testing.assert_close(task_logits(model, data), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "make", [stock_model, lambda: tiny_model(full_config())], ids=["stock", "ours"]
)
def test_logits_come_in_the_order_of_the_prompts(make):
    model = make()
    data = data_of(model, n_pairs=7)
    with torch.no_grad():
        expected = torch.cat(
            [model(data.tokens[i : i + 1, : end + 1])[:, -1] for i, end in enumerate(data.last)]
        )
    expected = expected.gather(1, data.candidates)
    for batch_size in (1, 2, 5, 14, 100):
        torch.testing.assert_close(
            all_logits(model, data, batch_size), expected, rtol=1e-4, atol=1e-5
        )


def test_the_batch_size_makes_no_difference():
    model = tiny_model(full_config(), dtype=torch.float64)
    circuit, data = circuit_of(model), data_of(model, n_pairs=7)
    for how in ("mean", "zero"):
        for inverted in (False, True):
            under = holding_circuit(circuit, model, how, inverted)
            results = [dataclasses.astuple(score(model, data, size, under)) for size in (2, 6, 100)]
            assert results[0] == pytest.approx(results[1], rel=1e-6)
            assert results[0] == pytest.approx(results[2], rel=1e-6)
    assert task_loss(model, data).item() == pytest.approx(score(model, data, 2).loss, rel=1e-6)
    curves = [
        [sized.circuit.loss for sized in faithfulness_curve(circuit, model, data, size)]
        for size in (4, 100)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


# Resampling


@pytest.mark.parametrize("n_pairs", [1, 2, 5, 8])
def test_resampled_are_the_activations_of_another_prompt(n_pairs):
    """At all positions before the last attention, and at the other prompt's own end after it."""
    model = tiny_model(full_config())
    data = data_of(model, n_pairs)
    names = list(node_hooks(model).values())
    found = resampled(model, data, names)
    assert found.keys() == set(names)
    width = int(data.last.max()) + 1
    with torch.no_grad():
        _, cache = model.run_with_cache(data.tokens[:, :width])
    early = cache["blocks.0.hook_mlp_out"]
    distances = (found["blocks.0.hook_mlp_out"][:, None] - early[None]).abs().flatten(2).amax(-1)
    partner = distances.argmin(1)
    assert sorted(partner.tolist()) == list(range(2 * n_pairs))  # each prompt's, once
    assert all(i != other for i, other in enumerate(partner.tolist()))
    for name in names:
        expected = cache[name][partner]
        if name.startswith("blocks.1") and found[name].shape[1] == 1:
            expected = expected[torch.arange(2 * n_pairs), data.last[partner]][:, None]
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    again = resampled(model, data, names)
    assert all(torch.equal(again[name], found[name]) for name in names)
    assert untouched(model)


def test_an_empty_circuit_under_resampling_is_another_prompt():
    model = tiny_model(n_layers=2, dtype=torch.float64)
    data = data_of(model, n_pairs=5, lengths=torch.full((10,), 7))
    data = dataclasses.replace(
        data, tokens=torch.cat([data.tokens[:, :-1], data.tokens[:1, -1:].expand(10, 1)], 1)
    )
    with (
        torch.no_grad()
    ):  # no embedding of its own reaches the end, which all prompts have in common
        model.embed.W_E[data.tokens[0, -1]] = 0.0
    circuit = circuit_of(model, share=0.0)
    found = all_logits(model, data, 10, holding_circuit(circuit, model, "resample"))
    with torch.no_grad():
        rows = evaluation.task_logits(model, data), model(data.tokens)[:, -1]
    partners = [next(j for j in range(10) if torch.allclose(rows[1][j].gather(0, data.candidates[i]).float(), found[i]))
                for i in range(10)]  # fmt: skip
    assert sorted(partners) == list(range(10))
    assert all(i != j for i, j in enumerate(partners))


# Under a circuit


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_holding_a_circuit_by_hand(how, inverted):
    model = tiny_model(full_config())
    circuit, data = circuit_of(model), data_of(model)
    values = {
        "mean": circuit.means,
        "zero": {name: torch.zeros_like(mean) for name, mean in circuit.means.items()},
        "resample": resampled(model, data, circuit.kept),
    }[how]
    nodes = circuit.kept if inverted else {name: ~mask for name, mask in circuit.kept.items()}
    with ablating(model, nodes, values), torch.no_grad():
        expected = task_logits(model, data)
    with holding_circuit(circuit, model, how, inverted)(data), torch.no_grad():
        assert torch.equal(task_logits(model, data), expected)
    with torch.no_grad():
        assert not torch.allclose(task_logits(model, data), expected, atol=1e-3)
    assert untouched(model)


@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_a_circuit_of_all_nodes_is_the_model(how):
    model = tiny_model(full_config())
    circuit, data = circuit_of(model, share=1.0), data_of(model)
    under = holding_circuit(circuit, model, how)
    assert torch.equal(all_logits(model, data, run_context=under), all_logits(model, data))
    nothing = holding_circuit(circuit_of(model, share=0.0), model, how, inverted=True)
    assert torch.equal(all_logits(model, data, run_context=nothing), all_logits(model, data))


def test_the_three_ablations_on_paper():
    """The written channel is held, so at its mean 1/4, at zero, or at what another prompt has
    there.
    """
    micro = micro_model()
    circuit = micro_circuit(micro)
    circuit.kept["blocks.0.hook_attn_out"][2] = False
    circuit = circuit.with_means(
        dict(circuit.means) | {"blocks.0.hook_attn_out": torch.tensor([0, 0, 0.25, 0])}
    )
    data = micro_data(micro)
    measured = evaluate(circuit, micro, data, batch_size=100)
    assert measured.full.loss == pytest.approx(LOSS, abs=1e-6)
    assert measured.circuit.loss == pytest.approx((loss_of(0.25) + loss_of(-0.25)) / 2, abs=1e-5)
    assert measured.circuit.accuracy == 0.5
    assert measured.zero.loss == pytest.approx(math.log(2), abs=1e-6)
    partner = resampled(micro, data, ["hook_embed"])["hook_embed"][:, 3, 0]  # where A or B stands
    swapped = (partner != torch.tensor([1.0, -1.0]).repeat(8)).float().mean().item()
    assert 0 < swapped < 1
    assert measured.resample.accuracy == pytest.approx(1 - swapped)
    assert measured.resample.loss == pytest.approx(
        swapped * loss_of(-WRITTEN) + (1 - swapped) * LOSS, rel=1e-4
    )
    assert measured.ablated.loss == pytest.approx(math.log(2), abs=1e-6)


def test_another_model_is_refused():
    circuit, other = micro_circuit(micro_model()), tiny_model()
    data = data_of(other)
    for judge in (evaluate, faithfulness_curve, random_circuits, effects):
        with pytest.raises(CircuitError, match="this circuit belongs to the model 'micro'"):
            judge(dataclasses.replace(circuit, scores=circuit.means), other, data)
    assert untouched(other)


@pytest.mark.parametrize("judge", [evaluate, faithfulness_curve, random_circuits, effects])
def test_the_model_is_as_it_was_also_after_an_exception(judge, monkeypatch):
    micro = micro_model()
    circuit = dataclasses.replace(micro_circuit(micro), scores=micro_circuit(micro).means)
    circuit = dataclasses.replace(circuit, edge_set=frozenset())  # both edges are cut
    data, before = micro_data(micro), {name: p.clone() for name, p in micro.named_parameters()}
    judge(circuit, micro, data)

    def same():
        assert untouched(micro)
        assert all(
            torch.equal(p, before[name]) and p.grad is None for name, p in micro.named_parameters()
        )

    same()
    real, calls = evaluation.candidate_logits, []

    def failing(*arguments):
        calls.append(
            not torch.equal(micro.blocks[0].attn.W_O, before["blocks.0.attn.W_O"])
            or not untouched(micro)
        )
        if len(calls) == 4:
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(evaluation, "candidate_logits", failing)
    with pytest.raises(ZeroDivisionError):
        judge(circuit, micro, data, batch_size=4)
    assert calls[-1]  # there was something to take back
    same()


# Calibration


def coins(shares, per=20):
    """Prompts whose logits differ by 0, 1, 2 …, and how often the second candidate is right at
    each.
    """
    differences = torch.arange(len(shares)).repeat_interleave(per).float()
    correct = torch.cat([(torch.arange(per) < round(share * per)).long() for share in shares])
    logits = torch.stack([torch.zeros_like(differences), differences], 1)
    data = data_of(micro_model(), n_pairs=len(correct) // 2)
    return logits, dataclasses.replace(data, correct=correct)


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.6), (0.5, 0.75), (0.8, 0.3), (0.1, 0.9)])
def test_calibration_finds_the_scale_and_shift_of_coins(low, high):
    """With a share p right where the logits differ by x, the best scale · x + shift is log(p / (1 -
    p)).
    """
    logits, data = coins([low, high])
    odds = [math.log(p / (1 - p)) for p in (low, high)]
    scale, shift = calibration(logits, data)
    assert (scale, shift) == pytest.approx((odds[1] - odds[0], odds[0]), abs=1e-3)
    # Logits that a model scales and shifts are calibrated back.
    changed = logits * 0.5 + torch.tensor([0.0, -1.0])
    scale, shift = calibration(changed, data)
    assert (scale * 0.5, shift - scale) == pytest.approx((odds[1] - odds[0], odds[0]), abs=2e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_calibrated_loss_is_never_larger(seed):
    logits = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed))
    _, data = coins([0.5, 0.5])
    scale, shift = calibration(logits, data)
    loss = score_logits(logits * scale + torch.tensor([0.0, shift]), data).loss
    assert loss <= score_logits(logits, data).loss + 1e-6
    for other in (
        (scale + 0.05, shift),
        (scale - 0.05, shift),
        (scale, shift + 0.05),
        (scale, shift - 0.05),
    ):
        assert (
            score_logits(logits * other[0] + torch.tensor([0.0, other[1]]), data).loss
            >= loss - 1e-6
        )


def test_calibration_leaves_its_input_alone_and_works_without_gradients():
    logits, data = coins([0.25, 0.6])
    before = logits.clone()
    with torch.no_grad():
        calibration(logits, data)
    assert torch.equal(logits, before)


def test_scores_by_hand():
    _, data = coins([0.5, 0.5], per=2)
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 2.0], [3.0, 3.0]])
    data = dataclasses.replace(data, correct=torch.tensor([0, 1, 1, 0]))
    losses = [math.log1p(math.exp(x)) for x in (1.0, -1.0, -2.0, 0.0)]
    pairs = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    found = score_logits(logits, data)
    assert found.loss == pytest.approx(sum(losses) / 4)
    assert found.accuracy == 0.5  # a tie is not right
    assert found.standard_error == pytest.approx(abs(pairs[0] - pairs[1]) / 2)
    assert math.isnan(score_logits(logits[:2], data.pairs([0])).standard_error)


# The faithfulness curve


def test_the_ladder_on_paper():
    """The circuit's three nodes in the order they are ranked, then others: only from three on does
    it do the task.
    """
    micro = micro_model()
    circuit = micro_circuit(micro)
    scores = {name: torch.rand(mean.shape, generator=torch.Generator().manual_seed(0)) * 0.1 for name, mean in
              circuit.means.items()}  # fmt: skip
    for score_, (hook, at) in enumerate(
        [("attn.hook_v", (0, 0)), ("ln1.hook_read", 0), ("hook_attn_out", 2)]
    ):
        scores[f"blocks.0.{hook}"][at] = 3.0 - score_
    sized_scores = faithfulness_curve(
        dataclasses.replace(circuit, scores=scores), micro, micro_data(micro)
    )
    # 3 · 2^(i/2) for i from -6 to 6; the model has 4 + 2 + 2 + 2 + 4 + 4 + 2 + 4 nodes.
    assert [sized.n_nodes for sized in sized_scores] == [0, 1, 2, 3, 4, 6, 8, 12, 17, 24]
    for sized in sized_scores:
        expected = LOSS if sized.n_nodes >= 3 else math.log(2)
        assert sized.circuit.loss == pytest.approx(expected, abs=1e-5)
    assert [sized.n_edges for sized in sized_scores] == [0, 0, 1] + [2] * 7


def test_the_ladder_goes_through_the_circuit_and_ends_at_the_model():
    model = tiny_model(full_config())
    circuit, data = circuit_of(model, share=0.3), data_of(model)
    sized_scores = {sized.n_nodes: sized for sized in faithfulness_curve(circuit, model, data)}
    assert sized_scores[circuit.n_nodes].circuit == score(
        model, data, run_context=holding_circuit(circuit, model)
    )
    assert sized_scores[circuit.n_nodes].n_edges == len(circuit.edges(model))
    total = sum(mask.numel() for mask in circuit.kept.values())
    assert max(sized_scores) == total
    assert sized_scores[total].circuit == score(model, data)
    with pytest.raises(CircuitError, match="of a circuit that has scores"):
        faithfulness_curve(dataclasses.replace(circuit, scores={}), model, data)


# Random circuits


def test_random_circuits_have_as_many_nodes_at_each_hook_point(monkeypatch):
    model = tiny_model(full_config())
    circuit, data, drawn = circuit_of(model, share=0.4), data_of(model), []
    circuit = dataclasses.replace(circuit, edge_set=frozenset())
    real = evaluation.holding_circuit
    monkeypatch.setattr(
        evaluation, "holding_circuit", lambda c, *rest: drawn.append(c) or real(c, *rest)
    )
    sized_scores = random_circuits(circuit, model, data, n_circuits=5, seed=3)
    assert len(sized_scores) == len(drawn) == 5
    for found, sized in zip(drawn, sized_scores, strict=True):
        sizes = {name: int(mask.sum()) for name, mask in found.kept.items()}
        assert sizes == {name: int(mask.sum()) for name, mask in circuit.kept.items()}
        assert sized.n_nodes == circuit.n_nodes
        assert sized.n_edges == len(found.edges(model)) > 0  # an edge set is not of these nodes
        assert sized.circuit == score(model, data, run_context=real(found, model))
    assert len({tuple(found.nodes) for found in [circuit, *drawn]}) == 6
    assert random_circuits(circuit, model, data, n_circuits=5, seed=3) == sized_scores
    assert random_circuits(circuit, model, data, n_circuits=5, seed=4) != sized_scores


def test_random_circuits_of_everything_are_the_model():
    model = tiny_model(full_config())
    data = data_of(model)
    (sized,) = random_circuits(circuit_of(model, share=1.0), model, data, n_circuits=1)
    assert sized.circuit == score(model, data)


# Effects


def test_effects_on_paper():
    """A second path of half the strength to the same channel: what is cut takes its share of what
    is written.
    """
    micro = micro_model()
    with torch.no_grad():
        micro.blocks[0].attn.W_V[0, 0, 1] = W_V / 2
        micro.blocks[0].attn.W_O[0, 1, 2] = W_O
        micro.blocks[0].mlp.W_in[1, 0], micro.blocks[0].mlp.W_out[0, 1] = 1.0, 0.0
    circuit = micro_circuit(micro)
    circuit.kept["blocks.0.attn.hook_v"][0, 1] = True
    circuit.kept["blocks.0.mlp.hook_post"][1] = True  # does nothing, and has no edge
    both, first, second = 1.5 * WRITTEN, WRITTEN, 0.5 * WRITTEN
    expected = {
        "0.attn_in.0": 0.0, "0.attn_v.0": second, "0.attn_v.1": first, "0.attn_out.2": 0.0, "0.mlp_neuron.1": both,
        "0.attn_in.0 → 0.attn_v.0  +1.500": second, "0.attn_in.0 → 0.attn_v.1  +0.750": first,
        "0.attn_v.0 → 0.attn_out.2  +2.000": second, "0.attn_v.1 → 0.attn_out.2  +2.000": first,
    }  # fmt: skip
    found = {
        str(part): effect for part, effect in effects(circuit, micro, micro_data(micro)).items()
    }
    assert list(found) == list(expected)
    for part, written in expected.items():
        assert found[part] == pytest.approx(loss_of(written) - loss_of(both), abs=1e-6), part


def test_effects_of_an_edge_pruned_circuit():
    """An edge that is cut already has no effect to show; those that are left have theirs without
    it.
    """
    micro = micro_model()
    circuit = micro_circuit(micro)
    circuit = circuit.without(circuit.edges(micro)[:1], micro)
    found = {
        str(part): effect for part, effect in effects(circuit, micro, micro_data(micro)).items()
    }
    assert list(found) == [*NODES, f"{EDGES[1][0]} → {EDGES[1][1]}  +2.000"]
    assert list(found.values()) == pytest.approx([0.0] * 4, abs=1e-6)


def test_effects_against_cutting_by_hand():
    model = tiny_model(n_layers=1)
    circuit, data = circuit_of(model, share=0.2), data_of(model)
    found = effects(circuit, model, data, batch_size=4)
    assert list(found) == [*circuit.nodes, *circuit.edges(model)]
    with circuit.applied(model):
        alone = score(model, data).loss
    for part, effect in found.items():
        with circuit.without([part], model).applied(model):
            assert effect == pytest.approx(score(model, data).loss - alone, abs=1e-6)


def test_means_are_those_of_the_corpus():
    """What all this is relative to: the micro circuit's means are 0 by its corpus."""
    micro = micro_model()
    means = mean_activations(micro, ["blocks.0.ln1.hook_read"], [micro_corpus()])
    assert means["blocks.0.ln1.hook_read"].tolist() == pytest.approx(
        [0.0, 2 / 6, 0.0, 0.0], abs=1e-6
    )
