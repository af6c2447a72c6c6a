"""The parts of the update rule, each against its definition.

The whole of the published rule is compared with its original in test_training_golden.
"""

import dataclasses

import pytest
import torch

from helpers import random_tokens, tiny_model
from tl_sparse.errors import ConfigError
from tl_sparse.hooks import annealed, weight_groups
from tl_sparse.network.config import paper_topk
from tl_sparse.network.layers import AbsTopK
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.objective import next_token_loss
from tl_sparse.training.presets import RECIPES, preset
from tl_sparse.training.trainer import Trainer

pytestmark = pytest.mark.any_line

STEPS = 10


def trainer_of(model=None, **changes):
    model = model or tiny_model(d_model=8, bigram_table=True)
    settings = dict(
        model=model.sparse_cfg,
        steps=STEPS,
        lr=0.05,
        l0_fraction=0.3,
        l0_fraction_embed=0.5,
        min_nonzero=1,
        anneal_start=0.0,
        anneal_stop=0.5,
    )
    return Trainer(model.train(), TrainConfig(**settings | changes))


def train(trainer, steps=STEPS):
    for step in range(steps):
        trainer.step(random_tokens(trainer.model, batch=3, seed=step))


def nonzero(parameter):
    return int(parameter.count_nonzero())


class PaperRecipe:
    """The paper's update rule written out, for `PAPER`: AdamW and a top-k of every matrix.

    Gradients are clipped, Q, K and V have budgets of their own, biases are sparse, and there is one
    fraction for all.
    """

    def __init__(self, weights):
        self.weights = weights
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.n_clipped = 0

    def step(self, number, grads):
        """The step with this number, from 0."""
        rms = self.clipping_rms(grads)
        fraction = 1 - 0.7 * min(1.0, max(0.0, (number - 1) / 5))
        warmup_and_decay = number / 2 if number < 2 else 1 - (number - 2) / 8
        lr = 0.3 * warmup_and_decay * (0.3 / fraction) ** 0.5  # the last factor is the sharkfin
        for name, grad in grads.items():
            self.update(name, grad / max(1.0, rms), number + 1, lr)
            if self.is_matrix(name):
                self.weights[name] = top(self.weights[name], fraction, name)

    def clipping_rms(self, grads):
        total = sum(float(grad.square().sum()) for grad in grads.values())
        rms = (total / sum(grad.numel() for grad in grads.values())) ** 0.5
        self.n_clipped += rms > 1
        return rms

    def update(self, name, grad, t, lr):
        """AdamW, which decays matrices only."""
        self.first[name] = 0.9 * self.first[name] + 0.1 * grad
        self.second[name] = 0.95 * self.second[name] + 0.05 * grad**2
        first = self.first[name] / (1 - 0.9**t)
        second = self.second[name] / (1 - 0.95**t)
        w = self.weights[name]
        if self.is_matrix(name):
            w = w * (1 - 0.1 * lr)
        self.weights[name] = w - lr * first / (second.sqrt() + 0.01)

    @staticmethod
    def is_matrix(name):
        if name in ("embed.W_E", "unembed.W_U"):
            return True
        in_a_layer = "attn" in name or "mlp" in name
        return in_a_layer and (".W_" in name or ".b_" in name)


PAPER = dict(
    steps=STEPS,
    lr=0.3,
    eps=0.01,
    l0_fraction=0.3,
    min_nonzero=1,
    anneal_start=0.1,
    anneal_stop=0.6,
    warmup_fraction=0.2,
)


def trained_parameters(model):
    """Name → parameter; a bridge's names without what TransformerLens puts into them."""
    named = model.named_parameters()
    return {name.replace("_original_component.", ""): p for name, p in named if p.requires_grad}


def test_the_recipe_of_the_paper_step_by_step():
    model = tiny_model(d_model=8, bigram_table=True)
    config = dataclasses.replace(preset("laptop", "paper"), model=model.sparse_cfg, **PAPER)
    trainer = Trainer(model.train(), config)
    parameters = trained_parameters(model)
    by_hand = PaperRecipe({name: p.detach().clone().double() for name, p in parameters.items()})
    for number in range(STEPS):
        tokens = random_tokens(model, batch=3, seed=number)
        loss = next_token_loss(model(tokens), tokens)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        by_hand.step(number, {n: g.double() for n, g in zip(parameters, grads, strict=True)})
        trainer.step(tokens)
        for name, parameter in parameters.items():
            expected = by_hand.weights[name]
            found = parameter.detach().double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=name)
            assert torch.equal(found == 0, expected == 0), name
    assert by_hand.n_clipped > 0
    assert nonzero(model.network.blocks[0].attn.W_Q) == int(0.3 * 8 * 15)


def top(w, fraction, name):
    """Keep int(fraction · entries); the largest of each neuron or channel is always among them."""
    inputs_come_first = name.endswith(("W_Q", "W_K", "W_V", "W_in"))
    rows = (w.mT if inputs_come_first else w).contiguous()
    flat = rows.view(-1, rows.shape[-1])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if ".W_" in name and "embed" not in name:
        largest = flat.abs().argmax(1)
        kept[torch.arange(len(flat)), largest] = True
    budget = int(fraction * w.numel()) - int(kept.sum())
    others = flat.abs().masked_fill(kept, -1).flatten()
    largest_first = others.argsort(descending=True)
    kept.view(-1)[largest_first[: max(0, budget)]] = True
    rows = (flat * kept).view_as(rows)
    return rows.mT.contiguous() if inputs_come_first else rows


def rms(tensors):
    return torch.cat([x.flatten() for x in tensors]).square().mean().sqrt()


def set_gradients(trainer, factor=1.0):
    """The gradients of random tokens, times a factor, as those of the trainer; and their RMS."""
    tokens = random_tokens(trainer.model, batch=3)
    loss = next_token_loss(trainer.model(tokens), tokens)
    grads = torch.autograd.grad(loss, trainer.parameters)
    for parameter, grad in zip(trainer.parameters, grads, strict=True):
        parameter.grad = factor * grad
    return factor * float(rms(grads))


def normalized_rms(trainer):
    """The RMS of the trainer's gradients after it has clipped or divided them."""
    trainer._normalize_gradients()
    return float(rms([parameter.grad for parameter in trainer.parameters]))


def test_clipping_leaves_a_gradient_below_rms_1_alone():
    trainer = trainer_of(gradient="clip")
    before = set_gradients(trainer)
    assert before < 1
    assert normalized_rms(trainer) == pytest.approx(before, rel=2e-3)


def test_dividing_gives_a_gradient_below_rms_1_an_rms_of_1():
    trainer = trainer_of(gradient="divide")
    assert set_gradients(trainer) < 1
    assert normalized_rms(trainer) == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize("gradient", ["clip", "divide"])
def test_a_large_gradient_gets_an_rms_of_1(gradient):
    trainer = trainer_of(gradient=gradient)
    assert set_gradients(trainer, factor=1e4) > 1
    assert normalized_rms(trainer) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_the_last_row_of_the_bigram_table(trained):
    trainer = trainer_of(last_bigram_row=trained)
    table = trainer.model.network.bigram.W_bigram
    before = table.detach().clone()
    train(trainer, 3)
    assert torch.equal(table[-1], before[-1]) == (not trained)
    assert not torch.equal(table[:-1], before[:-1])


def test_annealing_shapes():
    linear = annealed(1 / 16, 10, 50)
    exponential = annealed(1 / 16, 10, 50, "exponential")
    for schedule in (linear, exponential):
        assert [schedule(step) for step in (0, 10, 50, 99)] == [1, 1, 1 / 16, 1 / 16]
    assert linear(30) == pytest.approx(17 / 32)
    assert exponential(30) == pytest.approx(1 / 4)


def test_a_trainer_anneals_in_the_shape_that_is_asked_for():
    trainer = trainer_of(anneal_shape="exponential", l0_fraction=0.25)
    assert [trainer.sparsity.fraction_at(step) for step in (0, 2.5, 5)] == [1, 0.5, 0.25]


def test_sharkfin_on_and_off():
    on = trainer_of(l0_fraction=0.25)
    off = trainer_of(l0_fraction=0.25, sharkfin=False)
    assert off.lr(5) == on.lr(5) == pytest.approx(0.05 * 0.5)
    assert off.lr(0) == pytest.approx(0.05)
    assert on.lr(0) == pytest.approx(0.05 * 0.5)


def test_an_absolute_number_of_weights():
    trainer = trainer_of(l0_count=144, min_nonzero=0)
    groups = [group.parameters for group in trainer.sparsity.groups if not group.embedding]
    n_weights = sum(p.numel() for parameters in groups for p in parameters)
    assert trainer.config.model.n_matrix_weights == n_weights
    train(trainer)
    kept = sum(nonzero(p) for parameters in groups for p in parameters)
    assert 144 - len(groups) < kept <= 144  # each group rounds down


def test_fractions_of_groups():
    """The last pattern that fits counts; what no pattern fits has the fraction of all."""
    fractions = {"blocks.*.attn.*": 0.5, "blocks.0.attn.W_O": 0.2, "unembed.W_U": 1.0}
    trainer = trainer_of(l0_groups=fractions, min_nonzero=0)
    train(trainer)
    network = trainer.model.network
    attn, mlp = network.blocks[0].attn, network.blocks[0].mlp
    n_qkv = nonzero(attn.W_Q) + nonzero(attn.W_K) + nonzero(attn.W_V)
    assert n_qkv == int(0.5 * 3 * 8 * 15)
    assert nonzero(attn.W_O) == int(0.2 * 8 * 15)
    assert nonzero(mlp.W_in) == int(0.3 * 8 * 10)
    assert nonzero(network.embed.W_E) == int(0.5 * 8 * 11)
    assert nonzero(network.unembed.W_U) == 8 * 11


def test_a_fraction_of_no_group_is_refused():
    message = r"no group of weights matches 'blocks.9.\*'; the groups are blocks.0.attn"
    with pytest.raises(ConfigError, match=message):
        trainer_of(l0_groups={"blocks.9.*": 0.5})


OUTPUTS_AND_MLP = ["blocks.0.attn.W_O", "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"]
FUSED = ["blocks.0.attn.W_QKV", *OUTPUTS_AND_MLP]
APART = ["blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.0.attn.W_V", *OUTPUTS_AND_MLP]
EMBEDDINGS = ["embed.W_E", "unembed.W_U"]
BIASES = [
    "blocks.0.attn.b_Q",
    "blocks.0.attn.b_K",
    "blocks.0.attn.b_V",
    "blocks.0.attn.b_O",
    "blocks.0.mlp.b_in",
    "blocks.0.mlp.b_out",
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FUSED + EMBEDDINGS),
        ({"fused_qkv": False}, APART + EMBEDDINGS),
        ({"biases": True}, FUSED + EMBEDDINGS + BIASES),
    ],
    ids=["default", "apart", "biases"],
)
def test_what_shares_a_budget(options, expected):
    groups = weight_groups(tiny_model(), **options)
    assert {group.name for group in groups} == set(expected)


def test_annealing_abs_topk():
    """All entries until 20 % of the steps, the model's fraction from 60 %."""
    model = tiny_model(d_model=8, abs_topk=paper_topk(0.25), d_mlp=16)
    trainer = trainer_of(model, topk_anneal_start=0.2, topk_anneal_stop=0.6)
    layers = [module for module in model.network.modules() if isinstance(module, AbsTopK)]
    (neurons,) = [layer for layer in layers if layer.dim == 16]
    k_after_step, active = [], []

    def count_active(post, hook):
        active.append(int(post.ne(0).sum(-1).max()))

    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", count_active)]):
        for step in range(STEPS):
            trainer.step(random_tokens(model, batch=3, seed=step))
            k_after_step.append(neurons.k)
    assert k_after_step == active == [16, 16, 16, 13, 10, 7, 4, 4, 4, 4]
    assert {layer.k / layer.dim for layer in layers if layer.dim % 4 == 0 and layer.k} == {0.25}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_settings_of_the_same_configuration(name):
    config = preset("small", name)
    for field, value in RECIPES[name].items():
        assert getattr(config, field) == value
    assert config.steps == preset("small").steps


def test_an_unknown_recipe_is_refused():
    message = "recipe = 'papre' is not possible; it must be one of published, paper, sparse"
    with pytest.raises(ConfigError, match=message):
        preset("small", "papre")
