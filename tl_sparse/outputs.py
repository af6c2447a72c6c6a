"""Where results are written: a file appears complete or not at all, and so do several files that
belong together.

Symbolic links are written through, and pipes and devices directly. A file that is written again
keeps its permissions.
"""

import errno
import filecmp
import json
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from tl_sparse.checksums import FILES
from tl_sparse.errors import CheckpointError, ConfigError


def check_new_folder(folder: str | Path) -> None:
    """Raise `ConfigError` unless `folder` is new or empty: results are never overwritten."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty" if path.is_dir() else "is a file"
        raise ConfigError(f"out = {str(folder)!r} {what}; it must be a new or an empty folder")


def listing(folder: Path) -> str:
    """The names in a folder, for messages: at most three of them, and how many there are more."""
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:3]) or "nothing in it"
    more = len(names) - 3
    return f"{shown} and {more} more" if more > 0 else shown


def check_ending(path: str | Path, endings: Sequence[str], what: str) -> None:
    """Check that the name of a file has one of these endings, in small or capital letters.

    A pipe or a device may have any name.

    Args:
        path: the file.
        endings: the endings, such as ".html".
        what: what is written, for the message: "a page".

    Raises:
        ConfigError: if it has none of them.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending in endings or is_stream(path) or path.is_dir():  # a folder is refused by its writer
        return
    has = f"cannot be written as {path.suffix!r}" if ending else "needs an ending"
    raise ConfigError(f"{path}: {what} {has}; the name must end in {' or '.join(endings)}")


def check_new_file(path: str | Path, overwrite: bool) -> None:
    """Check, before the slow work of making its contents, that a file can be written.

    Raises:
        CheckpointError: if it cannot.
        ConfigError: if it exists, and `overwrite` is False.
    """
    path = Path(path)
    if is_stream(path):
        return
    with _errors_name(path):
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError("its folder is read-only")
    if target.exists() and not overwrite:
        raise _exists(path, "exists already")


def _exists(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} {what}; choose another name, or set overwrite (overwrite=True in Python, "
        "--overwrite for a command)"
    )


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turn the errors of writing into a `CheckpointError` with `path`."""
    try:
        yield
    except (OSError, SafetensorError, UnicodeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


#: What a process leaves that is killed while it writes: a file, and a folder of several.
_UNFINISHED_FILE = ".writing-"
UNFINISHED_FOLDER = ".saving-"


def is_unfinished(path: Path) -> bool:
    """Whether a process that writes now, or was killed while it wrote, has made this file."""
    return path.name.startswith((_UNFINISHED_FILE, UNFINISHED_FOLDER))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left unfinished in a folder in which no process writes now."""
    if not folder.is_dir():
        return
    for path in filter(is_unfinished, list(folder.iterdir())):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --- one file


@contextmanager
def replacing(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Atomically replace the file at `path` by the file that the block writes.

    The block writes to the path that the context yields, a temporary file in the same folder. That
    file becomes `path` if the block ends without an exception. If `path` is a pipe or a device,
    the bytes are copied into it instead.

    Args:
        path: the file. If it is a symbolic link, the file that it points to is replaced.
        overwrite: whether a file with other contents may be replaced.

    Raises:
        CheckpointError: if the file cannot be written, for example because the disk is full.
        ConfigError: if there is a file with other contents, and `overwrite` is False.
    """
    path = Path(path)
    with _errors_name(path):
        if is_stream(path):
            with TemporaryDirectory() as folder:
                temporary = Path(folder, "output")
                yield temporary
                _copy_to_stream(temporary, path)
            return
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(_UNFINISHED_FILE + uuid.uuid4().hex)
        try:
            mode = _new_file(temporary, target)
            yield temporary
            temporary.chmod(mode)  # safetensors makes a file that only its owner can read
            is_new = not target.exists()
            if not (is_new or overwrite or filecmp.cmp(temporary, target, shallow=False)):
                raise _exists(path, "exists already, with other contents")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device, such as /dev/stdout, which cannot be replaced."""
    folder = os.path.realpath(path.parent)
    if folder == "/dev" or folder.startswith("/proc/"):
        return True  # even if it is a regular file, as /dev/stdout is after `> file`
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _copy_to_stream(source: Path, path: Path) -> None:
    destination: int | Path = path
    if os.path.samestat(path.stat(), os.fstat(1)):
        # Opened anew, a file that is our standard output would be written from its beginning.
        sys.stdout.flush()
        destination = os.dup(1)
    with open(source, "rb") as file, open(destination, "wb") as stream:
        shutil.copyfileobj(file, stream)


def _target(path: Path) -> Path:
    """The file that `path` stands for, behind all symbolic links, which can be written to.

    Raises:
        OSError: if it is a folder, or read-only.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("it is a folder")
    # Renaming asks only for permission to write to the folder, and root has all permissions.
    is_writable = mode & 0o222 and os.access(target, os.W_OK)
    if not is_writable:
        raise PermissionError("the file is read-only")
    return target


def _new_file(temporary: Path, target: Path) -> int:
    """Create an empty file with the permissions of `target`, which are returned.

    If there is no `target` yet, the permissions are those that the umask allows.
    """
    temporary.touch(exist_ok=False)
    if target.exists():
        shutil.copymode(target, temporary)
    return stat.S_IMODE(temporary.stat().st_mode)


# --- files that belong together


@dataclass(frozen=True)
class FileSet:
    """The names of files that belong together in a folder, beside which there may be others.

    Attributes:
        what: what they are, for messages and for the name of a temporary folder: "model".
        described_by: the JSON file that describes them. It is moved into place last.
        required: the names of the others that are always there.
        optional: the names of those that may be missing.
    """

    what: str
    described_by: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def committed(self, folder: Path) -> Path:
        """The hidden folder with complete new files that are not yet in their places."""
        return folder / f".saved-{self.what}"


def check_new_files(files: FileSet, folder: str | Path, overwrite: bool) -> None:
    """`check_new_file` for each file of a set that is always there."""
    for name in (files.described_by, *files.required):
        check_new_file(Path(folder, name), overwrite)


@contextmanager
def replacing_together(files: FileSet, folder: Path, overwrite: bool) -> Iterator[Path]:
    """Replace files that belong together: all of them are replaced, or none.

    The block writes into the folder that the context yields, a hidden folder inside `folder`. If
    the block ends without an exception, that folder is renamed, and from this moment the new files
    count as saved. Then each of them is moved to its place. If the process is killed before it has
    moved them all, `finish_replacing`, which every reader calls first, moves the others.

    Files of the set that were there before, but are not among the new ones, are removed. All other
    files in `folder` stay as they are. If the new files are equal to those that are there, nothing
    is changed.

    Raises:
        CheckpointError: if the files cannot be written; those that were there are then unchanged.
        ConfigError: if there are other files of this set, and `overwrite` is False.
    """
    finish_replacing(files, folder)
    with _errors_name(folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / (UNFINISHED_FOLDER + uuid.uuid4().hex)
        try:
            staged.mkdir()
            yield staged
            if _are_there(files, staged, folder):
                return
            names = (files.described_by, *files.required)
            if not overwrite and any((folder / name).exists() for name in names):
                raise _exists(folder, f"holds another {files.what}")
            for path in staged.iterdir():
                _take_permissions(path, folder / path.name)
            staged.rename(files.committed(folder))
        except CheckpointError as error:  # it names the file where it was going to be
            raise CheckpointError(str(error).replace(str(staged), str(folder))) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # it is not empty unless writing failed
                    folder.rmdir()
    finish_replacing(files, folder)


def finish_replacing(files: FileSet, folder: Path) -> None:
    """Complete what `replacing_together` did not, because the process was killed.

    Raises:
        CheckpointError: if that is not possible, for example because the folder is read-only.
    """
    committed = files.committed(folder)
    if not committed.is_dir():
        return
    described_by = committed / files.described_by
    try:
        # While this file is here, it is not known which of the old files are still in place.
        if described_by.is_file():
            for path in _obsolete(files, committed, folder):
                path.unlink(missing_ok=True)
            for path in committed.iterdir():
                if path.name != files.described_by:
                    _move(path, folder / path.name)
            _move(described_by, folder / files.described_by)
        with suppress(FileNotFoundError):
            committed.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"saving a {files.what} in {folder} was interrupted, and cannot be completed: {error}"
        ) from error


def _are_there(files: FileSet, staged: Path, folder: Path) -> bool:
    """Whether the files in `folder` are equal to the new ones in `staged`."""
    for path in staged.iterdir():
        present = folder / path.name
        if not present.is_file() or not filecmp.cmp(path, present, shallow=False):
            return False
    return not _obsolete(files, staged, folder)


def _obsolete(files: FileSet, new_files: Path, folder: Path) -> list[Path]:
    """The optional files of the set that is in `folder` which are not among the new ones."""
    new_names = _listed(new_files / files.described_by)
    if new_names is None or not (folder / files.described_by).exists():
        return []
    old_names = _listed(folder / files.described_by)
    if old_names is None:  # an older version wrote it, or it is damaged
        old_names = set(files.optional)
    names = old_names.intersection(files.optional) - new_names
    return [folder / name for name in names if (folder / name).exists()]


def _listed(described_by: Path) -> set[str] | None:
    """The names of the files whose checksums a JSON file lists; None if it lists none."""
    if not described_by.is_file():
        return None
    try:
        return set(json.loads(described_by.read_text(encoding="utf-8"))[FILES])
    except (OSError, KeyError, RecursionError, TypeError, ValueError):
        return None


def _take_permissions(path: Path, replaced: Path) -> None:
    """Give a new file the permissions of the one that it will replace, if there is one."""
    target = _target(replaced)
    if target.exists():
        shutil.copymode(target, path)


def _move(source: Path, destination: Path) -> None:
    """Replace the file at `destination`; if it is a symbolic link, the file it points to."""
    target = Path(os.path.realpath(destination))
    try:
        source.replace(target)
    except FileNotFoundError:
        if source.exists():  # otherwise another process has just moved it
            raise
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(target) as temporary:  # the link leads to another file system
            shutil.copyfile(source, temporary)
        source.unlink()
