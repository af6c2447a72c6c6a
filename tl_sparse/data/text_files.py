"""Documents from files, either of the standard library or of the user.

Which files of a folder are read, and as what, is described in `DataConfig.source`.
"""

import codecs
import glob
import io
import os
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
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

_ENDINGS = (".py", ".txt")
# Folders in a user's folder that hold the code of others, or none.
_FOREIGN_FOLDERS = {
    "__pycache__",
    "__pypackages__",
    "_vendor",
    "bower_components",
    "dist-packages",
    "node_modules",
    "site-packages",
    "third_party",
    "vendor",
}
_FOREIGN_ENDINGS = (".dist-info", ".egg", ".egg-info")
# A folder that holds one of these is an environment: of venv or virtualenv, or of conda.
_ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")

# The longer marks come first, because the mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NAMES_SHOWN = 8  # in a warning


class _NotTextError(Exception):
    """A file is not text; the message says why."""


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
        try:
            text = _read(path)
        except _NotTextError:
            continue
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

    A warning names what is left out, by the rules in `DataConfig.source`.

    Args:
        source: a folder, a glob pattern or a file.

    Raises:
        DataError: if there are no files, no file holds text, or a file cannot be read.
    """
    try:
        paths = _user_paths(source)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user …
        raise DataError(f"cannot read {source}: {error}") from error
    if not paths:
        raise _no_files(source)
    documents = []
    not_text: list[str] = []
    for path in paths:
        try:
            text = _read(path)
        except _NotTextError as error:
            not_text.append(str(error))
            continue
        if text.strip():
            documents.append(text)
    if not documents and not_text:
        raise DataError(f"no file of {source} holds text: {_listed(not_text)}")
    if not documents:
        raise DataError(f"the {len(paths)} files of {source} hold only white space")
    if not_text:
        warnings.warn(f"left out of {source}: {_listed(not_text)}", stacklevel=2)
    return documents


def check_source(source: str) -> None:
    """Raise `DataError` if a source of text (see `DataConfig.source`) names no file or folder.

    It reads nothing, so it can come before slow work; datasets of the hub are not looked up.
    """
    if source == "builtin" or source.startswith("hf:"):
        return
    try:
        path = str(Path(source).expanduser())
        is_there = os.path.exists(path) or bool(glob.glob(path, recursive=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"cannot read {source}: {error}") from error
    if not is_there:
        raise _no_files(source)


def _no_files(source: str) -> DataError:
    return DataError(
        f'no files at {source}: give "builtin", a folder with *.py or *.txt, a glob pattern or a '
        "file"
    )


def _stdlib_paths() -> list[Path]:
    paths = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        # `os.walk` enters only the folders that are left in this list.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def _user_paths(source: str) -> list[Path]:
    """The files of `source` in order, each of them once, even if several links lead to it."""
    path = Path(source).expanduser()
    if path.is_dir():
        matches = _files_below(path)
    elif path.is_file():
        matches = [path]
    else:
        matches = list(map(Path, glob.glob(str(path), recursive=True)))
    once: dict[str, Path] = {}  # real path → the first path that leads to it
    for match in sorted(matches):
        if not match.is_dir():
            once.setdefault(os.path.realpath(match), match)
    return list(once.values())


def _files_below(source: Path) -> list[Path]:
    """The text files of a user's folder; a warning names what is left out."""

    def cannot_list(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    paths = []
    left_out: set[str] = set()
    for folder, subfolders, names in os.walk(source, onerror=cannot_list):
        foreign = set(_foreign_folders(Path(folder), subfolders))
        left_out |= foreign
        # `os.walk` enters only the folders that are left in this list.
        subfolders[:] = [name for name in subfolders if name not in foreign]
        for name in names:
            if not name.lower().endswith(_ENDINGS):
                continue
            if name.startswith("."):
                left_out.add(name)
            else:
                paths.append(Path(folder, name))
    if left_out:
        warnings.warn(
            f"left out of {source}: {_listed(sorted(left_out))} (hidden files and folders, "
            "installed packages, environments, the code of others and links to folders; to read "
            "them, make one of them the source or use a glob pattern)",
            stacklevel=4,
        )
    return paths


def _foreign_folders(folder: Path, names: list[str]) -> Iterator[str]:
    """Those of the folders in `folder` that are left out."""
    for name in names:
        path = folder / name
        is_environment = any((path / mark).exists() for mark in _ENVIRONMENT_MARKS)
        is_named_so = name in _FOREIGN_FOLDERS or name.endswith(_FOREIGN_ENDINGS)
        if name.startswith(".") or is_named_so or is_environment or path.is_symlink():
            yield name


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    n_more = len(names) - _NAMES_SHOWN
    return f"{shown} and {n_more} more" if n_more > 0 else shown


def _read(path: Path) -> str:
    r"""The text of a file, in which every line ends in "\n".

    Raises:
        DataError: if the file cannot be read.
        _NotTextError: if it is not text.
    """
    try:
        check_is_file(path)  # reading a pipe or a device could wait for ever
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = raw.decode(_encoding(raw, path))
        text.encode()  # encodings that a file may declare, such as UTF-7, allow half a character
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise _NotTextError(
            f"{path} is not {encoding} text: {error.reason} at byte {error.start}"
        ) from error
    except (UnicodeError, LookupError, SyntaxError) as error:
        raise _NotTextError(f"{path} is not text: {error}") from error
    if "\0" in text:
        raise _NotTextError(f"{path} is not text: it has a NUL byte")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(raw: bytes, path: Path) -> str:
    """The encoding that a file's byte-order mark or, in Python, its first lines name; else UTF-8.

    Raises:
        SyntaxError: if the first lines of a Python file name an unknown encoding.
    """
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            return encoding
    if path.suffix.lower() == ".py" and b"coding" in raw[:1000]:
        return tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
    return "utf-8"
