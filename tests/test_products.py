"""Products by the nonzero weights alone: those of the dense network, to rounding, whatever is done to the weights."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparse
from helpers import full_config, random_tokens, sparse_configs, tiny_config, tiny_model
from tl_sparse import kernels, products
from tl_sparse.errors import ConfigError
from tl_sparse.products import Product

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
needs_numba = pytest.mark.skipif(kernels._compiled() is None, reason="numba is not installed")


def sparse_matrix(d_in, d_out, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(d_in, d_out, generator=generator) < density
    return torch.randn(d_in, d_out, generator=generator, dtype=torch.float64).to(dtype) * kept


def all_sparse(model, mode="sparse"):
    for module in model.modules():
        if isinstance(module, Product):
            module.kernels = mode
    return model


def entries(product):
    return product._entries


def close(a, b, dtype):
    a, b = a.detach(), b.detach()
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * max([1.0, *b.abs().flatten().tolist()]))


@needs_numba
@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_value_and_gradients_are_those_of_the_dense_product(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    n, d_in, d_out = (data.draw(st.integers(low, 70)) for low in (32, 1, 1))
    W = sparse_matrix(d_in, d_out, data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])), dtype)
    x, bias = torch.randn(2 * n, 2, d_in, dtype=dtype)[::2], torch.randn(d_out, dtype=dtype)  # not contiguous
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 3)))
        found = []
        for mode in ("sparse", "dense"):
            product, inputs = Product(), [t.clone().requires_grad_() for t in (x, W, bias)]
            product.kernels = mode
            out = product(inputs[0], [inputs[1]], lambda weight=inputs[1]: weight, inputs[2])
            gradients = torch.autograd.grad(out.square().sum(), inputs)
            found.append([out, *gradients])
    finally:
        torch.set_num_threads(threads)
    for ours, expected in zip(*found, strict=True):
        close(ours, expected, dtype)


@needs_numba
@settings(derandomize=True, deadline=None, max_examples=40)
@given(sparse_configs())
def test_networks_of_every_architecture(config):
    dtype = torch.float64  # in float32 rounding may make AbsTopK choose another entry
    model = tiny_model(config, dtype=dtype)
    tokens = random_tokens(model, batch=32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= sparse_matrix(weight.numel(), 1, 0.3, dtype).ne(0).view_as(weight)
    logits = {}
    for mode in ("dense", "sparse"):
        loss = all_sparse(model, mode)(tokens, return_type="loss")
        logits[mode] = model(tokens), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for ours, expected in zip(logits["sparse"], logits["dense"], strict=True):
        close(ours, expected, dtype)


@needs_numba
@pytest.mark.parametrize(
    "edit",
    [
        lambda W: W.data.mul_(2),
        lambda W: W.data.__setitem__((0, 0), W.data[0, 0] + 1),
        lambda W: W.data.copy_(W.data.flip(1)),
        lambda W: W.detach().numpy().__setitem__((0, 0), 5.0),
        lambda W: setattr(W, "data", torch.ones_like(W)),
    ],
    ids=["data", "one entry", "a permutation", "numpy", "other memory"],
)
def test_a_change_of_the_weights_is_noticed(edit):
    W, x, product = torch.nn.Parameter(sparse_matrix(40, 30, 0.1)), torch.randn(64, 40), Product()
    product.kernels = "sparse"
    with torch.no_grad():
        product(x, [W], lambda: W, torch.zeros(30))
        assert entries(product) is not None
        edit(W)
        torch.testing.assert_close(product(x, [W], lambda: W, torch.zeros(30)), x @ W, rtol=1e-5, atol=1e-5)


@needs_numba
def test_second_derivatives():
    W, x = sparse_matrix(5, 4, 0.5, torch.float64).requires_grad_(), torch.randn(32, 5, dtype=torch.float64)
    product = Product()
    product.kernels = "sparse"
    run = lambda x, W: product(x, [W], lambda: W, torch.zeros(4, dtype=torch.float64)).sin()  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x.requires_grad_(), W))


@needs_numba
def test_auto_takes_the_nonzero_entries_where_they_are_few():
    x = torch.randn(512, 512)
    for density, sparse in ((0.01, True), (0.05, True), (0.5, False), (1.0, False)):
        product, W = Product(), sparse_matrix(512, 512, density)
        torch.testing.assert_close(product(x, [W], lambda W=W: W, torch.zeros(512)), x @ W, rtol=1e-5, atol=1e-4)
        assert (entries(product) is not None) == sparse, density
    few, W = Product(), sparse_matrix(256, 256, 0.01)
    few(x[:64, :256], [W], lambda: W, torch.zeros(256))
    assert entries(few) is None  # so little is done sooner than begun
    small, W = Product(), sparse_matrix(32, 32, 0.01)
    small(x[:, :32], [W], lambda: W, torch.zeros(32))
    assert entries(small) is None


@needs_numba
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_few_tokens_and_matrices_of_nothing_but_zeros(n, density):
    W, x, product = sparse_matrix(20, 17, density), torch.randn(n, 3, 20), Product()
    product.kernels = "sparse"
    torch.testing.assert_close(product(x, [W], lambda: W, torch.ones(17)), F.linear(x, W.T, torch.ones(17)))


@needs_numba
def test_what_can_be_done_with_a_model_stays_possible(tmp_path):
    model = all_sparse(tiny_model(full_config(), seed=1))
    tokens = random_tokens(model, batch=32)
    expected, names = model(tokens), set(model.state_dict())
    assert not any("times" in name for name in names)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0].mlp.W_in.zero_()
    assert not torch.equal(model(tokens), expected)
    torch.testing.assert_close(twin(tokens), expected)
    torch.testing.assert_close(twin.to(torch.float64)(tokens).float(), expected, rtol=1e-4, atol=1e-5)
    assert twin.to(torch.bfloat16)(tokens).dtype == torch.bfloat16  # dense: numba has no bfloat16
    buffer = io.BytesIO()
    torch.save(model.network.state_dict(), buffer)
    model.save_pretrained(tmp_path / "saved")
    reopened = tl_sparse.load(tmp_path / "saved", device="cpu", kernels="sparse")
    torch.testing.assert_close(reopened(tokens), model(tokens), rtol=1e-5, atol=1e-6)


def test_kernels_is_one_of_three(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    for kernels_ in ("dense", "sparse", "auto"):
        model = tl_sparse.load(tmp_path / "model", device="cpu", kernels=kernels_)
        assert {m.kernels for m in model.modules() if isinstance(m, Product)} == {kernels_}
    with pytest.warns(UserWarning, match=r"kernels = 'sparse' needs numba .* in torch.bfloat16, products are dense"):
        tl_sparse.load(tmp_path / "model", device="cpu", kernels="sparse", dtype="bfloat16")
    with pytest.raises(ConfigError, match="kernels = 'fast' is not possible; it must be one of auto, dense, sparse"):
        tl_sparse.load(tmp_path / "model", kernels="fast")


def test_without_numba_all_is_dense(monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda: None)
    model = tiny_model(full_config())
    tokens = random_tokens(model, batch=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(all_sparse(model)(tokens), all_sparse(model, "dense")(tokens))
    assert all(entries(m) is None for m in model.modules() if isinstance(m, Product))


@pytest.mark.parametrize("act_fn", ["gelu", "relu"])
def test_a_nonlinearity_in_place_is_not_seen(act_fn):
    model = tiny_model(tiny_config(act_fn=act_fn)).requires_grad_(False)
    tokens = random_tokens(model)
    plain, cached = model(tokens), model.run_with_cache(tokens, names_filter=lambda name: ".mlp." in name)
    torch.testing.assert_close(cached[0], plain, rtol=0, atol=0)
    pre, post = (cached[1][f"blocks.0.mlp.hook_{name}"] for name in ("pre", "post"))
    torch.testing.assert_close(getattr(F, act_fn)(pre), post, rtol=0, atol=0)
    assert bool((pre < 0).any())
    assert pickle.loads(pickle.dumps(model.network.blocks[0].mlp)).act_fn == act_fn


@needs_numba
def test_both_sides_know_how_large_a_tile_is():
    assert kernels.products.TILE == products.TILE
