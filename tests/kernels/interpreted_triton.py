"""The Triton kernels against plain torch and against numba, interpreted on the CPU.

`test_triton.py` runs this file in a process of its own, since Triton decides when it defines a
kernel whether it interprets it. A row takes the interpreter 15 ms, whatever its length.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tl_sparse.hooks import WeightSparsity, abs_topk, selection
from tl_sparse.kernels import gpu, launch, triton_in_use

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, -NAN, 1e-45, -6e-8, 1 + 2**-23]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def small():
    """Small matrices and short rows go to Triton, and matrices have several segments of blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "MIN_COLUMNS", 1)
        patch.setattr(gpu, "MIN_WEIGHTS", 1)
        patch.setattr(launch, "BLOCK", 64)
        patch.setattr(launch, "PROGRAMS", 3)
        yield


def without_triton(function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.TRITON, "why_not", "switched off by a test")
        return function(*arguments)


def same(a, b):
    """Equal, also in the sign of zeros and in where NaN is."""
    values = torch.equal(a.nan_to_num(7, 8, 9), b.nan_to_num(7, 8, 9))
    is_number = ~a.isnan()
    return values and torch.equal(a.signbit() & is_number, b.signbit() & is_number)


@st.composite
def matrices(draw, max_rows=3):
    """Random numbers, with ties and special values, of any dtype; also not contiguous."""
    n_rows, n_columns = draw(st.integers(1, max_rows)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (n_rows, 2 * n_columns)
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-6, 3))
    kind = draw(st.sampled_from(["random", "rounded", "special", "mixed"]))
    if kind == "rounded":  # ties everywhere
        x = torch.randint(-3, 4, shape, generator=generator).float()
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    if kind == "special":
        x = special
    if kind == "mixed":
        x = torch.where(torch.rand(shape, generator=generator) < 0.2, special, x)
    x = x.to(draw(st.sampled_from(DTYPES)))
    return x[:, ::2] if draw(st.booleans()) else x[:, :n_columns].contiguous()


def first_largest(x, k):
    """Which entries of a vector are the `k` largest; of equal ones, the first. NaN is largest."""
    order = x.abs().sort(descending=True, stable=True).indices
    return torch.zeros(len(x), dtype=torch.bool).index_fill(0, order[:k], True)


def is_tied(x, k):
    """Whether equal magnitudes decide which `k` entries of a vector are kept."""
    if not 0 < k < len(x):
        return False
    ordered = x.abs().nan_to_num(INF, INF).sort(descending=True).values
    return bool(ordered[k - 1] == ordered[k])


def value_and_gradient(x, k):
    x = x.detach().requires_grad_()
    out = abs_topk(x, k)
    incoming = torch.arange(1.0, 1 + out.numel()).view(out.shape).to(x)
    (gradient,) = torch.autograd.grad(out, x, -incoming)
    return out.detach(), gradient


@settings(max_examples=20, deadline=None, derandomize=True)
@given(matrices(), st.floats(0, 1))
@example(torch.tensor([[NAN, 1.0, -NAN, INF, 0.0]]), 0.5)  # two are NaN: they are the largest
@example(torch.tensor([[NAN, 1.0, -NAN, INF, 0.0]]), 0.2)  # a tie between NaN
@example(torch.tensor([[0.0, -0.0, 3.0, -0.0, 0.0]]), 0.6)  # a tie between zeros
def test_abs_topk_and_its_gradient(x, share):
    k = int(share * (x.shape[1] + 1))  # also 0, and all of them
    out, gradient = value_and_gradient(x, k)
    kept = torch.stack([first_largest(row, k) for row in x])
    zeros = torch.zeros_like(x).copysign(x)
    assert same(out, torch.where(kept, x, zeros))
    incoming = -torch.arange(1.0, 1 + x.numel()).view(x.shape).to(x)
    assert same(gradient, incoming * kept)
    decided = not any(is_tied(row, k) for row in x)
    if decided and x.dtype in (torch.float32, torch.float64):
        by_numba = without_triton(value_and_gradient, x, k)
        assert same(out, by_numba[0])
        assert same(gradient, by_numba[1])


@pytest.mark.parametrize("n_columns", [1024, 1025, 8192])
def test_the_columns_for_which_the_kernels_are_made(n_columns):
    x = torch.randn(2, n_columns, generator=torch.Generator().manual_seed(0))
    out, gradient = value_and_gradient(x, n_columns // 4)
    expected = without_triton(value_and_gradient, x, n_columns // 4)
    assert same(out, expected[0])
    assert same(gradient, expected[1])


def test_a_gradient_of_infinity_is_not_hidden():
    x = torch.tensor([[1.0, -5.0, 3.0, 0.5]], requires_grad=True)
    incoming = torch.tensor([[INF, INF, -1.0, NAN]])
    (gradient,) = torch.autograd.grad(abs_topk(x, 1), x, incoming)
    assert same(gradient, torch.tensor([[NAN, INF, -0.0, NAN]]))


def test_second_derivatives():
    x = torch.tensor([[3.0, -2.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(abs_topk(x, 2).pow(3).sum(), x, create_graph=True)
    assert gradient.tolist() == [[27.0, 12.0, 0.0]]
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert second.tolist() == [[18.0, -12.0, 0.0]]


def test_what_a_hook_changes_in_place_has_the_right_gradient():
    x = torch.tensor([[1.0, -5.0, 3.0, 0.5]], requires_grad=True)
    out = abs_topk(x * 1, 2)
    out[..., 1] = 0
    (out * 2).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0, 2.0, 0.0]]


def test_shapes_and_modes():
    assert abs_topk(torch.zeros(0, 9), 3).shape == (0, 9)
    x = torch.tensor([[[3.0, -4.0, 1.0]], [[0.5, 2.0, -3.0]]])
    with torch.inference_mode():
        assert abs_topk(x, 1).tolist() == [[[0.0, -4.0, 0.0]], [[0.0, 0.0, -3.0]]]
    assert abs_topk(x[0, 0], 2).tolist() == [3.0, -4.0, 0.0]


def test_compiled_models_have_no_gap():
    def run(x):
        return abs_topk(x * 2, 3) + 1

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x = torch.tensor([[1.0, -5.0, 3.0, 0.5, 2.0]], requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    assert out.tolist() == [[1.0, -9.0, 7.0, 1.0, 5.0]]
    assert x.grad.tolist() == [[0.0, 2.0, 2.0, 0.0, 2.0]]


def test_exported_models_have_no_operator_of_ours():
    class Model(torch.nn.Module):
        def forward(self, x):
            return abs_topk(x, 1)

    exported = torch.export.export(Model(), (torch.tensor([[3.0, -4.0, 1.0]]),))
    assert "tl_sparse" not in str(exported.graph)


def test_within_torch_func():
    x = torch.tensor([[3.0, -4.0, 1.0], [0.5, 2.0, -3.0]])
    expected = [[0.0, -4.0, 0.0], [0.0, 0.0, -3.0]]
    assert torch.vmap(lambda row: abs_topk(row, 1))(x).tolist() == expected
    gradient = torch.func.grad(lambda x: abs_topk(x, 1).pow(2).sum() / 2)(x)
    assert gradient.tolist() == expected


# Weights


def projected(x, k, minimum):
    x = x.clone(memory_format=torch.contiguous_format)
    selection.zero_all_but(x, k, minimum)
    return x


@settings(max_examples=8, deadline=None, derandomize=True)
@given(matrices(max_rows=5), st.floats(0, 1), st.integers(0, 4))
@example(torch.tensor([[2.0, 2.0], [1.0, 0.5]]), 0.5, 1)  # the second row keeps its 1
@example(torch.ones(3, 80), 0.5, 0)  # the first half, which ends within a segment
@example(torch.tensor([[1.0] * 9, [2.0] * 9]), 0.6, 4)  # ties within the rows and over the rows
def test_the_projection(x, share, minimum):
    k = int(share * x.numel())
    kept = torch.stack([first_largest(row, minimum) for row in x]).flatten()
    others = (~kept).nonzero()[:, 0]
    n_others = max(0, k - int(kept.sum()))
    kept[others[first_largest(x.flatten()[others], n_others)]] = True
    found = projected(x, k, minimum)
    assert same(found, x.masked_fill(~kept.view(x.shape) | (x == 0), 0.0))
    assert same(found, without_triton(projected, x, k, minimum))


def test_a_larger_projection_is_that_of_numba():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 60, generator=generator) * torch.logspace(-3, 0, 10)[:, None]
    found = projected(x, 200, 4)
    assert torch.equal(found, without_triton(projected, x, 200, 4))
    assert int(found.count_nonzero()) == 200


def test_a_training_step_is_that_without_triton():
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))

    def weights_after_a_step():
        torch.manual_seed(0)
        into, out = torch.nn.Linear(6, 12), torch.nn.Linear(12, 3)
        model = torch.nn.Sequential(into, out)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
        with WeightSparsity(model, 0.3, min_nonzero=0).attached(optimizer):
            out(abs_topk(into(x), 4)).square().sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights_after_a_step(), without_triton(weights_after_a_step))


def test_the_kernels_are_those_of_triton():
    assert triton_in_use("cpu")[0].isdigit()
    assert gpu._working(torch.device("cpu")) is launch
    assert launch.triton_rows.abs_topk.__class__.__name__ == "InterpretedFunction"
