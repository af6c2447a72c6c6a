"""Text to train on, as tokens in files: the standard library and synthetic idioms, the user's
files, or a stream.
"""

import glob
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tl_sparse.data.config import DataConfig
from tl_sparse.errors import DataError
from tl_sparse.tasks import idiom_documents

# Folders of the standard library that hold no ordinary code: tests, tables, data, and what pip
# installed.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    | {"turtledemo", "ensurepip", "site-packages", "dist-packages", "__pycache__"}
)
#: Of a stream: documents in the buffer that shuffles it; characters that train the tokenizer, and
#: for validation.
STREAM_BUFFER = 1_000
STREAM_TOKENIZER_CHARS = 5_000_000
STREAM_VALIDATION_CHARS = 2_000_000


@dataclass(frozen=True)
class Documents:
    """Whole documents, none for both; `description` says in a line where they come from."""

    train: "list[str] | Stream"
    validation: list[str]
    description: str


def load_documents(config: DataConfig) -> Documents:
    """Read or generate the documents of `config` and split them into training and validation
    documents.

    The split is by document, the same for the same seed, whatever order the file system lists files
    in. Only a single document is itself cut in two, at the end of a line.

    Raises:
        DataError: no files or dataset, one that is unreadable or not (UTF-8) text, nothing but
            white space in them, or too little to leave a document on each side.
    """
    if config.source.startswith("hf:"):
        return _streamed_documents(config)
    if config.source == "builtin":
        groups = {
            "standard library": _stdlib_documents(config.stdlib_chars, config.seed),
            "synthetic idiom": idiom_documents(config.idiom_chars, config.seed),
        }
    else:
        groups = {config.source: _user_documents(config.source)}
    description = ", ".join(
        f"{len(group):,} {name} file{'s' * (len(group) != 1)} ({sum(map(len, group)):,} characters)"
        for name, group in groups.items()
        if group
    )
    documents = list(chain.from_iterable(groups.values()))
    if len(documents) == 1:
        return _cut_in_two(documents[0], config.validation_fraction, description)
    train, validation = list[str](), list[str]()
    for group in groups.values():  # each by itself, so that both sides have the same mixture
        held_out = _held_out(group, config.validation_fraction, config.seed)
        train += [document for i, document in enumerate(group) if i not in held_out]
        validation += [document for i, document in enumerate(group) if i in held_out]
    if not validation:
        raise DataError(
            f"too few documents for training and validation: {description or 'none'}; give at least two"
        )
    return Documents(train, validation, description)


def _stdlib_documents(n_chars: int, seed: int) -> list[str]:
    """Files of the standard library in seeded order, `n_chars` in all; the last is cut at a line's
    end.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _SKIPPED_FOLDERS
        ]  # these are not walked into
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort()
    random.Random(seed).shuffle(paths)
    documents, left = list[str](), n_chars
    for path in paths:
        if left <= 0:
            break
        text = _read(path)
        if len(text) > left:
            text = text[: text.rfind("\n", 0, left) + 1]
            left = 0
        left -= len(text)
        if text.strip():
            documents.append(text)
    return documents


def _user_documents(source: str) -> list[str]:
    """The text of each non-empty file that `source` (folder, file, or glob pattern) stands for."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [inside for inside in path.rglob("*") if inside.suffix in (".py", ".txt")]
    else:
        found = (
            [path]
            if path.is_file()
            else [Path(name) for name in glob.glob(str(path), recursive=True)]
        )
    paths = sorted(path for path in found if not path.is_dir())
    if not paths:
        raise DataError(
            f'no files at {source}: give "builtin", a folder with *.py or *.txt, a glob pattern or a file'
        )
    documents = [text for path in paths if (text := _read(path)).strip()]
    if not documents:
        raise DataError(f"nothing but white space in the {len(paths)} files of {source}")
    return documents


def _read(path: Path) -> str:
    """The text of a file, its line ends made one newline."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it has a NUL byte")
    return text


def _held_out(documents: Sequence[str], fraction: float, seed: int) -> set[int]:
    """Which documents are for validation: random ones that fit into `fraction` of the characters (a
    share of the documents could be one long file); at least one and at most all but one, none of a
    single document.
    """
    room, held_out = fraction * sum(map(len, documents)), set[int]()
    for i in random.Random(seed).sample(range(len(documents)), len(documents)):
        if len(documents[i]) <= room and len(held_out) < len(documents) - 1:
            held_out.add(i)
            room -= len(documents[i])
    if not held_out and len(documents) > 1:
        held_out.add(min(range(len(documents)), key=lambda i: len(documents[i])))
    return held_out


def _cut_in_two(document: str, fraction: float, description: str) -> Documents:
    """The last `fraction` of the only document is for validation, from the beginning of a line."""
    cut = document.rfind("\n", 0, round(len(document) * (1 - fraction))) + 1
    head, tail = document[:cut], document[cut:]
    if not head.strip() or not tail.strip():
        raise DataError(f"too little text to split into training and validation: {description}")
    return Documents([head], [tail], description)


@dataclass(frozen=True)
class Stream:
    """The documents of an "hf:" dataset but those `held_out`, read anew, in the same order, at
    every iteration.

    Iterating raises `DataError` where the dataset cannot be read or a document is not text.
    """

    config: DataConfig
    held_out: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[str]:
        import datasets

        source, column = self.config.source, self.config.text_column
        path = Path(source.removeprefix("hf:")).expanduser()
        where = (
            {"path": str(path)}
            if not path.is_file()
            else {"path": str(path.parent), "data_files": path.name}
        )
        subset, split = self.config.subset or None, self.config.split
        number = length = 0
        try:
            dataset = datasets.load_dataset(**where, name=subset, split=split, streaming=True)
            for row in dataset.shuffle(self.config.seed, buffer_size=STREAM_BUFFER):
                if column not in row:
                    raise DataError(
                        f"{source} has no column {column!r}; text_column must be one of {', '.join(row)}"
                    )
                if not isinstance(text := row[column] or "", str):
                    raise DataError(
                        f"column {column!r} of {source} must hold text, not {type(text).__name__}"
                    )
                if text.strip():
                    if number not in self.held_out:
                        yield text
                    number, length = number + 1, length + len(text)
                if length >= self.config.max_chars:
                    return
        except DataError:
            raise
        except Exception as error:  # of many kinds: the network's, the parsers' of each format, …
            raise DataError(
                f'cannot read the dataset {source}: {error}; it must be "hf:owner/name" as on the Hugging Face hub, '
                'with a subset and a split that there are, or "hf:" and a local folder or file of JSON lines, Parquet …'
            ) from error


def _streamed_documents(config: DataConfig) -> Documents:
    """A stream to train on; of its documents the first, never the second, and a share of the others
    are held out.
    """
    generator, validation, room, i = (
        random.Random(config.seed),
        dict[int, str](),
        STREAM_VALIDATION_CHARS,
        -1,
    )
    for i, text in enumerate(Stream(config)):
        if i == 0 or (i > 1 and generator.random() < config.validation_fraction):
            validation[i] = text
            room -= len(text)
        if i > 0 and room <= 0:
            break
    if i < 1:
        raise DataError(
            f"{config.source} has {i + 1} documents with text in {config.text_column!r}; give at least two"
        )
    description = f"the dataset {config.source} (at most {config.max_chars:,} characters)"
    return Documents(Stream(config, frozenset(validation)), list(validation.values()), description)
