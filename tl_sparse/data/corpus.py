"""Text packed as rows of tokens, in files that are mapped, not read, into memory."""

import copy
import hashlib
import random
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
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

from tl_sparse.data.config import DataConfig
from tl_sparse.data.documents import Documents, load_documents
from tl_sparse.data.stream import Stream
from tl_sparse.data.tokenizer import load_tokenizer, train_tokenizer
from tl_sparse.errors import DataError, TokenizerError, TrainError

#: How many characters of a stream train the tokenizer.
STREAM_TOKENIZER_CHARS = 5_000_000
_DOCUMENTS_PER_BATCH = 64  # bounds the memory that the tokenizer's result objects take


@dataclass(frozen=True)
class Corpus:
    """What a run reads: the tokenizer trained on its text, and tokens [seq, n_ctx], uint16 or
    int32, mapped from files.

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
    """Train a tokenizer of `d_vocab` tokens on the text of `config`, in which the `required`
    strings are tokens, and pack the text as rows of `n_ctx` tokens, in an order that `seed`
    decides.

    The files appear in `folder` all together or not at all; None makes temporary ones. `about` is
    that of a corpus that was in `folder` before: if its files are still there, with their sizes,
    they are read, and otherwise made again.

    Raises:
        DataError: as `load_documents` and `pack_tokens`, or the disk is full.
        TokenizerError: as `train_tokenizer`.
        TrainError: the text is no longer the one that `about` describes.
    """
    if folder is not None and about is not None:
        stored = _read_corpus(folder, n_ctx, about)
        if stored is not None:
            return stored
    documents = load_documents(config)
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
                    f"{parent} was trained on other text: {config} does not give its tokens "
                    "any more"
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

    The documents are shuffled with `seed` and joined, each with the end-of-text token before it; a
    row may hold the end of one document and the beginning of the next. The last, incomplete row is
    dropped. A stream, which is shuffled already, is packed in the order in which it comes.

    Raises:
        DataError: the documents do not fill one row.
        TokenizerError: the tokenizer has no end-of-text token.
    """
    with TemporaryFile() as file:
        return _write_rows(file, documents, tokenizer, n_ctx, seed).int()


def _read_corpus(folder: Path, n_ctx: int, about: dict[str, Any]) -> Corpus | None:
    """The corpus in `folder`, if it is whole."""
    try:
        for name, size in about["bytes"].items():
            if (folder / name).stat().st_size != size:
                return None
        tokenizer = load_tokenizer(folder)
    except (TokenizerError, OSError, KeyError):
        return None
    train = _mapped(folder / "train", tokenizer, n_ctx)
    validation = _mapped(folder / "validation", tokenizer, n_ctx)
    return Corpus(tokenizer, train, validation, about)


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
    """The tokenizer's files, and a file of tokens for each side of the split."""
    tokenizer.save_pretrained(folder)
    with open(folder / "train", "w+b") as file:
        train = _write_rows(file, documents.train, tokenizer, n_ctx, seed)
    with open(folder / "validation", "w+b") as file:
        validation = _write_rows(file, documents.validation, tokenizer, n_ctx, seed)
    digest = hashlib.sha256()
    for rows in (train, validation):
        for chunk in rows.split(1024):
            digest.update(chunk.numpy())
    about = {
        "description": documents.description,
        "sha256": digest.hexdigest(),
        "bytes": {"train": train.nbytes, "validation": validation.nbytes},
    }
    return Corpus(tokenizer, train, validation, about)


def _write_rows(
    file: IO[bytes],
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    n_ctx: int,
    seed: int,
) -> Int[Tensor, "seq n_ctx"]:
    """`pack_tokens` into an empty, open file, from which the rows are mapped. Only one batch of
    documents at a time is in memory.
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
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            tokens.append(end_of_text)
            tokens.extend(encoding.ids)
        tokens.tofile(file)
        n_tokens += len(tokens)
    if n_tokens < n_ctx:
        raise DataError(
            f"the documents are {n_tokens} tokens, fewer than one row of n_ctx = {n_ctx}"
        )
    n_rows = n_tokens // n_ctx
    file.truncate(n_rows * n_ctx * dtype.itemsize)
    return _mapped(file, tokenizer, n_ctx)


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of what encodes text. The original may still truncate and pad as it was last asked to,
    for example by `model.to_tokens`.
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


def _token_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype[Any]:
    """uint16 if every token fits, else int32."""
    largest = max(tokenizer.get_vocab().values())
    return np.dtype("H" if largest < 2**16 else "i")


def _mapped(
    file: Path | IO[bytes], tokenizer: PreTrainedTokenizerFast, n_ctx: int
) -> Int[Tensor, "seq n_ctx"]:
    """The rows in a file of tokens."""
    # "c" is copy-on-write: writing into the tensor leaves the file as it is. With "r", torch would
    # warn that the memory cannot be written to.
    tokens = np.memmap(file, _token_dtype(tokenizer), "c")
    return torch.from_numpy(tokens).view(-1, n_ctx)
