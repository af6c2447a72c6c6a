"""Which text to train on."""

from dataclasses import dataclass

from tl_sparse.config import MAX_SEED, check, check_types, short_repr


@dataclass(frozen=True)
class DataConfig:
    """Which text to train on.

    Attributes:
        source: the text: "builtin", a folder, a glob pattern, a file, or "hf:owner/name". "builtin"
            stands for the standard library of the running Python and synthetic idioms; a folder, a
            glob pattern or one file is your own text, by the rules below; "hf:owner/name", or "hf:"
            followed by a local folder or file, is a dataset that `datasets.load_dataset` reads,
            which is streamed and shuffled in a buffer.
        subset: the subset of an "hf:" dataset to read; "" if it has only one.
        split: the split of an "hf:" dataset to read.
        text_column: the column of an "hf:" dataset that holds a document in each row.
        task_answers: whether the tokenizer has each answer of the built-in tasks as a single token,
            also where the text is your own. With "builtin" it always has them.
        max_chars: the number of characters after which no further document of an "hf:" dataset is
            read.
        stdlib_chars: the largest number of characters from the standard library; only for
            "builtin".
        idiom_chars: the smallest number of characters of synthetic idioms; only for "builtin".
        validation_fraction: the share of the text that is held out for validation. For an "hf:"
            dataset it is the share of the documents, until 2,000,000 characters are held out.
        seed: decides which standard library files are read, the idioms, the order of a stream, and
            the split into training and validation text.

    Which files are read:
        Of a folder, every file below it whose name ends in .py or .txt, also in capitals. Left out
        are hidden files and folders, folders of installed packages and of others' code
        (node_modules, site-packages, vendor, *.egg-info …), environments, and links to folders. A
        glob pattern or a single file is taken as it is. A file is read once, however many links
        lead to it.

        Files are UTF-8, or what a byte-order mark or the first lines of a Python file (`# -*-
        coding: latin-1 -*-`) say. Line ends become newlines. Files that are not text in this
        encoding or hold NUL bytes are left out, as are those that hold only white space. A warning
        names what is left out, except for the latter. A file or folder that cannot be read is an
        error.

    Raises:
        ConfigError: for an impossible value; the message gives the field, the value and the valid
            range.
    """

    source: str = "builtin"
    subset: str = ""
    split: str = "train"
    text_column: str = "text"
    task_answers: bool = False
    max_chars: int = 1_000_000_000
    stdlib_chars: int = 500_000
    idiom_chars: int = 6_000_000
    validation_fraction: float = 0.05
    seed: int = 0

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_types(self)
        expected = '"builtin", a folder, a glob pattern, a file, or "hf:" followed by a dataset'
        is_named = self.source not in ("", "hf:") and "\0" not in self.source
        check(is_named, "source", self.source, expected)
        check(self.max_chars >= 1, "max_chars", self.max_chars, "at least 1")
        for name in ("stdlib_chars", "idiom_chars"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"at least 0 and at most {MAX_SEED}")
        empty = self.source == "builtin" and self.stdlib_chars + self.idiom_chars == 0
        check(not empty, "stdlib_chars", 0, "above 0 when idiom_chars is 0")
        fraction = self.validation_fraction
        check(0 < fraction < 1, "validation_fraction", fraction, "in (0, 1)")
