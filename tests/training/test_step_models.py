"""The models that a run keeps of its steps: they are those of the run, and change nothing in it."""

import dataclasses
import json
import shutil

import pytest
import torch

import tl_sparse
from helpers import quick_config
from tl_sparse import DataConfig, TrainConfig, paper_topk, train
from tl_sparse.checkpoints import kept_steps, open_with_corpus, step_folder
from tl_sparse.checkpoints.steps import name_of_model, read_step_record, write_step_record
from tl_sparse.cli.parser import build_parser
from tl_sparse.cli.training import train_config
from tl_sparse.errors import CheckpointError, ConfigError, TrainError
from tl_sparse.files import read_json
from tl_sparse.training.checkpoint_files import Checkpoints
from tl_sparse.training.objective import Objective
from tl_sparse.training.runs import Run
from tl_sparse.training.step_models import is_log_spaced

pytestmark = pytest.mark.any_line

#: Thirty steps of milliseconds, in the first twenty of which AbsTopK is annealed.
CONFIG = TrainConfig(
    model=quick_config(abs_topk=paper_topk(0.25)),
    data=DataConfig(stdlib_chars=0, idiom_chars=12_000),
    steps=30,
    batch_size=16,
    lr=1e-2,
    l0_fraction=0.25,
    topk_anneal_stop=2 / 3,
    checkpoint_steps=7,
)
KEEPING = dataclasses.replace(CONFIG, keep_checkpoints="log")
STEPS = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 30]


@dataclasses.dataclass
class Kept:
    """A run that keeps steps, and the states that it wrote into its checkpoints, by step."""

    folder: object
    states: dict


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "run"
    states = {}
    real = Checkpoints.save

    def save(checkpoints, checkpoint, processes):
        copied = {name: tensor.clone() for name, tensor in checkpoint.state.items()}
        states[len(checkpoint.losses)] = copied
        real(checkpoints, checkpoint, processes)

    config = dataclasses.replace(KEEPING, checkpoint_steps=5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Checkpoints, "save", save)
        train(config, folder, device="cpu", progress=False)
    return Kept(folder, states)


def test_the_steps_are_about_ten_in_each_factor_of_ten():
    found = [step for step in range(1, 1001) if is_log_spaced(step)]
    assert found == [
        *(1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 79, 100),
        *(126, 158, 200, 251, 316, 398, 501, 631, 794, 1000),
    ]


def test_steps_are_kept_and_checkpoints_are_not(kept):
    assert kept_steps(kept.folder) == STEPS
    assert not (kept.folder / "checkpoints").exists()
    assert {path.name for path in step_folder(kept.folder, 8).iterdir()} == {
        "config.json",
        "corpus_sample.safetensors",
        "model.safetensors",
        "step.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("step", [5, 10, 20, 25])
def test_a_kept_model_has_the_weights_and_the_topk_of_its_step(step, kept):
    model = tl_sparse.load(f"{kept.folder}@{step}", device="cpu")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, kept.states[step][f"model/{name}"]), name
    fraction = 1 - min(1, step / 20) * 0.75
    block = model.network.blocks[0]
    assert block.topk_mlp_out.k == int(fraction * 16)
    assert block.attn.topk_q.k == int(fraction * 8)
    assert block.mlp.topk.k == int(fraction * 32)
    assert model.cfg.model_name == f"run@{step}"
    assert model.tokenizer is not None


def test_its_record_measures_that_model(kept):
    _, corpus = open_with_corpus(f"{kept.folder}@10", device="cpu")
    _, expected = open_with_corpus(kept.folder, device="cpu")
    assert torch.equal(corpus, expected)
    log = [json.loads(line) for line in (kept.folder / "log.jsonl").read_text().splitlines()]
    at_20 = read_step_record(step_folder(kept.folder, 20))
    assert at_20.training_loss == log[0]["loss"]
    model = tl_sparse.load(f"{kept.folder}@20", device="cpu")
    n_nonzero = sum(int(model.get_parameter(name).count_nonzero()) for name in _matrices(model))
    assert at_20.nonzero_weights == n_nonzero < at_20.weights


def _matrices(model):
    return [name for name, _ in model.named_parameters() if ".W_" in name and "bigram" not in name]


def test_the_last_step_is_the_model_of_the_run(kept):
    record = json.loads((kept.folder / "training.json").read_text())
    last = read_step_record(step_folder(kept.folder, 30))
    assert last.validation_loss == record["validation_loss"]
    assert last.nonzero_weights == record["nonzero_weights"]
    assert last.weights == record["weights"]
    model, at_end = tl_sparse.load(kept.folder), tl_sparse.load(f"{kept.folder}@30")
    assert at_end.sparse_cfg == model.sparse_cfg == CONFIG.model
    for name, weight in model.state_dict().items():
        assert torch.equal(at_end.state_dict()[name], weight)


def test_keeping_steps_changes_nothing_in_the_run(kept, tmp_path):
    train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    for name in ("model.safetensors", "config.json", "log.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (kept.folder / name).read_bytes()
    with pytest.raises(CheckpointError, match="run keeps no models of its steps; `tl-sparse train"):
        tl_sparse.load(f"{tmp_path}/run@10")


def killed_at_step(step, monkeypatch):
    """Let a process be killed while it keeps a step; what it has written so far stays there."""

    def write(folder, record):
        if record.step == step:
            shutil.copytree(folder, folder.with_name(".saving-killed"))
            raise KeyboardInterrupt
        write_step_record(folder, record)

    monkeypatch.setattr("tl_sparse.training.step_models.write_step_record", write)


def killed_at_checkpoint(step, monkeypatch):
    """Let a process be killed before it writes a checkpoint."""

    def save(checkpoints, checkpoint, processes):
        if len(checkpoint.losses) == step:
            raise KeyboardInterrupt
        real(checkpoints, checkpoint, processes)

    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)


@pytest.mark.parametrize(("kill", "step"), [(killed_at_step, 16), (killed_at_checkpoint, 21)])
def test_resuming_keeps_the_same_files(kill, step, kept, tmp_path):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        kill(step, patched)
        with pytest.raises(KeyboardInterrupt):
            train(KEEPING, folder, device="cpu", progress=False)
    assert kept_steps(folder) == [each for each in STEPS if each < step]
    # The models of an unfinished run can be opened already.
    assert tl_sparse.load(f"{folder}@13", device="cpu").cfg.model_name == "run@13"
    train(KEEPING, folder, device="cpu", progress=False, resume=True)
    assert contents(folder / "steps") == contents(kept.folder / "steps")


def contents(folder):
    """Path → bytes of the files in a folder of steps, or the architecture in config.json.

    A tokenizer that was read from a file is written with other settings, whose checksum is there.
    """
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name == "config.json":
            found[name] = read_json(path)["abs_topk"]
        elif path.is_file() and path.name != "tokenizer_config.json":
            found[name] = path.read_bytes()
    return found


def test_all_keeps_the_model_of_every_checkpoint(kept, tmp_path):
    config = dataclasses.replace(CONFIG, keep_checkpoints="all", checkpoint_steps=10)
    train(config, tmp_path / "run", device="cpu", progress=False)
    assert kept_steps(tmp_path / "run") == [10, 20, 30]
    for step in (10, 20, 30):
        assert contents(step_folder(tmp_path / "run", step)) == contents(
            step_folder(kept.folder, step)
        )


def test_a_dense_run_that_stops_early_keeps_its_last_model(tmp_path):
    model = dataclasses.replace(CONFIG.model, abs_topk={})
    config = dataclasses.replace(
        KEEPING, model=model, l0_fraction=1.0, l0_fraction_embed=1.0, topk_anneal_stop=0.0
    )
    config = dataclasses.replace(config, validate_steps=20, target_validation_loss=100.0)
    train(config, tmp_path / "run", device="cpu", progress=False)
    assert kept_steps(tmp_path / "run") == [step for step in STEPS if step <= 20]
    first = read_step_record(step_folder(tmp_path / "run", 1))
    assert first.nonzero_weights == first.weights


def test_the_target_is_reached_by_the_model_that_is_saved(tmp_path):
    """AbsTopK is still being annealed when training stops: the model has the k of this moment."""
    config = dataclasses.replace(
        CONFIG, topk_anneal_stop=1.0, validate_steps=20, target_validation_loss=100.0
    )
    model, _ = train(config, tmp_path / "run", device="cpu", progress=False)
    saved = tl_sparse.load(tmp_path / "run", device="cpu")
    assert saved.network.blocks[0].mlp.topk.k == 16 == model.network.blocks[0].mlp.topk.k
    assert saved.sparse_cfg == model.sparse_cfg


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise CheckpointError("cannot write model.safetensors: No space left on device")

    monkeypatch.setattr("tl_sparse.training.step_models.save_model", full)
    with pytest.raises(TrainError, match=r"cannot keep the model of step 1: .*No space left on"):
        train(KEEPING, tmp_path / "run", device="cpu", progress=False)


# --- opening


@pytest.fixture
def run(tmp_path):
    """The folder of a run with empty folders of steps."""
    for step in (1, 10, 100):
        step_folder_of(tmp_path / "run", step).mkdir(parents=True)
    return tmp_path / "run"


def step_folder_of(run, step):
    return run / "steps" / f"step-{step:08}"


def test_the_message_lists_the_steps(run):
    with pytest.raises(
        CheckpointError, match=r"run keeps no model of step 11; it keeps steps 1, 10, 100$"
    ):
        tl_sparse.load(f"{run}@11")


def test_of_many_steps_the_message_lists_the_nearest(run):
    for step in range(1000, 1100):
        step_folder_of(run, step).mkdir()
    nearest = ", ".join(str(step) for step in range(1000, 1010))
    with pytest.raises(
        CheckpointError, match=rf"it keeps 103 others, of which the nearest are {nearest}$"
    ):
        tl_sparse.load(f"{run}@900")


def test_only_folders_with_the_names_of_steps_are_steps(run):
    (run / "steps" / "step-00000007").write_text("a file")
    for name in ("step-7", "step-0000000007", ".saving-1", "step-00000007x"):
        (run / "steps" / name).mkdir()
    assert kept_steps(run) == [1, 10, 100]
    assert kept_steps(run / "no such") == []


def test_other_names_are_no_steps(run):
    with pytest.raises(CheckpointError, match="there is no folder"):
        tl_sparse.load(f"{run}@last")
    with pytest.raises(CheckpointError, match="there is no folder"):
        tl_sparse.load(f"{run}er@10")
    with pytest.raises(CheckpointError, match=r"revision = 'x' is not possible"):
        tl_sparse.load(f"{run}@10", revision="x")


def test_a_folder_of_that_name_comes_first(kept, tmp_path):
    shutil.copytree(step_folder(kept.folder, 5), tmp_path / "run@10")
    shutil.copytree(kept.folder, tmp_path / "run")
    model = tl_sparse.load(f"{tmp_path}/run@10", device="cpu")
    assert torch.equal(model.embed.W_E, kept.states[5]["model/embed.W_E"])


def test_the_name_of_a_step_is_that_of_its_run(kept, tmp_path):
    folder = step_folder(kept.folder, 5)
    assert name_of_model(folder) == "run@5"
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert name_of_model(moved) == "moved"
    assert tl_sparse.load(moved, device="cpu").cfg.model_name == "moved"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"step": 1}', "step.json is damaged: 'training_loss' is missing"),
        ('{"step": "1"}', "step.json is damaged: 'step' is '1', which must be a whole number"),
    ],
)
def test_a_damaged_record_is_named(text, message, tmp_path):
    (tmp_path / "step.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_step_record(tmp_path)


# --- configurations


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "some", None, []])
def test_what_cannot_be_kept(value):
    with pytest.raises(ConfigError, match=r"keep_checkpoints = .* 'log' or 'all'"):
        TrainConfig(keep_checkpoints=value)


def test_all_needs_a_number_of_steps():
    with pytest.raises(ConfigError, match=r"checkpoint_steps = 0 .* with keep_checkpoints = 'all'"):
        TrainConfig(keep_checkpoints="all")


@pytest.mark.parametrize(("given", "value"), [("log", "log"), ("3", 3)])
def test_the_flag_takes_a_number_or_a_word(given, value):
    flags = ["train", "--out", "x", "--keep-checkpoints", given]
    assert train_config(build_parser().parse_args(flags)).keep_checkpoints == value


def test_a_run_that_was_begun_before_steps_were_kept_goes_on(tmp_path):
    Run(tmp_path, CONFIG, Objective()).write_settings()
    Run(tmp_path, KEEPING, Objective()).reopen()
