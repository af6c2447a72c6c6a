"""Compiled AbsTopK and weight top-k against NumPy and torch, and without numba."""

import subprocess
import sys
import textwrap
import threading
import types
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tl_sparse
from helpers import needs_numba
from tl_sparse.hooks import WeightSparsity, abs_topk, activations, selection, weight_groups
from tl_sparse.kernels import dispatch as kernels
from tl_sparse.network.config import SparseConfig, paper_topk

pytestmark = pytest.mark.any_line

EXAMPLES = settings(max_examples=100)
INF, NAN = float("inf"), float("nan")
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0,
    INF,
    -INF,
    NAN,
    -NAN,
    5e-324,
    1e-45,
    -1e-45,
    1e-38,
    3e38,
    1 + 2**-23,
    -1 - 2**-23,
]
dtypes = st.sampled_from([torch.float32, torch.float64])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def without_kernels(function, *arguments):
    """What the function returns where numba is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (activations, selection):
            patch.setattr(module, "kernel", lambda name, x: None)
        return function(*arguments)


def same(a, b):
    """Equal, also in the sign of zeros and in where NaN is."""
    return (
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        and signs(a, b)
    )


def signs(a, b):
    return torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


@st.composite
def matrices(draw, max_rows=6):
    """Random numbers of all sizes, with ties and special values; also not contiguous."""
    rows, columns, dtype = draw(st.integers(1, max_rows)), draw(st.integers(2, 40)), draw(dtypes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(2 * rows, 2 * columns, dtype=torch.float64, generator=generator)
    x = (x * 10.0 ** draw(st.integers(-45, 30))).to(dtype)
    kind = draw(st.sampled_from(["random", "rounded", "special", "mixed", "constant"]))
    if kind == "rounded":  # ties everywhere
        x = torch.randint(-3, 4, x.shape, generator=generator).to(dtype)
    elif kind in ("special", "mixed"):
        chosen = torch.tensor(
            draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=8)), dtype=dtype
        )
        some = chosen[torch.randint(len(chosen), x.shape, generator=generator)]
        x = (
            some
            if kind == "special"
            else torch.where(torch.rand(x.shape, generator=generator) < 0.3, some, x)
        )
    elif kind == "constant":
        x = torch.full_like(x, draw(st.sampled_from(SPECIAL)))
    layout = draw(st.sampled_from(["contiguous", "slice", "steps", "transposed", "expanded"]))
    if layout == "transposed":
        return x[:columns, :rows].T if x.shape[0] >= columns else x.T[:columns, :rows].T
    if layout == "expanded":
        return x[:1, :columns].expand(rows, columns)
    x = x[::2, ::2] if layout == "steps" else x[:rows, :columns]
    return x.contiguous() if layout == "contiguous" else x


def value_and_gradient(x, k):
    x = x.detach().requires_grad_()
    out = abs_topk(x, k)
    (gradient,) = torch.autograd.grad(
        out, x, torch.arange(1.0, 1 + out.numel()).view(out.shape).to(x)
    )
    return out.detach(), gradient


@needs_numba
@EXAMPLES
@given(matrices(), st.floats(0, 1))
@example(torch.tensor([[NAN, 1.0, -NAN, INF, 0.0]]), 0.5)  # two are NaN: they are the largest
@example(torch.tensor([[NAN, 1.0, -NAN, INF, 0.0]]), 0.0)  # a tie between NaN
@example(torch.tensor([[NAN, 0.0, 0.0]]), 1.0)  # as many equal ones below NaN as are kept
def test_abs_topk_and_its_gradient_are_those_without_kernels(x, share):
    k = 1 + int(share * (x.shape[1] - 2))
    out, gradient = value_and_gradient(x, k)
    expected, expected_gradient = without_kernels(value_and_gradient, x, k)
    dropped = ~x.isfinite() & (
        out == 0
    )  # one more than fits: without kernels it is multiplied by 0
    assert same(out, torch.where(dropped, out, expected))
    assert same(gradient, expected_gradient)


@needs_numba
@every_dtype
@pytest.mark.parametrize(
    "shape", [(9,), (1, 9), (0, 9), (63, 33), (64, 2), (65, 257), (3, 50, 128), (2, 3, 4, 1000)]
)
def test_all_shapes(shape, dtype):
    """Also rows that do not fill the last byte of a mask, and more entries than a vector has."""
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for k in {1, shape[-1] // 4, shape[-1] - 1} - {0}:
        out, gradient = value_and_gradient(x, k)
        expected = without_kernels(value_and_gradient, x, k)
        assert same(out, expected[0])
        assert same(gradient, expected[1])
        assert (out.count_nonzero(-1) == k).all()


@needs_numba
def test_an_activation_that_is_zero_in_most_places():
    """Which zeros are kept decides where gradients go, also beside rows without ties."""
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).relu()
    x[::3] = torch.where(torch.arange(32) < 5, x[::3], 0.0)
    out, gradient = value_and_gradient(x, 8)
    expected = without_kernels(value_and_gradient, x, 8)
    assert same(out, expected[0])
    assert same(gradient, expected[1])
    assert (gradient.count_nonzero(-1) == 8).all()


def test_gradients_against_finite_differences_and_of_gradients():
    x = (
        (torch.randperm(40, generator=torch.Generator().manual_seed(0)).double() - 20.3)
        .view(4, 10)
        .requires_grad_()
    )
    assert torch.autograd.gradcheck(lambda x: abs_topk(x, 3), (x,))
    assert torch.autograd.gradgradcheck(lambda x: abs_topk(x, 3).pow(3), (x,))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(mode):
    with mode():
        x = torch.tensor([[3.0, -4.0, 1.0]])
        assert torch.equal(abs_topk(x, 1), torch.tensor([[0.0, -4.0, 0.0]]))


def test_what_a_hook_changes_in_place_has_the_right_gradient():
    x = torch.tensor([[1.0, -5.0, 3.0, 0.5]], requires_grad=True)
    out = abs_topk(x * 1, 2)
    out[..., 1] = 0
    (out * 2).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0, 2.0, 0.0]]


def test_a_gradient_that_is_not_contiguous():
    x = torch.tensor([[1.0, -5.0, 3.0], [4.0, 2.0, -1.0]], requires_grad=True)
    (abs_topk(x, 1).T * torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).sum().backward()
    assert x.grad.tolist() == [[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]


# Weights


def projected(x, k, minimum):
    x = x.clone(memory_format=torch.contiguous_format)
    selection.zero_all_but(x, k, minimum)
    return x


@needs_numba
@EXAMPLES
@given(matrices(), st.floats(0, 1), st.integers(0, 6))
@example(
    torch.tensor([[2.0, 2.0], [1.0, 0.5]]), 0.5, 1
)  # the second row keeps its 1, the first one of its 2
def test_the_projection_is_that_without_kernels(x, share, minimum):
    k = int(share * x.numel())
    a, b = projected(x, k, minimum), without_kernels(projected, x, k, minimum)
    assert torch.equal(a.nan_to_num(7, 8, 9), b.nan_to_num(7, 8, 9))


@needs_numba
@every_dtype
def test_training_is_that_without_kernels(dtype):
    """Every weight after every step, until most rows are at their minimum."""
    config = SparseConfig(
        n_layers=2,
        d_model=12,
        n_heads=2,
        d_head=5,
        d_mlp=16,
        d_vocab=24,
        n_ctx=10,
        positions="concatenated",
        d_pos=3,
        abs_topk=paper_topk(0.25),
    )
    tokens = torch.randint(24, (12, 4, 10), generator=torch.Generator().manual_seed(0))

    def weights_of_every_step():
        model = tl_sparse.create(config, seed=0, device="cpu", dtype=dtype)
        optimizer, seen = torch.optim.Adam(model.parameters(), lr=3e-2), []
        sparsity = WeightSparsity(model, tl_sparse.hooks.annealed(0.02, 2, 9), min_nonzero=2)
        with sparsity.attached(optimizer):
            for batch in tokens:
                optimizer.zero_grad()
                model(batch, return_type="loss").backward()
                optimizer.step()
                seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return torch.stack(seen)

    assert torch.equal(weights_of_every_step(), without_kernels(weights_of_every_step))


@needs_numba
def test_a_large_matrix_with_a_budget_for_few_beyond_the_minimum():
    x = (
        torch.randn(700, 300, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 0, 700)[:, None]
    )
    for k in (0, 2800, 2801, 5000, 100_000, x.numel() - 1, x.numel()):
        a = projected(x, k, 4)
        assert torch.equal(a, without_kernels(projected, x, k, 4))
        assert int(a.count_nonzero()) == max(k, 4 * 700)


# Where the kernels run, and where they cannot


class BrokenNumba(types.ModuleType):
    """It raises at a decoration, or at the first call of what is decorated."""

    def __init__(self, when):
        super().__init__("numba")
        self.when = when

    def njit(self, **options):
        def fail(*arguments):
            raise RuntimeError(f"cannot work {self.when}")

        return fail if self.when == "at decoration" else lambda function: fail


BROKEN = [None, BrokenNumba("at decoration"), BrokenNumba("at a call")]


@pytest.mark.parametrize("numba", BROKEN, ids=["missing", "nowhere to cache", "no compiler"])
def test_without_numba(monkeypatch, numba):
    x, model = (
        torch.randn(30, 16),
        tl_sparse.create(SparseConfig(1, 8, 2, 4, 16, 20, 6), seed=0, device="cpu"),
    )
    group = weight_groups(model)[0]
    expected = abs_topk(x, 4)
    monkeypatch.setitem(sys.modules, "numba", numba)
    for name in ("products", "topk"):
        monkeypatch.delitem(sys.modules, f"tl_sparse.kernels.{name}", raising=False)
        monkeypatch.delattr(tl_sparse.kernels, name, raising=False)
    kernels._compiled.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(abs_topk(x, 4), expected)
            group.project(0.1, min_nonzero=1)
        assert kernels._compiled() is None
        said = "numba does not work here, so everything runs in plain torch: cannot work"
        assert [str(warning.message) for warning in caught] == (
            [f"{said} {numba.when}"] if numba else []
        )
    finally:
        kernels._compiled.cache_clear()
    assert sum(int(p.count_nonzero()) for p in group.parameters) == 24


SCRIPT = """
    import multiprocessing, sys, threading, torch
    from tl_sparse.hooks import abs_topk
    x = torch.randn(2000, 64)
    expected = abs_topk(x, 16)
    results = []
    def work():
        for _ in range(20):
            results.append(torch.equal(abs_topk(x, 16), expected))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert results == [True] * 80
    def child():
        torch.set_num_threads(1)  # torch's own OpenMP would hang
        sys.exit(0 if torch.equal(abs_topk(x, 16), expected) else 1)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    print("child:", process.exitcode)
"""


@needs_numba
def test_several_threads_and_a_forked_process():
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "child: 0\n"


@needs_numba
def test_a_thread_of_its_own():
    results = []
    thread = threading.Thread(
        target=lambda: results.append(abs_topk(torch.tensor([[1.0, -2.0]]), 1).tolist())
    )
    thread.start()
    thread.join()
    assert results == [[[0.0, -2.0]]]
