"""Text packed as rows of tokens, in files that are memory-mapped rather than read whole."""

import copy
import hashlib
import random
import shutil
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Int, Int32
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.checksums import file_checksum
from tl_sparse.config import check
from tl_sparse.data.config import DataConfig
from tl_sparse.data.documents import Documents, load_documents
from tl_sparse.data.stream import Stream
from tl_sparse.data.tokenizer import load_tokenizer, train_tokenizer
from tl_sparse.errors import CheckpointError, DataError, TokenizerError, TrainError
from tl_sparse.tasks import encoding

#: The number of characters of a stream that the tokenizer is trained on.
STREAM_TOKENIZER_CHARS = 5_000_000
_DOCUMENTS_PER_BATCH = 64  # bounds the memory of the tokenizer's result objects


@dataclass(frozen=True)
class Corpus:
    """The tokens of a training run.

    Attributes:
        tokenizer: the tokenizer, trained on the text of the run.
        train: the training tokens, uint16 or int32, memory-mapped from a file.
        validation: the validation tokens, likewise.
        about: a description of the text, the SHA-256 hash of all tokens, and the checksum of each
            file.
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
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Corpus:
    """Train a tokenizer on the text of `config`, and pack the text as rows of tokens.

    Args:
        config: the text.
        d_vocab: the size of the tokenizer's vocabulary.
        n_ctx: the number of tokens in each row.
        seed: decides the order of the documents.
        required: strings that must be single tokens.
        folder: the folder for the files, which appear there all together or not at all; None makes
            temporary files.
        about: the `Corpus.about` of a corpus that was in `folder` before. If its files are still
            there and have not changed, they are read. Otherwise a warning names what has changed,
            and they are made again.
        tokenizer: a tokenizer to use instead of training one; `d_vocab` and `required` then have
            no effect.

    Raises:
        DataError: as for `load_documents` and `pack_tokens`, or if the files cannot be written, for
            example because the disk is full.
        TokenizerError: as for `train_tokenizer`.
        TrainError: if the text is no longer the text that `about` describes.
    """
    if folder is not None and about is not None:
        try:
            return _read_corpus(folder, n_ctx, about)
        except (CheckpointError, DataError, TokenizerError) as error:
            warnings.warn(f"{error}; the text is packed again", stacklevel=2)
    documents = load_documents(config)
    if tokenizer is None:
        tokenizer = train_tokenizer(_tokenizer_text(documents), d_vocab, required)
    parent = None if folder is None else folder.parent
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".data.", dir=parent) as temporary:
            packed = Path(temporary, "data")
            corpus = _write_corpus(packed, documents, tokenizer, n_ctx, seed)
            if about is not None and corpus.about["sha256"] != about.get("sha256"):
                raise TrainError(
                    f"{parent} was trained on different text: {config} no longer gives the same "
                    "tokens"
                )
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
                packed.replace(folder)
    except OSError as error:
        raise DataError(
            f"cannot write the packed tokens of {parent or 'the run'}: {error}"
        ) from error
    return corpus


def pack_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, n_ctx: int, seed: int
) -> Int32[Tensor, "seq n_ctx"]:
    """The documents as rows of exactly `n_ctx` tokens, for next-token prediction.

    The documents are shuffled with `seed` and concatenated, with the end-of-text token before each;
    a row may hold the end of one document and the beginning of the next. The last row is dropped if
    it is incomplete. A stream is already shuffled, and is packed in its own order.

    Raises:
        ConfigError: if `n_ctx` is below 1, or `n_ctx` or `seed` is not an integer.
        DataError: if the documents do not fill one row, or one of them is not text.
        TokenizerError: if the tokenizer is not one of transformers' fast tokenizers, or has no
            end-of-text token, or no tokens for a part of a document.
    """
    check(type(n_ctx) is int and n_ctx >= 1, "n_ctx", n_ctx, "an integer of at least 1")
    check(type(seed) is int, "seed", seed, "an integer")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(
            f"tokenizer = {tokenizer!r} is not a fast tokenizer of transformers; "
            "`load_tokenizer` reads one"
        )
    if isinstance(documents, str) or not isinstance(documents, Iterable):
        raise DataError(f"documents must be texts in a list, not a {type(documents).__name__}")
    with TemporaryFile() as file:
        return _write_rows(file, documents, tokenizer, n_ctx, seed).int()


def _read_corpus(folder: Path, n_ctx: int, about: Mapping[str, Any]) -> Corpus:
    """The corpus in `folder`.

    Raises:
        CheckpointError, DataError: if a file is missing, cannot be read or is not the one that
            `about` describes.
        TokenizerError: if the tokenizer cannot be read.
    """
    if "files" in about:
        _check_files(folder, about["files"])
    else:
        _check_sizes(folder, about.get("bytes"))
    tokenizer = load_tokenizer(folder)
    try:
        train = _mapped(folder / "train", tokenizer, n_ctx)
        validation = _mapped(folder / "validation", tokenizer, n_ctx)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{folder} does not hold rows of {n_ctx} tokens: {error}") from error
    # A run that was begun before files had checksums has one hash for the tokens of both sides.
    if "files" not in about and _token_hash(train, validation) != about.get("sha256"):
        raise DataError(f"{folder / 'train'} or {folder / 'validation'} has changed")
    return Corpus(tokenizer, train, validation, dict(about))


def _check_files(folder: Path, checksums: Any) -> None:
    """Raise `DataError` unless the files in `folder` have the checksums that their corpus had."""
    if not isinstance(checksums, Mapping) or not {"train", "validation"} <= checksums.keys():
        raise DataError(f"the checksums of the files in {folder} are not known")
    for name, expected in checksums.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        if file_checksum(path) != expected:
            raise DataError(f"{path} has changed: its checksum is not that of the packed text")


def _check_sizes(folder: Path, sizes: Any) -> None:
    """Raise `DataError` unless the token files in `folder` have the sizes that they had."""
    for name in ("train", "validation"):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        if not isinstance(sizes, Mapping) or path.stat().st_size != sizes.get(name):
            raise DataError(f"{path} has changed: it has another size")


def _token_hash(*sides: Int[Tensor, "seq n_ctx"]) -> str:
    """The SHA-256 hash of the tokens of all sides."""
    digest = hashlib.sha256()
    for rows in sides:
        for chunk in rows.split(1024):
            digest.update(chunk.numpy())
    return digest.hexdigest()


def _tokenizer_text(documents: Documents) -> Iterable[str]:
    """The text that the tokenizer is trained on: all training documents, or the beginning of a
    stream.
    """
    texts = documents.train
    if isinstance(texts, Stream):
        max_chars = min(texts.config.max_chars, STREAM_TOKENIZER_CHARS)
        return replace(texts, config=replace(texts.config, max_chars=max_chars))
    return texts


def _write_corpus(
    folder: Path,
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    n_ctx: int,
    seed: int,
) -> Corpus:
    """Write the tokenizer, and one file of tokens for each side of the split."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library raises a bare Exception, as for a full disk
        raise OSError(f"{folder}: {error}") from error
    with open(folder / "train", "w+b") as file:
        train = _write_rows(file, documents.train, tokenizer, n_ctx, seed, "training documents")
    with open(folder / "validation", "w+b") as file:
        validation = _write_rows(
            file, documents.validation, tokenizer, n_ctx, seed, "validation documents"
        )
    about = {
        "description": documents.description,
        "sha256": _token_hash(train, validation),
        "files": {path.name: file_checksum(path) for path in sorted(folder.iterdir())},
    }
    return Corpus(tokenizer, train, validation, about)


def _write_rows(
    file: IO[bytes],
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    n_ctx: int,
    seed: int,
    what: str = "documents",
) -> Int[Tensor, "seq n_ctx"]:
    """Do the work of `pack_tokens`, in an empty, open file from which the rows are memory-mapped.

    Only one batch of documents is in memory at a time. Errors call the documents `what`.
    """
    end_of_text = tokenizer.eos_token_id
    if end_of_text is None:
        raise TokenizerError(
            "the tokenizer has no end-of-text token (eos_token) to put before each document"
        )
    if isinstance(documents, Sequence):
        documents = random.Random(seed).sample(documents, len(documents))
    backend = _encoder(tokenizer)
    dtype = _token_dtype(tokenizer)
    n_tokens = 0
    for batch in _batches(documents):
        tokens = array(dtype.char)
        _check_texts(batch)
        with encoding(f"the {what}"):
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
        for document in encoded:
            tokens.append(end_of_text)
            tokens.extend(document.ids)
        tokens.tofile(file)
        n_tokens += len(tokens)
    if n_tokens < n_ctx:
        raise DataError(
            f"the {what} have {n_tokens} tokens, fewer than one row of n_ctx = {n_ctx}; "
            "give more text"
        )
    n_rows = n_tokens // n_ctx
    file.truncate(n_rows * n_ctx * dtype.itemsize)
    return _mapped(file, tokenizer, n_ctx)


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend that neither truncates nor pads.

    The original keeps the truncation and padding of its last call, for example by
    `model.to_tokens`.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(documents)
    while True:
        batch = list(islice(remaining, _DOCUMENTS_PER_BATCH))
        if not batch:
            return
        yield batch


def _check_texts(documents: list[str]) -> None:
    """Raise `DataError` for a document that the tokenizer could not read."""
    for document in documents:
        if not isinstance(document, str):
            raise DataError(f"each document must be text, not {type(document).__name__}")
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"a document holds half a character: {error}") from error


def _token_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype[Any]:
    """uint16 if every token id fits into it, else int32."""
    largest = max(tokenizer.get_vocab().values())
    return np.dtype("H" if largest < 2**16 else "i")


def _mapped(
    file: Path | IO[bytes], tokenizer: PreTrainedTokenizerFast, n_ctx: int
) -> Int[Tensor, "seq n_ctx"]:
    """The rows of a file of tokens, memory-mapped."""
    # Mode "c" is copy-on-write, so writing into the tensor does not change the file. With mode "r",
    # torch would warn that the memory is read-only.
    tokens = np.memmap(file, _token_dtype(tokenizer), "c")
    return torch.from_numpy(tokens).view(-1, n_ctx)
