"""Where a model comes from: what a user names, found as a folder on this machine."""

from __future__ import annotations

from pathlib import Path

from tl_sparse.errors import CheckpointError


def find(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of what a user passes to `tl_sparse.load`.

    Raises:
        CheckpointError: if there is no such thing.
    """
    if Path(source).is_dir():
        return Path(source)
    raise CheckpointError(f"{str(source)!r} is not a folder; give one with config.json or beeg_config.json in it")
