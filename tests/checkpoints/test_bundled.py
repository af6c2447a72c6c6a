"""The models in the package: they open by name, and are as good as their cards say."""

import json
from pathlib import Path

import pytest
import torch

import tl_sparse
from tl_sparse.checkpoints.corpus_sample import load_corpus
from tl_sparse.checkpoints.sources import find
from tl_sparse.config import merged
from tl_sparse.evaluation.judge import task_scores
from tl_sparse.files import read_yaml
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.measures import evaluate_loss
from tl_sparse.training.presets import preset

NAMES = ("tiny-python-sparse", "tiny-python-dense")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def models():
    return {name: tl_sparse.load(name, device="cpu") for name in NAMES}


def record(name):
    return json.loads((find(name) / "training.json").read_text())


def test_they_are_small_and_open_in_float32(models):
    assert sum(path.stat().st_size for name in NAMES for path in find(name).iterdir()) < 5_000_000
    for name, model in models.items():
        assert model.cfg.model_name == name
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert tl_sparse.load(find(name), device="cpu").sparse_cfg == model.sparse_cfg


def test_their_losses_are_equal_within_two_percent_and_true_of_the_sample(models):
    sparse, dense = (record(name)["validation_loss"] for name in NAMES)
    assert abs(dense / sparse - 1) < 0.02
    for name, model in models.items():
        sample = load_corpus(find(name), model.tokenizer, model.cfg.n_ctx)  # of the training text
        assert evaluate_loss(model, sample[:128], 64) == pytest.approx(
            record(name)["validation_loss"], rel=0.1
        )


def test_one_is_sparse_and_one_is_dense(models):
    for name, fraction in zip(NAMES, (1 / 64, 1), strict=True):
        block = models[name].blocks[1]
        for weight in (
            block.attn.W_O,
            block.mlp.W_out,
        ):  # W_in shares its budget with its positional rows
            assert float(weight.ne(0).float().mean()) == pytest.approx(fraction, abs=1e-3)
    assert models[NAMES[0]].sparse_cfg.abs_topk == tl_sparse.paper_topk(0.25)
    assert not models[NAMES[1]].sparse_cfg.abs_topk


@pytest.mark.any_line
def test_the_sparse_one_does_the_tasks(models):
    scores = task_scores(models["tiny-python-sparse"], n_pairs=200, seed=77)
    done = {name for name, score in scores.items() if score is not None and score.accuracy >= 0.9}
    assert {"single_double_quote", "bracket_counting", "set_or_string"} <= done
    assert len(done) >= 6
    said = record("tiny-python-sparse")["tasks"]
    for name, score in scores.items():
        assert score.accuracy == pytest.approx(said[name]["accuracy"], abs=0.06), name


def test_their_configurations_are_committed():
    for name in NAMES:
        config = merged(preset("laptop"), read_yaml(EXAMPLES / f"{name}.yaml"))
        said = merged(TrainConfig(), record(name)["config"])
        assert said == config, name


def test_cards(models):
    for name in NAMES:
        card = (find(name) / "README.md").read_text()
        assert f'tl_sparse.load("{name}")' in card
        assert f"tl-sparse train examples/{name}.yaml" in card
        assert f"{record(name)['validation_loss']}" in card


@pytest.fixture(scope="module")
def bridges():
    return tl_sparse.load_bridges("tiny-python-bridged", device="cpu")


def test_the_bridged_one_is_small_and_sparse(bridges):
    folder = find("tiny-python-bridged")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    assert {p.dtype for p in bridges.sparse.parameters()} == {torch.float32}
    assert {p.dtype for p in bridges.maps.parameters()} == {torch.float32}
    weight = bridges.sparse.blocks[1].mlp.W_out
    assert float(weight.ne(0).float().mean()) == pytest.approx(1 / 64, abs=1e-3)
    alone = tl_sparse.load("tiny-python-bridged", device="cpu")
    assert torch.equal(alone.unembed.W_U, bridges.sparse.unembed.W_U)


def test_its_bridges_are_as_good_as_its_card_says(bridges):
    said = bridges.recorded_losses()
    sample = load_corpus("tiny-python-bridged", bridges.sparse.tokenizer, 128)
    found = bridges.losses(sample[:32])  # of the training text
    assert found.ce_sparse == pytest.approx(said.ce_sparse, rel=0.1)
    for at_site, expected in zip(found.sites, said.sites, strict=True):
        for name in ("nmse_encoder", "nmse_decoder", "kl_dense_to_sparse", "kl_sparse_to_dense"):
            loss = getattr(expected, name)
            assert getattr(at_site, name) == pytest.approx(loss, rel=0.15, abs=0.01), name
    card = (find("tiny-python-bridged") / "README.md").read_text()
    assert str(said) in card
    assert "examples/tiny-python-bridged.yaml" in card
