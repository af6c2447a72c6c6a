"""Text to train on, as tokens in files: the standard library and synthetic idioms, the user's files, or a stream."""

import copy
import glob
import hashlib
import os
import random
import shutil
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.configs import DataConfig
from tl_sparse.errors import CheckpointError, DataError, TokenizerError, TrainError
from tl_sparse.files import read_tensors
from tl_sparse.sources import find
from tl_sparse.tasks import idiom_documents
from tl_sparse.tokenizer import load_tokenizer, train_tokenizer

# Folders of the standard library that hold no ordinary code: tests, tables, data, and what pip installed.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    | {"turtledemo", "ensurepip", "site-packages", "dist-packages", "__pycache__"}
)
#: A sample of the training tokens, saved with a model; enough rows for stable means wherever it is pruned.
CORPUS_SAMPLE = "corpus_sample.safetensors"
CORPUS_ROWS = 512
_ENCODED_AT_ONCE = 64  # documents; bounds the memory that the tokenizer's result objects take
#: Of a stream: documents in the buffer that shuffles it; characters that train the tokenizer, and for validation.
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
    """Read or generate the documents of `config` and split them into training and validation documents.

    The split is by document, the same for the same seed, whatever order the file system lists files in. Only
    a single document is itself cut in two, at the end of a line.

    Raises:
        DataError: no files or dataset, one that is unreadable or not (UTF-8) text, nothing but white space in
            them, or too little to leave a document on each side.
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
        raise DataError(f"too few documents for training and validation: {description or 'none'}; give at least two")
    return Documents(train, validation, description)


@dataclass(frozen=True)
class Corpus:
    """What a run reads: the tokenizer trained on its text, and tokens [seq, n_ctx], uint16 or int32, mapped from files.

    `about` has a description of the text, and SHA-256 and sizes in bytes of the files.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Int[Tensor, "seq n_ctx"]
    validation: Int[Tensor, "seq n_ctx"]
    about: dict[str, Any]


def packed_corpus(
    config: DataConfig,
    *,
    d_vocab: int,
    n_ctx: int,
    seed: int,
    required: Sequence[str],
    folder: Path | None = None,
    about: dict[str, Any] | None = None,
) -> Corpus:
    """Train a tokenizer of `d_vocab` tokens on the text of `config`, in which the `required` strings are tokens, and
    pack the text as rows of `n_ctx` tokens, in an order that `seed` decides.

    The files appear in `folder` all together or not at all; None makes temporary ones. With `about`, of a corpus
    that was there, it is taken from there if the sizes are right, and else made again.

    Raises:
        DataError, TokenizerError: as `load_documents`, `train_tokenizer` and `pack_tokens`; the disk is full.
        TrainError: the text has become another than the one of `about`.
    """
    if folder is not None and about is not None and (found := _read_corpus(folder, n_ctx, about)) is not None:
        return found
    documents = load_documents(config)
    sample = documents.train
    if isinstance(sample, Stream):
        max_chars = min(config.max_chars, STREAM_TOKENIZER_CHARS)
        sample = replace(sample, config=replace(config, max_chars=max_chars))
    tokenizer = train_tokenizer(sample, d_vocab, required)
    parent, rows, digest = None if folder is None else folder.parent, {}, hashlib.sha256()
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".data.", dir=parent) as temporary:
            packed = Path(temporary, "data")
            tokenizer.save_pretrained(packed)
            for name, part in (("train", documents.train), ("validation", documents.validation)):
                with open(packed / name, "w+b") as file:
                    rows[name] = _write_rows(file, part, tokenizer, n_ctx, seed)
                for some in rows[name].split(1024):
                    digest.update(some.numpy())
            sizes = {name: tensor.nbytes for name, tensor in rows.items()}
            made = {"description": documents.description, "sha256": digest.hexdigest(), "bytes": sizes}
            if about is not None and made["sha256"] != about.get("sha256"):
                raise TrainError(f"{parent} was trained on other text: {config} does not give its tokens any more")
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
                packed.replace(folder)
    except OSError as error:
        raise DataError(f"cannot write the packed tokens of {parent or 'the run'}: {error}") from error
    return Corpus(tokenizer, **rows, about=made)


def _read_corpus(folder: Path, n_ctx: int, about: dict[str, Any]) -> Corpus | None:
    """The corpus in `folder`, if it is whole."""
    try:
        if any((folder / name).stat().st_size != size for name, size in about["bytes"].items()):
            return None
        tokenizer = load_tokenizer(folder)
    except (TokenizerError, OSError, KeyError):
        return None
    rows = {name: _mapped(folder / name, tokenizer, n_ctx) for name in about["bytes"]}
    return Corpus(tokenizer, **rows, about=about)


def pack_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, n_ctx: int, seed: int
) -> Int32[Tensor, "seq n_ctx"]:
    """The documents as rows of exactly `n_ctx` tokens, for next-token prediction.

    The documents are shuffled with `seed` and joined, each with the end-of-text token before it; a row may
    hold the end of one document and the beginning of the next. The last, incomplete row is dropped. A stream,
    which is shuffled already, is packed as it comes.

    Raises:
        DataError: the documents do not fill one row.
        TokenizerError: the tokenizer has no end-of-text token.
    """
    with TemporaryFile() as file:
        return _write_rows(file, documents, tokenizer, n_ctx, seed).int()


def _write_rows(
    file: IO[bytes], documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, n_ctx: int, seed: int
) -> Int[Tensor, "seq n_ctx"]:
    """`pack_tokens` into an empty, open file, which the rows are mapped from; a batch at a time is in memory."""
    if (end_of_text := tokenizer.eos_token_id) is None:
        raise TokenizerError("the tokenizer has no end-of-text token (eos_token) to put before each document")
    if isinstance(documents, Sequence):
        documents = random.Random(seed).sample(documents, len(documents))
    # A copy: the original may still truncate and pad as it was last asked to, as by `model.to_tokens`.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    dtype, n_tokens = _dtype(tokenizer), 0
    remaining = iter(documents)
    while batch := list(islice(remaining, _ENCODED_AT_ONCE)):
        tokens = array(dtype.char)
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            tokens.append(end_of_text)
            tokens.extend(encoding.ids)
        tokens.tofile(file)
        n_tokens += len(tokens)
    if n_tokens < n_ctx:
        raise DataError(f"the documents are {n_tokens} tokens, fewer than one row of n_ctx = {n_ctx}")
    file.truncate((n_tokens - n_tokens % n_ctx) * dtype.itemsize)
    return _mapped(file, tokenizer, n_ctx)


def _dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype[Any]:
    """uint16 if every token fits, else int32."""
    return np.dtype("H" if max(tokenizer.get_vocab().values()) < 2**16 else "i")


def _mapped(file: str | Path | IO[bytes], tokenizer: PreTrainedTokenizerFast, n_ctx: int) -> Int[Tensor, "seq n_ctx"]:
    # "c": whoever writes into the tensor, the file stays as it is; torch warns of memory it must not write.
    return torch.from_numpy(np.memmap(file, _dtype(tokenizer), "c")).view(-1, n_ctx)


def _stdlib_documents(n_chars: int, seed: int) -> list[str]:
    """Files of the standard library in seeded order, `n_chars` in all; the last is cut at a line's end."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # these are not walked into
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
        found = [path] if path.is_file() else [Path(name) for name in glob.glob(str(path), recursive=True)]
    paths = sorted(path for path in found if not path.is_dir())
    if not paths:
        raise DataError(f'no files at {source}: give "builtin", a folder with *.py or *.txt, a glob pattern or a file')
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
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it has a NUL byte")
    return text


def _held_out(documents: Sequence[str], fraction: float, seed: int) -> set[int]:
    """Which documents are for validation: random ones that fit into `fraction` of the characters (a share of the
    documents could be one long file); at least one and at most all but one, none of a single document."""
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
    """The documents of an "hf:" dataset but those `held_out`, read anew, in the same order, at every iteration.

    Iterating raises `DataError` where the dataset cannot be read or a document is not text.
    """

    config: DataConfig
    held_out: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[str]:
        import datasets

        source, column = self.config.source, self.config.text_column
        path = Path(source.removeprefix("hf:")).expanduser()
        where = {"path": str(path)} if not path.is_file() else {"path": str(path.parent), "data_files": path.name}
        subset, split = self.config.subset or None, self.config.split
        number = length = 0
        try:
            dataset = datasets.load_dataset(**where, name=subset, split=split, streaming=True)
            for row in dataset.shuffle(self.config.seed, buffer_size=STREAM_BUFFER):
                if column not in row:
                    raise DataError(f"{source} has no column {column!r}; text_column must be one of {', '.join(row)}")
                if not isinstance(text := row[column] or "", str):
                    raise DataError(f"column {column!r} of {source} must hold text, not {type(text).__name__}")
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
    """A stream to train on; of its documents the first, never the second, and a share of the others are held out."""
    generator, validation, room, i = random.Random(config.seed), dict[int, str](), STREAM_VALIDATION_CHARS, -1
    for i, text in enumerate(Stream(config)):
        if i == 0 or (i > 1 and generator.random() < config.validation_fraction):
            validation[i] = text
            room -= len(text)
        if i > 0 and room <= 0:
            break
    if i < 1:
        raise DataError(f"{config.source} has {i + 1} documents with text in {config.text_column!r}; give at least two")
    description = f"the dataset {config.source} (at most {config.max_chars:,} characters)"
    return Documents(Stream(config, frozenset(validation)), list(validation.values()), description)


def load_corpus(
    model: str | Path, tokenizer: PreTrainedTokenizerFast | None, n_ctx: int, source: str | None = None
) -> Int32[Tensor, "seq n_ctx"]:
    """Tokens of a model's training distribution, to take means over.

    Args:
        model: its folder, or another name that `load` knows; `train` leaves a sample of the training tokens there.
        tokenizer: of the model.
        n_ctx: length of the rows.
        source: text to use instead of that sample: see `DataConfig.source`.

    Raises:
        DataError: no sample in the folder and no `source`; or the source cannot be used.
        TokenizerError: a source is given, but there is no tokenizer.
        CheckpointError: there is no such model, or the sample is damaged.
    """
    if source is None:
        sample = find(model) / CORPUS_SAMPLE
        if not sample.is_file():
            raise DataError(f"{sample} does not exist; give the text the model was trained on, or one like it")
        tokens = read_tensors(sample).get("tokens")
        if tokens is None or tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens):
            raise CheckpointError(f"{sample} must hold integer tokens [seq, pos]")
        if tokens.shape[1] > n_ctx:
            raise DataError(f"{sample}: rows of {tokens.shape[1]} tokens do not fit the context of n_ctx = {n_ctx}")
        return tokens.int()
    if tokenizer is None:
        raise TokenizerError("the model has no tokenizer, so text cannot become tokens for it")
    documents = load_documents(DataConfig(source, max_chars=3_000_000, stdlib_chars=300_000, idiom_chars=300_000))
    return pack_tokens(documents.train, tokenizer, n_ctx, seed=0)[:CORPUS_ROWS]
