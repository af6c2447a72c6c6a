"""Several processes of `accelerate launch` train one model together; what is logged also reaches a
tracker.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from test_runs import MODEL, assert_same_run

import tl_sparse
from tl_sparse import DataConfig, TrainConfig, train
from tl_sparse.errors import ConfigError, TrainError

SHORT = TrainConfig(
    model=MODEL,
    data=DataConfig(stdlib_chars=0, idiom_chars=30_000),
    steps=12,
    batch_size=4,
    lr=1e-2,
    l0_fraction=0.25,
    checkpoint_steps=5,
    validate_steps=20,
)
LONG = dataclasses.replace(SHORT, steps=150)
#: Every process writes what it saw, for the tests: `hashes` has one of all weights after each step.
PROGRAM = """
import dataclasses, functools, hashlib, json, os, signal, sys
from pathlib import Path
import torch
import tl_sparse.training as training
from test_multiprocess import LONG, SHORT
from tl_sparse.errors import TLSparseError

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
step, backward, seen = training.Trainer.step, training.Trainer._backward, {}
# quick, and asks for no C++ compiler
torch.compile = functools.partial(torch.compile, backend="eager")

def run(name, config, out=None, resume=False, before=lambda done: None, factor=lambda done: 1.0):
    hashes, rows = [], []
    def recording(trainer, tokens):
        before(trainer.sparsity.steps)
        loss = step(trainer, tokens)
        weights = b"".join(p.detach().numpy().tobytes() for p in trainer.model.state_dict().values())
        hashes.append((hashlib.sha256(weights).hexdigest(), trainer.sparsity.l0(), float(loss)))
        rows.append(tokens.tolist())
        return loss
    training.Trainer.step = recording
    training.Trainer._backward = lambda self, tokens: backward(self, tokens) * factor(self.sparsity.steps)
    try:
        _, record = training.train(config, out, "cpu", progress=False, resume=resume)
        end = {"error": None, "record": record}
    except TLSparseError as error:
        end = {"error": f"{type(error).__name__}: {error}"}
    seen[name] = {"hashes": hashes, "rows": rows, **end}

def terminated(done):
    if done == 7 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)

run("whole", SHORT, folder / "whole")
run("stopped", SHORT, folder / "stopped", before=terminated)
run("resumed", SHORT, folder / "stopped", resume=True)
run("nan", SHORT, folder / "nan", factor=lambda done: float("nan") if (done, rank) == (6, 1) else 1.0)
run("odd", dataclasses.replace(SHORT, batch_size=5), folder / "odd")
run("other", dataclasses.replace(SHORT, accumulation=2, compile=True))
run("long", LONG, folder / "long")
run("command", LONG, folder / "command", resume=True)
(folder / f"seen-{rank}.json").write_text(json.dumps(seen))
"""


def launched(*command):
    """Two processes that meet on a free port of this machine. `--multi_gpu`, since `--cpu` would
    start one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if sys.platform == "darwin":
        env["GLOO_SOCKET_IFNAME"] = "lo0"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command = [*launch, "--main_process_port", port, *map(str, command)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def errors_of_the_command(folder):
    """What `accelerate launch -m tl_sparse train` says, of whose processes one gets SIGTERM while
    it trains.
    """
    (folder / "config.yaml").write_text(json.dumps(dataclasses.asdict(LONG)))
    out = folder / "command"
    process = launched(
        "-m", "tl_sparse", "train", folder / "config.yaml", "--out", out, "--device", "cpu"
    )
    while process.poll() is None and not any((out / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    ranks = {
        p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(recursive=True)
    }
    ranks["1"].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    return errors


@pytest.fixture(scope="module")
def seen(folder, errors_of_the_command):
    (folder / "program.py").write_text(PROGRAM)
    process = launched(folder / "program.py", folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def test_all_processes_have_the_same_weights_after_every_step(seen):
    for name in seen[0]:
        assert seen[0][name]["hashes"] == seen[1][name]["hashes"], name
    assert len(seen[0]["whole"]["hashes"]) == 12
    assert seen[0]["whole"]["hashes"][-1][1] == seen[0]["whole"]["record"]["nonzero_weights"]


def test_two_processes_train_what_one_would(seen, folder, monkeypatch):
    rows = []
    real = tl_sparse.training.trainer.Trainer.step

    def recording(trainer, tokens):
        rows.append(tokens.tolist())
        return real(trainer, tokens)

    monkeypatch.setattr("tl_sparse.training.trainer.Trainer.step", recording)
    expected, record = train(SHORT, device="cpu", progress=False)
    assert rows == [
        a + b for a, b in zip(seen[0]["whole"]["rows"], seen[1]["whole"]["rows"], strict=True)
    ]
    ours = tl_sparse.load(folder / "whole", device="cpu").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours[name] != 0, tensor != 0), name
        torch.testing.assert_close(
            ours[name], tensor, rtol=0, atol=5e-6, msg=name
        )  # measured: at most 5e-7
    for name in ("training_loss", "validation_loss"):
        assert seen[0]["whole"]["record"][name] == pytest.approx(record[name], abs=1e-5)
    assert seen[0]["whole"]["record"]["training_tokens_seen"] == record["training_tokens_seen"]


def test_accumulation_and_compile_change_nothing(seen):
    ours, expected = (
        [loss for _, _, loss in seen[0][name]["hashes"]] for name in ("other", "whole")
    )
    assert ours == pytest.approx(expected, abs=1e-4)


def test_a_signal_to_one_process_stops_all_after_the_same_step(seen, folder):
    start = "TrainError: training ended after step 8 of 12: stopped by SIGTERM"
    assert (
        seen[0]["stopped"]["error"]
        == f"{start}; its state is in {folder / 'stopped'}, and resume goes on"
    )
    assert seen[1]["stopped"]["error"] == start
    assert [len(process["stopped"]["hashes"]) for process in seen] == [8, 8]


def test_resuming_changes_nothing(seen, folder):
    for process in seen:
        assert (
            process["stopped"]["hashes"] + process["resumed"]["hashes"]
            == process["whole"]["hashes"]
        )
    assert_same_run(folder / "stopped", folder / "whole")


def test_no_number_in_one_process_stops_all(seen, folder):
    for process in seen:
        assert "training ended after step 6 of 12: the loss went from" in process["nan"]["error"]
    assert [path.name for path in (folder / "nan" / "checkpoints").iterdir()] == [
        f"step-{done:08}.safetensors" for done in (5, 6)
    ]


def test_a_batch_that_cannot_be_divided_is_refused(seen, folder):
    for process in seen:
        message = (
            "ConfigError: batch_size = 5 is not possible; it must be a multiple of the 2 processes"
        )
        assert process["odd"]["error"] == message
    assert not (folder / "odd").exists()


def test_the_command_stops_with_one_state_and_goes_on(errors_of_the_command, seen, folder):
    stopped = f"stopped by SIGTERM; its state is in {folder / 'command'}, and resume goes on"
    assert errors_of_the_command.count(stopped) == 1
    assert seen[0]["command"]["error"] is None
    assert 0 < len(seen[0]["command"]["hashes"]) < 150
    assert_same_run(folder / "command", folder / "long")


# --- trackers, in one process


@pytest.fixture
def tracked(monkeypatch):
    """accelerate's wandb, replaced by one that only remembers."""
    import accelerate.tracking
    from accelerate.utils import LoggerType

    calls = []

    class Tracker(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None

        def __init__(self, run_name):
            super().__init__()
            calls.append(run_name)

        def start(self):
            pass

        def store_init_configuration(self, values):
            calls.append(values)

        def log(self, values, step):
            assert values["step"] == step
            calls.append(values)

        def finish(self):
            calls.append("finished")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    return calls


def test_a_tracker_gets_what_is_logged(tracked, tmp_path):
    config = dataclasses.replace(SHORT, steps=60, track="wandb")
    train(config, tmp_path / "run", device="cpu", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert tracked[0] == "tl_sparse"
    assert (tracked[1]["lr"], tracked[1]["model.abs_topk.attn_in"]) == (0.01, 0.25)
    assert tracked[2:] == [*lines, "finished"]


def test_a_tracker_ends_with_an_error_and_does_not_hinder_resuming(tracked, tmp_path, monkeypatch):
    tracking = dataclasses.replace(SHORT, track="wandb")
    real = tl_sparse.training.trainer.next_token_loss
    monkeypatch.setattr(
        "tl_sparse.training.trainer.next_token_loss", lambda *args: real(*args) * float("nan")
    )
    with pytest.raises(TrainError, match="to nan"):
        train(tracking, tmp_path / "run", device="cpu", progress=False)
    assert tracked.pop() == "finished"
    monkeypatch.setattr("tl_sparse.training.trainer.next_token_loss", real)
    seen = len(tracked)
    train(SHORT, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert len(tracked) == seen


def test_a_tracker_that_is_not_installed_is_named(tracked, tmp_path):
    message = "track = 'tensorboard' is not possible; it must be 'none' until it is installed: pip install tensorboard"
    with pytest.raises(ConfigError, match=message):
        train(
            dataclasses.replace(SHORT, track="tensorboard"),
            tmp_path / "run",
            device="cpu",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(dataclasses.replace(SHORT, track="wandb"), device="cpu", progress=False)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
