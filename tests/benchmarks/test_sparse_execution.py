"""docs: what a network gains when its weights multiply by their nonzero entries alone, as ratios.

Ratios of the shortest times of each, all sides taking turns in one process: these machines are
noisy.
"""

import time

import pytest
import torch

import tl_sparse
from benchmarks.plain import PlainTransformer, copy_weights, topk_by_torch
from benchmarks.test_gate_step import plain_and_gated
from tl_sparse.checkpoints.loading import create
from tl_sparse.hooks import NodeGates, weight_groups
from tl_sparse.hooks.activations import abs_topk
from tl_sparse.hooks.points import frozen
from tl_sparse.network import layers
from tl_sparse.network.config import SparseConfig, paper_topk
from tl_sparse.network.products import Product
from tl_sparse.pruning.means import corpus_means
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.trainer import Trainer

#: At d_model 2048 and 8 layers: 415 million parameters with these sizes.
WIDTHS = {256: 16, 1024: 8, 2048: 8}  # d_model: batch
AT_LEAST = {(2048, 100): 5, (2048, 1000): 8}  # (d_model, 1 / density): times as fast as plain torch


def architecture(d_model, n_layers):
    return SparseConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=d_model // 16,
        d_head=16,
        d_mlp=4 * d_model,
        d_vocab=2048,
        n_ctx=256,
        abs_topk=paper_topk(0.25),
        attn_sinks=True,
        bigram_table=True,
    )


def network(d_model, density, n_layers=8):
    """Random weights of which each matrix keeps this share."""
    model = create(architecture(d_model, n_layers), seed=0, device="cpu")
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
    plain, by_torch = (
        PlainTransformer(model.sparse_cfg, topk) for topk in (abs_topk, topk_by_torch)
    )
    copy_weights(plain, model), copy_weights(by_torch, model)
    tokens = torch.randint(2048, (WIDTHS[d_model], 256), generator=torch.Generator().manual_seed(0))
    programs = {"ours": model, "plain": plain, "plain, torch.topk": by_torch}
    took = best_times(
        {name: lambda run=run: run(tokens) for name, run in programs.items()},
        3 if d_model < 2048 else 1,
    )
    ratio = took["plain, torch.topk"] / took["ours"]
    print(
        f"forward, d_model {d_model}, 1/{one_in}: {tokens.numel() / took['ours']:,.0f} tokens/s, "
        f"{ratio:.1f} times plain torch with torch.topk, "
        f"{took['plain'] / took['ours']:.1f} times plain torch with our AbsTopK"
    )
    assert ratio >= AT_LEAST.get((d_model, one_in), 1)


def test_growth():
    """How the times of a step and of a forward grow with the nonzero weights and the width."""
    tokens = torch.randint(2048, (8, 256), generator=torch.Generator().manual_seed(0))
    series = {
        "d_model 1024, nonzero weights x 1, 4, 16, 64": [
            (1024, 1 / one_in) for one_in in (1024, 256, 64, 16)
        ],
        "fixed nonzero weights, d_model x 1, 2, 4": [(256, 1 / 16), (512, 1 / 64), (1024, 1 / 256)],
    }
    largest = {}
    for title, points in series.items():
        for kernels in ("auto", "dense"):
            took = [step_and_forward(*point, kernels, tokens) for point in points]
            largest[title, kernels] = took[-1][1] / took[0][1]
            for kind, seconds in zip(("step", "forward"), zip(*took, strict=True), strict=True):
                growth = ", ".join(f"{one / seconds[0]:.2f}" for one in seconds)
                print(f"{title}: {kind}, {kernels}, takes {growth} ({1e3 * seconds[0]:.0f} ms)")
    assert largest[title, "auto"] < 6 < largest[title, "dense"]  # four times the width


def step_and_forward(d_model, density, kernels, tokens):
    """Shortest times of each at four layers."""
    trainer = annealed_trainer(d_model, density, n_layers=4)
    use(trainer.model, kernels)
    forward = torch.no_grad()(lambda: trainer.model(tokens))
    return list(best_times({"step": lambda: trainer.step(tokens), "forward": forward}, 3).values())


def annealed_trainer(d_model, density, n_layers=8):
    """Training with this share of the weights left."""
    config = TrainConfig(
        model=network(d_model, density, n_layers).sparse_cfg,
        l0_fraction=density,
        l0_fraction_embed=max(density, 1 / 16),
        anneal_start=0.0,
        anneal_stop=0.0,
        batch_size=8,
        min_nonzero=1,
    )
    trainer = Trainer(create(config.model, seed=0, device="cpu").train(), config)
    trainer.sparsity.steps = config.steps // 4
    return trainer


def test_a_training_step_at_1024():
    tokens, runs = torch.randint(2048, (8, 256), generator=torch.Generator().manual_seed(0)), {}
    for kernels in ("auto", "dense"):
        trainer = annealed_trainer(1024, 1 / 64)
        use(trainer.model, kernels)
        runs[kernels] = lambda trainer=trainer: trainer.step(tokens)
    took = best_times(runs, 3)
    ratio = took["auto"] / took["dense"]
    print(f"training step, d_model 1024 x 8, 1/64: {ratio:.2f} of the dense kernels' time")
    assert ratio <= 0.7


def as_in_plain_torch(run):
    """`run` with AbsTopK by torch.topk; the model's products are dense already."""

    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                layers,
                "abs_topk",
                lambda x, k, inplace: topk_by_torch(x, k) if k < x.shape[-1] else x,
            )
            run()

    return patched


def compare_gate_steps(name, runs, turns, at_least):
    """`runs`: a gate step by our kernels ("auto") and by dense ones."""
    took = best_times(runs | {"torch": as_in_plain_torch(runs["dense"])}, turns)
    ratio = took["torch"] / took["auto"]
    print(
        f"gate step, {name}: {1e3 * took['auto']:.0f} ms, "
        f"{ratio:.2f} times as fast as plain torch with torch.topk, "
        f"{took['dense'] / took['auto']:.2f} times as dense products with our AbsTopK"
    )
    assert ratio >= at_least


def test_a_gate_step_of_the_bundled_model():
    runs = {}
    for kernels in ("auto", "dense"):
        model = tl_sparse.load("tiny-python-sparse", device="cpu", kernels=kernels)
        _, runs[kernels] = plain_and_gated(model, n_pairs=64)
    compare_gate_steps("tiny-python-sparse, 64 pairs", runs, turns=30, at_least=1.5)


def test_a_gate_step_at_2048():
    model = network(2048, 1 / 100)
    tokens = torch.randint(2048, (8, 256), generator=torch.Generator().manual_seed(0))
    means = {
        name: mean
        for name, mean in corpus_means(model, tokens).items()
        if not name.endswith("hook_z")
    }
    gates = NodeGates(means, init_bias=0.5, init_scale=0.5, seed=0)

    def step(kernels):
        use(model, kernels)
        with frozen(model):
            with gates.attached(model):
                loss = model(tokens, return_type="loss")
            (loss + 1e-3 * gates.expected_size()).backward()

    runs = {kernels: lambda kernels=kernels: step(kernels) for kernels in ("auto", "dense")}
    compare_gate_steps("d_model 2048 x 8, 1/100", runs, turns=1, at_least=4)
