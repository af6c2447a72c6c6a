"""What a hook replaces whatever it is need not be computed."""

import threading

import pytest
import torch

from helpers import full_config, has_hooks, node_means, random_data, random_masks, tiny_model
from tl_sparse.errors import HookNameError
from tl_sparse.evaluation.running import task_logits
from tl_sparse.hooks import ablating, hooked, recording
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.network.blocks import MLP, Attention

ATTN_OUT, MLP_OUT = "blocks.1.hook_attn_out", "blocks.0.hook_mlp_out"


def case():
    """A model, means and masks that hold half of the nodes, and all that two sublayers write."""
    model = tiny_model(full_config(), dtype=torch.float64)
    data = random_data(model, n_pairs=4)
    means = node_means(model, data.tokens)
    masks = random_masks(means, 0.5, torch.Generator().manual_seed(1))
    for name in (ATTN_OUT, MLP_OUT):
        masks[name] = torch.ones_like(masks[name])
    return model, data, means, masks


def runs_of(monkeypatch):
    """The list to which attention and MLPs are added whenever they run."""
    runs = []

    def counting(run):
        def counted(module, *args):
            runs.append(module)
            return run(module, *args)

        return counted

    for kind in (Attention, MLP):
        monkeypatch.setattr(kind, "forward", counting(kind.forward))
    return runs


@pytest.mark.parametrize("at_last_positions", [True, False])
def test_what_is_held_altogether_is_not_computed(monkeypatch, at_last_positions):
    model, data, means, masks = case()
    run = task_logits if at_last_positions else lambda model, data: model(data.tokens)
    recorded = ["blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"]
    with ablating(model, masks, means), recording(model, recorded):
        expected = run(model, data)  # what is recorded must be computed
    runs = runs_of(monkeypatch)
    with ablating(model, masks, means):
        found = run(model, data)
    first, second = model.network.blocks
    assert runs == [first.attn, second.mlp]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    runs.clear()
    run(model, data)
    assert len(runs) == 4
    assert not has_hooks(model)


def test_what_another_function_may_see_is_computed(monkeypatch):
    model, data, means, masks = case()
    runs = runs_of(monkeypatch)
    seen = []
    function = {"blocks.0.mlp.hook_pre": lambda x, hook: seen.append(x)}
    with hooked(model, function), ablating(model, masks, means):
        model(data.tokens)
    assert len(seen) == 1
    first, second = model.network.blocks
    assert runs == [first.attn, first.mlp, second.mlp]


def test_what_the_users_hook_sees_before_it_is_replaced_is_computed():
    model, data, means, masks = case()
    with recording(model, [MLP_OUT]) as computed, ablating(model, masks, means):
        model(data.tokens)
    assert computed[MLP_OUT].std() > 0
    assert not torch.allclose(computed[MLP_OUT], means[MLP_OUT].to(computed[MLP_OUT]))


def test_the_context_of_another_thread_keeps_nothing_from_being_computed():
    model, data, means, masks = case()
    expected = model(data.tokens)
    found = []
    thread = threading.Thread(target=lambda: found.append(model(data.tokens)))
    with ablating(model, masks, means):
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


def test_closed_gates_hold_all_nodes_and_learn_nothing(monkeypatch):
    model, data, means, _ = case()
    gates = NodeGates(means, init_bias=0.5, init_scale=0.0, seed=0)
    openings = torch.ones_like(gates.tau)
    for name in (ATTN_OUT, MLP_OUT):
        openings[gates.index[name]] = 0
    openings.requires_grad_()
    with gates.attached(model, openings=openings):
        expected = model(data.tokens)
    (slopes,) = torch.autograd.grad(expected.logsumexp(-1).mean(), openings)
    runs = runs_of(monkeypatch)
    with gates.attached(model, openings=openings, closed=[ATTN_OUT, MLP_OUT]):
        found = model(data.tokens)
    first, second = model.network.blocks
    assert runs == [first.attn, second.mlp]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (without,) = torch.autograd.grad(found.logsumexp(-1).mean(), openings)
    for name, index in gates.index.items():
        wanted = slopes[index] * (name not in (ATTN_OUT, MLP_OUT))
        torch.testing.assert_close(without[index], wanted, rtol=1e-9, atol=1e-12)
    closed = gates.attached(model, closed=["blocks.7.hook_mlp_out"])
    with (
        pytest.raises(HookNameError, match=r"no gates to close at blocks\.7\.hook_mlp_out"),
        closed,
    ):
        pass
