"""Runs in several processes that shard the weights, as `accelerate launch --use_fsdp` starts them.

Here the processes are forks of one that has imported everything.
"""

import hashlib
import json
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from helpers import fork_server
from tl_sparse import TrainConfig, train
from tl_sparse.errors import TLSparseError
from tl_sparse.hooks import is_sharded, parts_of
from tl_sparse.network import products
from tl_sparse.training.trainer import Trainer

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}


@dataclass(frozen=True)
class Job:
    """A run, or a part of one.

    Attributes:
        name: by which it is found in what the processes saw.
        config: its configuration.
        out: its folder; None saves nothing.
        resume: whether it goes on from a checkpoint.
        stop_after: the number of steps after which it gets SIGTERM; 0 for never.
    """

    name: str
    config: TrainConfig
    out: Path | None = None
    resume: bool = False
    stop_after: int = 0


def seen_by(n_processes, jobs, folder, environment=ENVIRONMENT):
    """What each of several processes saw of the jobs: a list of dictionaries by name of the job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(n_processes):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        sizes = {"WORLD_SIZE": n_processes, "LOCAL_WORLD_SIZE": n_processes}
        values = {name: str(value) for name, value in (of_rank | sizes).items()}
        arguments = (jobs, folder / f"seen-{rank}.json", environment | values)
        processes.append(fork_server().Process(target=_main, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * n_processes
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(n_processes)]


def _main(jobs, path, environment):
    os.environ.update(environment)
    path.write_text(json.dumps({job.name: what_is_seen(job) for job in jobs}))


def what_is_seen(job):
    """Train, and return the loss, number of nonzero weights and zero pattern after each step, the
    bytes that this process holds, and how the run ended.
    """
    before = resident_bytes()
    real_step = Trainer.step
    real_is_faster = products._is_faster
    steps = []
    seen = {"steps": steps, "error": None}

    def recording_step(trainer, tokens):
        loss = real_step(trainer, tokens)
        steps.append([float(loss), trainer.sparsity.l0(), pattern_of(trainer)])
        seen["bytes"] = {**bytes_of(trainer), "before": before}
        if trainer.steps_done == job.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    Trainer.step = recording_step
    products._is_faster = lambda *sizes, **nonzero: True  # as if the weights were large
    try:
        model, seen["record"] = train(job.config, job.out, "cpu", progress=False, resume=job.resume)
        seen["saving"] = error_of(model.save_pretrained, f"{job.out}-{os.getpid()}-again")
    except TLSparseError as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    finally:
        Trainer.step = real_step
        products._is_faster = real_is_faster
    return seen


def error_of(function, *arguments):
    """The message of the error that a function raises; None if it raises none."""
    try:
        function(*arguments)
    except TLSparseError as error:
        return str(error)
    return None


@torch.no_grad()
def pattern_of(trainer):
    """A hash of which weights are zero, with the name and shape of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in trainer.parameters_by_name.items():
        whole = parameter.full_tensor() if is_sharded(parameter) else parameter
        digest.update(f"{name} {tuple(whole.shape)}".encode())
        digest.update(whole.ne(0).numpy().tobytes())
    return digest.hexdigest()


def resident_bytes():
    return psutil.Process().memory_info().rss


def bytes_of(trainer):
    """The bytes of this process: of its weights, of their moments, and the most it had at once."""
    moments = []
    for state in trainer.optimizer.state.values():
        moments += [state["exp_avg"], state["exp_avg_sq"]]
    return {
        "weights": sum(part.nbytes for part in parts_of(trainer.parameters)),
        "moments": sum(part.nbytes for part in parts_of(moments)),
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
