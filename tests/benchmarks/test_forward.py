"""docs: a face takes at most 1.10 times the time of the same network in plain torch without
hooks.

Ratios of the shortest times of each, all sides taking turns in one process: these machines are
noisy.
"""

import time

import pytest
import torch

from benchmarks.plain import PlainTransformer, copy_weights, topk_by_torch
from tl_sparse.checkpoints.loading import create
from tl_sparse.faces.line import transformer_lens_line
from tl_sparse.hooks import abs_topk
from tl_sparse.network.config import SparseConfig, paper_topk

SIZES = {  # name: sizes, tokens [batch, pos], turns
    "laptop": (dict(n_layers=2, d_model=128, n_heads=8, d_mlp=512), (16, 128), 25),
    "256": (dict(n_layers=4, d_model=256, n_heads=16, d_mlp=1024), (16, 256), 11),
    "2048": (dict(n_layers=1, d_model=2048, n_heads=128, d_mlp=8192), (16, 256), 3),
}
FEATURES = {
    "dense": dict(),
    "sparse": dict(abs_topk=paper_topk(0.25)),
    "sparse, sinks": dict(abs_topk=paper_topk(0.25), attn_sinks=True),
}


def seconds(step, model, tokens):
    start = time.perf_counter()
    step(model, tokens)
    return time.perf_counter() - start


def forward(model, tokens):
    with torch.no_grad():
        model(tokens)


def forward_and_backward(model, tokens):
    model.zero_grad(set_to_none=True)
    model(tokens).logsumexp(-1).mean().backward()


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("size", SIZES)
def test_a_face_costs_no_more_than_a_tenth(size, features):
    sizes, shape, turns = SIZES[size]
    cfg = SparseConfig(
        **sizes, d_head=16, d_vocab=2048, n_ctx=256, bigram_table=True, **FEATURES[features]
    )
    face = create(cfg, seed=0, device="cpu")
    plain = PlainTransformer(cfg, abs_topk)
    copy_weights(plain, face)
    tokens = torch.randint(cfg.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    # In float64, where rounding does not decide which entries AbsTopK keeps.
    torch.testing.assert_close(
        face.double()(tokens[:1]), plain.double()(tokens[:1]), rtol=0, atol=1e-8
    )
    face.float(), plain.float()
    by_torch = PlainTransformer(cfg, topk_by_torch)
    by_torch.load_state_dict(plain.state_dict())
    for step in (forward, forward_and_backward):
        times = {name: [] for name in ("face", "plain", "plain, torch.topk")}
        for turn in range(turns + 1):
            for name, model in zip(times, (face, plain, by_torch), strict=True):
                took = seconds(step, model, tokens)
                if turn:  # the first one warms up
                    times[name].append(took)
        best = {name: min(values) for name, values in times.items()}
        ratio = best["face"] / best["plain"]
        print(
            f"TransformerLens {transformer_lens_line()}, {size}, {features}, {step.__name__}: "
            f"face {best['face'] * 1e3:.0f} ms, {ratio:.2f} of plain torch, "
            f"{best['face'] / best['plain, torch.topk']:.2f} of plain torch with torch.topk"
        )
        assert ratio <= 1.10
