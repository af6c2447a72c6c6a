"""Causal attention that never holds its pattern, with a sink for each head."""

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
    """z = softmax(q · k · scale, the sink among the logits) · v; each position sees itself and
    those before it.

    A sink is a logit that takes its share of the pattern and adds nothing to z.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if sink is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    direct = all(
        x.device.type == "cpu" and x.dtype == q.dtype and x.stride(-1) == 1 and x.numel() > 0
        for x in (q, k, v)
    )
    with_sink = (
        _WithSink.apply if direct and not torch.compiler.is_compiling() else _with_sink_as_key
    )
    return with_sink(q, k, v, scale, sink).transpose(1, 2)


class _WithSink(torch.autograd.Function):
    """Torch's fused attention returns the logarithm of each softmax' denominator, and its backward
    takes it. With the sink's logit added to that in between, value and gradients are those of
    attention with a sink.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sink: Tensor) -> Tensor:
        z, log_total = _fused(q, k, v, is_causal=True, scale=scale)
        z *= torch.sigmoid(log_total - sink[:, None]).unsqueeze(
            -1
        )  # e^log_total / (e^log_total + e^sink)
        ctx.save_for_backward(q, k, v, sink, z, log_total)
        ctx.scale = scale
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, z, log_total = ctx.saved_tensors
        with_sink, of_sink = (
            torch.logaddexp(log_total, sink[:, None]),
            None,
        )  # [batch, head, query_pos]
        of_q, of_k, of_v = _fused_backward(grad, q, k, v, z, with_sink, 0.0, True, scale=ctx.scale)
        if ctx.needs_input_grad[4]:
            of_sink = -((grad * z).sum(-1) * (sink[:, None] - with_sink).exp_()).sum((0, 2))
        return of_q, of_k, of_v, None, of_sink


def _with_sink_as_key(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: Tensor) -> Tensor:
    """The sink as a key of its own before the first token, with the value zero.

    Its logit reaches it through an extra channel that is 1 in every query; a query in front keeps
    the causal mask square.
    """
    d_head = q.shape[-1]
    q = F.pad(q * scale, (0, 1, 1, 0), value=1.0)
    sink = F.pad(sink.view(1, -1, 1, 1), (d_head, 0)).expand(k.shape[0], -1, -1, -1)
    k = torch.cat([sink, F.pad(k, (0, 1))], dim=2)
    v = F.pad(v, (0, 1, 1, 0))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)[:, :, 1:, :d_head]
