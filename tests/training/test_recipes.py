"""The parts of the update rule, each against its definition; for the whole of `published` see
test_training_golden.
"""

import dataclasses

import pytest
import torch

from helpers import random_tokens, tiny_model
from tl_sparse.errors import ConfigError
from tl_sparse.hooks import annealed, weight_groups
from tl_sparse.network.config import paper_topk
from tl_sparse.network.layers import AbsTopK
from tl_sparse.training.config import RECIPES, TrainConfig, preset
from tl_sparse.training.trainer import Trainer, next_token_loss

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


def test_the_recipe_of_the_paper_step_by_step():
    """AdamW and every top-k written out: clipped gradients, Q, K and V apart, biases sparse, one
    fraction for all.
    """
    model = tiny_model(d_model=8, bigram_table=True)
    config = dataclasses.replace(
        preset("laptop", "paper"),
        model=model.sparse_cfg,
        steps=STEPS,
        lr=0.3,
        eps=0.01,
        l0_fraction=0.3,
        min_nonzero=1,
        anneal_start=0.1,
        anneal_stop=0.6,
        warmup_fraction=0.2,
    )
    trainer = Trainer(model.train(), config)
    names = [
        name.replace("_original_component.", "")
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    weights = {
        n: p.detach().clone().double() for n, p in zip(names, trainer.parameters, strict=True)
    }
    first, second = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in "12")
    clipped = 0
    for step in range(STEPS):
        tokens = random_tokens(model, batch=3, seed=step)
        grads = torch.autograd.grad(next_token_loss(model(tokens), tokens), trainer.parameters)
        rms = (
            sum(float(g.double().square().sum()) for g in grads) / sum(g.numel() for g in grads)
        ) ** 0.5
        clipped += rms > 1
        fraction = 1 - 0.7 * min(1.0, max(0.0, (step - 1) / 5))
        lr = 0.3 * (step / 2 if step < 2 else 1 - (step - 2) / 8) * (0.3 / fraction) ** 0.5
        for name, grad in zip(names, grads, strict=True):
            grad, w, t = grad.double() / max(1.0, rms), weights[name], step + 1
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            layer = "attn" in name or "mlp" in name
            matrix = (layer and (".W_" in name or ".b_" in name)) or name in (
                "embed.W_E",
                "unembed.W_U",
            )
            w = w * (1 - 0.1 * lr) if matrix else w
            w = w - lr * (first[name] / (1 - 0.9**t)) / (
                (second[name] / (1 - 0.95**t)).sqrt() + 0.01
            )
            weights[name] = top(w, fraction, name) if matrix else w
        trainer.step(tokens)
        for name, parameter in zip(names, trainer.parameters, strict=True):
            torch.testing.assert_close(
                parameter.detach().double(), weights[name], rtol=0, atol=1e-5, msg=name
            )
            assert torch.equal(parameter == 0, weights[name] == 0), name
    assert nonzero(model.network.blocks[0].attn.W_Q) == int(0.3 * 8 * 15)


def top(w, fraction, name):
    """All but int(fraction · entries) at zero, where the largest entry of each neuron or channel
    stays.
    """
    by_row = name.endswith(("W_Q", "W_K", "W_V", "W_in"))  # inputs come first in these
    rows = (w.mT if by_row else w).contiguous()
    flat = rows.view(-1, rows.shape[-1])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if ".W_" in name and "embed" not in name:
        kept[torch.arange(len(flat)), flat.abs().argmax(1)] = True
    order = flat.abs().masked_fill(kept, -1).flatten().argsort(descending=True)
    kept.view(-1)[order[: max(0, int(fraction * w.numel()) - int(kept.sum()))]] = True
    rows = (flat * kept).view_as(rows)
    return rows.mT.contiguous() if by_row else rows


def test_clipping_and_dividing_gradients():
    """On a gradient below RMS 1 clipping changes nothing; dividing makes its RMS 1."""
    for gradient, expected in (("clip", None), ("divide", 1.0)):
        trainer = trainer_of(gradient=gradient)
        tokens = random_tokens(trainer.model, batch=3)
        grads = torch.autograd.grad(
            next_token_loss(trainer.model(tokens), tokens), trainer.parameters
        )
        before = torch.cat([g.flatten() for g in grads]).square().mean().sqrt()
        for p, g in zip(trainer.parameters, grads, strict=True):
            p.grad = g
        trainer._normalize_gradients()
        after = torch.cat([p.grad.flatten() for p in trainer.parameters]).square().mean().sqrt()
        assert before < 1
        assert float(after) == pytest.approx(expected or float(before), rel=2e-3)
        for p in trainer.parameters:
            p.grad = p.grad * 1e4
        trainer._normalize_gradients()
        after = torch.cat([p.grad.flatten() for p in trainer.parameters]).square().mean().sqrt()
        assert float(after) == pytest.approx(1.0, rel=1e-4)


def test_the_last_row_of_the_bigram_table():
    for last, moved in ((True, True), (False, False)):
        trainer = trainer_of(last_bigram_row=last)
        table = trainer.model.network.bigram.W_bigram
        before = table.detach().clone()
        train(trainer, 3)
        assert (not torch.equal(table[-1], before[-1])) == moved
        assert not torch.equal(table[:-1], before[:-1])


def test_annealing_shapes():
    linear, exponential = annealed(1 / 16, 10, 50), annealed(1 / 16, 10, 50, "exponential")
    for schedule in (linear, exponential):
        assert [schedule(step) for step in (0, 10, 50, 99)] == [1, 1, 1 / 16, 1 / 16]
    assert linear(30) == pytest.approx(17 / 32)
    assert exponential(30) == pytest.approx(1 / 4)
    trainer = trainer_of(anneal_shape="exponential", l0_fraction=0.25)
    assert [trainer.sparsity.fraction_at(step) for step in (0, 2.5, 5)] == [1, 0.5, 0.25]


def test_sharkfin_on_and_off():
    on, off = trainer_of(l0_fraction=0.25), trainer_of(l0_fraction=0.25, sharkfin=False)
    assert off.lr(5) == on.lr(5) == pytest.approx(0.05 * 0.5)
    assert off.lr(0) == pytest.approx(0.05)
    assert on.lr(0) == pytest.approx(0.05 * 0.5)


def test_an_absolute_number_of_weights():
    trainer = trainer_of(l0_count=144, min_nonzero=0)
    assert trainer.config.model.n_matrix_weights == sum(
        p.numel()
        for group in trainer.sparsity.groups
        if not group.embedding
        for p in group.parameters
    )
    train(trainer)
    kept = [
        sum(map(nonzero, group.parameters))
        for group in trainer.sparsity.groups
        if not group.embedding
    ]
    assert 144 - len(kept) < sum(kept) <= 144


def test_fractions_of_groups():
    """The last pattern that fits counts; what no pattern fits has the fraction of all."""
    groups = {"blocks.*.attn.*": 0.5, "blocks.0.attn.W_O": 0.2, "unembed.W_U": 1.0}
    trainer = trainer_of(l0_groups=groups, min_nonzero=0)
    train(trainer)
    block = trainer.model.network.blocks[0]
    assert sum(nonzero(p) for p in (block.attn.W_Q, block.attn.W_K, block.attn.W_V)) == int(
        0.5 * 3 * 8 * 15
    )
    assert nonzero(block.attn.W_O) == int(0.2 * 8 * 15)
    assert nonzero(block.mlp.W_in) == int(0.3 * 8 * 10)
    assert nonzero(trainer.model.network.embed.W_E) == int(0.5 * 8 * 11)
    assert nonzero(trainer.model.network.unembed.W_U) == 8 * 11
    with pytest.raises(
        ConfigError, match=r"no group of weights is named 'blocks.9.\*'; they are blocks.0.attn"
    ):
        trainer_of(l0_groups={"blocks.9.*": 0.5})


def test_what_shares_a_budget():
    model = tiny_model()
    fused = ["blocks.0.attn.W_QKV", "blocks.0.attn.W_O", "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"]
    apart = [f"blocks.0.attn.W_{name}" for name in "QKVO"] + fused[2:]
    embeddings = ["embed.W_E", "unembed.W_U"]
    biases = [f"blocks.0.attn.b_{name}" for name in "QKVO"] + [
        "blocks.0.mlp.b_in",
        "blocks.0.mlp.b_out",
    ]
    for options, expected in (
        ({}, fused + embeddings),
        ({"fused_qkv": False}, apart + embeddings),
        ({"biases": True}, fused + embeddings + biases),
    ):
        assert {group.name for group in weight_groups(model, **options)} == set(expected)


def test_annealing_abs_topk():
    """All entries until 20 % of the steps, the model's fraction from 60 %."""
    model = tiny_model(d_model=8, abs_topk=paper_topk(0.25), d_mlp=16)
    trainer = trainer_of(model, topk_anneal_start=0.2, topk_anneal_stop=0.6)
    neurons = next(m for m in model.network.modules() if isinstance(m, AbsTopK) and m.dim == 16)
    seen, active = [], []

    def look(post, hook):
        active.append(int(post.ne(0).sum(-1).max()))

    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", look)]):
        for step in range(STEPS):
            trainer.step(random_tokens(model, batch=3, seed=step))
            seen.append(neurons.k)
    assert seen == active == [16, 16, 16, 13, 10, 7, 4, 4, 4, 4]
    assert {
        m.k / m.dim
        for m in model.network.modules()
        if isinstance(m, AbsTopK) and m.dim % 4 == 0 and m.k
    } == {0.25}


def test_recipes_are_settings_of_the_same_configuration():
    for name, changes in RECIPES.items():
        config = preset("small", name)
        assert all(getattr(config, field) == value for field, value in changes.items())
        assert config.steps == preset("small").steps
    with pytest.raises(
        ConfigError, match="recipe = 'papre' is not possible; it must be one of published, paper"
    ):
        preset("small", "papre")
