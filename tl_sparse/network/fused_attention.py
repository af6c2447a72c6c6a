"""Causal attention that never holds its pattern in memory, with an optional sink per head."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_sparse.network.shapes import Heads

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fused_attention(
    q: Heads, k: Heads, v: Heads, scale: float, sink: Float[Tensor, " head"] | None
) -> Heads:
    """z = softmax(q · k · scale) · v, where each position attends to itself and those before it.

    A sink is one more logit in the softmax of its head. It takes a share of the pattern and adds
    nothing to z.
    """
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if sink is None:
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    elif _fits_the_cpu_kernel(q, k, v) and not torch.compiler.is_compiling():
        z = _WithSink.apply(q, k, v, scale, sink)
    else:
        z = _with_sink_as_key(q, k, v, scale, sink)
    return z.transpose(1, 2)


def _fits_the_cpu_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's fused attention on the CPU accepts these inputs without a copy."""
    for x in (q, k, v):
        if x.device.type != "cpu" or x.dtype != q.dtype:
            return False
        if x.stride(-1) != 1 or x.numel() == 0:
            return False
    return True


class _WithSink(torch.autograd.Function):
    """Attention with a sink, computed by torch's fused attention, which has none.

    The fused forward pass returns the logarithm of each softmax denominator, and the fused backward
    pass takes it as input. With the sink added to the denominator in between, the value and the
    gradients are those of attention with a sink.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sink: Tensor) -> Tensor:
        z, log_total = _fused(q, k, v, is_causal=True, scale=scale)
        # The share of the softmax that the sink leaves: e^log_total / (e^log_total + e^sink).
        share = torch.sigmoid(log_total - sink[:, None])
        z *= share.unsqueeze(-1)
        ctx.save_for_backward(q, k, v, sink, z, log_total)
        ctx.scale = scale
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, z, log_total = ctx.saved_tensors
        log_total_with_sink = torch.logaddexp(log_total, sink[:, None])  # [batch, head, query_pos]
        grad_q, grad_k, grad_v = _fused_backward(
            grad, q, k, v, z, log_total_with_sink, 0.0, True, scale=ctx.scale
        )
        grad_sink = None
        if ctx.needs_input_grad[4]:
            pattern_of_sink = (sink[:, None] - log_total_with_sink).exp_()
            grad_sink = -((grad * z).sum(-1) * pattern_of_sink).sum((0, 2))
        return grad_q, grad_k, grad_v, None, grad_sink


def _with_sink_as_key(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: Tensor) -> Tensor:
    """Attention in which the sink is an extra key before the first token, with a value of zero.

    An extra channel that is 1 in every query gives this key the logit of the sink. An extra query
    before the first token keeps the causal mask square.
    """
    d_head = q.shape[-1]
    q = F.pad(q * scale, (0, 1, 1, 0), value=1.0)
    sink_key = F.pad(sink.view(1, -1, 1, 1), (d_head, 0)).expand(k.shape[0], -1, -1, -1)
    k = torch.cat([sink_key, F.pad(k, (0, 1))], dim=2)
    v = F.pad(v, (0, 1, 1, 0))
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return z[:, :, 1:, :d_head]
