"""nnsight on our models, on both lines: it reads, edits and differentiates what our hooks do.

`test_nnsight.py` runs these tests in a process of their own, because nnsight changes `object`.
"""

import pytest
import torch
from tool_models import dense_model, difference, prompts, requires, sparse_model, stream_model

requires("nnsight")

from nnsight import NNsight

MODELS = {"dense": dense_model, "sparse": sparse_model, "stream": stream_model}
HOOKS = ["blocks.0.hook_resid_post", "blocks.0.attn.hook_z", "blocks.1.ln2.hook_read"]
EXACT = dict(atol=1e-12, rtol=0)  # in float64


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def test_each_hook_point_has_the_value_that_transformer_lens_caches(model):
    """Also the pattern, and pre, which the nonlinearity overwrites if nobody looks."""
    tokens, _ = prompts(model)
    traced = NNsight(model)
    with traced.trace(tokens) as tracer:
        seen = tracer.cache()
        logits = traced.output.save()
    expected_logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected_logits, **EXACT)
    assert "blocks.0.attn.hook_pattern" in cache
    for name, value in cache.items():
        torch.testing.assert_close(seen[f"model.{name}"].output, value, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", HOOKS)
def test_a_value_patched_from_another_prompt(model, name):
    clean, corrupt = prompts(model)
    traced = NNsight(model)
    with traced.trace(clean):
        value = traced.get(name).output.save()
    with traced.trace(corrupt):
        traced.get(name).output = value
        logits = traced.output.save()
    clean_value = model.run_with_cache(clean)[1][name]
    hooks = [(name, lambda x, hook: clean_value)]
    expected = model.run_with_hooks(corrupt, fwd_hooks=hooks)
    torch.testing.assert_close(logits, expected, **EXACT)
    assert (logits - model(corrupt)).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", HOOKS)
def test_a_value_edited_in_place(model, name):
    tokens, _ = prompts(model)
    traced = NNsight(model)
    with traced.trace(tokens):
        traced.get(name).output[:, -1] = 0.5
        logits = traced.output.save()

    def edit(x, hook):
        x = x.clone()
        x[:, -1] = 0.5
        return x

    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
    torch.testing.assert_close(logits, expected, **EXACT)
    assert (logits - model(tokens)).abs().max() > 0.01


def test_gradients_of_a_metric(model):
    tokens, _ = prompts(model)
    traced = NNsight(model)
    with traced.trace(tokens):
        z = traced.blocks[0].attn.hook_z.output
        resid = traced.blocks[1].hook_resid_mid.output
        with difference(traced.output).backward():
            of_resid = resid.grad.save()
            of_z = z.grad.save()
    expected = {}

    def remember(gradient, hook):
        expected[hook.name] = gradient.clone()

    names = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_mid"]
    with model.hooks(bwd_hooks=[(name, remember) for name in names]):
        difference(model(tokens)).backward()
    torch.testing.assert_close(of_z, expected["blocks.0.attn.hook_z"], **EXACT)
    torch.testing.assert_close(of_resid, expected["blocks.1.hook_resid_mid"], **EXACT)
    assert of_z.abs().max() > 1e-3


@torch.no_grad()
def test_text_is_tokenized_as_by_the_model():
    model = sparse_model()
    traced = NNsight(model)
    with traced.trace("a b c"):
        logits = traced.output.save()
    torch.testing.assert_close(logits, model("a b c"), **EXACT)
