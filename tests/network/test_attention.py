"""Attention with sinks: the quick ways against the definition, in value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparse.network.fused_attention import _with_sink_as_key, fused_attention

pytestmark = pytest.mark.any_line


def by_definition(q, k, v, scale, sink):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), float("-inf"))
    total = scores.exp().sum(-1, keepdim=True) + sink.exp()[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", scores.exp() / total, v)


def as_key(q, k, v, scale, sink):
    return _with_sink_as_key(*(x.transpose(1, 2) for x in (q, k, v)), scale, sink).transpose(1, 2)


def heads(batch, length, n_heads, d_head, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(batch, length, n_heads, d_head, generator=generator, dtype=torch.float64)
        for _ in range(4)
    ]
    sink = torch.randn(n_heads, generator=generator, dtype=torch.float64)
    q, k, v, grad, sink = (x.to(dtype) for x in (*made, sink))
    return [x.requires_grad_() for x in (q, k, v, sink)], grad


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99)
)
def test_value_and_gradients_are_those_of_the_definition(batch, length, n_heads, d_head, seed):
    (q, k, v, sink), grad = heads(batch, length, n_heads, d_head, seed=seed)
    expected = by_definition(q, k, v, 0.7, sink)
    of_inputs = torch.autograd.grad(expected, (q, k, v, sink), grad)
    for attention in (fused_attention, as_key):
        z = attention(q, k, v, 0.7, sink)
        torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
        for ours, by_hand in zip(
            torch.autograd.grad(z, (q, k, v, sink), grad), of_inputs, strict=True
        ):
            torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_long_sequences_in_other_dtypes(dtype, tolerance):
    (q, k, v, sink), grad = heads(2, 700, 2, 16, dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sink)]
    expected = by_definition(*exact[:3], 0.25, exact[3])
    z = fused_attention(q, k, v, 0.25, sink)
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=tolerance)
    of_exact = torch.autograd.grad(expected, exact, grad.double())
    for ours, by_hand in zip(torch.autograd.grad(z, (q, k, v, sink), grad), of_exact, strict=True):
        assert float((ours.double() - by_hand).abs().max()) < 3 * tolerance * float(
            by_hand.abs().max()
        )


@pytest.mark.parametrize("logit", [float("-inf"), -200.0, 200.0])
def test_a_sink_that_takes_nothing_or_everything(logit):
    (q, k, v, _), grad = heads(1, 5, 2, 4)
    sink = torch.full((2,), logit, dtype=torch.float64).requires_grad_()
    z = fused_attention(q, k, v, 0.5, sink)
    expected = torch.zeros_like(v) if logit > 0 else fused_attention(q, k, v, 0.5, None)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(z, (q, k, v, sink), grad)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_inputs_of_any_layout():
    (q, k, v, sink), _ = heads(2, 6, 3, 4)
    q_by_channel = q.detach().movedim(-1, 0).contiguous().movedim(0, -1)
    assert q_by_channel.stride(-1) != 1
    z = fused_attention(q_by_channel, k, v[:, :, :1].expand_as(v), 0.5, sink)
    expected = by_definition(q, k, v[:, :, :1].expand_as(v), 0.5, sink)
    torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
    assert fused_attention(q[:0], k[:0], v[:0], 0.5, sink).shape == (0, 6, 3, 4)
