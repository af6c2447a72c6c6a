"""Processes that share the work of a suite or a search, and end with the process that needs it."""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from tl_sparse.errors import SuiteError

T = TypeVar("T")


def in_processes(
    function: Callable[[T], None], arguments: Iterable[T], workers: int
) -> Iterator[None]:
    """Call `function` with each argument, in this process if `workers` is 1.

    Raises:
        SuiteError: if a process died, or after Ctrl-C.
    """
    try:
        if workers == 1:
            yield from map(function, arguments)
        else:
            yield from _in_pool(function, arguments, workers)
    except KeyboardInterrupt:
        raise SuiteError(
            "interrupted; finished work is kept, and the same command continues from there"
        ) from None
    except BrokenProcessPool as error:
        raise SuiteError(
            "a process died, perhaps because memory ran out; continue with fewer --workers"
        ) from error


def _in_pool(function: Callable[[T], None], arguments: Iterable[T], workers: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _prepare_process)
    try:
        futures = [pool.submit(function, argument) for argument in arguments]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_process() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    # Ctrl-C ends the process at once, without a traceback; the main process reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_parent() -> None:
    """End this process as soon as the process that started it has ended, however that happened.

    A process that is killed cannot end the ones it started, which would go on with nobody to take
    their results.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # sys.exit would end only this thread


def this_process() -> str:
    """A name of this process, from which `has_ended` can tell later whether it still runs."""
    return f"{socket.gethostname()}-{os.getpid()}"


def has_ended(process: str) -> bool:
    """Whether a process that `this_process` named is known to have ended.

    Of a process on another machine, this is not known.
    """
    host, _, pid = process.rpartition("-")
    if host != socket.gethostname() or not pid.isdecimal() or os.name != "posix":
        return False
    try:
        os.kill(int(pid), 0)  # sends no signal
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
