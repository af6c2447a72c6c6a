"""Text to train on, as tokens: the standard library and synthetic idioms, or the user's own files."""

from __future__ import annotations

import copy
import glob
import os
import random
import sysconfig
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int32
from torch import Tensor

from tl_sparse.config import DataConfig
from tl_sparse.errors import CheckpointError, DataError, TokenizerError
from tl_sparse.files import read_tensors
from tl_sparse.idioms import idiom_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Folders of the standard library that hold no ordinary code: tests, tables, data, and what pip installed.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    | {"turtledemo", "ensurepip", "site-packages", "dist-packages", "__pycache__"}
)
#: A sample of the training tokens, saved with a model; enough rows for stable means wherever it is pruned.
CORPUS_SAMPLE = "corpus_sample.safetensors"
CORPUS_ROWS = 512
_ENCODED_AT_ONCE = 1024  # documents; bounds the memory that the tokenizer's result objects take


@dataclass(frozen=True)
class Documents:
    """Whole documents, no document in both lists; `description` says in a line where they come from."""

    train: list[str]
    validation: list[str]
    description: str


def load_documents(config: DataConfig) -> Documents:
    """Read or generate the documents of `config` and split them into training and validation documents.

    The split is by document, the same for the same seed, whatever order the file system lists files in. Only
    a single document is itself cut in two, at the end of a line.

    Raises:
        DataError: no files, a file that is unreadable or not UTF-8 text, nothing but white space in them, or
            too little to leave a document on each side.
    """
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
    train: list[str] = []
    validation: list[str] = []
    for group in groups.values():  # each by itself, so that both sides have the same mixture
        held_out = _held_out(group, config.validation_fraction, config.seed)
        train += [document for i, document in enumerate(group) if i not in held_out]
        validation += [document for i, document in enumerate(group) if i in held_out]
    if not validation:
        raise DataError(
            f"too few documents for training and validation: {description or 'none'}; give at least two"
        )
    return Documents(train, validation, description)


def pack_tokens(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, n_ctx: int, seed: int
) -> Int32[Tensor, "seq n_ctx"]:
    """The documents as rows of exactly `n_ctx` tokens, for next-token prediction.

    The documents are shuffled with `seed` and joined, each with the end-of-text token before it; a row may
    hold the end of one document and the beginning of the next. The last, incomplete row is dropped.

    Raises:
        DataError: the documents do not fill one row.
        TokenizerError: the tokenizer has no end-of-text token.
    """
    if (end_of_text := tokenizer.eos_token_id) is None:
        raise TokenizerError("the tokenizer has no end-of-text token (eos_token) to put before each document")
    shuffled = random.Random(seed).sample(documents, len(documents))
    # A copy: the original may still truncate and pad as it was last asked to, as by `model.to_tokens`.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    stream = array("i")  # four bytes a token, where a list of Python integers would take over thirty
    for start in range(0, len(shuffled), _ENCODED_AT_ONCE):
        batch = shuffled[start : start + _ENCODED_AT_ONCE]
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            stream.append(end_of_text)
            stream.extend(encoding.ids)
    n_rows = len(stream) // n_ctx
    if n_rows == 0:
        raise DataError(f"the documents are {len(stream)} tokens, fewer than one row of n_ctx = {n_ctx}")
    return torch.frombuffer(stream, dtype=torch.int32)[: n_rows * n_ctx].clone().view(n_rows, n_ctx)


def _stdlib_documents(n_chars: int, seed: int) -> list[str]:
    """Files of the standard library in seeded order, `n_chars` in all; the last is cut at a line's end."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # these are not walked into
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort()
    random.Random(seed).shuffle(paths)
    documents: list[str] = []
    left = n_chars
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
        paths = [found for found in path.rglob("*") if found.suffix in (".py", ".txt") and not found.is_dir()]
    elif path.is_file():
        paths = [path]
    else:
        paths = [found for name in glob.glob(str(path), recursive=True) if not (found := Path(name)).is_dir()]
    if not paths:
        raise DataError(
            f'no files at {source}: give "builtin", a folder with *.py or *.txt, a glob pattern or a file'
        )
    documents = [text for path in sorted(paths) if (text := _read(path)).strip()]
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
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it has a NUL byte")
    return text


def _held_out(documents: Sequence[str], fraction: float, seed: int) -> frozenset[int]:
    """Which documents are for validation: at random, as many as fit into `fraction` of the characters.

    At least one and at most all but one; none of a single document. Counting characters, and not documents,
    keeps one long file from being most of the validation text.
    """
    room = fraction * sum(map(len, documents))
    held_out: set[int] = set()
    for i in random.Random(seed).sample(range(len(documents)), len(documents)):
        if len(documents[i]) <= room and len(held_out) < len(documents) - 1:
            held_out.add(i)
            room -= len(documents[i])
    if not held_out and len(documents) > 1:
        held_out.add(min(range(len(documents)), key=lambda i: len(documents[i])))
    return frozenset(held_out)


def _cut_in_two(document: str, fraction: float, description: str) -> Documents:
    """The last `fraction` of the only document is for validation, from the beginning of a line."""
    cut = document.rfind("\n", 0, round(len(document) * (1 - fraction))) + 1
    head, tail = document[:cut], document[cut:]
    if not head.strip() or not tail.strip():
        raise DataError(f"too little text to split into training and validation: {description}")
    return Documents([head], [tail], description)


def load_corpus(
    model_folder: str | Path, tokenizer: PreTrainedTokenizerFast | None, n_ctx: int, source: str | None = None
) -> Int32[Tensor, "seq n_ctx"]:
    """Tokens of a model's training distribution, to take means over.

    Args:
        model_folder: where the model is; `tl-sparse train` leaves a sample of its training tokens there.
        tokenizer: of the model.
        n_ctx: length of the rows.
        source: text to use instead of that sample: see `DataConfig.source`.

    Raises:
        DataError: no sample in the folder and no `source`; or the source cannot be used.
        TokenizerError: a source is given, but there is no tokenizer.
        CheckpointError: the sample is damaged.
    """
    sample = Path(model_folder) / CORPUS_SAMPLE
    if source is None:
        if not sample.is_file():
            raise DataError(f"{sample} does not exist; give the text the model was trained on, or one like it")
        tokens = read_tensors(sample).get("tokens")
        if tokens is None or tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens):
            raise CheckpointError(f"{sample} must hold integer tokens [seq, pos]")
        if tokens.shape[1] > n_ctx:
            raise DataError(f"{sample}: rows of {tokens.shape[1]} tokens do not fit the context of n_ctx = {n_ctx}")
        return tokens
    if tokenizer is None:
        raise TokenizerError("the model has no tokenizer, so text cannot become tokens for it")
    documents = load_documents(DataConfig(source, stdlib_chars=300_000, idiom_chars=300_000))
    return pack_tokens(documents.train, tokenizer, n_ctx, seed=0)[:CORPUS_ROWS]
