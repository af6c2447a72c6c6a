"""README: what a network gains when its weights multiply by their nonzero entries alone, as ratios.

Ratios of the shortest times of each, all sides taking turns in one process: these machines are noisy.
"""

import time

import pytest
import torch

import tl_sparse
from benchmarks.plain import PlainTransformer, copy_weights, topk_by_torch
from benchmarks.test_gate_step import plain_and_gated
from tl_sparse.checkpoints import create
from tl_sparse.config import SparseConfig, TrainConfig, paper_topk
from tl_sparse.hooks import weight_groups
from tl_sparse.hooks.activations import abs_topk
from tl_sparse.products import Product
from tl_sparse.training import Trainer

#: At d_model 2048 and 8 layers: 475 million parameters with these sizes.
WIDTHS = {256: 16, 1024: 8, 2048: 8}  # d_model: batch
AT_LEAST = {(2048, 100): 5, (2048, 1000): 8}  # (d_model, 1 / density): times as fast as plain torch


def network(d_model, density, n_layers=8):
    """Random weights of which each matrix keeps this share."""
    cfg = SparseConfig(
        n_layers=n_layers, d_model=d_model, n_heads=d_model // 16, d_head=16, d_mlp=4 * d_model, d_vocab=2048,
        n_ctx=256, abs_topk=paper_topk(0.25), attn_sinks=True, bigram_table=True,
    )  # fmt: skip
    model = create(cfg, seed=0, device="cpu")
    for group in weight_groups(model):
        group.project(max(density, 1 / 16) if group.embedding else density, min_nonzero=1)
    return model


def use(model, kernels):
    for module in model.modules():
        if isinstance(module, Product):
            module.kernels = kernels


def best_times(runs, turns):
    """Shortest time of each, taking turns; the first turn warms up."""
    times = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


@pytest.mark.parametrize("one_in", [16, 64, 100, 256, 1000])
@pytest.mark.parametrize("d_model", WIDTHS)
@torch.no_grad()
def test_forward_against_plain_torch(d_model, one_in):
    model = network(d_model, 1 / one_in)
    plain, by_torch = (PlainTransformer(model.sparse_cfg, topk) for topk in (abs_topk, topk_by_torch))
    copy_weights(plain, model), copy_weights(by_torch, model)
    tokens = torch.randint(2048, (WIDTHS[d_model], 256), generator=torch.Generator().manual_seed(0))
    programs = {"ours": model, "plain": plain, "plain, torch.topk": by_torch}
    took = best_times({name: lambda run=run: run(tokens) for name, run in programs.items()}, 3 if d_model < 2048 else 1)
    ratio = took["plain, torch.topk"] / took["ours"]
    print(
        f"forward, d_model {d_model}, 1/{one_in}: {tokens.numel() / took['ours']:,.0f} tokens/s, {ratio:.1f} times "
        f"plain torch with torch.topk, {took['plain'] / took['ours']:.1f} times plain torch with our AbsTopK"
    )
    assert ratio >= AT_LEAST.get((d_model, one_in), 1)


@torch.no_grad()
def test_growth_at_a_fixed_number_of_nonzero_weights():
    times, tokens = {}, torch.randint(2048, (8, 256), generator=torch.Generator().manual_seed(0))
    for d_model in (256, 512, 1024):
        model = network(d_model, (256 / d_model) ** 2 / 16, n_layers=4)
        for kernels in ("auto", "dense"):
            use(model, kernels)
            times[d_model, kernels] = best_times({"": lambda model=model: model(tokens)}, 4)[""]
    for kernels in ("auto", "dense"):
        growth = ", ".join(f"{times[d, kernels] / times[256, kernels]:.1f}" for d in (512, 1024))
        print(f"forward at a fixed number of nonzero weights, {kernels}: twice and four times the width takes {growth}")


def test_a_training_step_at_1024():
    config = TrainConfig(
        model=network(1024, 1 / 64).sparse_cfg, l0_fraction=1 / 64, l0_fraction_embed=1 / 8, anneal_start=0.0,
        anneal_stop=0.0, batch_size=8, min_nonzero=1,
    )  # fmt: skip
    tokens = torch.randint(2048, (8, 256), generator=torch.Generator().manual_seed(0))
    runs = {}
    for kernels in ("auto", "dense"):
        trainer = Trainer(create(config.model, seed=0, device="cpu").train(), config)
        trainer.sparsity.steps = config.steps // 4
        use(trainer.model, kernels)
        runs[kernels] = lambda trainer=trainer: trainer.step(tokens)
    took = best_times(runs, 2)
    print(f"training step, d_model 1024 x 8, 1/64: {took['auto'] / took['dense']:.2f} of the dense kernels' time")


def test_a_gate_step_of_the_bundled_model():
    runs = {}
    for kernels in ("auto", "dense"):
        model = tl_sparse.load("tiny-python-sparse", device="cpu", kernels=kernels)
        _, runs[kernels] = plain_and_gated(model, n_pairs=64)
    took = best_times(runs, 30)
    print(f"gate step, tiny-python-sparse, 64 pairs: {took['dense'] / took['auto']:.2f} times as fast as dense")
