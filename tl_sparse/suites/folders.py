"""Folders of jobs, each of which is written completely or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tl_sparse.suites.workers import has_ended, this_process


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, which becomes `folder` after the block unless that exists by then.

    It then came from another process, whose job was the same.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}."
    _remove_unfinished(folder.parent, prefix)
    with TemporaryDirectory(prefix=f"{prefix}{this_process()}.", dir=folder.parent) as temporary:
        written = Path(temporary, "job")
        yield written
        if not folder.exists():
            try:
                written.replace(folder)
            except OSError:
                if not folder.exists():
                    raise


def _remove_unfinished(parent: Path, prefix: str) -> None:
    """Remove the folders that a process left unfinished when it was killed."""
    for path in parent.glob(f"{prefix}*"):
        process = path.name.removeprefix(prefix).rpartition(".")[0]
        if has_ended(process):
            shutil.rmtree(path, ignore_errors=True)
