"""Training runs: what is on disk while they go on, and that going on after any interruption changes
nothing.
"""

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import tl_sparse
from tl_sparse import DataConfig, SparseConfig, TrainConfig, paper_topk, train
from tl_sparse.errors import ConfigError, TrainError
from tl_sparse.training.loop import batches, dead_neurons

MODEL = SparseConfig(
    n_layers=1,
    d_model=16,
    n_heads=2,
    d_head=4,
    d_mlp=32,
    d_vocab=384,
    n_ctx=32,
    abs_topk=paper_topk(0.25),
    attn_sinks=True,
    bigram_table=True,
)
#: Sixty steps of milliseconds; the text is the same few lines of idioms.
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(stdlib_chars=0, idiom_chars=30_000),
    steps=60,
    batch_size=4,
    lr=1e-2,
    l0_fraction=0.25,
    checkpoint_steps=7,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(CONFIG, folder, device="cpu", progress=False)
    return folder


def assert_same_run(folder, expected):
    ours, theirs = (tl_sparse.load(path, device="cpu").state_dict() for path in (folder, expected))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    logs = [
        [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for path in (folder, expected)
    ]
    assert logs[0] == logs[1]
    records = [json.loads((path / "training.json").read_text()) for path in (folder, expected)]
    for name in ("training_loss", "validation_loss", "nonzero_weights", "training_tokens_seen"):
        assert records[0][name] == records[1][name]
    assert not (folder / "checkpoints").exists()
    assert not (folder / "data").exists()
    assert not (folder / "run.json").exists()


def test_a_finished_run_leaves_its_log_and_no_checkpoints(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["l0"] == CONFIG.l0_fraction
    assert lines[-1]["loss"] < lines[0]["loss"]
    expected = {
        "log.jsonl",
        "training.json",
        "config.json",
        "model.safetensors",
        "corpus_sample.safetensors",
    }
    assert {path.name for path in uninterrupted.iterdir()} - expected == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def stop_at(monkeypatch, step):
    """Let the step with this number, from 0, raise."""
    real = tl_sparse.training.trainer.Trainer.step

    def stopping(trainer, tokens):
        if trainer.sparsity.steps == step:
            raise RuntimeError("the machine is gone")
        return real(trainer, tokens)

    monkeypatch.setattr("tl_sparse.training.trainer.Trainer.step", stopping)
    return lambda: monkeypatch.setattr("tl_sparse.training.trainer.Trainer.step", real)


@pytest.mark.parametrize("step", [7, 20, 41, 59])
def test_resuming_changes_nothing(step, uninterrupted, tmp_path, monkeypatch):
    undo = stop_at(monkeypatch, step)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    undo()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    last = step // 7 * 7
    assert names == [f"step-{done:08}.safetensors" for done in (last - 7, last) if done]
    # The text is not read again, nor the tokenizer trained.
    monkeypatch.setattr("tl_sparse.data.corpus.train_tokenizer", None)
    monkeypatch.setattr("tl_sparse.data.corpus.load_documents", None)
    # What may change: how often checkpoints are written.
    config = dataclasses.replace(CONFIG, checkpoint_steps=0, keep_checkpoints=5)
    _, record = train(config, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert record["config"]["keep_checkpoints"] == 5
    assert_same_run(tmp_path / "run", uninterrupted)


PROGRAM = """
import sys
from test_runs import CONFIG, train
print("ready", flush=True)
train(CONFIG, sys.argv[1], device="cpu", progress=False, resume=sys.argv[2] == "resume")
"""


def start(folder, how="start"):
    """A process that trains; it has imported everything when this returns."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), how]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "ready\n"
    return process


def killed_and_resumed(folder, moments):
    """Train in processes that are killed at the given moments, in seconds from their start, then to
    the end.
    """
    how = "start"
    for moment in moments:
        process = start(folder, how)
        time.sleep(moment)
        process.kill()
        process.communicate()
        if (folder / "training.json").exists():
            return
        # Killed before its first checkpoint, a run is begun again.
        resumable = any((folder / "checkpoints").glob("step-*.safetensors"))
        how = "resume" if resumable else "start"
        if not resumable and folder.exists():
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    process = start(folder, how)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def by_one_thread(tmp_path_factory):
    """The uninterrupted run, in a process like those that are killed."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    killed_and_resumed(folder, [])
    return folder


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(by_one_thread, tmp_path):
    generator = random.Random(0)
    killed_and_resumed(tmp_path / "run", [generator.uniform(0.2, 1.6) for _ in range(3)])
    assert_same_run(tmp_path / "run", by_one_thread)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_runs_killed_at_random_moments(seed, by_one_thread, tmp_path):
    generator = random.Random(seed)
    killed_and_resumed(tmp_path / "run", [generator.uniform(0.1, 1.8) for _ in range(2)])
    assert_same_run(tmp_path / "run", by_one_thread)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, by_one_thread, tmp_path):
    process = start(tmp_path / "run")
    while not any((tmp_path / "run" / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert (
        f"stopped by {signal.Signals(number).name}; its state is in {tmp_path / 'run'}, and resume goes on"
        in errors
    )
    process = start(tmp_path / "run", "resume")
    process.communicate()
    assert_same_run(tmp_path / "run", by_one_thread)


def test_signals_are_as_they_were_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(dataclasses.replace(CONFIG, steps=2), device="cpu", progress=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_loss_that_is_no_number_stops_before_it_does_harm(tmp_path, monkeypatch):
    real = tl_sparse.training.trainer.next_token_loss
    calls = []

    def spoiled(logits, tokens):
        calls.append(1)
        return real(logits, tokens) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr("tl_sparse.training.trainer.next_token_loss", spoiled)
    with pytest.raises(
        TrainError,
        match=r"training ended after step 9 of 60: the loss went from .* to nan; a smaller",
    ):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    monkeypatch.setattr("tl_sparse.training.trainer.next_token_loss", real)
    train(CONFIG, tmp_path / "run", device="cpu", progress=False, resume=True)


def test_a_loss_that_jumps_stops(tmp_path):
    config = dataclasses.replace(CONFIG, lr=100.0, max_jump=0.5)
    with pytest.raises(
        TrainError, match=r"the loss went from \d.* to \d.*; a smaller lr than 100.0 may help"
    ):
        train(config, device="cpu", progress=False)


def test_validation_is_logged_and_can_end_the_run(tmp_path):
    config = dataclasses.replace(CONFIG, validate_steps=20)
    train(config, tmp_path / "whole", device="cpu", progress=False)
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]
    losses = [line["validation_loss"] for line in lines]
    assert losses[0] > losses[1] > losses[2]
    assert ["dead_neurons" in line for line in lines] == [
        False,
        False,
        True,
    ]  # every 100 steps, and in the end
    assert 0 <= lines[2]["dead_neurons"] < 1
    _, record = train(
        dataclasses.replace(config, target_validation_loss=losses[1]),
        tmp_path / "short",
        device="cpu",
        progress=False,
    )
    assert record["validation_loss"] == pytest.approx(losses[1], abs=1e-6)
    assert record["training_tokens_seen"] == 40 * 4 * 32
    whole, short = (
        (tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "short")
    )
    assert short == whole[:2]


@pytest.mark.parametrize("changes", [dict(accumulation=3), dict(compile=True)])
def test_the_same_steps_in_other_ways(changes, monkeypatch):
    # The usual backend asks for a C++ compiler.
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    (expected, _), (ours, _) = (
        train(dataclasses.replace(CONFIG, steps=8, **more), device="cpu", progress=False)
        for more in ({}, changes)
    )
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_weights_and_loss_in_float32():
    (model, exact), (low, record) = (
        train(dataclasses.replace(CONFIG, precision=precision), device="cpu", progress=False)
        for precision in ("float32", "bfloat16")
    )
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert not torch.equal(low.W_E, model.W_E)
    assert record["validation_loss"] == pytest.approx(exact["validation_loss"], abs=0.1)


def test_dead_neurons_by_hand():
    model = tl_sparse.create(
        dataclasses.replace(MODEL, abs_topk={}, act_fn="relu"), seed=0, device="cpu"
    )
    with torch.no_grad():
        model.blocks[0].mlp.b_in[:] = -1e3  # no neuron is ever above zero …
        model.blocks[0].mlp.b_in[:8] = 1e3  # … but eight of 32
    assert dead_neurons(model, torch.arange(64).view(2, 32)) == 0.75


# --- what cannot be resumed


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    undo = stop_at(monkeypatch, 20)
    with pytest.raises(RuntimeError):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    undo()
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=0.5), "was trained with lr = 0.01, not 0.5; to resume, ask for the same"),
        (dict(steps=61), "was trained with steps = 60, not 61"),
        (
            dict(data=DataConfig(stdlib_chars=0, idiom_chars=30_000, seed=1)),
            r"was trained with data = {.*'seed': 0}, not {.*'seed': 1}; to resume, ask for the same",
        ),
        (dict(model=dataclasses.replace(MODEL, d_mlp=40)), "was trained with model = "),
    ],
)
def test_another_configuration_or_text_is_refused(changes, message, interrupted):
    before = contents(interrupted)
    with pytest.raises(TrainError, match=message):
        train(
            dataclasses.replace(CONFIG, **changes),
            interrupted,
            device="cpu",
            progress=False,
            resume=True,
        )
    assert contents(interrupted) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_offers_the_one_before(damage, interrupted, uninterrupted):
    earlier, last = sorted((interrupted / "checkpoints").iterdir())
    raw = bytearray(last.read_bytes())
    if damage == "truncated":
        del raw[len(raw) // 2 :]
    else:
        raw[-100] ^= 1
    last.write_bytes(raw)
    with pytest.raises(
        TrainError, match=rf"{last} is .*damaged.*; remove it to go on from {earlier.name}"
    ):
        train(CONFIG, interrupted, device="cpu", progress=False, resume=True)
    last.unlink()
    train(CONFIG, interrupted, device="cpu", progress=False, resume=True)
    assert_same_run(interrupted, uninterrupted)


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    real = tl_sparse.training.runs.write_tensors
    written = []

    def filling_up(path, tensors):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        real(path, tensors)
        written.append(path)

    monkeypatch.setattr("tl_sparse.training.runs.write_tensors", filling_up)
    with pytest.raises(
        TrainError, match=r"cannot write .*step-00000021.*No space left on device.*as they were"
    ):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    monkeypatch.setattr("tl_sparse.training.runs.write_tensors", real)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == written
    train(CONFIG, tmp_path / "run", device="cpu", progress=False, resume=True)


def test_only_an_unfinished_run_is_resumed(uninterrupted, tmp_path):
    for folder in (None, tmp_path / "absent", uninterrupted):
        with pytest.raises(
            TrainError, match=r"there is no unfinished run in .*training\.json instead"
        ):
            train(CONFIG, folder, device="cpu", progress=False, resume=True)
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        train(CONFIG, uninterrupted, device="cpu", progress=False)


def test_no_checkpoint_yet(tmp_path, monkeypatch):
    undo = stop_at(monkeypatch, 3)
    with pytest.raises(RuntimeError):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    undo()
    with pytest.raises(
        TrainError, match=r"there is no checkpoint in .*; train into a new folder without resume"
    ):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False, resume=True)


@pytest.mark.parametrize(("n_rows", "batch_size"), [(10, 3), (12, 4), (2, 4)])
@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_batches_can_start_anywhere(n_rows, batch_size, start):
    rows = torch.arange(n_rows)[:, None]
    all_of_them, from_there = (
        batches(rows, batch_size, seed=1),
        batches(rows, batch_size, seed=1, start=start),
    )
    for _ in range(start):
        next(all_of_them)
    for _ in range(10):
        assert next(all_of_them).tolist() == next(from_there).tolist()
