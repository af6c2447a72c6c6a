"""Runs that are killed at any moment, or whose disk is full, end as if nothing had happened."""

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_runs import CONFIG, assert_same_run, log_of, stop_at

from helpers import fork_server
from tl_sparse import DataConfig, train
from tl_sparse.cli import main
from tl_sparse.errors import DataError, TLSparseError, TrainError
from tl_sparse.locks import LOCK_FILE, folder_lock

pytestmark = pytest.mark.any_line

SHORT = dataclasses.replace(
    CONFIG, data=DataConfig(stdlib_chars=0, idiom_chars=15_000), steps=40, checkpoint_steps=10
)


#: Audit events that change files, and which of their arguments names the file.
EVENTS = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0}
OWN_ERROR = 3


def run(folder):
    """The same command again, or `resume` if there is something to resume."""
    resume = (folder / "run.json").exists()
    try:
        train(SHORT, folder, device="cpu", progress=False, resume=resume)
    except TLSparseError:
        sys.exit(OWN_ERROR)


def on_event(folder, react):
    """Call `react` with the name of every event that changes a file in `folder`."""

    def hook(event, arguments):
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(arguments[EVENTS[event]])
        # `shutil.rmtree` names the files in a folder without the folder.
        is_inside = path.is_relative_to(folder) or not path.is_absolute()
        is_change = event != "open" or (isinstance(arguments[1], str) and arguments[1] not in "rb")
        if is_inside and is_change:
            react(f"{event} {path.name}")

    sys.addaudithook(hook)


def run_and_tell(folder, channel):
    """Train, and send the names of the events."""
    events = []
    on_event(folder, events.append)
    run(folder)
    channel.send(events)


def run_and_kill(folder, number):
    """Train until the event with this number, which is not to happen."""
    n_left = [number]

    def count(event):
        if n_left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        n_left[0] -= 1

    on_event(folder, count)
    run(folder)


def run_on_full_disk(folder, n_bytes):
    """Train while no file can have more than `n_bytes`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    run(folder)


def exit_status(function, *arguments):
    """The exit status of a process that calls a function; minus its signal, if it is killed."""
    process = fork_server().Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run in a process like those that are disturbed, and the events that change its files."""
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    ours, theirs = multiprocessing.Pipe()
    assert exit_status(run_and_tell, folder, theirs) == 0
    return folder, ours.recv()


def assert_recovers(folder, expected):
    """A disturbed run, begun or resumed again, ends as if nothing had happened."""
    assert exit_status(run, folder) == 0
    assert_same_run(folder, expected)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(expected))


@pytest.mark.parametrize(
    "event",
    ["os.rename data", "os.rename step-00000020.safetensors", "os.remove run.json"],
    ids=["packing", "saving", "finishing"],
)
def test_a_kill(event, undisturbed, tmp_path):
    expected, events = undisturbed
    assert exit_status(run_and_kill, tmp_path / "run", events.index(event)) == -signal.SIGKILL
    assert_recovers(tmp_path / "run", expected)


@pytest.mark.slow
def test_a_kill_before_every_change_of_a_file(undisturbed, tmp_path):
    expected, events = undisturbed
    assert len(events) > 60
    end = events.index("os.remove run.json")
    for number in range(end + 1):
        folder = tmp_path / str(number)
        assert exit_status(run_and_kill, folder, number) == -signal.SIGKILL
        assert_recovers(folder, expected)
    # Without run.json the run has ended. Only the file of its lock may be left.
    for number in range(end + 1, len(events)):
        folder = tmp_path / str(number)
        assert exit_status(run_and_kill, folder, number) == -signal.SIGKILL
        assert_same_run(folder, expected)
        assert set(os.listdir(folder)) - {LOCK_FILE} == set(os.listdir(expected))


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes", [0, 50, 500, 3_000, 20_000, 40_000, 60_000])
def test_a_full_disk(n_bytes, undisturbed, tmp_path):
    expected, _ = undisturbed
    assert exit_status(run_on_full_disk, tmp_path / "run", n_bytes) == OWN_ERROR
    assert_recovers(tmp_path / "run", expected)


# --- files that are cut short or changed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(SHORT, folder, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run that ended after step 25, with checkpoints after steps 10 and 20."""
    folder = tmp_path_factory.mktemp("run") / "unfinished"
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 25)
        with pytest.raises(RuntimeError):
            train(SHORT, folder, device="cpu", progress=False)
    return folder


@pytest.fixture
def interrupted(unfinished, tmp_path):
    """A copy of the unfinished run."""
    return Path(shutil.copytree(unfinished, tmp_path / "run"))


def resume(folder, config=SHORT):
    return train(config, folder, device="cpu", progress=False, resume=True)


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 60, "loss": 4.',
        b'{"step": 60, "lo\xff\n',
        b"\0\0\0\0\0",
        b'{"step": 60, "loss": 3.0}\n{"step"',
        b"[]\n7\nnull\n{}\n",
    ],
)
def test_a_log_with_torn_lines(torn, interrupted, whole):
    with open(interrupted / "log.jsonl", "ab") as log:
        log.write(torn)
    resume(interrupted)
    assert_same_run(interrupted, whole)


def test_a_log_without_its_last_newline(interrupted, whole):
    log = interrupted / "log.jsonl"
    log.write_bytes(log.read_bytes().rstrip(b"\n"))
    resume(interrupted)
    assert_same_run(interrupted, whole)


def test_a_line_of_the_log_is_there_before_the_checkpoint_after_it(tmp_path, monkeypatch):
    """Killed between the two, a run that is resumed from the checkpoint would lack the line."""
    config = dataclasses.replace(SHORT, checkpoint_steps=20)

    def killed(run, values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tl_sparse.training.runs.Run.write_log", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", device="cpu", progress=False)
    with pytest.warns(UserWarning, match=r"there is no checkpoint in .* yet; training starts from"):
        resume(tmp_path / "run", config)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [20, 40]


def test_a_log_that_cannot_be_written(interrupted, whole):
    log = interrupted / "log.jsonl"
    before = log.read_bytes()
    log.unlink()
    log.mkdir()
    with pytest.raises(TLSparseError, match=r"cannot write .*log\.jsonl"):
        resume(interrupted)
    log.rmdir()
    log.write_bytes(before)
    resume(interrupted)
    assert_same_run(interrupted, whole)


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length].decode(), raw[8 + length :]


def with_header(path, header, data):
    encoded = header.encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def other_dtype(header):
    entries = json.loads(header)
    entries["model/blocks.0.mlp.b_out"]["dtype"] = "I32"
    return json.dumps(entries)


def other_shape(header):
    entries = json.loads(header)
    entries["model/blocks.0.mlp.W_in"]["shape"].reverse()
    return json.dumps(entries)


def other_step(header):
    entries = json.loads(header)
    entries["losses"], entries["step/embed.W_E"] = entries["step/embed.W_E"], entries["losses"]
    return json.dumps(entries)


def without_checksum(header):
    entries = json.loads(header)
    del entries["__metadata__"]
    return json.dumps(entries)


HEADERS = {
    "dtype": other_dtype,
    "shape": other_shape,
    "swapped": other_step,
    "no checksum": without_checksum,
    "name": lambda header: header.replace("model/blocks.0.mlp.W_in", "model/blocks.0.mlp.W_iz"),
    "moment": lambda header: header.replace("exp_avg/", "exp_avh/", 1),
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_damaged_header_is_noticed(change, interrupted, whole):
    earlier, last = sorted((interrupted / "checkpoints").iterdir())
    header, data = header_of(last)
    with_header(last, HEADERS[change](header), data)
    message = rf"{last} is damaged .*; training goes on from {earlier.name}"
    with pytest.warns(UserWarning, match=message):
        resume(interrupted)
    assert_same_run(interrupted, whole)


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_good_one(interrupted, monkeypatch):
    last = max((interrupted / "checkpoints").iterdir())
    last.write_bytes(last.read_bytes()[:-1])
    config = dataclasses.replace(SHORT, keep_checkpoints=1, checkpoint_steps=18)
    undo = stop_at(monkeypatch, 19)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(RuntimeError):
        resume(interrupted, config)
    undo()
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == [
        "step-00000018.safetensors"
    ]


def test_without_a_good_checkpoint(interrupted, whole):
    for path in (interrupted / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    message = (
        r"step-00000020.* is damaged .*step-00000010.* is damaged .*Remove .* to resume from the"
    )
    with pytest.raises(TrainError, match=message):
        resume(interrupted)
    for path in (interrupted / "checkpoints").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="training starts from the beginning"):
        resume(interrupted)
    assert_same_run(interrupted, whole)


@pytest.mark.parametrize("name", ["train", "validation", "tokenizer.json", "tokenizer_config.json"])
def test_packed_text_that_has_changed_is_packed_again(name, interrupted, whole):
    path = interrupted / "data" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match=rf"data.{name} has changed.*; the text is packed again"):
        resume(interrupted)
    assert_same_run(interrupted, whole)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"lr": 0.01', b'"lr": 0.02'), (b'"sha256"', b'"sha257"'), (b"{", b"["), (b'"steps"', b"")],
)
def test_changed_settings_are_noticed(old, new, interrupted):
    path = interrupted / "run.json"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(TrainError, match=r"run\.json .*; train into a new folder without resume"):
        resume(interrupted, dataclasses.replace(SHORT, lr=0.02 if b"lr" in old else 0.01))


def test_a_run_from_before_checksums_is_resumed(interrupted, whole):
    """Checkpoints had a checksum of their values, and run.json had none, nor one of each file."""
    from safetensors.torch import load_file, save_file

    from tl_sparse.training.checkpoint_files import _checksum

    for path in (interrupted / "checkpoints").iterdir():
        tensors = load_file(path)
        save_file(tensors | {"checksum": torch.tensor(_checksum(tensors))}, path)
    path = interrupted / "run.json"
    settings = json.loads(path.read_text())
    data = interrupted / "data"
    sizes = {name: (data / name).stat().st_size for name in ("train", "validation")}
    about = settings["data"]
    old = {"description": about["description"], "sha256": about["sha256"], "bytes": sizes}
    del settings["config"]["model"]["norm_eps"], settings["config"]["max_jump"]  # new fields
    path.write_text(json.dumps({"config": settings["config"], "data": old}))
    resume(interrupted)
    assert_same_run(interrupted, whole)


# --- what is said, and whether it helps


def test_to_resume_needs_only_the_folder(interrupted, whole):
    """The settings are those of the run; flags may change what affects no weight."""
    command = ["train", "--resume", "--out", str(interrupted), "--device", "cpu", "--quiet"]
    assert main([*command, "--steps", "999"]) == 1
    assert main([*command, "--keep-checkpoints", "1"]) == 0
    assert_same_run(interrupted, whole)


def test_to_resume_in_python_needs_only_the_folder(interrupted, whole):
    train(out=interrupted, device="cpu", progress=False, resume=True)
    assert_same_run(interrupted, whole)


def test_a_new_run_where_one_is_unfinished(interrupted, whole):
    command = f"`tl-sparse train --resume --out {interrupted}`"
    with pytest.raises(TrainError, match=f"an unfinished run in .*; continue it with {command}"):
        train(SHORT, interrupted, device="cpu", progress=False)
    resume(interrupted)
    assert_same_run(interrupted, whole)


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path):
    config = dataclasses.replace(SHORT, l0_groups={"nothing.*": 0.5})
    with pytest.raises(TLSparseError, match="no group of weights matches"):
        train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="no files at"):
        train(
            dataclasses.replace(SHORT, data=DataConfig(str(tmp_path / "nothing"))),
            tmp_path / "run",
            device="cpu",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_says_what_helps(tmp_path):
    config = dataclasses.replace(SHORT, lr=1e9)
    with pytest.raises(TrainError) as caught:
        train(config, tmp_path / "run", device="cpu", progress=False)
    message = str(caught.value)
    assert "to nan; a smaller lr than 1000000000.0 may help; its state is saved in" in message
    assert "but resume would come to the same loss; train into a new folder" in message
    with pytest.raises(TrainError, match="to nan"):
        resume(tmp_path / "run", config)
    train(SHORT, tmp_path / "new", device="cpu", progress=False)  # the advice, followed


def test_a_loss_that_jumps_says_what_helps(tmp_path):
    config = dataclasses.replace(SHORT, lr=100.0, max_jump=0.5, steps=6)
    message = r"--resume --out .* and a larger max_jump \(--max-jump\) than 0\.5$"
    with pytest.raises(TrainError, match=message):
        train(config, tmp_path / "run", device="cpu", progress=False)
    resume(tmp_path / "run", dataclasses.replace(config, max_jump=1e30))


def test_a_last_step_that_spoils_the_weights_is_noticed(tmp_path):
    config = dataclasses.replace(SHORT, lr=1e30, steps=1, warmup_fraction=0.0)
    with pytest.raises(TrainError, match="the validation loss of the trained model is nan"):
        train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- one process at a time


def test_a_second_run_in_the_same_folder_is_refused(interrupted, whole):
    before = sorted(interrupted.iterdir())
    message = r"run is in use by process \d+ on .*; wait until"
    with folder_lock(interrupted, TrainError):
        for how in (False, True):
            with pytest.raises(TrainError, match=message):
                train(SHORT, interrupted, device="cpu", progress=False, resume=how)
    assert sorted(interrupted.iterdir()) == before
    resume(interrupted)
    assert_same_run(interrupted, whole)


def test_the_lock_is_gone_after_an_error(interrupted):
    assert not (interrupted / LOCK_FILE).exists()
