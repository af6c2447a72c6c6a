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

NAMES = ("tiny-python-sparse", "tiny-python-dense", "tiny-python-wide", "tiny-python-wide-dense")
#: A sparse model and its dense twin.
TWINS = [NAMES[:2], NAMES[2:]]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def models():
    return {name: tl_sparse.load(name, device="cpu") for name in NAMES}


def record(name):
    return json.loads((find(name) / "training.json").read_text())


@pytest.mark.parametrize("twins", TWINS)
def test_they_are_small_and_open_in_float32(models, twins):
    assert sum(path.stat().st_size for name in twins for path in find(name).iterdir()) < 5_000_000
    for name in twins:
        model = models[name]
        assert model.cfg.model_name == name
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert tl_sparse.load(find(name), device="cpu").sparse_cfg == model.sparse_cfg


@pytest.mark.parametrize("twins", TWINS)
def test_their_losses_are_equal_within_two_percent_and_true_of_the_sample(models, twins):
    sparse, dense = (record(name)["validation_loss"] for name in twins)
    assert abs(dense / sparse - 1) < 0.02
    for name in twins:
        model = models[name]
        sample = load_corpus(find(name), model.tokenizer, model.cfg.n_ctx)  # of the training text
        assert evaluate_loss(model, sample[:128], 64) == pytest.approx(
            record(name)["validation_loss"], rel=0.1
        )


@pytest.mark.parametrize(
    ("twins", "fraction"), [(TWINS[0], 1 / 64), (TWINS[1], 1 / 144)], ids=["128", "192"]
)
def test_one_is_sparse_and_one_is_dense(models, twins, fraction):
    for name, kept in zip(twins, (fraction, 1), strict=True):
        block = models[name].blocks[1]
        for weight in (
            block.attn.W_O,
            block.mlp.W_out,
        ):  # W_in shares its budget with its positional rows
            assert float(weight.ne(0).float().mean()) == pytest.approx(kept, abs=1e-3)
    sparse, dense = (models[name] for name in twins)
    assert sparse.sparse_cfg.abs_topk == tl_sparse.paper_topk(0.25)
    assert not dense.sparse_cfg.abs_topk


def test_the_wide_one_is_better_with_no_more_weights():
    narrow, wide = (record(name) for name in (NAMES[0], NAMES[2]))
    assert wide["validation_loss"] < narrow["validation_loss"]
    assert wide["nonzero_weights"] <= narrow["nonzero_weights"]


@pytest.mark.any_line
@pytest.mark.parametrize("name", ["tiny-python-sparse", "tiny-python-wide"])
def test_the_sparse_ones_do_the_tasks(models, name):
    scores = task_scores(models[name], n_pairs=200, seed=77)
    done = {task for task, score in scores.items() if score is not None and score.accuracy >= 0.9}
    assert {"single_double_quote", "bracket_counting", "set_or_string"} <= done
    assert len(done) >= 6
    said = record(name)["tasks"]
    for task, score in scores.items():
        assert score.accuracy == pytest.approx(said[task]["accuracy"], abs=0.06), task


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
