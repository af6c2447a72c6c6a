"""captum on our models, on both lines: its attributions are our hooks' values and gradients.

captum reads layers through torch's hooks, so a layer is any hook point or module of the model.
"""

import numpy as np
import pytest
import torch
from tool_models import dense_model, prompts, requires, sparse_model, stream_model

requires("captum")

MODELS = {"dense": dense_model, "sparse": sparse_model, "stream": stream_model}
EXACT = dict(atol=1e-12, rtol=0)  # in float64
N_STEPS = 8


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def metric_of(logits):
    """Token 3 against token 4 at the last position, for each prompt."""
    return logits[:, -1, 3] - logits[:, -1, 4]


def metric(model):
    """The function of tokens that captum attributes."""
    return lambda tokens: metric_of(model(tokens))


def changed_metric(model, tokens, name, change):
    """The metric after `change` of the activation at one hook point."""

    def hook_function(x, hook):
        return change(x.clone())

    return metric_of(model.run_with_hooks(tokens, fwd_hooks=[(name, hook_function)]))


def value_and_gradient(model, tokens, name):
    """The activation at a hook point, and the gradient of the metric there."""
    found = {}

    def remember(x, hook):
        found["value"] = x.detach().clone()

    def remember_gradient(gradient, hook):
        found["gradient"] = gradient.clone()

    with model.hooks(fwd_hooks=[(name, remember)], bwd_hooks=[(name, remember_gradient)]):
        metric_of(model(tokens)).sum().backward()
    return found["value"], found["gradient"]


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"])
def test_layer_activation(model, name):
    from captum.attr import LayerActivation

    tokens, _ = prompts(model)
    found = LayerActivation(metric(model), model.hook_dict[name]).attribute(tokens)
    torch.testing.assert_close(found, model.run_with_cache(tokens)[1][name], **EXACT)


@pytest.mark.parametrize("name", ["blocks.1.mlp.hook_post", "blocks.0.attn.hook_z"])
def test_layer_gradient_times_activation(model, name):
    from captum.attr import LayerGradientXActivation

    tokens, _ = prompts(model)
    found = LayerGradientXActivation(metric(model), model.hook_dict[name]).attribute(tokens)
    value, gradient = value_and_gradient(model, tokens, name)
    torch.testing.assert_close(found, value * gradient, **EXACT)
    assert found.abs().max() > 1e-3


def test_layer_integrated_gradients_of_the_embedding(model):
    """Gauss-Legendre quadrature of the gradient on the way from the corrupt embedding."""
    from captum.attr import LayerIntegratedGradients

    clean, corrupt = prompts(model)
    method = LayerIntegratedGradients(metric(model), model.embed)
    found = method.attribute(clean, baselines=corrupt, n_steps=N_STEPS)
    expected = integrated_gradients(model, clean, corrupt)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)  # its steps are in float32


def integrated_gradients(model, clean, corrupt):
    start, end = (model.embed(tokens).detach() for tokens in (corrupt, clean))
    points, weights = np.polynomial.legendre.leggauss(N_STEPS)  # on [-1, 1]
    total = torch.zeros_like(end)
    for point, weight in zip(points, weights, strict=True):
        between = (start + (1 + point) / 2 * (end - start)).requires_grad_()
        value = changed_metric(model, clean, "hook_embed", lambda x, between=between: between)
        total += weight / 2 * torch.autograd.grad(value.sum(), between)[0]
    return total * (end - start)


def completeness_gap(model):
    """The change of the metric that integrated gradients of the embedding leave unexplained."""
    from captum.attr import LayerIntegratedGradients

    clean, corrupt = prompts(model)
    method = LayerIntegratedGradients(metric(model), model.embed)
    found = method.attribute(clean, baselines=corrupt, n_steps=200)
    change = metric_of(model(clean)) - metric_of(model(corrupt))
    return (found.sum((1, 2)) - change).abs().max()


def test_integrated_gradients_are_complete_only_without_abs_topk():
    """The logits jump where AbsTopK drops another entry, and gradients do not see jumps."""
    assert completeness_gap(dense_model()) < 1e-6
    assert completeness_gap(sparse_model()) > 0.1


@torch.no_grad()
def test_feature_ablation_of_tokens(model):
    from captum.attr import FeatureAblation

    tokens, _ = prompts(model)
    found = FeatureAblation(metric(model)).attribute(tokens, baselines=1)
    for position in range(tokens.shape[1]):
        ablated = tokens.clone()
        ablated[:, position] = 1
        expected = metric_of(model(tokens)) - metric_of(model(ablated))
        torch.testing.assert_close(found[:, position], expected, **EXACT)


@torch.no_grad()
def test_layer_feature_ablation_of_neurons(model):
    from captum.attr import LayerFeatureAblation

    tokens, _ = prompts(model)
    name = "blocks.1.mlp.hook_post"
    each_neuron = torch.arange(model.cfg.d_mlp).expand(1, 1, -1)
    method = LayerFeatureAblation(metric(model), model.hook_dict[name])
    found = method.attribute(tokens, layer_mask=each_neuron)
    for neuron in range(model.cfg.d_mlp):

        def ablate(x, neuron=neuron):
            x[..., neuron] = 0
            return x

        expected = metric_of(model(tokens)) - changed_metric(model, tokens, name, ablate)
        torch.testing.assert_close(found[:, -1, neuron], expected, **EXACT)
    assert found.abs().max() > 1e-3
