"""docs: what a step of training with bridges costs, beside a dense forward and a sparse step.

Ratios of the shortest times of each, all sides taking turns in one process.
"""

import torch

import tl_sparse
from benchmarks.test_training_step import Timed, batch, trainer
from tl_sparse.bridges.config import BridgeConfig
from tl_sparse.bridges.objective import BridgeObjective
from tl_sparse.checkpoints.loading import create
from tl_sparse.hooks import frozen
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.trainer import Trainer

TURNS = 8


def bridge_trainer(dense, sites_per_step):
    config = BridgeConfig.fitting(dense, TrainConfig(), sites_per_step=sites_per_step)
    objective = BridgeObjective(dense, config)
    model = create(config.train.model, seed=0, device="cpu").train()
    return Trainer(model, config.train, objective=objective)


def whole_pass_back(model, tokens):
    """A forward and a backward pass to the embedding, as each hybrid takes that starts there."""
    stream = model(tokens, stop_at_layer=0).detach().requires_grad_()
    model(stream, start_at_layer=0, tokens=tokens).logsumexp(-1).mean().backward()


def test_bridge_step():
    dense = tl_sparse.load("tiny-python-dense", device="cpu")
    sites = {n: bridge_trainer(dense, n) for n in (1, 2, 0)}
    model = sites[0].model
    plain = trainer(model.sparse_cfg)
    tokens = batch(model.sparse_cfg)
    timed = {n: Timed(each.step) for n, each in sites.items()}
    step, forward = Timed(plain.step), Timed(torch.no_grad()(dense))
    sparse_pass, dense_pass = Timed(whole_pass_back), Timed(whole_pass_back)
    with frozen(dense):
        for _ in range(TURNS):
            step(tokens)
            forward(tokens)
            sparse_pass(model, tokens)
            dense_pass(dense, tokens)
            for each in timed.values():
                each(tokens)
    n_sites = 2 * dense.cfg.n_layers + 1
    base = step.ms + forward.ms
    published = base + n_sites * (sparse_pass.ms + dense_pass.ms)
    for n, each in timed.items():
        print(
            f"bridge step with {n or n_sites} of {n_sites} sites: {each.ms / base:.2f} times a "
            f"sparse step and a dense forward; with all passes from the embedding, "
            f"{published / base:.2f} times"
        )
    assert timed[0].ms < published
    assert timed[1].ms < timed[2].ms < timed[0].ms
