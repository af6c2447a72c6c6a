"""README: the memory of each process of a sharded run, against one process that holds the model."""

import shutil

import pytest

from sharded_runs import Job, seen_by
from tl_sparse import DataConfig, SparseConfig, TrainConfig, paper_topk

MB = 1e6
#: 23 million weights, nearly all of them in six blocks.
MODEL = SparseConfig(
    n_layers=6,
    d_model=512,
    n_heads=12,
    d_head=64,
    d_mlp=2112,
    d_vocab=384,
    n_ctx=32,
    abs_topk=paper_topk(0.25),
    attn_sinks=True,
)
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(stdlib_chars=0, idiom_chars=30_000),
    steps=4,
    batch_size=6,
    anneal_start=0.0,
    anneal_stop=0.0,
)


@pytest.mark.parametrize("n_processes", [2, 3])
def test_memory_per_process(n_processes, tmp_path):
    job = Job("run", CONFIG, tmp_path / "run")
    [alone] = seen_by(1, [job], tmp_path, environment={})
    whole = memory_of(alone["run"])
    shutil.rmtree(tmp_path / "run")
    parts = [memory_of(seen["run"]) for seen in seen_by(n_processes, [job], tmp_path)]
    for name in whole:
        most = max(part[name] for part in parts)
        print(
            f"{n_processes} processes, {name}: at most {most / MB:.0f} MB in each, "
            f"{whole[name] / MB:.0f} MB in one alone ({most / whole[name]:.2f})"
        )
        assert most < whole[name]
    assert max(part["state"] for part in parts) < 1.05 * whole["state"] / n_processes


def memory_of(seen):
    """The bytes of weights, gradients and moments, and what the whole run added at its peak."""
    assert seen["error"] is None
    found = seen["bytes"]
    return {
        "state": 2 * found["weights"] + found["moments"],
        "peak": found["peak"] - found["before"],
    }
