"""Locks on folders."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from helpers import script_environment
from tl_sparse.errors import SuiteError, TrainError
from tl_sparse.locks import LOCK_FILE, folder_lock

pytestmark = pytest.mark.any_line

HOLDER = """
import sys, time
from pathlib import Path
from tl_sparse.errors import TrainError
from tl_sparse.locks import folder_lock
with folder_lock(Path(sys.argv[1]), TrainError):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=script_environment())
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_two_processes(other_process, tmp_path):
    message = rf"run is in use by process {other_process.pid} on .*; wait until it ends, or use"
    with pytest.raises(SuiteError, match=message), folder_lock(tmp_path / "run", SuiteError):
        pytest.fail("the folder is locked")
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with folder_lock(tmp_path / "run", SuiteError):
        pass  # a process that is killed leaves no lock


def test_the_same_process_twice(tmp_path):
    with folder_lock(tmp_path, TrainError):
        again = folder_lock(tmp_path, TrainError)
        with pytest.raises(TrainError, match=rf"in use by process {os.getpid()} on"), again:
            pytest.fail("the folder is locked")
        assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_ends_with_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path / "a" / "b", TrainError):
        raise KeyboardInterrupt
    assert not (tmp_path / "a" / "b").exists()  # it was made for the lock
    (tmp_path / "file").touch()
    with folder_lock(tmp_path, TrainError):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    lock = folder_lock(tmp_path / "file" / "run", TrainError)
    with pytest.raises(TrainError, match=r"cannot write to .*file.run"), lock:
        pytest.fail("it is not a folder")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    def no_locks(lock, **_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    lock = folder_lock(tmp_path / "run", TrainError)
    with pytest.warns(UserWarning, match="has no locks, so nothing prevents"), lock:
        (tmp_path / "run" / "result").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]
