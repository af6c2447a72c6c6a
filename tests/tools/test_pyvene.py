"""pyvene on our models: interchange interventions at hook points are our patches.

pyvene takes seconds to import, so a fixture does it, and not each process of pytest.
"""

import re

import pytest
import torch
from tool_models import dense_model, prompts, requires, sparse_model, stream_model

requires("pyvene")

MODELS = {"dense": dense_model, "sparse": sparse_model, "stream": stream_model}
HOOKS = [
    "blocks.0.hook_resid_post",
    "blocks.0.attn.hook_z",
    "blocks.1.ln2.hook_read",
    "blocks.1.mlp.hook_post",
]
POSITION = 3
EXACT = dict(atol=1e-12, rtol=0)  # in float64


@pytest.fixture(scope="module")
def pyvene():
    import pyvene

    return pyvene


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]()
    model.config = model.cfg  # pyvene asks each model for one; it reads nothing of ours
    return model


def component(name):
    """pyvene's name of what leaves a module: blocks[0].hook_resid_post.output."""
    return re.sub(r"\.(\d+)", r"[\1]", name) + ".output"


def patched(model, tokens, name, change):
    """The logits with a change of an activation at one position."""

    def hook_function(x, hook):
        x = x.clone()
        x[:, POSITION] = change(x[:, POSITION])
        return x

    return model.run_with_hooks(tokens, fwd_hooks=[(name, hook_function)])


@torch.no_grad()
@pytest.mark.parametrize("name", HOOKS)
def test_an_interchange_intervention(pyvene, model, name):
    clean, corrupt = prompts(model)
    intervention = {"component": component(name), "intervention": pyvene.VanillaIntervention()}
    intervenable = pyvene.IntervenableModel(intervention, model)
    _, logits = intervenable({"input": clean}, [{"input": corrupt}], {"sources->base": POSITION})
    source = model.run_with_cache(corrupt)[1][name][:, POSITION]
    expected = patched(model, clean, name, lambda x: source)
    torch.testing.assert_close(logits, expected, **EXACT)
    assert (logits - model(clean)).abs().max() > 0.01
    assert not model.hook_dict[name]._forward_hooks


@torch.no_grad()
def test_activations_collected(pyvene, model):
    tokens, _ = prompts(model)
    collect = {"component": component(HOOKS[0]), "intervention": pyvene.CollectIntervention()}
    intervenable = pyvene.IntervenableModel(collect, model)
    (_, collected), _ = intervenable({"input": tokens}, unit_locations={"base": POSITION})
    expected = model.run_with_cache(tokens)[1][HOOKS[0]][:, POSITION]
    torch.testing.assert_close(collected[0][:, 0], expected, **EXACT)


@torch.no_grad()
def test_a_function_in_place_of_an_activation(pyvene, model):
    tokens, _ = prompts(model)
    halved = {"component": component(HOOKS[2]), "intervention": lambda base, source: base / 2}
    _, logits = pyvene.IntervenableModel(halved, model)({"input": tokens})
    hooks = [(HOOKS[2], lambda x, hook: x / 2)]
    torch.testing.assert_close(logits, model.run_with_hooks(tokens, fwd_hooks=hooks), **EXACT)


def test_a_learned_subspace(pyvene, model):
    """A rotated subspace of rank 2 is interchanged, and its directions have gradients."""
    clean, corrupt = prompts(model)
    name = HOOKS[0]
    subspace = pyvene.LowRankRotatedSpaceIntervention(
        embed_dim=model.cfg.d_model, low_rank_dimension=2
    ).double()
    intervenable = pyvene.IntervenableModel(
        {"component": component(name), "intervention": subspace}, model
    )
    _, logits = intervenable({"input": clean}, [{"input": corrupt}], {"sources->base": POSITION})
    basis = subspace.rotate_layer.weight  # [d_model, 2], orthonormal
    source = model.run_with_cache(corrupt)[1][name][:, POSITION]
    expected = patched(model, clean, name, lambda x: x + (source - x) @ basis @ basis.T)
    torch.testing.assert_close(logits, expected, **EXACT)
    logits[:, -1, 3].sum().backward()
    (gradient,) = [parameter.grad for parameter in subspace.parameters()]
    assert gradient.abs().max() > 1e-4


@torch.no_grad()
def test_a_call_removes_the_hooks_of_others(pyvene):
    """After it, a context that holds nodes holds them no more: pyvene is for models as they are."""
    model = sparse_model()
    model.config = model.cfg
    clean, corrupt = prompts(model)
    intervention = {"component": component(HOOKS[0]), "intervention": pyvene.VanillaIntervention()}
    intervenable = pyvene.IntervenableModel(intervention, model)
    with model.hooks(fwd_hooks=[(HOOKS[1], lambda x, hook: torch.zeros_like(x))]):
        ablated = model(clean)
        intervenable({"input": clean}, [{"input": corrupt}], {"sources->base": POSITION})
        after = model(clean)
    assert (ablated - after).abs().max() > 0.01
    torch.testing.assert_close(after, model(clean), **EXACT)
