"""Runs whose weights are sharded over processes, against one process that holds all of them."""

import dataclasses
import json
import shutil

import pytest
import torch
from test_multiprocess import launched
from test_runs import MODEL

import tl_sparse
from sharded_runs import ENVIRONMENT, Job, seen_by, what_is_seen
from tl_sparse import DataConfig, TrainConfig, train
from tl_sparse.bridges.objective import BridgeObjective
from tl_sparse.errors import ConfigError, TrainError, UnsupportedError
from tl_sparse.training import Objective
from tl_sparse.training.runs import to_continue

pytestmark = pytest.mark.any_line
# Slow, since there are several processes: `make test-all` runs them.
slow = pytest.mark.slow

#: Batches that two and three processes can divide. Of the two heads, a third process has none.
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(stdlib_chars=0, idiom_chars=30_000),
    steps=12,
    batch_size=6,
    lr=1e-2,
    l0_fraction=0.25,
    min_nonzero=2,
    checkpoint_steps=5,
    validate_steps=20,
)
#: The paper's text: clipped gradients, AdamW, sparse biases, Q, K and V apart; and a bigram table
#: whose last row is not trained.
PAPER = dataclasses.replace(
    CONFIG,
    steps=6,
    gradient="clip",
    decay="adamw",
    sparse_biases=True,
    fused_qkv=False,
    last_bigram_row=False,
    keep_checkpoints="log",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process sees that holds all weights."""
    begun = Job("begun", CONFIG, folder / "from_one", stop_after=5)
    jobs = [Job("whole", CONFIG, folder / "one"), Job("paper", PAPER, folder / "one_paper"), begun]
    return {job.name: what_is_seen(job) for job in jobs}


@pytest.fixture(scope="module")
def of_two(folder, alone):
    """What two processes see."""
    jobs = [
        Job("whole", CONFIG, folder / "two"),
        Job("begun", CONFIG, folder / "resumed", stop_after=5),
        Job("from_one", CONFIG, folder / "from_one", resume=True),
    ]
    seen = seen_by(2, jobs, folder)
    shutil.copytree(folder / "resumed", folder / "begun_by_two")
    return seen


@pytest.fixture(scope="module")
def of_three(folder, of_two):
    """What three processes see."""
    jobs = [
        Job("paper", PAPER, folder / "three_paper"),
        Job("resumed", CONFIG, folder / "resumed", resume=True, stop_after=8),
    ]
    return seen_by(3, jobs, folder)


def assert_same_steps(found, expected):
    """The same zero patterns; losses that differ only by the order of sums."""
    assert len(found) == len(expected)
    for step, other in zip(found, expected, strict=True):
        assert step[0] == pytest.approx(other[0], abs=5e-6)  # measured: at most 5e-7
        assert step[1:] == other[1:]


def assert_same_model(found, expected):
    expected = tl_sparse.load(expected, device="cpu").state_dict()
    for name, tensor in tl_sparse.load(found, device="cpu").state_dict().items():
        assert torch.equal(tensor != 0, expected[name] != 0), name
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-6, msg=name)


@slow
def test_two_processes_train_what_one_would(of_two, alone, folder):
    for seen in of_two:
        assert seen["whole"]["error"] is None
        assert "the weights are sharded over processes" in seen["whole"]["saving"]
        assert_same_steps(seen["whole"]["steps"], alone["whole"]["steps"])
    assert_same_model(folder / "two", folder / "one")
    assert sorted(p.name for p in (folder / "two").iterdir()) == sorted(
        p.name for p in (folder / "one").iterdir()
    )
    record, expected = of_two[0]["whole"]["record"], alone["whole"]["record"]
    assert record["sharded"]
    assert record["processes"] == 2
    assert not expected["sharded"]
    assert record["nonzero_weights"] == expected["nonzero_weights"]
    for name in ("training_loss", "validation_loss"):
        assert record[name] == pytest.approx(expected[name], abs=1e-5)


@slow
def test_each_process_holds_its_part(of_two, of_three, alone):
    """Weights and moments, and so gradients, which are as large as the weights."""
    whole = alone["whole"]["bytes"]
    for seen in of_two:
        # Every axis of this model is even.
        assert seen["whole"]["bytes"]["weights"] == whole["weights"] / 2
        assert seen["whole"]["bytes"]["moments"] == whole["moments"] / 2
    parts = [seen["resumed"]["bytes"]["weights"] for seen in of_three]
    assert sum(parts) == whole["weights"]
    assert max(parts) < 0.36 * whole["weights"]


@slow
def test_the_paper_s_recipe_with_a_process_that_holds_no_head(of_three, alone, folder):
    for seen in of_three:
        assert seen["paper"]["error"] is None
        assert_same_steps(seen["paper"]["steps"], alone["paper"]["steps"])
    assert_same_model(folder / "three_paper", folder / "one_paper")


@slow
def test_the_models_of_steps_are_kept(of_three, alone, folder):
    for step in (1, 2, 3, 4, 5, 6):
        assert_same_model(f"{folder}/three_paper@{step}", f"{folder}/one_paper@{step}")


@slow
def test_other_numbers_of_processes_go_on(of_two, of_three, alone, folder):
    """Two begin, three go on, and one that holds all weights ends the run."""
    expected = alone["whole"]["steps"]
    state = f"its state is saved in {folder / 'resumed'}; {to_continue(folder / 'resumed')}"
    for seen, n_steps in ((of_two[0]["begun"], 6), (of_three[0]["resumed"], 9)):
        message = f"training ended after step {n_steps} of 12: stopped by SIGTERM; {state}"
        assert seen["error"] == f"TrainError: {message}"
    assert_same_steps(of_two[1]["begun"]["steps"], expected[:6])
    assert_same_steps(of_three[2]["resumed"]["steps"], expected[6:9])
    last = what_is_seen(Job("last", CONFIG, folder / "resumed", resume=True))
    assert last["error"] is None
    assert_same_steps(last["steps"], expected[9:])
    assert_same_model(folder / "resumed", folder / "one")


@slow
def test_a_run_of_one_process_goes_on_sharded(of_two, alone, folder):
    for seen in of_two:
        assert seen["from_one"]["error"] is None
        assert_same_steps(seen["from_one"]["steps"], alone["whole"]["steps"][6:])
    assert_same_model(folder / "from_one", folder / "one")


@slow
def test_a_damaged_checkpoint_is_passed_over(of_two, folder, tmp_path):
    """Of two, the one before is used; if both are damaged, both are named."""
    run = tmp_path / "run"
    shutil.copytree(folder / "begun_by_two", run)
    last, before = sorted((run / "checkpoints").iterdir(), reverse=True)
    assert [last.name, before.name] == ["step-00000006.sharded", "step-00000005.sharded"]
    shard = next(last.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"step-00000006.sharded is damaged .* goes on from step-0"
    ):
        train(CONFIG, run, device="cpu", progress=False, resume=True)
    assert_same_model(run, folder / "one")


@slow
def test_damaged_checkpoints_alone_are_refused(of_two, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "begun_by_two", run)
    for checkpoint in (run / "checkpoints").iterdir():
        next(checkpoint.glob("*.safetensors")).unlink()
    with pytest.raises(TrainError, match=r"is missing; it was saved together .* no earlier"):
        train(CONFIG, run, device="cpu", progress=False, resume=True)


@slow
def test_another_configuration_is_refused(of_two, folder):
    other = dataclasses.replace(CONFIG, lr=2e-2)
    with pytest.raises(TrainError, match=r"was trained with lr = 0.01, not 0.02"):
        train(other, folder / "begun_by_two", device="cpu", progress=False, resume=True)


@slow
def test_the_command_that_accelerate_launches(alone, folder):
    (folder / "config.yaml").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    out = folder / "launched"
    process = launched(
        *("-m", "tl_sparse", "train", folder / "config.yaml", "--out", out, "--device", "cpu"),
        options=("--use_fsdp", "--fsdp_version", "2"),
    )
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads((out / "training.json").read_text())["sharded"]
    assert_same_model(out, folder / "one")


# --- what is refused, before there is any process


@pytest.fixture
def asked_for(monkeypatch):
    """As in a process that `accelerate launch --use_fsdp --fsdp_version 2` has started."""
    for name, value in {**ENVIRONMENT, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refused(tmp_path, message, config=CONFIG, error=ConfigError, objective=None):
    with pytest.raises(error, match=message):
        tl_sparse.training.train_towards(
            objective or Objective(), config, tmp_path / "run", "cpu", False, False
        )
    assert not (tmp_path / "run").exists()


def test_compiled_models_are_not_sharded(asked_for, tmp_path):
    config = dataclasses.replace(CONFIG, compile=True)
    message = "compile = True is not possible; it must be false while the weights are sharded"
    refused(tmp_path, message, config)


def test_steps_without_a_dense_gradient_are_not_sharded(asked_for, tmp_path):
    config = dataclasses.replace(CONFIG, l0_fraction=0.125, dense_gradient_steps=8)
    message = "dense_gradient_steps = 8 is not possible; it must be 1 while the weights are sharded"
    refused(tmp_path, message, config)


def test_bridges_are_not_trained_with_sharded_weights(asked_for, tmp_path):
    class WithBridges(BridgeObjective):
        def __init__(self):
            pass

    message = "`tl-sparse bridge` cannot shard weights: launch it without --use_fsdp"
    refused(tmp_path, message, error=UnsupportedError, objective=WithBridges())


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "--fsdp_version = '1' is not possible; it must be 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params = 'true' is not possible"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "it must be 'no'; precision = 'bfloat16'"),
    ],
)
def test_options_of_accelerate_that_do_not_fit_are_named(
    asked_for, tmp_path, variable, value, message
):
    asked_for.setenv(variable, value)
    refused(tmp_path, message)


def test_an_accelerate_without_fsdp2_is_named(asked_for, tmp_path):
    @dataclasses.dataclass
    class OldPlugin:
        sharding_strategy: str = "FULL_SHARD"

    asked_for.setattr("accelerate.FullyShardedDataParallelPlugin", OldPlugin)
    refused(tmp_path, "accelerate = .* is not possible; it must be at least 1.6")


def test_a_torch_without_safetensors_checkpoints_is_named(asked_for, tmp_path):
    asked_for.setattr("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter", object)
    refused(tmp_path, "torch = .* is not possible; it must be at least 2.9")
