"""Text, JSON and YAML from files that anyone may have written.

What these functions return is safe to work with: it is small and shallow, each text can be encoded,
and each integer fits into 64 bits. For anything else they raise `OSError` or `ValueError`, which
the readers turn into errors of this package.
"""

import difflib
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

#: The largest JSON file that is read. Its values can take twenty times as much memory.
MAX_JSON_BYTES = 64 * 2**20
#: The largest YAML file that is read: the parser takes about a second for this much text.
MAX_YAML_BYTES = 2**17
#: How deep lists and mappings may be nested. Our own files have at most ten levels, and Python
#: cannot compare or print values with a thousand.
MAX_DEPTH = 100


def check_is_file(path: Path) -> None:
    """Raise `OSError` unless `path` is a file: opening a named pipe or a device may never end.

    The message of a `FileNotFoundError` is a whole sentence, which also gives the nearest name.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}{_nearest_file(path)}") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("it is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError("it is a named pipe or a device, not a file")


def _nearest_file(path: Path) -> str:
    """A hint at the file in the same folder whose name is most like that of a missing one."""
    files: list[str] = []
    with suppress(OSError), os.scandir(path.parent) as entries:
        files = [entry.name for entry in entries if entry.is_file()]
    near = difflib.get_close_matches(path.name, files, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def read_text(path: Path, max_bytes: int) -> str:
    r"""The text of a UTF-8 file, without a byte-order mark, in which every line ends in "\n".

    Raises:
        OSError: if the file cannot be read; see `check_is_file` for one that is missing.
        ValueError: if it is larger than `max_bytes`, or not UTF-8 text.
    """
    check_is_file(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"it has {size:,} bytes, and at most {max_bytes:,} are read")
    return path.read_text(encoding="utf-8-sig")


def printable(text: str, keep: str = "") -> str:
    r"""The text without characters that could steer a terminal or break the lines of a page.

    Each of them, except those in `keep`, is written as its escape, such as "\x1b" or "\n".
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def parse_json(text: str) -> Any:
    """The value that a JSON text describes.

    Raises:
        ValueError: if the text is not JSON, or has a key twice, or for the values that the
            docstring of this file excludes.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"it has more than {MAX_DEPTH} levels") from error
    _check(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value that a YAML text describes, with the types of JSON only.

    Raises:
        ValueError: if the text is not YAML, has a key twice or an alias, or for the values that the
            docstring of this file excludes.
    """
    try:
        value = yaml.load(text, _YamlLoader)
    except RecursionError as error:
        raise ValueError(f"it has more than {MAX_DEPTH} levels") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    _check(value)
    return value


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's loader of plain values, without what can make a short text stand for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read; write the value again",
                self.peek_event().start_mark,
            )  # fmt: skip
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "a key is there twice", node.start_mark
            )
        return mapping


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these keys and values."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _integer(digits: str) -> int:
    """The integer with these digits; the time to convert many digits would grow as their square."""
    if len(digits) > 20:
        raise ValueError(f"{digits[:20]}… has {len(digits)} digits, too many for an integer")
    return int(digits)


def _check(value: Any) -> None:
    """Raise `ValueError` unless a value has at most `MAX_DEPTH` levels of values that can be used.

    It goes through the value level by level, because a recursion would itself be too deep.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
                for key in item:
                    _check_key(key)
            elif isinstance(item, list):
                inner.extend(item)
            else:
                _check_scalar(item)
        level = inner
        if not level:
            return
    raise ValueError(f"it has more than {MAX_DEPTH} levels")


def _check_key(key: Any) -> None:
    if not isinstance(key, str):
        raise ValueError(f"the key {key!r} is not a text")
    key.encode()


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        value.encode()  # raises a ValueError for half a surrogate pair
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"an integer of {value.bit_length()} bits does not fit into 64")
    elif not isinstance(value, float | None):
        raise ValueError(f"{value!r} is not a text, a number, true, false, null, a list or mapping")
