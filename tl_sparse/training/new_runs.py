"""Whether a run can begin in a folder: a check that imports quickly, for before the slow work."""

from pathlib import Path

from tl_sparse.locks import LOCK_FILE
from tl_sparse.outputs import check_new_folder, is_unfinished

#: The settings of a run, in its folder until the run is finished.
RUN_FILE = "run.json"


def check_no_other_files(folder: str | Path) -> None:
    """Check that a folder holds nothing but, perhaps, an unfinished run.

    Raises:
        ConfigError: if a run cannot begin there because there are files of others.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file() and not _is_only_begun(folder):
        check_new_folder(folder)


def _is_only_begun(folder: Path) -> bool:
    """Whether `folder` is all that a process left that was killed before it wrote its settings."""
    if not folder.is_dir():
        return False
    return all(path.name == LOCK_FILE or is_unfinished(path) for path in folder.iterdir())
