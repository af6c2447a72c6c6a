"""What a score may not depend on: the batches, padding, and which positions are computed."""

import dataclasses
import warnings

import pytest
import torch

from helpers import full_config, has_hooks, random_circuit, random_data, stock_model, tiny_model
from micro import micro_circuit, micro_data, micro_model
from tl_sparse.errors import CircuitError, ConfigError, DataError, TaskError, UnsupportedError
from tl_sparse.evaluation.holding import holding_circuit
from tl_sparse.evaluation.judge import evaluate, score, score_logits
from tl_sparse.evaluation.running import all_logits, resampled, task_logits, task_loss
from tl_sparse.hooks import NodeGates, ablating, recording, treats_positions_alike
from tl_sparse.tasks.task_data import candidate_logits

# Partners in resample ablation


@pytest.mark.parametrize("n_pairs", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_each_prompt_has_a_partner_from_another_pair(n_pairs, seed):
    model = tiny_model(full_config())
    data = random_data(model, n_pairs)
    row_of = {tuple(tokens): row for row, tokens in enumerate(data.tokens.tolist())}
    partners = data.with_partners(seed).partners
    rows = [row_of[tuple(tokens)] for tokens in partners.tokens.tolist()]
    assert sorted(rows) == list(range(2 * n_pairs))
    assert all(partner // 2 != prompt // 2 for prompt, partner in enumerate(rows))
    assert torch.equal(partners.last, data.last[rows])


def test_the_seed_decides_the_partners():
    data = random_data(tiny_model(full_config()), n_pairs=8)
    first, again, other = (data.with_partners(seed).partners for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_a_prompt_keeps_its_partner_when_pairs_are_selected():
    data = random_data(tiny_model(full_config()), n_pairs=8).with_partners(0)
    chosen = data.pairs([5, 1]).to("cpu")
    rows = [10, 11, 2, 3]
    assert torch.equal(chosen.partners.tokens, data.partners.tokens[rows])
    assert torch.equal(chosen.partners.last, data.partners.last[rows])


def test_a_single_pair_cannot_be_resampled(micro):
    data = micro_data(micro, n_pairs=1)
    with pytest.raises(TaskError, match=r"needs at least 2 pairs.*there is 1"):
        data.with_partners(0)
    circuit = micro_circuit(micro)
    with pytest.raises(TaskError, match="needs at least 2 pairs"):
        score(micro, data, run_context=holding_circuit(circuit, micro, "resample"))
    evaluation = evaluate(circuit, micro, data)
    assert evaluation.resample is None
    assert evaluation.circuit.loss < 0.1


def test_a_resampled_prompt_has_the_same_logits_in_any_batch():
    model = tiny_model(full_config(), dtype=torch.float64)
    data = random_data(model, n_pairs=9)
    under = holding_circuit(random_circuit(model), model, "resample")
    expected = all_logits(model, data, 100, under, seed=4)
    for batch_size in (1, 4, 7):
        found = all_logits(model, data, batch_size, under, seed=4)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # Also if only some of the pairs are scored.
    some = data.with_partners(4).pairs([7, 2])
    found = all_logits(model, some, 2, under)
    torch.testing.assert_close(found, expected[[14, 15, 4, 5]], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(all_logits(model, data, 100, under, seed=5), expected, atol=1e-3)


def test_the_seed_of_an_evaluation_is_that_of_its_partners():
    model = tiny_model(full_config(), dtype=torch.float64)
    data, circuit = random_data(model, n_pairs=9), random_circuit(model)
    under = holding_circuit(circuit, model, "resample")
    for seed in (0, 3):
        expected = score_logits(all_logits(model, data.with_partners(seed), 100, under), data)
        assert evaluate(circuit, model, data, 4, seed).resample.loss == pytest.approx(expected.loss)


def test_an_unknown_ablation_or_another_model_is_refused(micro):
    circuit = micro_circuit(micro)
    with pytest.raises(ConfigError, match=r"ablation = 'means' .* one of mean, zero, resample"):
        holding_circuit(circuit, micro, "means")
    with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
        holding_circuit(circuit, tiny_model())


# Functions that may need all positions


def remove_at_the_first_position(activation, hook=None):
    activation = activation.clone()
    activation[:, 0] = 0.0
    return activation


def hook_at_a_hook_point(model):
    model.add_hook("blocks.1.hook_mlp_out", remove_at_the_first_position)


def permanent_hook(model):
    model.add_perma_hook("blocks.1.hook_mlp_out", remove_at_the_first_position)


def hook_of_torch(model):
    model.blocks[1].mlp.register_forward_hook(
        lambda module, args, out: remove_at_the_first_position(out)
    )


def pre_hook_of_torch(model):
    model.unembed.register_forward_pre_hook(
        lambda module, args: (remove_at_the_first_position(args[0]),)
    )


def hook_on_the_model(model):
    model.register_forward_hook(lambda module, args, out: remove_at_the_first_position(out) * 2)


def other_forward(model):
    mlp = model.blocks[1].mlp
    forward = mlp.forward
    mlp.forward = lambda read: remove_at_the_first_position(forward(read))


def replaced_hook_point(model):
    class Spliced(torch.nn.Module):
        def forward(self, x):
            return remove_at_the_first_position(x)

    model.blocks[1].hook_mlp_out = Spliced()


CHANGES = [
    hook_at_a_hook_point,
    permanent_hook,
    hook_of_torch,
    pre_hook_of_torch,
    hook_on_the_model,
    other_forward,
    replaced_hook_point,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_score_under_the_users_hooks_is_that_of_whole_sequences(change):
    model = tiny_model(full_config(), dtype=torch.float64)
    data = random_data(model, n_pairs=4)
    assert treats_positions_alike(model)
    if change is permanent_hook and not hasattr(model, "add_perma_hook"):
        model.add_perma_hook = lambda name, hook: model.hook_dict[name].add_perma_hook(hook)
    change(model)
    assert not treats_positions_alike(model)
    with torch.no_grad():
        expected = candidate_logits(model(data.tokens), data)
        found = task_logits(model, data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_a_hook_for_all_modules_counts_too():
    model = tiny_model(full_config())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not treats_positions_alike(model)
    finally:
        handle.remove()
    assert treats_positions_alike(model)


def test_what_the_user_records_of_a_score_is_the_whole_sequence():
    model = tiny_model(full_config())
    data = random_data(model, n_pairs=4)
    name = "blocks.1.hook_resid_post"
    with recording(model, [name]) as activations, torch.no_grad():
        task_logits(model, data)
    assert activations[name].shape == (8, int(data.last.max()) + 1, model.cfg.d_model)


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_a_circuit_alone_needs_the_last_positions_only(how):
    model = tiny_model(full_config())
    data = random_data(model)
    with holding_circuit(random_circuit(model), model, how)(data):
        assert treats_positions_alike(model)
    assert not has_hooks(model)


def test_values_for_each_position_are_used_at_their_positions():
    """Nodes held at a whole run of other prompts, as by the user's own `run_with_cache`."""
    model = tiny_model(full_config(), dtype=torch.float64)
    circuit, data = random_circuit(model), random_data(model, n_pairs=4)
    data = dataclasses.replace(data, last=data.last.index_fill(0, torch.tensor([0]), 7))
    others = data.tokens.flip(0)
    _, cache = model.run_with_cache(others)
    values = {name: cache[name] for name in circuit.kept}
    means = {name: circuit.means[name] for name in circuit.kept}
    gates = NodeGates(means, init_bias=0.0, init_scale=0.5, seed=0)
    contexts = [
        ablating(model, circuit.dropped, values),
        gates.attached(model, values=values),
    ]
    for context in contexts:
        with context, torch.no_grad():
            expected = candidate_logits(model(data.tokens), data)
            torch.testing.assert_close(task_logits(model, data), expected, rtol=1e-9, atol=1e-10)


def test_a_tokenizer_that_pads_on_the_left_hides_no_token():
    """The first token is the padding token too."""
    model = micro_model()
    data = micro_data(model)
    expected = all_logits(model, data)
    model.tokenizer.padding_side = "left"
    model.cfg.default_prepend_bos = False
    hook_at_a_hook_point_of_one_layer = ("blocks.0.hook_mlp_out", lambda x, hook: x)
    with model.hooks(fwd_hooks=[hook_at_a_hook_point_of_one_layer]):
        torch.testing.assert_close(all_logits(model, data), expected)


def test_prompts_longer_than_the_context():
    model = micro_model()
    data = micro_data(model, n_pairs=2)
    data = dataclasses.replace(
        data,
        prompts=("A end " * 20, *data.prompts[1:]),
        tokens=torch.zeros(4, 9, dtype=torch.long),
        last=torch.full((4,), 8),
    )
    message = r"of task micro has 9 tokens, more than the context of 8: '(A end ){10}…'"
    with pytest.raises(DataError, match=message):
        score(model, data)


# Models that see padding


def bidirectional():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stock_model(attention_dir="bidirectional", n_ctx=10)


def test_a_model_that_sees_padding_runs_on_prompts_of_equal_length():
    model = bidirectional()
    lengths = torch.tensor([4, 4, 9, 9, 4, 4, 6, 6, 9, 9])
    data = random_data(model, n_pairs=5, lengths=lengths)
    with torch.no_grad():
        prompts = [tokens[: end + 1] for tokens, end in zip(data.tokens, data.last, strict=True)]
        alone = [model(prompt[None])[:, -1] for prompt in prompts]
    expected = torch.cat(alone).gather(1, data.candidates)
    for batch_size in (1, 4, 100):
        found = all_logits(model, data, batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_that_would_be_seen_is_refused():
    model = bidirectional()
    data = random_data(model, n_pairs=2, lengths=torch.tensor([4, 4, 9, 9]))
    for call in (task_logits, task_loss):
        with pytest.raises(UnsupportedError, match=r"same length, not \[5, 10\] tokens"):
            call(model, data)
    with pytest.raises(UnsupportedError, match=r"same length, not \[5, 10\] tokens"):
        resampled(model, data, ["blocks.0.hook_mlp_out"])
    within_a_pair = random_data(model, n_pairs=1, lengths=torch.tensor([4, 5]))
    with pytest.raises(UnsupportedError, match=r"same length, not \[5, 6\] tokens"):
        score(model, within_a_pair)
    assert not has_hooks(model)


@pytest.mark.parametrize("is_hooked", [False, True])
def test_a_model_of_another_package_unembeds_the_last_positions_only(monkeypatch, is_hooked):
    """Its other logits are computed only for those who look at them."""
    model = stock_model()
    data = random_data(model, n_pairs=4)
    with torch.no_grad():
        expected = candidate_logits(model(data.tokens), data)
    shapes = []
    run = type(model.unembed).forward

    def recorded(module, resid):
        shapes.append(list(resid.shape))
        return run(module, resid)

    monkeypatch.setattr(type(model.unembed), "forward", recorded)
    if is_hooked:
        model.unembed.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        found = task_logits(model, data)
    n_positions = int(data.last.max()) + 1 if is_hooked else 1
    assert shapes == [[8, n_positions, model.cfg.d_model]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
