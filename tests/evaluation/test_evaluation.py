"""Evaluating circuits: task scores, ablations, calibration, faithfulness curves and effects."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers import (
    cancels,
    copied_parameters,
    full_config,
    has_hooks,
    random_circuit,
    random_data,
    random_tokens,
    sparse_configs,
    stock_model,
    tiny_model,
)
from micro import (
    LOSS,
    NODES,
    W_O,
    W_U,
    W_V,
    WRITTEN,
    micro_circuit,
    micro_corpus,
    micro_data,
    micro_model,
)
from tl_sparse.circuits.families import node_hooks
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation import judge as evaluation
from tl_sparse.evaluation import running
from tl_sparse.evaluation.holding import holding_circuit
from tl_sparse.evaluation.judge import (
    calibration,
    evaluate,
    faithfulness_curve,
    random_circuits,
    score,
    score_logits,
    score_next_tokens,
)
from tl_sparse.evaluation.removal import effects
from tl_sparse.evaluation.running import all_logits, resampled, task_logits, task_loss
from tl_sparse.evaluation.scores import Evaluation, scores_table
from tl_sparse.hooks import ablating, mean_activations
from tl_sparse.hooks.points import hooked
from tl_sparse.tasks.scores import Score, score_row
from tl_sparse.tasks.task_data import candidate_logits


def scored_by_means(circuit):
    """Scores for a circuit whose values do not matter."""
    return {name: circuit.means[name] for name in circuit.kept}


def loss_if_written(a):
    """The loss of the micro model if a is written after A and -a after B, instead of ±WRITTEN.

    The root is the scale of the final norm; see micro.py.
    """
    return math.log1p(math.exp(-2 * W_U * a / math.sqrt((1 + a * a) / 4)))


# Logits at the last positions alone


@settings(max_examples=30)
@given(st.data(), sparse_configs())
def test_the_logits_of_one_position_are_those_of_the_full_forward(data, config):
    model = tiny_model(config, seed=data.draw(st.integers(0, 3)), dtype=torch.float64)
    tokens = random_tokens(model, batch=3)
    assume(not cancels(model, tokens))
    positions = st.lists(st.integers(0, config.n_ctx - 1), min_size=3, max_size=3)
    last = torch.tensor(data.draw(positions))
    with torch.no_grad():
        full = model.network(tokens)
        one = model.network(tokens, last=last)
    assert one.shape == (3, 1, config.d_vocab)
    torch.testing.assert_close(one[:, 0], full[torch.arange(3), last], rtol=1e-9, atol=1e-10)


def test_gradients_of_one_position_are_those_of_the_full_forward():
    model = tiny_model(full_config(), dtype=torch.float64)
    data = random_data(model)

    def gradients(logits):
        model.zero_grad()
        logits.square().sum().backward()
        named = model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    of_one = gradients(task_logits(model, data))
    full = model.network(data.tokens)
    of_all = gradients(candidate_logits(full, data))
    assert of_one.keys() == of_all.keys()
    for name, gradient in of_all.items():
        torch.testing.assert_close(of_one[name], gradient, rtol=1e-8, atol=1e-10)


#: The hook points of a block, in the order of the forward pass.
UP_TO_ATTENTION = [
    "hook_resid_pre",
    "ln1.hook_read",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
]
#: The hook points of a block after attention, the last step that reads other positions.
PAST_ATTENTION = [
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_read",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]


def test_what_hooks_see_of_one_position():
    """They see all positions up to the last attention, and one position of each row after it."""
    model = tiny_model(full_config())
    tokens = random_tokens(model, batch=3)
    last = torch.tensor([0, 4, 7])
    all_positions = [f"blocks.0.{place}" for place in UP_TO_ATTENTION + PAST_ATTENTION]
    all_positions += [f"blocks.1.{place}" for place in UP_TO_ATTENTION]
    one_position = [f"blocks.1.{place}" for place in PAST_ATTENTION]
    one_position += ["ln_final.hook_normalized", "hook_bigram"]
    _, full = model.run_with_cache(tokens)
    seen = {}

    def look(activation, hook):
        seen[hook.name] = activation.detach()

    with hooked(model, dict.fromkeys(all_positions + one_position, look)):
        model.network(tokens, last=last)
    for name in all_positions:
        torch.testing.assert_close(seen[name], full[name], rtol=1e-4, atol=1e-5)
    for name in one_position:
        expected = full[name][torch.arange(3), last][:, None]
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-5)


def test_hooks_at_the_last_block_act_on_one_position():
    """A circuit has the same logits at the last positions alone as in the full forward pass."""
    model = tiny_model(full_config(), dtype=torch.float64)
    circuit, data = random_circuit(model), random_data(model)
    with circuit.applied(model), torch.no_grad():
        expected = candidate_logits(model(data.tokens), data)
        torch.testing.assert_close(task_logits(model, data), expected, rtol=1e-9, atol=1e-10)


def our_model():
    return tiny_model(full_config())


@pytest.mark.parametrize("make", [stock_model, our_model])
def test_logits_come_in_the_order_of_the_prompts(make):
    model = make()
    data = random_data(model, n_pairs=7)
    with torch.no_grad():
        prompts = [tokens[: end + 1] for tokens, end in zip(data.tokens, data.last, strict=True)]
        alone = [model(prompt[None])[:, -1] for prompt in prompts]
    expected = torch.cat(alone).gather(1, data.candidates)
    for batch_size in (1, 2, 5, 14, 100):
        found = all_logits(model, data, batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_a_score_does_not_depend_on_the_batch_size(how, inverted):
    model = tiny_model(full_config(), dtype=torch.float64)
    data = random_data(model, n_pairs=7)
    under = holding_circuit(random_circuit(model), model, how, inverted)
    expected = score(model, data, 2, under)
    for batch_size in (6, 100):
        found = score(model, data, batch_size, under)
        for figure in ("loss", "standard_error", "accuracy", "logit_difference"):
            assert getattr(found, figure) == pytest.approx(getattr(expected, figure), rel=1e-6)


def test_a_curve_does_not_depend_on_the_batch_size():
    model = tiny_model(full_config(), dtype=torch.float64)
    circuit = random_circuit(model)
    data = random_data(model, n_pairs=7)
    small = faithfulness_curve(circuit, model, data, 4)
    large = faithfulness_curve(circuit, model, data, 100)
    losses = [sized.circuit.loss for sized in small]
    assert [sized.circuit.loss for sized in large] == pytest.approx(losses, rel=1e-6)


def test_the_task_loss_is_the_loss_of_the_score():
    model = tiny_model(full_config(), dtype=torch.float64)
    data = random_data(model, n_pairs=7)
    assert task_loss(model, data).item() == pytest.approx(score(model, data, 2).loss, rel=1e-6)


# Resampling


@pytest.mark.parametrize("n_pairs", [2, 5, 8])
def test_resampled_are_the_activations_of_another_prompt(n_pairs):
    """Where the other prompt has ended, they are those of its last token."""
    model = tiny_model(full_config())
    data = random_data(model, n_pairs).with_partners(seed=3)
    names = list(node_hooks(model).values())
    found = resampled(model, data, names)
    assert found.keys() == set(names)
    width = int(data.last.max()) + 1
    with torch.no_grad():
        _, cache = model.run_with_cache(data.tokens[:, :width])

    partners = []
    for tokens in data.partners.tokens:
        (partner,) = (data.tokens == tokens).all(1).nonzero()[:, 0].tolist()
        partners.append(partner)
    for prompt, partner in enumerate(partners):
        end = int(data.last[partner]) + 1
        for name in names:
            seen = cache[name][partner, :end]
            expected = torch.cat([seen, seen[-1:].expand(width - end, *seen.shape[1:])])
            torch.testing.assert_close(found[name][prompt], expected, rtol=1e-4, atol=1e-5)
    assert not has_hooks(model)


def test_resampling_is_the_same_each_time():
    model = tiny_model(full_config())
    data = random_data(model)
    names = list(node_hooks(model).values())
    first = resampled(model, data, names)
    again = resampled(model, data, names)
    assert all(torch.equal(again[name], first[name]) for name in names)


def test_an_empty_circuit_under_resampling_is_another_prompt():
    """All prompts end in a token whose embedding is zero, so only nodes tell them apart.

    An empty circuit holds all nodes. What would be left of the prompt itself is the embedding of
    its last token.
    """
    model = tiny_model(n_layers=2, dtype=torch.float64)
    data = random_data(model, n_pairs=5, lengths=torch.full((10,), 7))
    data.tokens[:, -1] = data.tokens[0, -1].clone()
    with torch.no_grad():
        model.embed.W_E[data.tokens[0, -1]] = 0.0
        full = model(data.tokens)[:, -1]
    circuit = random_circuit(model, share=0.0)
    found = all_logits(model, data, 10, holding_circuit(circuit, model, "resample"))

    partners = []
    for candidates, logits in zip(data.candidates, found, strict=True):
        of_each = full[:, candidates]
        same = [prompt for prompt in range(10) if torch.allclose(of_each[prompt], logits)]
        assert len(same) == 1
        partners.append(same[0])
    assert sorted(partners) == list(range(10))
    assert all(prompt != partner for prompt, partner in enumerate(partners))


# Running a model under a circuit


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_holding_a_circuit_by_hand(how, inverted):
    model = tiny_model(full_config())
    circuit = random_circuit(model)
    data = random_data(model)
    if how == "mean":
        values = circuit.means
    elif how == "zero":
        values = {name: torch.zeros_like(mean) for name, mean in circuit.means.items()}
    else:
        values = resampled(model, data, circuit.kept)
    held = circuit.kept if inverted else circuit.dropped
    with ablating(model, held, values), torch.no_grad():
        expected = task_logits(model, data)
    with holding_circuit(circuit, model, how, inverted)(data), torch.no_grad():
        assert torch.equal(task_logits(model, data), expected)
    with torch.no_grad():
        assert not torch.allclose(task_logits(model, data), expected, atol=1e-3)
    assert not has_hooks(model)


@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_a_circuit_of_all_nodes_is_the_model(how):
    model = tiny_model(full_config())
    data = random_data(model)
    under = holding_circuit(random_circuit(model, share=1.0), model, how)
    assert torch.equal(all_logits(model, data, run_context=under), all_logits(model, data))


@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_the_model_without_a_circuit_of_no_nodes_is_the_model(how):
    model = tiny_model(full_config())
    data = random_data(model)
    under = holding_circuit(random_circuit(model, share=0.0), model, how, inverted=True)
    assert torch.equal(all_logits(model, data, run_context=under), all_logits(model, data))


@pytest.fixture
def without_the_written_channel(micro):
    """The hand-calculated circuit without its last node, whose mean is set to 1/4."""
    circuit = micro_circuit(micro)
    circuit.kept["blocks.0.hook_attn_out"][2] = False
    mean = torch.tensor([0, 0, 0.25, 0])
    return circuit.with_means(dict(circuit.means) | {"blocks.0.hook_attn_out": mean})


def test_mean_and_zero_ablation_on_paper(micro, without_the_written_channel):
    """The written channel is held at its mean, 1/4 after A and after B, or at zero."""
    measured = evaluate(without_the_written_channel, micro, micro_data(micro))
    assert measured.full.loss == pytest.approx(LOSS, abs=1e-6)
    at_mean = (loss_if_written(0.25) + loss_if_written(-0.25)) / 2
    assert measured.circuit.loss == pytest.approx(at_mean, abs=1e-5)
    assert measured.circuit.accuracy == 0.5
    assert measured.zero.loss == pytest.approx(math.log(2), abs=1e-6)
    assert measured.ablated.loss == pytest.approx(math.log(2), abs=1e-6)


def test_resampling_on_paper(micro, without_the_written_channel):
    """The written channel is held at its activation on another prompt: the value of A or of B."""
    data = micro_data(micro)
    measured = evaluate(without_the_written_channel, micro, data)
    embeddings = resampled(micro, data, ["hook_embed"])["hook_embed"]
    letters = embeddings[
        :, 3, 0
    ]  # the letter is at position 3, and its embedding 1 for A, -1 for B
    own_letters = torch.tensor([1.0, -1.0]).repeat(data.n_pairs)
    swapped = (letters != own_letters).float().mean().item()
    assert 0 < swapped < 1
    assert measured.resample.accuracy == pytest.approx(1 - swapped)
    expected = swapped * loss_if_written(-WRITTEN) + (1 - swapped) * LOSS
    assert measured.resample.loss == pytest.approx(expected, rel=1e-4)


JUDGES = [evaluate, faithfulness_curve, random_circuits, effects]


@pytest.mark.parametrize("judge", JUDGES)
def test_a_circuit_of_another_model_is_refused(judge, micro):
    circuit = micro_circuit(micro)
    circuit = dataclasses.replace(circuit, scores=scored_by_means(circuit))
    other = tiny_model()
    with pytest.raises(CircuitError, match="this circuit belongs to the model 'micro'"):
        judge(circuit, other, random_data(other))
    assert not has_hooks(other)


def circuit_without_edges(micro):
    """The hand-calculated circuit with scores, and with both of its edges cut."""
    circuit = micro_circuit(micro)
    return dataclasses.replace(circuit, scores=scored_by_means(circuit), edge_set=frozenset())


def assert_as_before(model, before):
    assert not has_hooks(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name


@pytest.mark.parametrize("judge", JUDGES)
def test_judging_leaves_the_model_as_it_was(judge, micro):
    before = copied_parameters(micro)
    judge(circuit_without_edges(micro), micro, micro_data(micro))
    assert_as_before(micro, before)


@pytest.mark.parametrize("judge", JUDGES)
def test_the_model_is_as_it_was_also_after_an_exception(judge, micro, monkeypatch):
    before = copied_parameters(micro)
    real = running._last_logits
    changed = []  # for each call, whether the model is changed at that moment

    def failing_at_the_sixth_call(*arguments):
        cut_weights = not torch.equal(micro.blocks[0].attn.W_O, before["blocks.0.attn.W_O"])
        changed.append(cut_weights or has_hooks(micro))
        if len(changed) == 6:
            raise ZeroDivisionError
        return real(*arguments)

    # 16 prompts in batches of 4: the sixth call is in the second score that a judge takes, which is
    # under the circuit; the first one of `evaluate` is that of the full model.
    monkeypatch.setattr(running, "_last_logits", failing_at_the_sixth_call)
    with pytest.raises(ZeroDivisionError):
        judge(circuit_without_edges(micro), micro, micro_data(micro), batch_size=4)
    assert changed[-1]  # there was a change to undo
    assert_as_before(micro, before)


# Calibration


def coins(shares, per=20):
    """For each i, `per` prompts whose two logits differ by i, and the data they belong to.

    For a fraction `shares[i]` of them the second answer is right. The rest of the data is
    arbitrary.
    """
    differences = torch.arange(len(shares)).repeat_interleave(per).float()
    logits = torch.stack([torch.zeros_like(differences), differences], 1)
    correct = torch.cat([torch.arange(per) < round(share * per) for share in shares]).long()
    data = random_data(micro_model(), n_pairs=len(correct) // 2)
    return logits, dataclasses.replace(data, correct=correct)


def calibrated(logits, scale, shift):
    return logits * scale + torch.tensor([0.0, shift])


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.6), (0.5, 0.75), (0.8, 0.3), (0.1, 0.9)])
def test_calibration_finds_the_scale_and_shift_of_coins(low, high):
    """If a fraction p is right where logits differ by x, scale · x + shift is log(p / (1 - p))."""
    logits, data = coins([low, high])
    log_odds = [math.log(p / (1 - p)) for p in (low, high)]
    expected = (log_odds[1] - log_odds[0], log_odds[0])
    assert calibration(logits, data) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.6), (0.5, 0.75), (0.8, 0.3), (0.1, 0.9)])
def test_calibration_undoes_a_scale_and_a_shift(low, high):
    logits, data = coins([low, high])
    log_odds = [math.log(p / (1 - p)) for p in (low, high)]
    scale, shift = calibration(calibrated(logits, 0.5, -1.0), data)
    # scale · (0.5 · x - 1) + shift = (0.5 · scale) · x + (shift - scale)
    of_the_original = (scale * 0.5, shift - scale)
    expected = (log_odds[1] - log_odds[0], log_odds[0])
    assert of_the_original == pytest.approx(expected, abs=2e-3)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_no_other_scale_or_shift_has_a_smaller_loss(seed):
    logits = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed))
    _, data = coins([0.5, 0.5])
    scale, shift = calibration(logits, data)

    def loss(scale, shift):
        return score_logits(calibrated(logits, scale, shift), data).loss

    smallest = loss(scale, shift)
    assert smallest <= score_logits(logits, data).loss + 1e-6
    assert loss(scale + 0.05, shift) >= smallest - 1e-6
    assert loss(scale - 0.05, shift) >= smallest - 1e-6
    assert loss(scale, shift + 0.05) >= smallest - 1e-6
    assert loss(scale, shift - 0.05) >= smallest - 1e-6


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
    of_pairs = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    found = score_logits(logits, data)
    assert found.loss == pytest.approx(sum(losses) / 4)
    assert found.accuracy == 0.5  # a tie does not count as right
    assert found.standard_error == pytest.approx(abs(of_pairs[0] - of_pairs[1]) / 2)


def test_one_pair_has_no_standard_error():
    _, data = coins([0.5, 0.5], per=2)
    score = score_logits(torch.zeros(2, 2), data.pairs([0]))
    assert score.standard_error is None
    assert score_row("name", score)[1] == "0.693"


def test_a_score_prints_as_a_line():
    score = Score(0.14872, 0.00712, 0.9561, 2.7131)
    assert str(score) == "loss 0.149 ± 0.007, accuracy 95.6%, logit difference 2.71"
    assert str(Score(0.14872, None, 0.9561)) == "loss 0.149, accuracy 95.6%"
    assert "0.14872" in repr(score)


def test_next_tokens_by_hand():
    answers = torch.tensor([[0, 1], [0, 1]])
    data = random_data(micro_model(), n_pairs=1)
    data = dataclasses.replace(data, candidates=answers, correct=torch.tensor([0, 1]))
    run = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    full = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.8, 0.1]]).log()
    found = score_next_tokens(run, data, full + 3.0)  # a constant added to all logits is nothing
    assert found.next_token.probability == pytest.approx((0.5 + 0.2) / 2)
    assert found.next_token.top == 0.5
    kl = [
        0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25),
        0.8 * math.log(0.8 / 0.2) + 0.1 * math.log(0.1 / 0.7),
    ]
    assert found.next_token.kl == pytest.approx(sum(kl) / 2)
    # Between the two answers, the rest of the vocabulary plays no part.
    assert found.logit_difference == pytest.approx(math.log(2.0))
    assert found.loss == pytest.approx(math.log(1.5))


def test_the_evaluation_of_the_micro_circuit_among_all_tokens(micro):
    data = micro_data(micro, 8)
    found = evaluate(micro_circuit(micro), micro, data)
    # The circuit is all that the model has; both are sure of the answer to the same degree.
    assert found.circuit.next_token == found.full.next_token
    assert found.full.next_token.kl == 0.0
    assert found.faithfulness(found.circuit) == pytest.approx(1.0)
    # Without nodes every logit is zero, whatever the prompt.
    assert found.empty.next_token.probability == pytest.approx(1 / micro.cfg.d_vocab)
    assert found.empty.loss == pytest.approx(math.log(2))
    assert found.empty.logit_difference == pytest.approx(0.0, abs=1e-6)
    assert found.faithfulness(found.empty) == 0.0
    assert found.faithfulness(found.ablated) == pytest.approx(0.0, abs=1e-6)
    assert found.empty.next_token.kl > 0.1


def evaluation_with(**values):
    score = Score(0.25, 0.0, 1.0, logit_difference=2.0)
    fields = dict.fromkeys(("full", "circuit", "ablated", "zero"), score)
    fields |= {"resample": None, "n_pairs": 4, "n_nodes": 3, "n_edges": 2}
    return Evaluation(**fields | values)


def test_what_older_files_lack_is_not_made_up():
    old = Score(0.25, 0.0, 1.0)
    without = evaluation_with(full=old, circuit=old, ablated=old, zero=old)
    assert without.faithfulness(without.circuit) is None
    assert without.misses_target is False
    assert "among all tokens" not in scores_table(without)
    assert scores_table(without).count("–") == 8  # logit difference and faithfulness, four rows
    assert Evaluation.from_dict(dataclasses.asdict(without)) == without
    chance = dataclasses.replace(old, logit_difference=2.0)
    same = evaluation_with(empty=chance)
    assert same.faithfulness(same.circuit) is None  # the full model does no more than no nodes


@pytest.mark.parametrize(("target", "misses"), [(None, False), (0.25, False), (0.2, True)])
def test_a_circuit_that_misses_its_target_is_marked(target, misses):
    evaluation = evaluation_with(target_loss=target)
    assert evaluation.misses_target == misses
    said = "misses the target on these pairs: its task loss is 0.250, and it had to be at most 0.2"
    assert (said in scores_table(evaluation)) == misses


def test_a_target_may_be_a_whole_number(micro):
    config = {"target_loss": 1}
    circuit = dataclasses.replace(micro_circuit(micro), measured={"config": config})
    assert evaluate(circuit, micro, micro_data(micro)).target_loss == 1.0


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_the_target_is_that_of_the_ablation_of_the_search(ablation):
    losses = {"mean": 0.1, "zero": 0.2, "resample": 0.3}
    of = {name: Score(loss, 0.0, 1.0) for name, loss in losses.items()}
    scores = {"circuit": of["mean"], "zero": of["zero"], "resample": of["resample"]}
    for target in (0.05, 0.15, 0.25, 0.35):
        evaluation = evaluation_with(target_loss=target, ablation=ablation, **scores)
        assert evaluation.reached_loss == losses[ablation]
        assert evaluation.misses_target == (losses[ablation] > target)
    nothing_to_resample = evaluation_with(target_loss=0.1, ablation="resample")
    assert nothing_to_resample.reached_loss is None
    assert not nothing_to_resample.misses_target


# The faithfulness curve


def test_the_curve_on_paper(micro):
    """The circuit's three nodes rank first, and only circuits with all three do the task."""
    circuit = micro_circuit(micro)
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for name, mask in circuit.kept.items():
        scores[name] = 0.1 * torch.rand(mask.shape, generator=generator)
    scores["blocks.0.attn.hook_v"][0, 0] = 3.0
    scores["blocks.0.ln1.hook_read"][0] = 2.0
    scores["blocks.0.hook_attn_out"][2] = 1.0
    circuit = dataclasses.replace(circuit, scores=scores)
    curve = faithfulness_curve(circuit, micro, micro_data(micro))
    # 3 · 2^(i/2) for i from -6 to 6; the model has 4 + 2 + 2 + 2 + 4 + 4 + 2 + 4 nodes.
    assert [sized.n_nodes for sized in curve] == [0, 1, 2, 3, 4, 6, 8, 12, 17, 24]
    assert [sized.n_edges for sized in curve] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    for sized in curve:
        expected = LOSS if sized.n_nodes >= 3 else math.log(2)
        assert sized.circuit.loss == pytest.approx(expected, abs=1e-5)


def test_the_curve_goes_through_the_circuit_and_ends_at_the_model():
    model = tiny_model(full_config())
    circuit = random_circuit(model, share=0.3)
    data = random_data(model)
    curve = {sized.n_nodes: sized for sized in faithfulness_curve(circuit, model, data)}
    itself = curve[circuit.n_nodes]
    assert itself.circuit == score(model, data, run_context=holding_circuit(circuit, model))
    assert itself.n_edges == len(circuit.edges(model))
    n_nodes = sum(mask.numel() for mask in circuit.kept.values())
    assert max(curve) == n_nodes
    assert curve[n_nodes].circuit == score(model, data)


def test_a_curve_needs_scores():
    model = tiny_model(full_config())
    circuit = dataclasses.replace(random_circuit(model), scores={})
    with pytest.raises(CircuitError, match="and the circuit must have scores"):
        faithfulness_curve(circuit, model, random_data(model))


# Random circuits


def sizes(circuit):
    """Hook name → the number of nodes kept there."""
    return {name: int(mask.sum()) for name, mask in circuit.kept.items()}


def test_random_circuits_have_as_many_nodes_at_each_hook_point(monkeypatch):
    model = tiny_model(full_config())
    data = random_data(model)
    circuit = dataclasses.replace(random_circuit(model, share=0.4), edge_set=frozenset())
    real = evaluation.holding_nodes
    drawn = []

    def remembering(circuit, *rest):
        drawn.append(circuit)
        return real(circuit, *rest)

    monkeypatch.setattr(evaluation, "holding_nodes", remembering)
    measured = random_circuits(circuit, model, data, n_circuits=5, seed=3)
    assert len(measured) == len(drawn) == 5
    assert len({tuple(each.nodes) for each in [circuit, *drawn]}) == 6
    for each, sized in zip(drawn, measured, strict=True):
        assert sizes(each) == sizes(circuit)
        assert sized.n_nodes == circuit.n_nodes
        # The edge set of the given circuit does not apply to other nodes.
        assert sized.n_edges == len(each.edges(model)) > 0
        assert sized.circuit == score(model, data, run_context=real(each, model))


def test_a_seed_decides_the_random_circuits():
    model = tiny_model(full_config())
    data = random_data(model)
    circuit = random_circuit(model, share=0.4)
    measured = random_circuits(circuit, model, data, n_circuits=5, seed=3)
    assert random_circuits(circuit, model, data, n_circuits=5, seed=3) == measured
    assert random_circuits(circuit, model, data, n_circuits=5, seed=4) != measured


def test_random_circuits_of_everything_are_the_model():
    model = tiny_model(full_config())
    data = random_data(model)
    (sized,) = random_circuits(random_circuit(model, share=1.0), model, data, n_circuits=1)
    assert sized.circuit == score(model, data)


# Effects


def named_effects(circuit, micro):
    """The name of each node or edge → its effect."""
    measured = effects(circuit, micro, micro_data(micro))
    return {str(part): effect for part, effect in measured.items()}


def test_effects_on_paper(micro):
    """With a second path of half the strength, each ablated part removes its share of the write."""
    attn, mlp = micro.blocks[0].attn, micro.blocks[0].mlp
    with torch.no_grad():
        attn.W_V[0, 0, 1] = W_V / 2
        attn.W_O[0, 1, 2] = W_O
        mlp.W_in[1, 0] = 1.0
        mlp.W_out[0, 1] = 0.0
    circuit = micro_circuit(micro)
    circuit.kept["blocks.0.attn.hook_v"][0, 1] = True
    circuit.kept["blocks.0.mlp.hook_post"][1] = True  # has no effect and no edge
    both, first, second = 1.5 * WRITTEN, WRITTEN, 0.5 * WRITTEN
    written_without = {
        "0.attn_in 0": 0.0,
        "0.attn_v h0.0": second,
        "0.attn_v h0.1": first,
        "0.attn_out 2": 0.0,
        "0.mlp_neuron 1": both,
        "0.attn_in 0 → 0.attn_v h0.0  +1.500": second,
        "0.attn_in 0 → 0.attn_v h0.1  +0.750": first,
        "0.attn_v h0.0 → 0.attn_out 2  +2.000": second,
        "0.attn_v h0.1 → 0.attn_out 2  +2.000": first,
    }
    found = named_effects(circuit, micro)
    assert list(found) == list(written_without)
    for part, written in written_without.items():
        expected = loss_if_written(written) - loss_if_written(both)
        assert found[part] == pytest.approx(expected, abs=1e-6), part


def test_effects_of_an_edge_pruned_circuit(micro):
    """An edge that is already cut has no effect; the other effects are measured without it."""
    circuit = micro_circuit(micro)
    circuit = circuit.without(circuit.edges(micro)[:1], micro)
    found = named_effects(circuit, micro)
    assert list(found) == [*NODES, "0.attn_v h0.0 → 0.attn_out 2  +2.000"]
    assert list(found.values()) == pytest.approx([0.0] * 4, abs=1e-6)


def test_effects_against_cutting_by_hand():
    model = tiny_model(n_layers=1)
    circuit = random_circuit(model, share=0.2)
    data = random_data(model)
    found = effects(circuit, model, data, batch_size=4)
    assert list(found) == [*circuit.nodes, *circuit.edges(model)]
    with circuit.applied(model):
        of_all = score(model, data).loss
    for part, effect in found.items():
        with circuit.without([part], model).applied(model):
            assert effect == pytest.approx(score(model, data).loss - of_all, abs=1e-6)


def test_means_are_those_of_the_corpus(micro):
    """The effects are relative to these: the micro circuit's means over its corpus are 0."""
    means = mean_activations(micro, ["blocks.0.ln1.hook_read"], [micro_corpus()])
    assert means["blocks.0.ln1.hook_read"].tolist() == pytest.approx(
        [0.0, 2 / 6, 0.0, 0.0], abs=1e-6
    )
