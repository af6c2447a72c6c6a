"""The network within the transformations of torch.func."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from helpers import full_config, random_tokens, tiny_model
from tl_sparse.network.products import Kernels, Product

pytestmark = pytest.mark.any_line


@pytest.fixture(params=["auto", "dense", "sparse"])
def network(request):
    kernels: Kernels = request.param
    network = tiny_model(full_config(), dtype=torch.float64).network
    for module in network.modules():
        if isinstance(module, Product):
            module.kernels = kernels
    return network


def loss_of(network, weights, tokens):
    return functional_call(network, weights, (tokens,)).square().mean()


def learned(network):
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def test_grad_is_what_autograd_gives(network):
    tokens = random_tokens(network, batch=8)
    gradients = grad(lambda weights: loss_of(network, weights, tokens))(learned(network))
    network(tokens).square().mean().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, network.get_parameter(name).grad)


def test_vmap_gives_the_gradient_of_each_row(network):
    tokens = random_tokens(network, batch=4)
    weights = learned(network)

    def gradient(row):
        return grad(lambda w: loss_of(network, w, row[None]))(weights)["unembed.W_U"]

    together = vmap(gradient)(tokens)
    for row, ours in zip(tokens, together, strict=True):
        torch.testing.assert_close(ours, gradient(row))


def test_jvp_is_the_derivative_along_a_direction(network):
    tokens = random_tokens(network)
    weights = learned(network)
    direction = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    direction["unembed.W_U"].fill_(1.0)

    def loss(w):
        return loss_of(network, w, tokens)

    _, derivative = jvp(loss, (weights,), (direction,))
    expected = grad(loss)(weights)["unembed.W_U"].sum()
    torch.testing.assert_close(derivative, expected)
