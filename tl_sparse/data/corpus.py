"""Text packed as rows of tokens, in files that are memory-mapped rather than read whole."""

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
        about: a description of the text, the SHA-256 hash of the tokens, and the sizes of the files
            in bytes.
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
            there and have the same sizes, they are read; otherwise they are made again.

    Raises:
        DataError: as for `load_documents` and `pack_tokens`, or if the files cannot be written, for
            example because the disk is full.
        TokenizerError: as for `train_tokenizer`.
        TrainError: if the text is no longer the text that `about` describes.
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
        DataError: if the documents do not fill one row.
        TokenizerError: if the tokenizer has no end-of-text token.
    """
    with TemporaryFile() as file:
        return _write_rows(file, documents, tokenizer, n_ctx, seed).int()


def _read_corpus(folder: Path, n_ctx: int, about: dict[str, Any]) -> Corpus | None:
    """The corpus in `folder`; None if a file is missing or has another size."""
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
    """Write the tokenizer, and one file of tokens for each side of the split."""
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
    """Do the work of `pack_tokens`, in an empty, open file from which the rows are memory-mapped.

    Only one batch of documents is in memory at a time.
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
            f"the documents have {n_tokens} tokens, fewer than one row of n_ctx = {n_ctx}"
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
