"""Steps between dense gradients, which train the nonzero weights alone."""

import dataclasses

import pytest
import torch
from test_recipes import rms, top, trained_parameters
from test_runs import CONFIG, assert_same_run, stop_at

import tl_sparse
from helpers import copied_parameters, full_config, random_tokens, tiny_config, tiny_model
from tl_sparse import train
from tl_sparse.errors import CheckpointError, ConfigError, TrainError
from tl_sparse.hooks import WeightSparsity, weight_groups
from tl_sparse.kernels import dispatch
from tl_sparse.network.products import Product
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.objective import next_token_loss
from tl_sparse.training.presets import RECIPES, preset
from tl_sparse.training.trainer import Trainer

pytestmark = pytest.mark.any_line

STEPS = 9
INTERVAL = 4
SMALL = tiny_config(d_model=8, d_mlp=24, bigram_table=True)


def model_of(config=SMALL, dtype=torch.float64):
    """A model with small weights, so that zeros soon overtake them."""
    model = tiny_model(config, dtype=dtype).train()
    with torch.no_grad():
        for group in weight_groups(model):
            for weight in group.parameters:
                weight *= 0.1
    return model


def trainer_of(config=SMALL, dtype=torch.float64, **changes):
    """Fractions are final from the first step on, and below a quarter."""
    settings = dict(
        model=config,
        steps=3 * STEPS,
        lr=0.5,
        l0_fraction=0.2,
        l0_fraction_embed=0.0,
        min_nonzero=1,
        anneal_start=0.0,
        anneal_stop=0.0,
        dense_gradient_steps=INTERVAL,
    )
    return Trainer(model_of(config, dtype), TrainConfig(**settings | changes))


def take_steps(trainer, last=STEPS):
    while trainer.steps_done < last:
        trainer.step(random_tokens(trainer.model, batch=6, seed=trainer.steps_done))


def patterns(model):
    """Name → which entries are nonzero, of the weights that are sparse."""
    sparse = [p for group in weight_groups(model) for p in group.parameters]
    return {n: p != 0 for n, p in model.named_parameters() if any(p is each for each in sparse)}


class ByHand:
    """The published recipe with masked gradients, on dense tensors and without an optimizer."""

    def __init__(self, weights):
        self.weights = weights
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.ratio = None

    def is_sparse(self, name):
        return ".W_" in name and "bigram" not in name

    def known(self, grads):
        """The gradients of nonzero weights and of all other parameters."""
        return {n: g * (self.weights[n] != 0) if self.is_sparse(n) else g for n, g in grads.items()}

    def rms_of_known(self, grads):
        total = sum(grad.square().sum() for grad in self.known(grads).values())
        sizes = [
            (self.weights[n] != 0).sum() if self.is_sparse(n) else g.numel()
            for n, g in grads.items()
        ]
        return (total / sum(sizes)).sqrt()

    def step(self, number, grads, lr):
        is_dense = number in (0, 4, 8)
        if is_dense:
            scale = rms(grads.values())
            self.ratio = scale / self.rms_of_known(grads)
        else:
            scale = self.rms_of_known(grads) * self.ratio
            grads = self.known(grads)
            self.first = self.known(self.first)
            self.second = self.known(self.second)
        for name, grad in grads.items():
            self.update(name, grad / (scale + 1e-5), number + 1, lr)
            if self.is_sparse(name):
                if is_dense:
                    self.weights[name] = top(self.weights[name], 0.2, name)
                self.weights[name] = self.weights[name] * (1 - 0.1 * lr)

    def update(self, name, grad, t, lr):
        self.first[name] = 0.9 * self.first[name] + 0.1 * grad
        self.second[name] = 0.95 * self.second[name] + 0.05 * grad**2
        first = self.first[name] / (1 - 0.9**t)
        second = self.second[name] / (1 - 0.95**t)
        self.weights[name] = self.weights[name] - lr * first / (second.sqrt() + 0.1)


@pytest.mark.parametrize("kernels", ["auto", "sparse"])
def test_steps_against_masked_gradients_written_out(kernels):
    trainer = trainer_of(fused_qkv=False)
    model = trainer.model
    for module in model.modules():
        if isinstance(module, Product):
            module.kernels = kernels
    parameters = trained_parameters(model)
    by_hand = ByHand({name: p.detach().clone() for name, p in parameters.items()})
    for number in range(STEPS):
        tokens = random_tokens(model, batch=6, seed=number)
        loss = next_token_loss(model(tokens), tokens)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        by_hand.step(number, dict(zip(parameters, grads, strict=True)), trainer.lr(number))
        trainer.step(tokens)
        for name, parameter in parameters.items():
            expected = by_hand.weights[name]
            torch.testing.assert_close(
                parameter.detach(), expected, rtol=0, atol=1e-12, msg=f"{name}, step {number}"
            )
            assert torch.equal(parameter == 0, expected == 0), name


def test_an_interval_of_1_is_the_recipe_with_dense_gradients_bit_for_bit():
    trainer = trainer_of(dtype=torch.float32, dense_gradient_steps=1)
    model = model_of(dtype=torch.float32)
    parameters = list(model.parameters())
    matrices = [p for group in weight_groups(model) for p in group.parameters]
    adam = torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.95), eps=0.1, fused=True)
    sparsity = WeightSparsity(model, 0.2, min_nonzero=1)
    for step in range(STEPS):
        tokens = random_tokens(model, batch=6, seed=step)
        next_token_loss(model(tokens), tokens).backward()
        grads = [p.grad for p in parameters]
        norms = torch.stack(torch._foreach_norm(grads))
        scale = (norms.square().sum() / sum(g.numel() for g in grads)).sqrt() + 1e-5
        torch._foreach_mul_(grads, 1 / scale)
        lr = adam.param_groups[0]["lr"] = trainer.lr(step)
        with sparsity.attached(adam):
            adam.step()
        adam.zero_grad()
        with torch.no_grad():
            torch._foreach_add_(matrices, matrices, alpha=-0.1 * lr)
        trainer.step(tokens)
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), (name, step)


def test_zeros_stay_zeros_between_dense_gradients_and_then_others_come_in():
    trainer = trainer_of()
    took_in = []
    for step in range(STEPS):
        before = patterns(trainer.model)
        take_steps(trainer, step + 1)
        after = patterns(trainer.model)
        took_in.append(any(bool((after[name] & ~before[name]).any()) for name in after))
        if step % INTERVAL != 0:
            assert all(torch.equal(before[name], after[name]) for name in after), step
    assert took_in == [False, False, False, False, True, False, False, False, True]


def test_weights_train_whole_until_their_share_is_final_and_below_a_quarter():
    trainer = trainer_of(steps=24, anneal_stop=0.75, l0_fraction=0.15, l0_fraction_embed=0.5)
    low = []
    for step in range(24):
        take_steps(trainer, step + 1)
        held = trainer.nonzero_steps.held
        assert not any(p in held for p in (trainer.model.W_E, trainer.model.W_U))
        low.append(len(held) > 0)
    # The fraction is below 1/4 from step 16 on, and final at step 18; 20 is the next multiple of 4.
    # The last step has a dense gradient too.
    assert low == [step in (21, 22) for step in range(24)]


CASES = {
    "all features": (full_config(d_model=9, d_mlp=24), {}),
    "tied unembedding": (tiny_config(d_model=9, d_mlp=24, tied_unembed=True), {}),
    "the paper": (SMALL, RECIPES["paper"] | {"l0_fraction_embed": 0.0}),
    "parts of a batch": (SMALL, {"accumulation": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_plain_torch_trains_the_same(case, monkeypatch):
    config, changes = CASES[case]
    compiled = trainer_of(config, **changes)
    take_steps(compiled)
    monkeypatch.setattr(dispatch, "_compiled", lambda: None)  # as where numba is not installed
    plain = trainer_of(config, **changes)
    take_steps(plain)
    expected = copied_parameters(plain.model)
    for name, parameter in copied_parameters(compiled.model).items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-12, msg=name)


def test_a_frozen_weight_stays_as_it_is():
    model = model_of()
    frozen = model.network.blocks[0].mlp.W_in.requires_grad_(False)
    before = frozen.clone()
    trainer = Trainer(model, trainer_of().config)
    take_steps(trainer)
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("done", [3, 4, 5, 8])
def test_a_restored_trainer_goes_on_bit_for_bit(done):
    whole = trainer_of(dtype=torch.float32)
    take_steps(whole, done)
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    take_steps(whole)
    restored = trainer_of(dtype=torch.float32)
    take_steps(restored, 2)  # it has held other weights before
    restored.load_state(state, done)
    assert {name: t.shape for name, t in restored.state().items()} == {
        name: t.shape for name, t in state.items()
    }
    take_steps(restored)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, restored.state()[name]), name


def test_a_weight_that_passes_through_zero_is_still_trained_after_resuming():
    trainer = trainer_of()
    take_steps(trainer, 2)
    weight = trainer.model.network.blocks[0].mlp.W_in
    nonzeros = trainer.nonzero_steps.held[weight]
    with torch.no_grad():
        nonzeros.values[0] = 0
    nonzeros.write()
    restored = trainer_of()
    restored.load_state(trainer.state(), 2)
    take_steps(restored, 3)
    assert float(weight.detach().flatten()[nonzeros.positions[0]]) == 0
    restored_weight = restored.model.network.blocks[0].mlp.W_in
    assert float(restored_weight.detach().flatten()[nonzeros.positions[0]]) != 0


@pytest.mark.parametrize("wrong", [[-1, 2], [2, 2], [3, 1], [0, 10**6], [0.5, 1.5]])
def test_positions_that_are_none_are_refused(wrong):
    trainer = trainer_of()
    take_steps(trainer, 2)
    state = trainer.state()
    name = next(name for name in state if name.endswith("mlp.W_in") and "positions" in name)
    before = copied_parameters(trainer.model)
    with pytest.raises(CheckpointError, match=f"{name} are not the positions of entries"):
        trainer.load_state(state | {name: torch.tensor(wrong)}, 2)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_an_objective_that_fails_leaves_the_model_as_it_was():
    trainer = trainer_of()
    take_steps(trainer, 2)

    def fail(*arguments):
        raise RuntimeError("no")

    trainer.objective.backward = fail
    with pytest.raises(RuntimeError):
        trainer.step(random_tokens(trainer.model))
    modules = list(trainer.model.network.modules())
    assert all(each.trained is None for each in modules if isinstance(each, Product))


RUN = dataclasses.replace(
    CONFIG, l0_fraction=0.2, min_nonzero=2, dense_gradient_steps=8, anneal_stop=0.2
)


def test_a_run_is_resumed_between_dense_gradients_and_only_with_the_same_interval(
    tmp_path, monkeypatch
):
    train(RUN, tmp_path / "whole", device="cpu", progress=False)
    undo = stop_at(monkeypatch, 30)  # the last checkpoint is that of step 28
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(RUN, tmp_path / "run", device="cpu", progress=False)
    undo()
    other = dataclasses.replace(RUN, dense_gradient_steps=4)
    with pytest.raises(TrainError, match="was trained with dense_gradient_steps = 8, not 4"):
        train(other, tmp_path / "run", device="cpu", progress=False, resume=True)
    train(RUN, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    trained = tl_sparse.load(tmp_path / "whole", device="cpu")
    assert sum(int(pattern.sum()) for pattern in patterns(trained).values()) == sum(
        int(fraction * sum(p.numel() for p in group.parameters))
        for group in weight_groups(trained)
        for fraction in [RUN.l0_fraction_embed if group.embedding else RUN.l0_fraction]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_gradient_steps": 0}, "dense_gradient_steps = 0 .* at least 1"),
        ({"dense_gradient_steps": -3}, "dense_gradient_steps = -3 .* at least 1"),
        ({"dense_gradient_steps": 2.5}, "dense_gradient_steps"),
        (
            {"dense_gradient_steps": 8, "l0_fraction": 1},
            "l0_fraction = 1 .* a share below 0.25 .* if dense_gradient_steps = 8",
        ),
        ({"dense_gradient_steps": 8, "l0_fraction": 0.25}, "l0_fraction = 0.25 .* below 0.25"),
        ({"dense_gradient_steps": 8, "l0_count": 400_000}, "l0_count = 400000 .* below 0.25"),
    ],
)
def test_impossible_intervals_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_the_recipe_trains_so():
    assert preset("laptop", "sparse").dense_gradient_steps > 1
    assert preset("laptop").dense_gradient_steps == 1
