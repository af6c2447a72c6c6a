"""Suites and searches that are killed: nobody stays behind, and the same command completes them."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from helpers import command_flags, script_environment
from micro import QUICK_SETTINGS, save_micro, save_pairs
from tl_sparse.files import read_json

pytestmark = pytest.mark.any_line

N_KILLS = 10
posix = pytest.mark.skipif(os.name != "posix", reason="only POSIX has SIGKILL")


def start(*words):
    """`tl-sparse` with these arguments, as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tl_sparse", *words],
        env=script_environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(*words):
    process = start(*words)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


@pytest.fixture
def suite_command(tmp_path):
    """The command of a suite of two tasks and two seeds, without the folder of its results."""
    model = save_micro(tmp_path / "one")
    tasks = [save_pairs(tmp_path / f"{name}.jsonl") for name in ("first", "second")]
    words = ["suite", model, "--tasks", ",".join(tasks), "--seeds", "0,1", "--device", "cpu"]
    return [*words, *command_flags(QUICK_SETTINGS)]


@pytest.fixture
def search_command(tmp_path):
    pytest.importorskip("optuna")
    model = save_micro(tmp_path / "one")
    task = save_pairs(tmp_path / "micro.jsonl")
    words = ["search", model, task, "--trials", "6", "--device", "cpu"]
    return [*words, *command_flags(QUICK_SETTINGS | {"steps": 50})]


def kill_somewhere(command, out, generator):
    """Kill the command at a random moment after it has begun to write; whether it was running."""
    process = start(*command, "--out", str(out))
    while process.poll() is None and not out.exists():
        time.sleep(0.01)
    time.sleep(generator.uniform(0, 3))
    is_running = process.poll() is None
    process.kill()
    process.wait()
    process.stderr.close()
    return is_running


def without_seconds(results):
    """The results of a suite without the times, which differ from run to run."""
    for tasks in results["models"].values():
        for entry in tasks.values():
            for kind in ("node_pruned", "edge_pruned"):
                entry[kind].pop("seconds")
    return results


@posix
@pytest.mark.slow
def test_a_suite_that_was_killed_is_completed_with_the_same_results(suite_command, tmp_path):
    def results_in(out):
        return without_seconds(read_json(out / "results.json"))

    undisturbed = tmp_path / "undisturbed"
    finish(*suite_command, "--out", str(undisturbed))
    generator = random.Random(0)
    n_running = 0
    for number in range(N_KILLS):
        out = tmp_path / f"killed {number}"
        n_running += kill_somewhere(suite_command, out, generator)
        finish(*suite_command, "--out", str(out))
        assert results_in(out) == results_in(undisturbed), number
        assert not list(out.rglob(".*")), number
        for path in undisturbed.rglob("circuit.safetensors"):
            again = out / path.relative_to(undisturbed)
            assert again.read_bytes() == path.read_bytes(), again
    assert n_running > 0


@posix
@pytest.mark.slow
def test_a_search_that_was_killed_is_completed_with_the_same_settings(search_command, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    finish(*search_command, "--out", str(undisturbed))
    generator = random.Random(0)
    n_running = 0
    for number in range(N_KILLS):
        out = tmp_path / f"killed {number}"
        n_running += kill_somewhere(search_command, out, generator)
        finish(*search_command, "--out", str(out))
        best = (out / "best.yaml").read_text()
        assert best == (undisturbed / "best.yaml").read_text(), number
    assert n_running > 0


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(number, suite_command, tmp_path):
    process = start(*suite_command, "--out", str(tmp_path / "out"), "--workers", "2")
    workers = []
    while process.poll() is None and len(workers) < 3:  # one of them tracks what they share
        workers = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
