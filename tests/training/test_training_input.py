"""Models, configurations and tokens of unusual kinds: each works, or is refused in one line."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import yaml
from test_runs import CONFIG, MODEL

from helpers import random_tokens, tiny_model
from tl_sparse import DataConfig, TrainConfig, train
from tl_sparse.cli import main
from tl_sparse.errors import ConfigError, DataError, TokenizerError, TrainError
from tl_sparse.tasks import token_ids
from tl_sparse.tasks.idioms import idiom_documents
from tl_sparse.training import evaluate_loss, preset
from tl_sparse.training.trainer import Trainer

pytestmark = pytest.mark.any_line

SHORT = dataclasses.replace(CONFIG, steps=2)


def trainer_of(model, **changes):
    settings = dict(steps=4, l0_fraction=0.3, min_nonzero=1, anneal_start=0.0, anneal_stop=0.5)
    return Trainer(model.train(), TrainConfig(model=model.sparse_cfg, **settings | changes))


def take_steps(trainer, n_steps=4):
    for step in range(n_steps):
        trainer.step(random_tokens(trainer.model, batch=3, seed=step))


# --- models that are partly frozen


@pytest.mark.parametrize("decay", ["after", "adamw"])
@pytest.mark.parametrize("frozen", ["embed.W_E", "blocks.0.attn.W_K", "blocks.0.mlp.W_in"])
def test_frozen_matrices_stay_as_they_are(frozen, decay):
    model = tiny_model(d_model=8)
    matrix = model.network.get_parameter(frozen)
    matrix.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    trainer = trainer_of(model, decay=decay)
    take_steps(trainer)
    for name, parameter in model.network.named_parameters():
        if name == frozen:
            assert torch.equal(parameter, before[name])
        elif ".W_" in name:
            assert not torch.equal(parameter, before[name]), name
    others = [p for p in trainer.matrices if p is not matrix]
    assert len(others) == len(trainer.matrices)
    assert trainer.sparsity.l0() == sum(int(p.count_nonzero()) for p in others)


def test_the_others_of_a_group_share_its_budget():
    model = tiny_model(d_model=8)
    attn = model.network.blocks[0].attn
    attn.W_K.requires_grad_(False)
    take_steps(trainer_of(model))
    kept = int(attn.W_Q.count_nonzero() + attn.W_V.count_nonzero())
    assert kept == int(0.3 * (attn.W_Q.numel() + attn.W_V.numel()))


def test_a_frozen_bigram_table():
    model = tiny_model(d_model=8, bigram_table=True)
    table = model.network.bigram.W_bigram
    table.requires_grad_(False)
    before = table.detach().clone()
    take_steps(trainer_of(model, last_bigram_row=False))
    assert torch.equal(table, before)


def test_nothing_to_train():
    model = tiny_model(d_model=8).requires_grad_(False)
    model.network.ln_final.w.requires_grad_(True)
    message = "no weight matrix of the model can be trained: all of them are frozen"
    with pytest.raises(TrainError, match=message):
        trainer_of(model)


# --- dtypes, and gradients that are switched off


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision_are_refused(dtype):
    message = rf"parameters of {dtype} cannot be trained.*precision = 'bfloat16'"
    with pytest.raises(TrainError, match=message):
        trainer_of(tiny_model(d_model=8, dtype=dtype))


def test_parameters_in_double_precision_are_trained():
    trainer = trainer_of(tiny_model(d_model=8, dtype=torch.float64))
    take_steps(trainer)
    assert trainer.model.W_E.dtype == torch.float64


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_switched_off(off):
    expected, _ = train(SHORT, device="cpu", progress=False)
    with off():
        found, _ = train(SHORT, device="cpu", progress=False)
        trainer = trainer_of(found, l0_fraction=0.5)
        trainer.step(random_tokens(found))
        assert not torch.is_grad_enabled()
    for name, tensor in expected.state_dict().items():
        assert tensor.shape == found.state_dict()[name].shape


def test_training_gives_the_same_with_gradients_switched_off():
    expected, _ = train(SHORT, device="cpu", progress=False)
    with torch.no_grad():
        found, _ = train(SHORT, device="cpu", progress=False)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_a_model_from_inference_mode_is_refused():
    with torch.inference_mode():
        model = tiny_model(d_model=8)
    with pytest.raises(TrainError, match=r"inference_mode.* cannot be trained; make it outside"):
        trainer_of(model)


# --- tokens

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, np.int64, np.uint16]


def as_dtype(tokens, dtype):
    return tokens.to(dtype) if isinstance(dtype, torch.dtype) else tokens.numpy().astype(dtype)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_of_any_kind(dtype):
    model = tiny_model(d_model=8)
    tokens = random_tokens(model, batch=3)
    given = as_dtype(tokens, dtype)
    assert evaluate_loss(model, given, 2) == evaluate_loss(model, tokens, 2)
    expected = trainer_of(tiny_model(d_model=8)).step(tokens)
    assert trainer_of(tiny_model(d_model=8)).step(given) == expected


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(2, 4),
        torch.zeros(2, 4, dtype=torch.bool),
        torch.zeros(0, 4, dtype=torch.long),
        torch.zeros(4, 0, dtype=torch.long),
        torch.zeros(4, 1, dtype=torch.long),
        torch.zeros(2, 2, 2, dtype=torch.long),
        torch.tensor(3),
        torch.full((2, 4), 11),
        torch.full((2, 4), -1),
        np.zeros((2, 4)),
        [["a", "b"]],
        "text",
        None,
    ],
)
def test_what_is_no_tokens(tokens):
    model = tiny_model(d_model=8)
    with pytest.raises(DataError):
        evaluate_loss(model, tokens, 2)
    trainer = trainer_of(model)
    with pytest.raises(DataError):
        trainer.step(tokens)
    assert trainer.steps_done == 0


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True, None])
def test_sizes_that_are_no_batches(size):
    model = tiny_model(d_model=8)
    with pytest.raises(ConfigError, match=r"batch_size = .* is not possible"):
        evaluate_loss(model, random_tokens(model), size)
    with pytest.raises(ConfigError, match="model = 'model' is not possible"):
        evaluate_loss("model", random_tokens(model), 2)


# --- configurations


def test_a_mapping_is_a_configuration():
    expected, record = train(SHORT, device="cpu", progress=False)
    found, _ = train(dataclasses.asdict(SHORT), device="cpu", progress=False)
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    again, _ = train(record["config"], device="cpu", progress=False)
    assert all(map(torch.equal, again.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("laptop", "config = 'laptop' is not possible; it must be a TrainConfig, or a mapping"),
        (MODEL, "config = SparseConfig"),
        ([], r"config = \[\] is not possible"),
        ({"step": 3}, "unknown configuration key 'step'; did you mean 'steps'"),
        ({"model": None}, "model = None is not possible; it must be a mapping"),
    ],
)
def test_what_is_no_configuration(config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"d_model": 16}},
        {"model": None},
        {"data": {}},
        {"data": "builtin"},
        {"model": dataclasses.replace(MODEL, n_ctx=1)},
        {"steps": 10**12},
        {"steps": np.int64(3)},
        {"steps": math.nan},
        {"seed": 2**64},
        {"lr": math.inf},
        {"lr": math.nan},
        {"lr": 10**400},
        {"lr": "0.1"},
        {"eps": math.inf},
        {"weight_decay": math.inf},
        {"l0_groups": None},
        {"l0_groups": [("a", 0.5)]},
        {"l0_groups": {1: 0.5}},
        {"l0_groups": {"a": 10**400}},
        {"gradient": ["clip"]},
        {"precision": torch.bfloat16},
    ],
    ids=str,
)
def test_impossible_settings(changes):
    with pytest.raises(ConfigError, match="is not possible"):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("out", [3, b"run", "a\0b", ["run"]])
def test_what_is_no_folder(out):
    with pytest.raises(ConfigError, match=r"out = .* is not possible; it must be the path"):
        train(SHORT, out, device="cpu", progress=False)


@pytest.mark.parametrize("name", [None, 3, ["laptop"], {}])
def test_what_is_no_preset(name):
    with pytest.raises(ConfigError, match="is not possible; it must be one of"):
        preset(name)
    if name is not None:
        with pytest.raises(ConfigError, match="is not possible; it must be one of"):
            preset("laptop", name)


YAMLS = [
    "",
    "3",
    "- steps",
    "steps",
    "steps: [1]",
    "steps: 1e3",
    "steps: 2026-01-01",
    "lr: .nan",
    "lr: -.inf",
    "lr: yes",
    "1: 2",
    "null: 3",
    "[a]: b",
    "model: 3",
    "model:",
    "model: {n_ctx: 1}",
    "model: {d_vocab: 3}",
    "data: {source: 3}",
    "data: {source: ''}",
    "data: [builtin]",
    "l0_groups: {a: }",
    "l0_groups: {3: 0.5}",
    "l0_groups: {nothing: 0.5}",
    "steps: !!python/object/apply:os.system [true]",
    "steps: 3\n\tlr: 2",
    "\0",
    "train: {steps: 3}",
]


@pytest.mark.parametrize("text", YAMLS)
def test_a_wrong_file_gives_one_line(text, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    small = ["--stdlib-chars", "0", "--idiom-chars", "20000", "--device", "cpu"]
    command = ["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), *small]
    assert main(command) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("tl-sparse: error: ")
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_the_file_of_a_configuration_is_what_was_configured(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(SHORT)))
    arguments = ["train", str(path), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(arguments) == 0


def test_a_validation_text_that_is_shorter_than_a_row(tmp_path):
    (tmp_path / "a.py").write_text("".join(idiom_documents(30_000, seed=0)))
    (tmp_path / "b.py").write_text("x\n")
    config = dataclasses.replace(SHORT, data=DataConfig(str(tmp_path)))
    message = "the validation documents have 3 tokens, fewer than one row of n_ctx = 32"
    with pytest.raises(DataError, match=message):
        train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


# --- the vocabulary


@pytest.fixture(scope="module")
def rhymes(tmp_path_factory):
    """Text that has nothing to do with Python."""
    folder = tmp_path_factory.mktemp("rhymes")
    for name, animal in (("a.txt", "lamb"), ("b.txt", "dog")):
        lines = [f"Mary had {number} little {animal}s.\n" for number in range(300)]
        (folder / name).write_text("".join(lines))
    return str(folder)


def vocabulary_of(source, d_vocab, **changes):
    model = dataclasses.replace(MODEL, d_vocab=d_vocab)
    data = DataConfig(source, **changes)
    config = dataclasses.replace(SHORT, model=model, data=data, steps=1)
    trained, _ = train(config, device="cpu", progress=False)
    return trained.tokenizer


def test_a_vocabulary_of_own_text_has_no_answers_of_tasks(rhymes):
    vocabulary_of(rhymes, d_vocab=257)  # single bytes: no room for anything else
    tokenizer = vocabulary_of(rhymes, d_vocab=270)
    assert len(token_ids(tokenizer, " enumerate")) > 1


def test_a_vocabulary_of_own_text_with_the_answers_of_tasks(rhymes):
    tokenizer = vocabulary_of(rhymes, d_vocab=384, task_answers=True)
    for text in (" enumerate", "):\n", "=None"):
        assert len(token_ids(tokenizer, text)) == 1
    message = r"258 entries has no room for \d+ of the 31 strings .* --d-vocab"
    with pytest.raises(TokenizerError, match=message):
        vocabulary_of(rhymes, d_vocab=258, task_answers=True)
