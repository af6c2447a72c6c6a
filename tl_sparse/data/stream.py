"""Datasets that are streamed rather than read into memory, with `datasets.load_dataset`."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_sparse.data.config import DataConfig
from tl_sparse.errors import DataError

#: How many documents the buffer holds that shuffles a stream.
STREAM_BUFFER = 1_000
#: How many characters of a stream are held out for validation, at most one document more.
STREAM_VALIDATION_CHARS = 2_000_000


@dataclass(frozen=True)
class Stream:
    """The documents of an "hf:" dataset except those `held_out`, read anew, in the same order, at
    every iteration.

    Attributes:
        config: names the dataset; it ends after `max_chars` characters.
        held_out: the numbers of documents to leave out.

    Raises:
        DataError: at iteration, if the dataset cannot be read or a document is not text.
    """

    config: DataConfig
    held_out: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[str]:
        number = 0
        n_chars = 0
        for row in self._rows():
            text = self._text(row)
            if text.strip():
                if number not in self.held_out:
                    yield text
                number += 1
                n_chars += len(text)
            if n_chars >= self.config.max_chars:
                return

    def _rows(self) -> Iterator[dict[str, Any]]:
        """All rows of the dataset, shuffled."""
        import datasets

        location = self._location()
        try:
            dataset = datasets.load_dataset(
                **location,
                name=self.config.subset or None,
                split=self.config.split,
                streaming=True,
            )
            yield from dataset.shuffle(self.config.seed, buffer_size=STREAM_BUFFER)
        except Exception as error:  # of many kinds: the network's, the parsers' of each format, …
            raise DataError(
                f"cannot read the dataset {self.config.source}: {error}; "
                'it must be "hf:owner/name" as on the Hugging Face hub, with a subset and a split '
                'that exist there, or "hf:" and a local folder or file of JSON lines, Parquet …'
            ) from error

    def _location(self) -> dict[str, str]:
        """Where `load_dataset` finds the dataset, as its arguments."""
        path = Path(self.config.source.removeprefix("hf:")).expanduser()
        if path.is_file():
            return {"path": str(path.parent), "data_files": path.name}
        return {"path": str(path)}

    def _text(self, row: dict[str, Any]) -> str:
        """The document in a row; empty if the row has none."""
        column = self.config.text_column
        if column not in row:
            raise DataError(
                f"{self.config.source} has no column {column!r}; "
                f"text_column must be one of {', '.join(row)}"
            )
        text = row[column] or ""
        if not isinstance(text, str):
            raise DataError(
                f"column {column!r} of {self.config.source} must hold text, "
                f"not {type(text).__name__}"
            )
        return text


def held_out_documents(config: DataConfig) -> dict[int, str]:
    """The documents of a stream that are for validation, by their numbers: the first, never the
    second, which is left to train on, and a random share of the others.

    Raises:
        DataError: the dataset cannot be read, or has fewer than two documents.
    """
    rng = random.Random(config.seed)
    held_out: dict[int, str] = {}
    n_chars = 0
    n_documents = 0
    for number, text in enumerate(Stream(config)):
        n_documents += 1
        if number == 0 or (number > 1 and rng.random() < config.validation_fraction):
            held_out[number] = text
            n_chars += len(text)
        if number > 0 and n_chars >= STREAM_VALIDATION_CHARS:
            break
    if n_documents < 2:
        raise DataError(
            f"{config.source} has {n_documents} documents with text in {config.text_column!r}; "
            "give at least two"
        )
    return held_out
