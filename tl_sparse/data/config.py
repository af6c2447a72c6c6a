"""Which text to train on."""

from dataclasses import dataclass

from tl_sparse.config import check, check_types, short_repr


@dataclass(frozen=True)
class DataConfig:
    """Which text to train on.

    Attributes:
        source: "builtin" (the standard library of the running Python, and synthetic idioms), or the
            user's own text: a folder (every *.py and *.txt below it), a glob pattern, or one file;
            or "hf:owner/name", or "hf:" and a local folder or file, for what
            `datasets.load_dataset` reads, streamed and shuffled in a buffer.
        subset: the part of an "hf:" dataset that is read; "" for its only one.
        split: the split of an "hf:" dataset that is read.
        text_column: the column of an "hf:" dataset that holds a document in each row.
        max_chars: no further document of an "hf:" dataset is taken after so many characters.
        stdlib_chars: characters of the standard library, at most; for "builtin" only.
        idiom_chars: characters of synthetic idioms, at least; for "builtin" only.
        validation_fraction: share of the text kept for validation; of an "hf:" dataset, a share of
            the documents, until they have 2,000,000 characters.
        seed: decides which standard library files are read, the idioms, the order of a stream, and
            the split.

    Raises:
        ConfigError: for an impossible value, naming the field, the value and the valid range.
    """

    source: str = "builtin"
    subset: str = ""
    split: str = "train"
    text_column: str = "text"
    max_chars: int = 1_000_000_000
    stdlib_chars: int = 500_000
    idiom_chars: int = 6_000_000
    validation_fraction: float = 0.05
    seed: int = 0

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_types(self)
        expected = '"builtin", a folder, a glob pattern, a file or "hf:" and a dataset'
        check(self.source not in ("", "hf:"), "source", self.source, expected)
        check(self.max_chars >= 1, "max_chars", self.max_chars, "at least 1")
        for name in ("stdlib_chars", "idiom_chars", "seed"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        empty = self.source == "builtin" and self.stdlib_chars + self.idiom_chars == 0
        check(not empty, "stdlib_chars", 0, "above 0 when idiom_chars is 0")
        fraction = self.validation_fraction
        check(0 < fraction < 1, "validation_fraction", fraction, "in (0, 1)")
