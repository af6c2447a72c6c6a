"""Training and validation documents from every source that a `DataConfig` can name."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from tl_sparse.config import as_config
from tl_sparse.data.config import DataConfig
from tl_sparse.data.stream import Stream, held_out_documents
from tl_sparse.data.text_files import stdlib_documents, user_documents
from tl_sparse.errors import DataError
from tl_sparse.tasks import idiom_documents


@dataclass(frozen=True)
class Documents:
    """The documents of a run; none of them is on both sides of the split.

    Attributes:
        train: the training documents.
        validation: the validation documents.
        description: where the documents come from, in one line.
    """

    train: list[str] | Stream
    validation: list[str]
    description: str


def load_documents(config: DataConfig) -> Documents:
    """Read or generate the documents of `config`, a `DataConfig` or a mapping of those of its
    fields that differ from the defaults, and split them into training and validation documents.

    The split is by document. It depends on the seed, and not on the order in which the file system
    lists the files. If there is only one document, it is cut in two at the end of a line.

    Raises:
        ConfigError: if `config` is neither, or has an impossible value.
        DataError: if there are no files or the dataset does not exist; if a file cannot be read, or
            none holds text; or if there is too little text to leave a document on each side of the
            split.
    """
    config = as_config(config, DataConfig)
    if config.source.startswith("hf:"):
        return _streamed(config)
    groups = _groups(config)
    description = _description(groups)
    documents = list(chain.from_iterable(groups.values()))
    if len(documents) == 1:
        return _cut_in_two(documents[0], config.validation_fraction, description)
    train: list[str] = []
    validation: list[str] = []
    for group in groups.values():  # split each group, so that both sides have the same mixture
        held_out = _held_out(group, config.validation_fraction, config.seed)
        for number, document in enumerate(group):
            side = validation if number in held_out else train
            side.append(document)
    if not validation:
        raise DataError(
            "too few documents for training and validation: "
            f"{description or 'none'}; give at least two"
        )
    return Documents(train, validation, description)


def _streamed(config: DataConfig) -> Documents:
    held_out = held_out_documents(config)
    return Documents(
        train=Stream(config, frozenset(held_out)),
        validation=list(held_out.values()),
        description=f"the dataset {config.source} (at most {config.max_chars:,} characters)",
    )


def _groups(config: DataConfig) -> dict[str, list[str]]:
    """All documents, by the name of their group."""
    if config.source != "builtin":
        return {config.source: user_documents(config.source)}
    return {
        "standard library": stdlib_documents(config.stdlib_chars, config.seed),
        "synthetic idiom": idiom_documents(config.idiom_chars, config.seed),
    }


def _description(groups: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for name, group in groups.items():
        if group:
            files = "file" if len(group) == 1 else "files"
            n_chars = sum(map(len, group))
            parts.append(f"{len(group):,} {name} {files} ({n_chars:,} characters)")
    return ", ".join(parts)


def _held_out(documents: Sequence[str], fraction: float, seed: int) -> set[int]:
    """The indices of the documents that are held out for validation.

    At least one document is held out and at least one is left; of a single document, none is held
    out. They are drawn at random such that they fit into `fraction` of the characters, rather than
    of the documents, since one of these could be a very long file. If no document fits, the
    shortest one is held out.
    """
    n_documents = len(documents)
    if n_documents < 2:
        return set()
    lengths = list(map(len, documents))
    room = fraction * sum(lengths)
    held_out: set[int] = set()
    for number in random.Random(seed).sample(range(n_documents), n_documents):
        if lengths[number] <= room and len(held_out) < n_documents - 1:
            held_out.add(number)
            room -= lengths[number]
    return held_out or {lengths.index(min(lengths))}


def _cut_in_two(document: str, fraction: float, description: str) -> Documents:
    """Hold out about the last `fraction` of the only document, from the beginning of a line."""
    cut = document.rfind("\n", 0, round(len(document) * (1 - fraction))) + 1
    head = document[:cut]
    tail = document[cut:]
    if not head.strip() or not tail.strip():
        raise DataError(f"too little text to split into training and validation: {description}")
    return Documents([head], [tail], description)
