"""Products by the nonzero weights alone are the dense ones, whatever is done to weights."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tl_sparse
from helpers import (
    full_config,
    must_not_run,
    needs_numba,
    random_tokens,
    sparse_configs,
    tiny_config,
    tiny_model,
)
from tl_sparse.checkpoints.loading import create
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import ConfigError
from tl_sparse.hooks import abs_topk, weight_groups
from tl_sparse.kernels import dispatch as kernels
from tl_sparse.network.config import SparseConfig, paper_topk
from tl_sparse.network.products import Compressed, Product

pytestmark = pytest.mark.any_line

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def sparse_matrix(d_in, d_out, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(d_in, d_out, generator=generator) < density
    return torch.randn(d_in, d_out, generator=generator, dtype=torch.float64).to(dtype) * kept


def all_sparse(model, mode="sparse"):
    for module in model.modules():
        if isinstance(module, Product):
            module.kernels = mode
    return model


def product_of(W, kernels="auto"):
    """x → x · W + bias, with W a parameter."""
    owner = nn.Module()
    owner.W = W if isinstance(W, nn.Parameter) else nn.Parameter(W)
    product = Product(owner, ["W"])
    product.kernels = kernels
    return product


@contextmanager
def threads(n):
    """So many threads, also for work that is not worth it."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_WORTH_SHARING", 100)
        torch.set_num_threads(n)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def entries(product):
    return product._cache.entries


def close(a, b, dtype):
    a, b = a.detach(), b.detach()
    torch.testing.assert_close(
        a, b, rtol=0, atol=TOLERANCE[dtype] * max([1.0, *b.abs().flatten().tolist()])
    )


def value_and_gradients(product, mode, x, bias):
    """x · W + bias, and the gradients of the sum of its squares, in the given mode."""
    product.kernels = mode
    inputs = [x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()]
    learned = []
    for name in product.names:
        weight = getattr(product.owner, name)
        if weight.requires_grad:
            learned.append(weight if weight._base is None else weight._base)  # a tied one is a view
    out = product(*inputs)
    assert (entries(product) is not None) == (mode == "sparse")
    return [out, *torch.autograd.grad(out.square().sum(), [*inputs, *learned])]


def assert_modes_agree(product, x, bias):
    product._cache = type(product._cache)()
    dense = value_and_gradients(product, "dense", x, bias)
    sparse = value_and_gradients(product, "sparse", x, bias)
    for ours, expected in zip(sparse, dense, strict=True):
        close(ours, expected, x.dtype)


@needs_numba
@settings(max_examples=40)
@given(st.data())
def test_value_and_gradients_are_those_of_the_dense_product(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    n, d_in, d_out = (data.draw(st.integers(low, 70)) for low in (32, 1, 1))
    W = sparse_matrix(d_in, d_out, data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])), dtype)
    product = product_of(W)
    product.owner.W.requires_grad_(data.draw(st.booleans()))
    x = torch.randn(2 * n, 2, d_in, dtype=dtype)[::2]  # not contiguous
    bias = torch.randn(d_out, dtype=dtype)
    with threads(data.draw(st.integers(1, 3))):
        assert_modes_agree(product, x, bias)


def thinned(model):
    """The model with only three in ten of the weights in its matrices."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                kept = sparse_matrix(weight.numel(), 1, 0.3, weight.dtype).ne(0)
                weight *= kept.view_as(weight)
    return model


def assert_modes_agree_in(model, tokens):
    """Check each product by itself, on the input that it has in the network.

    The logits of the two modes may differ: where the residual stream nearly cancels, norms magnify
    the rounding errors of earlier products, and where two magnitudes are equal but for rounding,
    AbsTopK may choose another entry.
    """
    inputs = {}

    def remember(product, arguments, output):
        inputs[product] = arguments

    products = [module for module in model.modules() if isinstance(module, Product)]
    handles = [product.register_forward_hook(remember) for product in products]
    model(tokens)
    for handle in handles:
        handle.remove()
    assert set(inputs) == set(products)
    for product, (x, bias) in inputs.items():
        assert_modes_agree(product, x, bias)


@needs_numba
@settings(max_examples=40)
@given(sparse_configs())
def test_networks_of_every_architecture(config):
    model = thinned(tiny_model(config, dtype=torch.float64))
    assert_modes_agree_in(model, random_tokens(model, batch=32))


@needs_numba
@pytest.mark.parametrize("rest", [0.0, 1e-8])
@pytest.mark.parametrize("topk", [{}, {"resid_post_mlp": 0.5}])
def test_networks_in_which_rounding_decides(topk, rest):
    """After the first layer little is left of the stream, and all of it is of one magnitude."""
    config = tiny_config(n_layers=2, abs_topk=topk)
    model = thinned(tiny_model(config, dtype=torch.float64))
    tokens = torch.zeros(32, config.n_ctx, dtype=torch.int64)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        block = model.blocks[0]
        added = cache["blocks.0.hook_resid_mid"] + cache["blocks.0.hook_mlp_out"]
        block.mlp.b_out -= added[0, 0] - rest
    assert_modes_agree_in(model, tokens)


@needs_numba
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "none", "normalization": "rms", "norm_bias": False, "d_pos": 0},
        {"tied_unembed": True, "logits_bias": False},
    ],
)
def test_logits_and_gradients_of_whole_networks(changes):
    """Of networks in which rounding is neither magnified nor decides what AbsTopK chooses."""
    model = thinned(tiny_model(full_config(**changes), dtype=torch.float64))
    tokens = random_tokens(model, batch=32)
    found = {}
    for mode in ("dense", "sparse"):
        loss = all_sparse(model, mode)(tokens, return_type="loss")
        learned = [p for p in model.parameters() if p.requires_grad]
        found[mode] = [model(tokens), *torch.autograd.grad(loss, learned)]
    for ours, expected in zip(found["sparse"], found["dense"], strict=True):
        close(ours, expected, torch.float64)


@needs_numba
@pytest.mark.parametrize(
    "edit",
    [
        lambda W: W.data.mul_(2),
        lambda W: W.data.__setitem__((0, 0), W.data[0, 0] + 1),
        lambda W: W.data.copy_(W.data.flip(1)),
        lambda W: W.detach().numpy().__setitem__((0, 0), 5.0),
        lambda W: setattr(W, "data", torch.ones_like(W)),
        lambda W: W.neg_(),
        lambda W: W[3].neg_(),
        lambda W: W[:, 4:8].mul_(0.5),
        lambda W: W.copy_(W[torch.arange(40).roll(2)]),
        lambda W: W.__setitem__(slice(0, 2), W[[1, 0]].clone()),
    ],
    ids=[
        "data",
        "entry",
        "permutation",
        "numpy",
        "other memory",
        "sign",
        "sign of a row",
        "scale",
        "moved",
        "swap",
    ],
)
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_change_of_the_weights_is_noticed(edit, density, dtype):
    W = sparse_matrix(40, 30, density, dtype).bfloat16().to(dtype)  # many low bits are zero
    W, x = nn.Parameter(W), torch.randn(64, 40, dtype=dtype)
    product = product_of(W, "sparse")
    with torch.no_grad():
        bias = torch.zeros(30, dtype=dtype)
        product(x, bias)
        assert entries(product) is not None
        edit(W)
        torch.testing.assert_close(product(x, bias), x @ W, rtol=1e-5, atol=1e-5)


@needs_numba
def test_threads_that_share_a_model():
    W, x, bias = sparse_matrix(300, 200, 0.3), torch.randn(64, 300), torch.zeros(200)
    for _ in range(20):
        product = product_of(W, "sparse")
        with torch.no_grad(), ThreadPoolExecutor(4) as pool:
            for result in pool.map(product, [x] * 4, [bias] * 4):
                torch.testing.assert_close(result, x @ W, rtol=1e-4, atol=1e-4)


@needs_numba
@pytest.mark.parametrize("counted", [0, 3, 5000])
def test_weights_that_change_while_they_are_taken_do_no_harm(counted):
    W = sparse_matrix(30, 20, 0.3)
    taken = Compressed.empty(30, 20, counted, W)
    kernels.kernel("compress", W)(W, *taken.parts)
    there = min(counted, int(W.count_nonzero()))
    assert int(taken.starts[-1]) == int(taken.transposed.starts[-1]) == there
    assert torch.equal(
        taken.transposed.values[:there].sort().values, taken.values[:there].sort().values
    )


@needs_numba
def test_a_tied_unembedding_is_not_copied_to_be_looked_at(monkeypatch):
    embed, x, bias, free = sparse_matrix(50, 40, 0.2), torch.ones(32, 40), torch.zeros(50), []
    contiguous = torch.Tensor.contiguous
    owner = nn.Module()
    owner.W = embed.T
    product = Product(owner, ["W"])
    product.kernels = "sparse"
    first = product(x, bias)
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: free.append(x.is_contiguous()) or contiguous(x)
    )
    assert torch.equal(product(x, bias), first)
    torch.testing.assert_close(first, x @ embed.T)
    assert free
    assert all(free)


@needs_numba
def test_another_default_device_is_no_hindrance():
    W, x = sparse_matrix(40, 30, 0.2), torch.randn(64, 40)
    expected = x @ W
    product, bias = product_of(W, "sparse"), torch.zeros(30)
    with torch.device("meta"):
        torch.testing.assert_close(product(x, bias), expected, rtol=1e-5, atol=1e-5)
        assert int(abs_topk(x, 7).count_nonzero()) == 64 * 7


@needs_numba
def test_second_derivatives():
    x, bias = (torch.randn(*size, 5, dtype=torch.float64).requires_grad_() for size in ((32,), ()))
    product = product_of(sparse_matrix(5, 5, 0.5, torch.float64), "sparse")
    assert torch.autograd.gradgradcheck(
        lambda x, bias, W: product(x, bias).sin(), (x, bias, product.owner.W)
    )


@needs_numba
def test_auto_takes_the_nonzero_entries_where_they_are_few():
    x = torch.randn(512, 512)
    for density, sparse in ((0.01, True), (0.05, True), (0.5, False), (1.0, False)):
        W = sparse_matrix(512, 512, density)
        product = product_of(W)
        torch.testing.assert_close(product(x, torch.zeros(512)), x @ W, rtol=1e-5, atol=1e-4)
        assert (entries(product) is not None) == sparse, density
    few = product_of(sparse_matrix(256, 256, 0.01))
    few(x[:64, :256], torch.zeros(256))
    assert entries(few) is None  # so little is done sooner than begun
    small = product_of(sparse_matrix(32, 32, 0.01))
    small(x[:, :32], torch.zeros(32))
    assert entries(small) is None


@needs_numba
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_few_tokens_and_matrices_of_nothing_but_zeros(n, density):
    W, x = sparse_matrix(20, 17, density), torch.randn(n, 3, 20)
    out = product_of(W, "sparse")(x, torch.ones(17))
    torch.testing.assert_close(out, F.linear(x, W.T, torch.ones(17)))


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
    torch.testing.assert_close(
        twin.to(torch.float64)(tokens).float(), expected, rtol=1e-4, atol=1e-5
    )
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
    with pytest.warns(
        UserWarning,
        match=r"kernels = 'sparse' needs numba .* in torch.bfloat16, products are dense",
    ):
        tl_sparse.load(tmp_path / "model", device="cpu", kernels="sparse", dtype="bfloat16")
    with pytest.raises(
        ConfigError, match="kernels = 'fast' is not possible; it must be one of auto, dense, sparse"
    ):
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
    plain, cached = (
        model(tokens),
        model.run_with_cache(tokens, names_filter=lambda name: ".mlp." in name),
    )
    torch.testing.assert_close(cached[0], plain, rtol=0, atol=0)
    pre, post = (cached[1][f"blocks.0.mlp.hook_{name}"] for name in ("pre", "post"))
    torch.testing.assert_close(getattr(F, act_fn)(pre), post, rtol=0, atol=0)
    assert bool((pre < 0).any())
    assert pickle.loads(pickle.dumps(model.network.blocks[0].mlp)).act_fn == act_fn


def test_a_hook_point_whose_forward_is_replaced_sees_what_others_see():
    """nnsight reads activations so: the nonlinearity is not in place, the pattern is computed."""
    model = tiny_model(tiny_config()).requires_grad_(False)
    tokens = random_tokens(model)
    logits, cache = model.run_with_cache(tokens)
    seen = {}
    names = ["blocks.0.mlp.hook_pre", "blocks.0.attn.hook_pattern"]
    for name in names:

        def remember(x, name=name):
            seen[name] = x
            return x

        model.hook_dict[name].forward = remember
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-6)
    for name in names:
        torch.testing.assert_close(seen[name], cache[name], rtol=0, atol=0)


# Weights that are not there densely


@pytest.mark.parametrize(
    "numba", [pytest.param(True, marks=needs_numba), False], ids=["numba", "torch"]
)
@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_without_dense_weights_everything_is_as_with_them(tmp_path, monkeypatch, storage, numba):
    model = tiny_model(full_config())
    with torch.no_grad():
        for group in weight_groups(model):
            group.project(0.2, min_nonzero=1)
    model.save_pretrained(tmp_path / "model", dense=storage == "dense")
    if not numba:
        monkeypatch.setattr(kernels, "_compiled", lambda: None)
    model, without = (
        tl_sparse.load(tmp_path / "model", device="cpu", dense_weights=dense)
        for dense in (True, False)
    )
    names = {name for name, _ in without.named_parameters()}
    assert not [name for name in names if ".attn.W_" in name or ".mlp.W_" in name]
    for tokens in (random_tokens(model, batch=32), random_tokens(model, batch=1, length=2)):
        close(without(tokens), model(tokens), torch.float32)
        (_, ours), (_, theirs) = without.run_with_cache(tokens), model.run_with_cache(tokens)
        for name in theirs:
            close(ours[name], theirs[name], torch.float32)
    assert torch.equal(without.W_Q, model.W_Q)
    assert torch.equal(without.blocks[1].mlp.W_in, model.blocks[1].mlp.W_in)
    assert repr(without) == repr(model)
    assert fingerprint(without) == fingerprint(model)
    state = without.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    without.save_pretrained(tmp_path / "again")
    assert torch.equal(tl_sparse.load(tmp_path / "again", device="cpu")(tokens), model(tokens))
    moved = copy.deepcopy(without).to(torch.float64)
    assert moved.blocks[0].attn.W_O.dtype == moved(tokens).dtype == torch.float64


def test_dense_kernels_make_dense_products_of_compact_weights_too(tmp_path, monkeypatch):
    dense = tiny_model(full_config())
    dense.save_pretrained(tmp_path)
    model = tl_sparse.load(tmp_path, device="cpu", dense_weights=False, kernels="dense")
    stub = must_not_run("a sparse product")
    monkeypatch.setattr(Product, "_entries_of_compact_weights", stub)
    for n_tokens in (1, 64):
        tokens = random_tokens(dense, batch=n_tokens)
        assert torch.equal(model(tokens), all_sparse(dense, "dense")(tokens))


@pytest.mark.parametrize(
    "numba", [pytest.param(True, marks=needs_numba), False], ids=["numba", "torch"]
)
def test_compact_weights_can_be_set_loaded_and_moved(tmp_path, monkeypatch, numba):
    dense = tiny_model(biases=False)  # nothing else is in an MLP
    dense.save_pretrained(tmp_path / "model")
    if not numba:
        monkeypatch.setattr(kernels, "_compiled", lambda: None)
    model = tl_sparse.load(tmp_path / "model", device="cpu", dense_weights=False)
    tokens, other = random_tokens(dense, batch=32), tiny_model(biases=False, seed=1)
    close(model(tokens), dense(tokens), torch.float32)
    assert repr(model) == repr(dense)
    with torch.no_grad():
        for W_in in (2 * dense.blocks[0].mlp.W_in, nn.Parameter(3 * dense.blocks[0].mlp.W_in)):
            model.network.blocks[0].mlp.W_in = W_in
            dense.blocks[0].mlp.W_in.copy_(W_in)
            close(model(tokens), dense(tokens), torch.float32)
    model.network.load_state_dict(other.network.state_dict())
    close(model(tokens), other(tokens), torch.float32)
    state = other.network.state_dict()
    wrong = state | {"blocks.0.mlp.W_in": torch.zeros(2, 3)}
    with pytest.raises(
        RuntimeError, match=r"size mismatch for blocks.0.mlp.W_in: \[2, 3\], not \[6, 10\]"
    ):
        model.network.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.mlp\.W_in"):
        model.network.load_state_dict(
            {name: value for name, value in state.items() if name != "blocks.0.mlp.W_in"}
        )
    for module in (model, other):
        module.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model.W_in, other.W_in)
    close(model(tokens), other(tokens), torch.float32)


@needs_numba
@pytest.mark.slow
def test_415_million_weights_in_a_tenth_of_their_memory(tmp_path):
    """The memory of a model at 1/100, in a process of its own, beside that of a tiny model."""
    config = SparseConfig(
        8, 2048, 128, 16, 8192, 2048, 256, abs_topk=paper_topk(0.25), bigram_table=True
    )
    model = create(config, seed=0, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.numel() > 1_000_000 and "bigram" not in name:
                weight.view(-1)[
                    torch.rand(weight.numel()) > (1 / 16 if "embed" in name else 1 / 100)
                ] = 0.0
    n_bytes = sum(4 * p.numel() for p in model.parameters())
    assert n_bytes > 4 * 410_000_000
    model.save_pretrained(tmp_path / "large")
    tiny_model().save_pretrained(tmp_path / "tiny")
    code = """if True:
        import re, sys, torch, tl_sparse
        model = tl_sparse.load(sys.argv[1], device="cpu", dense_weights=False)
        with torch.no_grad():
            model(torch.zeros(1, min(64, model.cfg.n_ctx), dtype=torch.long))
        print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
    """
    peak = {}
    for name in ("tiny", "large"):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        peak[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak["large"] - peak["tiny"] < n_bytes / 10
