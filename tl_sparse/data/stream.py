"""Datasets that `datasets.load_dataset` streams rather than reads into memory."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_sparse.data.config import DataConfig
from tl_sparse.errors import DataError, counted

#: The number of documents in the buffer in which a stream is shuffled.
STREAM_BUFFER = 1_000
#: Documents of a stream are held out for validation until they have this many characters.
STREAM_VALIDATION_CHARS = 2_000_000


@dataclass(frozen=True)
class Stream:
    """The documents of an "hf:" dataset except those in `held_out`. Every iteration reads them
    anew, in the same order.

    Attributes:
        config: names the dataset, and ends it after `max_chars` characters.
        held_out: the indices of the documents to leave out.

    Raises:
        DataError: during iteration, if the dataset cannot be read or a document is not text.
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
        except Exception as error:  # the network and the parsers raise errors of many kinds
            raise DataError(
                f"cannot read the dataset {self.config.source}: {error}; "
                'it must be "hf:owner/name" as on the Hugging Face hub, with a subset and a split '
                'that exist there, or "hf:" and a local folder or file of JSON lines, Parquet …'
            ) from error

    def _location(self) -> dict[str, str]:
        """The arguments with which `load_dataset` finds the dataset."""
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
    """The documents of a stream that are held out for validation, by their index in the stream.

    The first document is always held out, and the second never is, so that there is one on each
    side of the split. Of the others a random share is held out.

    Raises:
        DataError: if the dataset cannot be read, or has fewer than two documents.
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
            f"{config.source} has {counted(n_documents, 'document')} with text in "
            f"{config.text_column!r}; give at least two"
        )
    return held_out
