"""Training with bridges: its gradients and files, and that it goes on exactly after a stop."""

import dataclasses
import json
import math

import pytest
import torch

import tl_sparse
from helpers import has_hooks, quick_config, random_tokens, stock_model, tiny_config, tiny_model
from tl_sparse import BridgeConfig, DataConfig, TrainConfig, paper_topk, train_bridges
from tl_sparse.bridges.losses import Target, nmse
from tl_sparse.bridges.objective import BridgeObjective
from tl_sparse.bridges.streams import continued, run_with_streams
from tl_sparse.cli.parser import main
from tl_sparse.errors import (
    ArgumentError,
    BridgeError,
    ConfigError,
    TokenizerError,
    TrainError,
    UnsupportedError,
)
from tl_sparse.training.objective import next_token_loss
from tl_sparse.training.trainer import Trainer

pytestmark = pytest.mark.any_line

SMALL = quick_config(abs_topk=paper_topk(0.5))
TEXT = DataConfig(stdlib_chars=0, idiom_chars=30_000)
TRAIN = TrainConfig(
    model=SMALL,
    data=TEXT,
    steps=12,
    batch_size=4,
    l0_fraction=0.5,
    checkpoint_steps=5,
)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """A dense model of a few steps, with its tokenizer."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    model = dataclasses.replace(SMALL, abs_topk={}, d_model=12)
    config = dataclasses.replace(
        TRAIN, model=model, l0_fraction=1.0, l0_fraction_embed=1.0, steps=20
    )
    tl_sparse.train(config, folder, device="cpu", progress=False)
    return folder


@pytest.fixture
def dense(dense_folder):
    return tl_sparse.load(dense_folder, device="cpu")


def summed_loss(objective, tokens, step):
    """The whole loss in one graph, site by site, as the paper has it."""
    config = objective.bridge_config
    dense = run_with_streams(objective.dense, tokens)
    sparse = run_with_streams(objective.sparse, tokens)
    target = Target.of(dense.logits, config.top_tokens)
    loss = config.weight_ce * next_token_loss(sparse.logits, tokens)
    loss = loss + config.weight_kl * target.kl(sparse.logits)
    for site, maps in enumerate(objective.maps.sites):
        encoded = maps.encoder(dense.read[site], config.sharpness(step))
        decoded = maps.decoder(sparse.written[site])
        loss = loss + config.weight_nmse * nmse(encoded, sparse.read[site])
        loss = loss + config.weight_nmse * nmse(decoded, dense.read[site])
        to_sparse = continued(objective.sparse, tokens, site, encoded)
        to_dense = continued(objective.dense, tokens, site, decoded)
        loss = loss + config.weight_kl_dense_to_sparse * target.kl(to_sparse)
        loss = loss + config.weight_kl_sparse_to_dense * target.kl(to_dense)
    return loss


def random_objective(**fields):
    """An objective of random models in float64, whose dense one is TransformerLens' own."""
    dense = stock_model(n_layers=2, d_vocab=11).double().requires_grad_(False)
    abs_topk = {"mlp_neuron": 0.5, "resid_pre": 0.8}
    model = tiny_config(n_layers=2, abs_topk=abs_topk, bigram_table=True)
    config = BridgeConfig(train=TrainConfig(model=model, steps=10, l0_fraction=0.9), **fields)
    objective = BridgeObjective(dense, config)
    objective.maps.double()
    sparse = tiny_model(model, dtype=torch.float64)
    objective.start(sparse, config.train, torch.device("cpu"))
    return objective


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"encoder": "threshold", "top_tokens": 4},
        {"weight_ce": 0.5, "weight_kl": 2.0, "weight_nmse": 3.0, "weight_kl_sparse_to_dense": 0.0},
    ],
    ids=["published", "thresholds and likeliest tokens", "weights"],
)
def test_gradients_are_those_of_the_whole_loss(fields):
    """Although the passes are taken back one by one, and the streams' gradients at once."""
    objective = random_objective(**fields)
    tokens = random_tokens(objective.sparse, 3)
    parameters = [*objective.sparse.parameters(), *objective.maps.parameters()]
    loss = summed_loss(objective, tokens, step=2)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = objective.backward(tokens, share=0.5, step=2)
    torch.testing.assert_close(found, loss.detach() / 2)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, gradient / 2)
    assert not has_hooks(objective.sparse)
    assert all(parameter.grad is None for parameter in objective.dense.parameters())


def test_some_sites_per_step_give_the_loss_of_all_on_average():
    objective = random_objective(sites_per_step=2)
    tokens = random_tokens(objective.sparse, 3)
    drawn = [objective._sites(step) for step in range(400)]
    assert drawn == [objective._sites(step) for step in range(400)]
    for site in range(5):
        share = sum(site in sites for sites in drawn) / 400
        assert abs(share - 2 / 5) < 0.1  # four standard errors
    # The terms of the two sites are weighted with 5/2.
    own = next_token_loss(objective.sparse(tokens), tokens)
    target = Target.of(objective.dense(tokens))
    own = own + target.kl(objective.sparse(tokens))
    found = objective.backward(tokens, share=1.0, step=7)
    terms = [v for name, v in objective.measured().items() if "/" in name]
    assert len(terms) == 8
    torch.testing.assert_close(found, own.detach() + 2.5 * sum(terms))


def test_thresholds_become_hard():
    config = BridgeConfig(
        train=TrainConfig(steps=100),
        encoder="threshold",
        threshold_anneal_start=0.1,
        threshold_anneal_stop=0.5,
    )
    assert [config.sharpness(step) for step in (0, 10)] == [1, 1]
    assert config.sharpness(30) == 1 + 99 / 2
    assert [config.sharpness(step) for step in (50, 99)] == [math.inf, math.inf]


@pytest.fixture(scope="module")
def whole(dense_folder, tmp_path_factory):
    """A run without an interruption."""
    folder = tmp_path_factory.mktemp("bridged") / "whole"
    config = BridgeConfig(train=TRAIN, sites_per_step=2)
    _, record = train_bridges(dense_folder, config, folder, "cpu", progress=False)
    return folder, record


def tensors_of(folder):
    bridges = tl_sparse.load_bridges(folder, device="cpu")
    return bridges.sparse.state_dict() | bridges.maps.state_dict()


def test_a_finished_run(whole, dense_folder):
    folder, record = whole
    bridges = tl_sparse.load_bridges(folder, device="cpu")  # the dense one by its name, a path
    assert bridges.recorded_losses() is not None
    assert [site["site"] for site in record["bridge_losses"]["sites"]] == bridges.sites
    assert record["bridges"]["sites_per_step"] == 2
    ce_sparse = record["bridge_losses"]["ce_sparse"]
    assert ce_sparse == pytest.approx(record["validation_loss"], rel=1e-5)  # on the same rows
    assert {path.name for path in folder.iterdir()} >= {"bridges.json", "bridges.safetensors"}
    assert not (folder / "run.json").exists()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert "nmse_encoder/blocks.0.hook_resid_mid" in lines[-1].keys() | lines[0].keys()
    assert {"ce_sparse", "kl_sparse", "loss"} <= lines[-1].keys()


def test_a_run_that_was_stopped_ends_with_the_same_bits(whole, dense_folder, tmp_path, monkeypatch):
    config = BridgeConfig(train=TRAIN, sites_per_step=2)
    step = Trainer.step

    def failing(trainer, tokens):
        if trainer.steps_done == 8:
            raise RuntimeError("stopped")
        return step(trainer, tokens)

    monkeypatch.setattr(Trainer, "step", failing)
    folder = tmp_path / "stopped"
    with pytest.raises(RuntimeError, match="stopped"):
        train_bridges(dense_folder, config, folder, "cpu", progress=False)
    monkeypatch.setattr(Trainer, "step", step)

    with pytest.raises(TrainError, match="continue it with `tl-sparse bridge --resume"):
        tl_sparse.train(TRAIN, folder, "cpu", progress=False)
    with pytest.raises(TrainError, match="holds a run of another kind; continue it with"):
        tl_sparse.train(None, folder, "cpu", progress=False, resume=True)
    other = dataclasses.replace(config, weight_nmse=2.0)
    with pytest.raises(TrainError, match=r"was trained with weight_nmse = 1\.0, not 2\.0"):
        train_bridges(dense_folder, other, folder, "cpu", progress=False, resume=True)

    train_bridges(dense_folder, None, folder, "cpu", progress=False, resume=True)
    found, expected = tensors_of(folder), tensors_of(whole[0])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_run_without_bridges_is_not_resumed_with_them(dense_folder, tmp_path, monkeypatch):
    def stopped(trainer, tokens):
        raise RuntimeError("stopped")

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        tl_sparse.train(TRAIN, tmp_path / "run", "cpu", progress=False)
    with pytest.raises(TrainError, match="holds a training run without bridges"):
        train_bridges(dense_folder, None, tmp_path / "run", "cpu", progress=False, resume=True)


def test_the_dense_model_is_left_as_it_is(dense):
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    config = BridgeConfig(train=dataclasses.replace(TRAIN, steps=2))
    dense.train()
    bridges, _ = train_bridges(dense, config, progress=False)
    assert dense.training
    assert all(parameter.requires_grad for parameter in dense.parameters())
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, before[name])
    assert bridges.dense is dense
    assert not bridges.sparse.training
    assert not has_hooks(dense)


def test_the_command(dense_folder, tmp_path, capsys):
    out = tmp_path / "bridged"
    flags = "--steps 3 --batch-size 2 --d-model 16 --n-heads 2 --d-head 4 --d-mlp 16 --n-ctx 16"
    flags += " --stdlib-chars 0 --idiom-chars 30000 --l0-fraction 0.5"
    flags += f" --encoder threshold --device cpu --out {out}"
    status = main(["bridge", str(dense_folder), *flags.split()])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "KL(dense ‖ sparse)" in printed.out
    assert f"open it with tl_sparse.load_bridges({str(out)!r})" in printed.out
    bridges = tl_sparse.load_bridges(out, device="cpu")
    assert bridges.maps.kind == "threshold"
    assert bridges.sparse.cfg.n_ctx == 16
    assert bridges.sparse.cfg.d_vocab == 384  # the dense model's


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "relu"}, "encoder = 'relu'"),
        ({"encoder_fraction": 0.0}, r"encoder_fraction = 0\.0"),
        ({"threshold_log_eps": math.inf}, "threshold_log_eps = inf"),
        ({"sharpness_stop": 0.0}, r"sharpness_stop = 0\.0"),
        ({"threshold_anneal_start": 0.7}, r"threshold_anneal_start = 0\.7"),
        ({"threshold_anneal_stop": 1.5}, r"threshold_anneal_stop = 1\.5"),
        ({"weight_kl": -1.0}, r"weight_kl = -1\.0"),
        ({"top_tokens": -1}, "top_tokens = -1"),
        ({"sites_per_step": 6}, r"sites_per_step = 6 is not possible; it must be in \[0, 5\]"),
        ({"train": 3}, "train = 3"),
        ({"train": TrainConfig(compile=True)}, "compile = True is not possible; it must be false"),
    ],
)
def test_impossible_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        BridgeConfig(**fields)


def test_a_loss_needs_a_term():
    weights = dict.fromkeys(tl_sparse.bridges.config.LOSS_WEIGHTS, 0.0)
    with pytest.raises(ConfigError, match="above 0, or another weight must be"):
        BridgeConfig(**weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 2}, "n_layers = 2 of the sparse model must be 1, as in the dense model"),
        ({"d_vocab": 500}, "d_vocab = 500 of the sparse model must be 384"),
        ({"n_ctx": 64}, "n_ctx = 64 of the sparse model must be at most 32"),
    ],
)
def test_sparse_models_that_do_not_fit(dense, changes, message):
    train = dataclasses.replace(TRAIN, model=dataclasses.replace(SMALL, **changes))
    with pytest.raises(BridgeError, match=message):
        train_bridges(dense, BridgeConfig(train=train), progress=False)
    fitting = BridgeConfig.fitting(dense, train)
    assert fitting.train.model == SMALL


def test_dense_models_that_cannot_be_used():
    for wrong in (3.5, object(), None):
        with pytest.raises(ArgumentError, match="dense must be a TransformerLens model, or the f"):
            train_bridges(wrong)
    with pytest.raises(TokenizerError, match="the dense model has no tokenizer"):
        train_bridges(stock_model())


def test_unsupported_blocks_are_named():
    class Parallel:
        cfg = stock_model().cfg
        hook_dict = {"blocks.0.hook_resid_pre": None, "blocks.0.hook_resid_post": None}

        def parameters(self):
            yield torch.zeros(1)

    with pytest.raises(UnsupportedError, match=r"has no blocks\.0\.hook_resid_mid"):
        train_bridges(Parallel())
