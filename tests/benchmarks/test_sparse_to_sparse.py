"""docs: what a step takes that trains the nonzero weights alone, against the dense network's.

Ratios of the shortest times of each, all sides taking turns in one process: these machines are
noisy. The dense network has neither AbsTopK nor a weight top-k, and multiplies densely.
"""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from benchmarks.test_sparse_execution import architecture
from benchmarks.test_training_step import Timed
from tl_sparse.checkpoints.loading import create
from tl_sparse.network.products import Product
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.presets import RECIPES
from tl_sparse.training.trainer import Trainer

INTERVAL = RECIPES["sparse"]["dense_gradient_steps"]
TURNS = 3


@dataclass(frozen=True)
class Size:
    """A model, the share of its weights that is nonzero, and the size of its batches.

    Attributes:
        at_most: the largest ratio of a step, on average over an interval, to a dense one.
    """

    d_model: int
    n_layers: int
    fraction: float
    batch: int
    at_most: float


SIZES = [Size(1024, 8, 1 / 64, 8, 0.3), Size(2048, 2, 1 / 256, 8, 0.2)]


def trainer(model, fraction, interval):
    """A training whose fractions are final from the first step on."""
    config = TrainConfig(
        model=model,
        l0_fraction=fraction,
        l0_fraction_embed=max(fraction, 1 / 16),
        min_nonzero=1,
        anneal_start=0.0,
        anneal_stop=0.0,
        dense_gradient_steps=interval,
    )
    made = Trainer(create(model, seed=0, device="cpu").train(), config)
    made.sparsity.steps = 8 * INTERVAL
    return made


def dense_trainer(model):
    made = trainer(dataclasses.replace(model, abs_topk={}), 0.5, 1)
    made.sparsity.groups = []
    for module in made.model.modules():
        if isinstance(module, Product):
            module.kernels = "dense"
    return made


def batch(size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2048, (size, 256), generator=generator)


@dataclass(frozen=True)
class Times:
    """The shortest milliseconds of steps.

    Attributes:
        plain: of the dense network.
        dense_gradient: of every `INTERVAL`-th step.
        next: of the step after it, which finds the nonzero weights.
        between: of the other steps.
    """

    plain: float
    dense_gradient: float
    next: float
    between: float

    @property
    def mean(self):
        return (self.dense_gradient + self.next + (INTERVAL - 2) * self.between) / INTERVAL


def measured(model, fraction, tokens):
    made = trainer(model, fraction, INTERVAL)
    plain = Timed(dense_trainer(model).step)
    dense_gradient, next_to_it, between = (Timed(made.step) for _ in range(3))
    for _ in range(1 + TURNS):
        plain(tokens)
        made.sparsity.steps = 8 * INTERVAL
        dense_gradient(tokens)
        next_to_it(tokens)
        between(tokens)
    return Times(plain.ms, dense_gradient.ms, next_to_it.ms, between.ms)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size.d_model))
def test_a_step_against_a_dense_one(size):
    model = architecture(size.d_model, size.n_layers)
    took = measured(model, size.fraction, batch(size.batch))
    ratio = took.mean / took.plain
    print(f"\nd_model {size.d_model} x {size.n_layers}, 1/{1 / size.fraction:.0f}, K = {INTERVAL}:")
    print(f"  dense network {took.plain:.0f} ms; shares of it:")
    print(f"  step {ratio:.3f} (at most {size.at_most})")
    print(f"  between dense gradients {took.between / took.plain:.3f}")
    print(f"  with a dense gradient {took.dense_gradient / took.plain:.3f}")
    assert ratio <= size.at_most


def test_growth_with_the_width_at_as_many_nonzero_weights():
    tokens = batch(8)
    took = []
    for d_model, fraction in ((512, 1 / 16), (1024, 1 / 64), (2048, 1 / 256)):
        took.append(measured(architecture(d_model, 2), fraction, tokens))
    for name in ("mean", "between", "dense_gradient", "plain"):
        milliseconds = [getattr(each, name) for each in took]
        growth = ", ".join(f"x {b / a:.2f}" for a, b in pairwise(milliseconds))
        print(f"\n512, 1024, 2048 x 2 layers, {name}: {milliseconds[0]:.0f} ms, {growth}")
    assert all(b.mean / a.mean <= 2.5 for a, b in pairwise(took))
