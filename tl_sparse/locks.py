"""A lock on a folder, so that only one process at a time works in it."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tl_sparse.errors import TLSparseError

#: The file in a folder that is locked while a process works there. It names this process.
LOCK_FILE = ".lock"

# How file systems that cannot lock files say so; some network file systems are among them.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(folder: Path, error: type[TLSparseError]) -> Iterator[None]:
    """Within the context, no other process, thread or machine can lock `folder`.

    The operating system holds the lock, so a process that is killed leaves none behind. On a file
    system without locks the context only warns. The folder is created if it does not exist, and
    removed again if it is empty in the end.

    Args:
        folder: the folder.
        error: the error to raise if the folder is locked already or cannot be written to.

    Raises:
        error: see above; the message names the process that holds the lock.
    """
    path = folder / LOCK_FILE
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as timeout:
        raise error(
            f"{folder} is in use by {_holder(path)}; wait until it ends, or use another folder"
        ) from timeout
    except OSError as reason:
        if reason.errno not in _NO_LOCKS:
            raise error(f"cannot write to {folder}: {reason}") from reason
        warnings.warn(
            f"the file system of {folder} has no locks, so nothing prevents that another process "
            "works in this folder at the same time",
            stacklevel=3,
        )
    with suppress(OSError):  # the name only serves the message of another process
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove a file that is open
            path.unlink()
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # only an empty folder can be removed


def _holder(path: Path) -> str:
    """The process that holds the lock, as the lock file names it."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, ValueError):
        return "another process"
