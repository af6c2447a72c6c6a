"""Documents from files, either of the standard library or of the user."""

import glob
import os
import random
import sysconfig
from pathlib import Path

from tl_sparse.errors import DataError
from tl_sparse.parsing import check_is_file

# Folders of the standard library that hold no ordinary code: tests, tables, data, and installed
# packages.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def stdlib_documents(n_chars: int, seed: int) -> list[str]:
    """Files of the running Python's standard library, in an order that `seed` decides.

    They have at most `n_chars` characters in all; the last file is cut at the end of a line.
    """
    paths = _stdlib_paths()
    random.Random(seed).shuffle(paths)
    documents = []
    room = n_chars
    for path in paths:
        if room <= 0:
            break
        text = _read(path)
        if len(text) > room:
            text = text[: text.rfind("\n", 0, room) + 1]
            room = 0
        else:
            room -= len(text)
        if text.strip():
            documents.append(text)
    return documents


def user_documents(source: str) -> list[str]:
    """The text of each file of `source`, except files that hold only white space.

    Args:
        source: a folder, a glob pattern or a file.

    Raises:
        DataError: if there are no files, no file holds text, or a file cannot be read or is not
            text.
    """
    paths = _user_paths(source)
    if not paths:
        raise DataError(
            f'no files at {source}: give "builtin", a folder with *.py or *.txt, a glob pattern '
            "or a file"
        )
    documents = [text for text in map(_read, paths) if text.strip()]
    if not documents:
        raise DataError(f"the {len(paths)} files of {source} hold only white space")
    return documents


def _stdlib_paths() -> list[Path]:
    paths = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        # `os.walk` enters only the folders that are left in this list.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def _user_paths(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        matches = [inside for inside in path.rglob("*") if inside.suffix.lower() in (".py", ".txt")]
    elif path.is_file():
        matches = [path]
    else:
        matches = list(map(Path, glob.glob(str(path), recursive=True)))
    return sorted(match for match in matches if not match.is_dir())


def _read(path: Path) -> str:
    r"""The text of a file, in which every line ends in "\n"."""
    try:
        check_is_file(path)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it has a NUL byte")
    return text
