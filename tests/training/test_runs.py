"""Training runs: their files, and that going on after any interruption changes nothing."""

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import signal

import pytest
import torch

import tl_sparse
from helpers import fork_server, must_not_run, quick_config
from tl_sparse import DataConfig, TrainConfig, paper_topk, train
from tl_sparse.errors import CheckpointError, ConfigError, TrainError
from tl_sparse.training.measures import dead_neurons
from tl_sparse.training.runs import _check_same
from tl_sparse.training.tokens import batches

pytestmark = pytest.mark.any_line

MODEL = quick_config(abs_topk=paper_topk(0.25), attn_sinks=True)
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
VALIDATED = dataclasses.replace(CONFIG, validate_steps=20)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(CONFIG, folder, device="cpu", progress=False)
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(folder, expected):
    found = tl_sparse.load(folder, device="cpu").state_dict()
    for name, tensor in tl_sparse.load(expected, device="cpu").state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert log_of(folder) == log_of(expected)
    record = json.loads((folder / "training.json").read_text())
    expected_record = json.loads((expected / "training.json").read_text())
    for name in ("training_loss", "validation_loss", "nonzero_weights", "training_tokens_seen"):
        assert record[name] == expected_record[name]
    for name in ("checkpoints", "data", "run.json"):
        assert not (folder / name).exists()


def test_a_finished_run_leaves_its_log_and_no_checkpoints(uninterrupted):
    log = log_of(uninterrupted)
    assert [line["step"] for line in log] == [20, 40, 60]
    assert log[-1]["l0"] == CONFIG.l0_fraction
    assert log[-1]["loss"] < log[0]["loss"]
    assert {path.name for path in uninterrupted.iterdir()} == {
        "log.jsonl",
        "training.json",
        "config.json",
        "model.safetensors",
        "corpus_sample.safetensors",
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
    trained_again = must_not_run("the tokenizer is trained again")
    monkeypatch.setattr("tl_sparse.data.corpus.train_tokenizer", trained_again)
    read_again = must_not_run("the text is read again")
    monkeypatch.setattr("tl_sparse.data.corpus.load_documents", read_again)
    # What may change: how often checkpoints are written.
    config = dataclasses.replace(CONFIG, checkpoint_steps=0, keep_checkpoints=5)
    _, record = train(config, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert record["config"]["keep_checkpoints"] == 5
    assert_same_run(tmp_path / "run", uninterrupted)


NEVER = CONFIG.steps


def train_in_child(channel, folder, resume, hold_at):
    """Train, and send the message of the error that ended it, or None.

    Before the step with the number `hold_at`, from 0, it sends "waiting" and waits for an answer.
    """
    real = tl_sparse.training.trainer.Trainer.step

    def waiting(trainer, tokens):
        if trainer.sparsity.steps == hold_at:
            channel.send("waiting")
            channel.recv()
        return real(trainer, tokens)

    tl_sparse.training.trainer.Trainer.step = waiting
    try:
        train(CONFIG, folder, device="cpu", progress=False, resume=resume)
        channel.send(None)
    except TrainError as error:
        channel.send(str(error))


def start(folder, resume=False, hold_at=NEVER):
    """A process that trains, and a connection to it."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, folder, resume, hold_at)
    process = fork_server().Process(target=train_in_child, args=arguments)
    process.start()
    theirs.close()
    return process, ours


def finish(folder, resume=False):
    """Train to the end in a process of its own."""
    process, channel = start(folder, resume)
    assert channel.recv() is None
    process.join()


def killed_and_resumed(folder, moments):
    """Train in processes that are killed after these seconds each, and then to the end."""
    resume = False
    for moment in moments:
        process, _ = start(folder, resume)
        process.join(moment)
        process.kill()
        process.join()
        # Killed before it has written its settings, a run begins with the same command.
        resume = (folder / "run.json").exists()
        if (folder / "training.json").exists() and not resume:
            return
    finish(folder, resume)


@pytest.fixture(scope="module")
def by_one_thread(tmp_path_factory):
    """The uninterrupted run, in a process like those that are killed."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    finish(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_runs_killed_at_random_moments(seed, by_one_thread, tmp_path):
    generator = random.Random(seed)
    killed_and_resumed(tmp_path / "run", [generator.uniform(0.1, 1.8) for _ in range(2)])
    assert_same_run(tmp_path / "run", by_one_thread)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, by_one_thread, tmp_path):
    folder = tmp_path / "run"
    process, channel = start(folder, hold_at=10)
    assert channel.recv() == "waiting"
    os.kill(process.pid, number)
    channel.send("go on")
    stopped = f"stopped by {signal.Signals(number).name}; its state is saved in {folder}"
    command = f"tl-sparse train --resume --out {folder}"
    going_on = f"continue it with `{command}` (in Python, resume=True)"
    assert channel.recv() == f"training ended after step 11 of 60: {stopped}; {going_on}"
    process.join()
    finish(folder, resume=True)
    assert_same_run(folder, by_one_thread)


def test_signals_are_as_they_were_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(dataclasses.replace(CONFIG, steps=2), device="cpu", progress=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_loss_that_is_no_number_stops_before_it_does_harm(tmp_path, monkeypatch):
    real = tl_sparse.training.objective.next_token_loss
    calls = []

    def spoiled(logits, tokens):
        calls.append(1)
        return real(logits, tokens) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr("tl_sparse.training.objective.next_token_loss", spoiled)
    with pytest.raises(
        TrainError,
        match=r"training ended after step 9 of 60: the loss went from .* to nan; a smaller",
    ):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    monkeypatch.setattr("tl_sparse.training.objective.next_token_loss", real)
    train(CONFIG, tmp_path / "run", device="cpu", progress=False, resume=True)


def test_a_loss_that_jumps_stops(tmp_path):
    config = dataclasses.replace(CONFIG, lr=100.0, max_jump=0.5)
    with pytest.raises(
        TrainError, match=r"the loss went from \d.* to \d.*; a smaller lr than 100.0 may help"
    ):
        train(config, device="cpu", progress=False)


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run that is validated every 20 steps."""
    folder = tmp_path_factory.mktemp("run") / "validated"
    train(VALIDATED, folder, device="cpu", progress=False)
    return folder


def test_validation_is_logged(validated):
    log = log_of(validated)
    losses = [line["validation_loss"] for line in log]
    assert losses[0] > losses[1] > losses[2]
    # Dead neurons are counted every 100 steps, and in the end.
    assert ["dead_neurons" in line for line in log] == [False, False, True]
    assert 0 <= log[2]["dead_neurons"] < 1


def test_a_target_validation_loss_ends_the_run(validated, tmp_path):
    target = log_of(validated)[1]["validation_loss"]
    config = dataclasses.replace(VALIDATED, target_validation_loss=target)
    _, record = train(config, tmp_path / "short", device="cpu", progress=False)
    assert record["validation_loss"] == pytest.approx(target, abs=1e-6)
    assert record["training_tokens_seen"] == 40 * 4 * 32
    assert log_of(tmp_path / "short") == log_of(validated)[:2]


@pytest.mark.parametrize(
    "changes", [dict(accumulation=3), pytest.param(dict(compile=True), marks=pytest.mark.slow)]
)
def test_the_same_steps_in_other_ways(changes, monkeypatch):
    # The usual backend asks for a C++ compiler.
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    config = dataclasses.replace(CONFIG, steps=8)
    expected, _ = train(config, device="cpu", progress=False)
    found, _ = train(dataclasses.replace(config, **changes), device="cpu", progress=False)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_weights_and_loss_in_float32():
    model, record = train(CONFIG, device="cpu", progress=False)
    config = dataclasses.replace(CONFIG, precision="bfloat16")
    low_model, low_record = train(config, device="cpu", progress=False)
    assert {p.dtype for p in low_model.parameters()} == {torch.float32}
    assert not torch.equal(low_model.W_E, model.W_E)
    assert low_record["validation_loss"] == pytest.approx(record["validation_loss"], abs=0.1)


def test_dead_neurons_by_hand():
    model = tl_sparse.create(
        dataclasses.replace(MODEL, abs_topk={}, act_fn="relu"), seed=0, device="cpu"
    )
    with torch.no_grad():
        model.blocks[0].mlp.b_in[:8] = 1e3  # eight of 32 neurons are above zero …
        model.blocks[0].mlp.b_in[8:] = -1e3  # … and the others never
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
        (dict(lr=0.5), "was trained with lr = 0.01, not 0.5; to resume, use the same value"),
        (dict(steps=61), "was trained with steps = 60, not 61"),
        (
            dict(data=DataConfig(stdlib_chars=0, idiom_chars=30_000, seed=1)),
            r"was trained with data = {.*'seed': 0}, not {.*'seed': 1}; to resume, use the same",
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
def test_a_damaged_checkpoint_is_passed_over(damage, interrupted, uninterrupted):
    earlier, last = sorted((interrupted / "checkpoints").iterdir())
    raw = bytearray(last.read_bytes())
    if damage == "truncated":
        del raw[len(raw) // 2 :]
    else:
        raw[-100] ^= 1
    last.write_bytes(raw)
    message = rf"{last} is damaged .*; training goes on from {earlier.name}"
    with pytest.warns(UserWarning, match=message):
        train(CONFIG, interrupted, device="cpu", progress=False, resume=True)
    assert_same_run(interrupted, uninterrupted)


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    real = tl_sparse.training.checkpoint_files.write_tensors
    written = []

    def filling_up(path, tensors):
        if len(written) == 2:
            raise CheckpointError(f"cannot write {path}: No space left on device")
        real(path, tensors)
        written.append(path)

    monkeypatch.setattr("tl_sparse.training.checkpoint_files.write_tensors", filling_up)
    with pytest.raises(
        TrainError, match=r"cannot write .*step-00000021.*No space left on device.*are unchanged"
    ):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    monkeypatch.setattr("tl_sparse.training.checkpoint_files.write_tensors", real)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == written
    train(CONFIG, tmp_path / "run", device="cpu", progress=False, resume=True)


def test_only_an_unfinished_run_is_resumed(uninterrupted, tmp_path):
    reasons = {
        tmp_path / "absent": "there is no such folder",
        uninterrupted: "its training.json is that of a finished run",
    }
    for folder, reason in reasons.items():
        message = f"^there is no unfinished run in {folder}; {reason}$"
        with pytest.raises(TrainError, match=message):
            train(CONFIG, folder, device="cpu", progress=False, resume=True)
    with pytest.raises(TrainError, match="resume needs the folder of a run, out"):
        train(CONFIG, device="cpu", progress=False, resume=True)


def test_a_run_begins_in_an_empty_folder(uninterrupted):
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        train(CONFIG, uninterrupted, device="cpu", progress=False)


def test_no_checkpoint_yet(uninterrupted, tmp_path, monkeypatch):
    undo = stop_at(monkeypatch, 3)
    with pytest.raises(RuntimeError):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False)
    undo()
    message = r"there is no checkpoint in .* yet; training starts from the beginning"
    with pytest.warns(UserWarning, match=message):
        train(CONFIG, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(("n_rows", "batch_size"), [(10, 3), (12, 4), (2, 4)])
@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_batches_can_start_anywhere(n_rows, batch_size, start):
    rows = torch.arange(n_rows)[:, None]
    from_the_start = batches(rows, batch_size, seed=1)
    from_there = batches(rows, batch_size, seed=1, start=start)
    for _ in range(start):
        next(from_the_start)
    for _ in range(10):
        assert next(from_the_start).tolist() == next(from_there).tolist()


def test_a_run_from_before_a_field_of_the_model_existed_can_be_resumed(tmp_path):
    before = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    del before["model"]["norm_eps"]
    _check_same(before, CONFIG, tmp_path)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, norm_eps=1e-5))
    with pytest.raises(TrainError, match="was trained with model = "):
        _check_same(before, other, tmp_path)
