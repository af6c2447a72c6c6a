"""docs: what sparsity costs a training step, as ratios to the same network's dense step.

Ratios of the shortest times of each, all sides taking turns in one process: these machines are
noisy.
"""

import dataclasses
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tl_sparse.checkpoints.loading import create
from tl_sparse.network.config import SparseConfig, paper_topk
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.trainer import Trainer

LARGER = SparseConfig(
    n_layers=8,
    d_model=256,
    n_heads=16,
    d_head=16,
    d_mlp=1024,
    d_vocab=2048,
    n_ctx=256,
    abs_topk=paper_topk(0.25),
    attn_sinks=True,
    bigram_table=True,
)
MODELS = {"laptop": (TrainConfig().model, 25), "256": (LARGER, 4)}  # name: model, turns


def trainer(model, abs_topk=True, weight_topk=True):
    """In the middle of a training whose fraction is final from the first step on."""
    model = model if abs_topk else dataclasses.replace(model, abs_topk={})
    config = TrainConfig(model=model, anneal_start=0.0, anneal_stop=0.0)
    made = Trainer(create(model, seed=0, device="cpu").train(), config)
    made.sparsity.steps = config.steps // 4
    if not weight_topk:
        made.sparsity.groups = []
    return made


def batch(model):
    shape = TrainConfig().batch_size, model.n_ctx
    return torch.randint(model.d_vocab, shape, generator=torch.Generator().manual_seed(0))


class Timed:
    """A function, and the shortest time that a call of it took after the first one."""

    def __init__(self, function):
        self.function, self.times = function, []

    def __call__(self, *arguments):
        start = time.perf_counter()
        result = self.function(*arguments)
        self.times.append(time.perf_counter() - start)
        return result

    @property
    def ms(self):
        return 1e3 * min(self.times[1:])


def peak_memory(name, sparse):
    """The bytes that training takes, measured in a process of its own."""
    code = f"from benchmarks.test_training_step import *; print(added_memory({name!r}, {sparse}))"
    command = [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}; {code}"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def added_memory(name, sparse):
    model, _ = MODELS[name]
    small = dataclasses.replace(model, n_layers=1, d_vocab=32, n_ctx=8)
    trainer(small).step(batch(small))
    before = peak()
    made = trainer(model, sparse, sparse)
    for _ in range(4):
        made.step(batch(model))
    return peak() - before


def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not the same there: Linux counts what the parent had when it started this process.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_step_against_a_dense_one(name):
    model, turns = MODELS[name]
    tokens = batch(model)
    trainers = {
        "sparse": trainer(model),
        "no AbsTopK": trainer(model, abs_topk=False),
        "dense": trainer(model, abs_topk=False, weight_topk=False),
    }
    projection = trainers["sparse"].sparsity.project = Timed(trainers["sparse"].sparsity.project)
    steps = {kind: Timed(made.step) for kind, made in trainers.items()}
    forwards = {kind: Timed(torch.no_grad()(made.model)) for kind, made in trainers.items()}
    for _ in range(turns + 1):
        for functions in (steps, forwards):
            for function in functions.values():
                function(tokens)
    sparse, dense = steps["sparse"].ms, steps["dense"].ms
    ratios = {
        "step": (sparse / dense, 1.15),
        "weight top-k's share of it": (projection.ms / sparse, 0.04),
        "AbsTopK's share of it": (1 - steps["no AbsTopK"].ms / sparse, None),
        "forward": (forwards["sparse"].ms / forwards["dense"].ms, 1.2),
        "peak memory": (peak_memory(name, True) / peak_memory(name, False), 1.1),
    }
    print(
        f"\n{name}: dense step {dense:.0f} ms, "
        f"{1e3 * tokens.numel() / sparse:,.0f} tokens/s sparse; sparse / dense:"
    )
    for measure, (value, limit) in ratios.items():
        print(f"  {measure} {value:.3f}" + (f" (at most {limit})" if limit else ""))
    assert all(limit is None or value <= limit for value, limit in ratios.values())
