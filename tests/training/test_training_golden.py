"""The published update rule against the trajectory of the original training script."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers import GOLDEN
from tl_sparse import TrainConfig, load
from tl_sparse.checkpoints.openai import read_openai_model
from tl_sparse.training.presets import RECIPES
from tl_sparse.training.trainer import Trainer

FOLDER = GOLDEN / "training"
#: Weights after so many steps.
STORED = {
    1: "after_1.pt",
    2: "after_2.pt",
    3: "after_3.pt",
    10: "after_10.pt",
    60: "final_model.pt",
}


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def openai_folder(tmp_path_factory):
    """A weights file of the trajectory as a model folder."""
    folder = tmp_path_factory.mktemp("training")

    def make(name):
        (folder / "beeg_config.json").write_bytes((FOLDER / "beeg_config.json").read_bytes())
        (folder / "final_model.pt").write_bytes((FOLDER / name).read_bytes())
        return folder

    return make


@pytest.fixture
def trainer(openai_folder):
    values = json.loads((FOLDER / "recipe.json").read_text())["hyperparameters"]
    same_names = (
        "batch_size",
        "lr",
        "eps",
        "weight_decay",
        "warmup_fraction",
        "l0_fraction",
        "l0_fraction_embed",
        "anneal_start",
        "anneal_stop",
        "min_nonzero",
    )
    config = TrainConfig(
        steps=values["total_steps"],
        beta1=values["betas"][0],
        beta2=values["betas"][1],
        **RECIPES["published"],
        **{name: values[name] for name in same_names},
    )
    model = load(openai_folder("initial_model.pt"), device="cpu").train()
    model.unembed.b_U.requires_grad_(False)  # a constant in the original
    return Trainer(model, config)


def test_the_learning_rate_and_the_fraction_of_every_step(trainer, golden):
    for step, (lr, fraction) in enumerate(
        zip(golden["lr"].tolist(), golden["l0_fraction"].tolist(), strict=True)
    ):
        assert trainer.lr(step) == pytest.approx(lr, abs=1e-8)
        assert trainer.sparsity.fraction_at(step) == pytest.approx(fraction, abs=1e-12)


def test_losses_and_weights_follow_the_original(trainer, golden, openai_folder):
    for step in range(60):
        loss = trainer.step(golden["tokens"][step])
        assert float(loss) == pytest.approx(float(golden["loss"][step]), abs=1e-5), f"step {step}"
        if step + 1 in STORED:
            expected = read_openai_model(openai_folder(STORED[step + 1])).tensors
            weights = trainer.model.state_dict()
            assert weights.keys() == expected.keys()
            for name, tensor in weights.items():
                torch.testing.assert_close(
                    tensor, expected[name], rtol=0, atol=1e-6, msg=f"{name}, step {step}"
                )
                assert torch.equal(tensor == 0, expected[name] == 0), (
                    f"{name}: other weights are kept, step {step}"
                )
