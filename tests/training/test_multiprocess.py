"""Several processes of `accelerate launch` train one model together; and trackers of a run."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_runs import MODEL, assert_same_run

import tl_sparse
from tl_sparse import DataConfig, TrainConfig, train
from tl_sparse.errors import ConfigError, TrainError
from tl_sparse.training.runs import to_continue

# Slow, since each process imports all libraries: `make test-all` runs them.
pytestmark = [pytest.mark.any_line, pytest.mark.slow]

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
#: In most steps, only the nonzero weights are trained.
NONZEROS = dataclasses.replace(
    SHORT, l0_fraction=0.2, min_nonzero=2, anneal_stop=0.2, dense_gradient_steps=4
)
HERE = Path(__file__).parent


def launched(*arguments, options=("--multi_gpu",)):
    """Two processes that meet on a free port of this machine; `options` are accelerate's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    # `--cpu` would start only one.
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options]
    launch += ["--num_processes", "2", "--main_process_port", port]
    command = [*launch, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def errors_of_the_command(folder):
    """What `accelerate launch -m tl_sparse train` says when one of its processes gets SIGTERM."""
    (folder / "config.yaml").write_text(json.dumps(dataclasses.asdict(SHORT)))
    out = folder / "command"
    process = launched(
        HERE / "launched_command.py",
        *("train", folder / "config.yaml", "--out", out, "--device", "cpu"),
    )
    while process.poll() is None and not (out / "waiting").exists():
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    by_rank = {child.environ().get("RANK"): child for child in children}
    by_rank["1"].send_signal(signal.SIGTERM)
    (out / "waiting").unlink()
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    return errors


@pytest.fixture(scope="module")
def seen(folder, errors_of_the_command):
    """What each of the two processes of launched.py saw: name of the run → what it was."""
    process = launched(HERE / "launched.py", folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def losses(run):
    return [loss for _, _, loss in run["hashes"]]


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
    of_first, of_second = [process["whole"]["rows"] for process in seen]
    assert rows == [a + b for a, b in zip(of_first, of_second, strict=True)]
    found = tl_sparse.load(folder / "whole", device="cpu").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name] != 0, tensor != 0), name
        # Measured: at most 5e-7.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-6, msg=name)
    of_two = seen[0]["whole"]["record"]
    for name in ("training_loss", "validation_loss"):
        assert of_two[name] == pytest.approx(record[name], abs=1e-5)
    assert of_two["training_tokens_seen"] == record["training_tokens_seen"]


def test_two_processes_train_the_same_nonzero_weights_as_one(seen, folder):
    expected, record = train(NONZEROS, device="cpu", progress=False)
    found = tl_sparse.load(folder / "nonzeros", device="cpu").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name] != 0, tensor != 0), name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-6, msg=name)
    validation_loss = seen[0]["nonzeros"]["record"]["validation_loss"]
    assert validation_loss == pytest.approx(record["validation_loss"], abs=1e-5)


def test_accumulation_and_compile_change_nothing(seen):
    expected = losses(seen[0]["whole"])
    assert losses(seen[0]["compiled"]) == pytest.approx(expected, abs=1e-4)


def test_a_signal_to_one_process_stops_all_after_the_same_step(seen, folder):
    start = "TrainError: training ended after step 8 of 12: stopped by SIGTERM"
    end = f"; its state is saved in {folder / 'stopped'}; {to_continue(folder / 'stopped')}"
    first, second = [process["stopped"] for process in seen]
    assert first["error"] == start + end
    assert second["error"] == start
    assert len(first["hashes"]) == len(second["hashes"]) == 8


def test_resuming_changes_nothing(seen, folder):
    for process in seen:
        in_two_parts = process["stopped"]["hashes"] + process["resumed"]["hashes"]
        assert in_two_parts == process["whole"]["hashes"]
    assert_same_run(folder / "stopped", folder / "whole")


def test_no_number_in_one_process_stops_all(seen, folder):
    for process in seen:
        assert "training ended after step 6 of 12: the loss went from" in process["nan"]["error"]
    checkpoints = sorted(path.name for path in (folder / "nan" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000005.safetensors", "step-00000006.safetensors"]


def test_a_batch_that_cannot_be_divided_is_refused(seen, folder):
    message = "batch_size = 5 is not possible; it must be a multiple of the 2 processes"
    for process in seen:
        assert process["odd"]["error"] == f"ConfigError: {message}"
    assert not (folder / "odd").exists()


def test_the_command_stops_with_one_state_and_goes_on(errors_of_the_command, seen, folder):
    stopped = f"stopped by SIGTERM; its state is saved in {folder / 'command'}"
    stopped += f"; {to_continue(folder / 'command')}"
    assert errors_of_the_command.count(stopped) == 1
    assert seen[0]["command"]["error"] is None
    assert 0 < len(seen[0]["command"]["hashes"]) <= 12 - 8
    assert_same_run(folder / "command", folder / "whole")


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


TRACKED = dataclasses.replace(SHORT, track="wandb")


def spoil_the_loss(monkeypatch):
    real = tl_sparse.training.objective.next_token_loss

    def not_a_number(*arguments):
        return real(*arguments) * float("nan")

    monkeypatch.setattr("tl_sparse.training.objective.next_token_loss", not_a_number)


def test_a_tracker_gets_what_is_logged(tracked, tmp_path):
    config = dataclasses.replace(TRACKED, steps=60)
    train(config, tmp_path / "run", device="cpu", progress=False)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    run_name, settings, *logged = tracked
    assert run_name == "tl_sparse"
    assert settings["lr"] == 0.01
    assert settings["model.abs_topk.attn_in"] == 0.25
    assert logged == [*map(json.loads, log.splitlines()), "finished"]


def test_a_tracker_ends_with_an_error(tracked, tmp_path, monkeypatch):
    spoil_the_loss(monkeypatch)
    with pytest.raises(TrainError, match="to nan"):
        train(TRACKED, tmp_path / "run", device="cpu", progress=False)
    assert tracked[-1] == "finished"


def test_a_run_that_was_tracked_is_resumed_without_a_tracker(tracked, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        spoil_the_loss(patched)
        with pytest.raises(TrainError, match="to nan"):
            train(TRACKED, tmp_path / "run", device="cpu", progress=False)
    tracked.clear()
    train(SHORT, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert tracked == []


def test_a_tracker_that_is_not_installed_is_named(tracked, tmp_path):
    config = dataclasses.replace(SHORT, track="tensorboard")
    message = (
        "track = 'tensorboard' is not possible; it must be 'none' until it is installed: "
        "pip install tensorboard"
    )
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(TRACKED, device="cpu", progress=False)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_killing_the_launcher_stops_its_processes(tmp_path):
    """They write a checkpoint, as after any other signal."""
    config = dataclasses.replace(SHORT, steps=100_000)
    (tmp_path / "config.yaml").write_text(json.dumps(dataclasses.asdict(config)))
    out = tmp_path / "out"
    launcher = launched(
        "-m", "tl_sparse", "train", tmp_path / "config.yaml", "--out", out, "--device", "cpu"
    )
    while launcher.poll() is None and not any((out / "checkpoints").glob("step-*")):
        time.sleep(0.1)
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert len([child for child in children if "RANK" in child.environ()]) == 2
    launcher.kill()
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive
