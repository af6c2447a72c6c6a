"""Text packed as rows of tokens, in files that are mapped, not read, into memory."""

import copy
import hashlib
import random
import shutil
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.data.config import DataConfig
from tl_sparse.data.documents import STREAM_TOKENIZER_CHARS, Stream, load_documents
from tl_sparse.data.tokenizer import load_tokenizer, train_tokenizer
from tl_sparse.errors import DataError, TokenizerError, TrainError

_ENCODED_AT_ONCE = 64  # documents; bounds the memory that the tokenizer's result objects take


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

    The files appear in `folder` all together or not at all; None makes temporary ones. With
    `about`, of a corpus that was there, it is taken from there if the sizes are right, and else
    made again.

    Raises:
        DataError, TokenizerError: as `load_documents`, `train_tokenizer` and `pack_tokens`; the
            disk is full.
        TrainError: the text has become another than the one of `about`.
    """
    if (
        folder is not None
        and about is not None
        and (found := _read_corpus(folder, n_ctx, about)) is not None
    ):
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
            made = {
                "description": documents.description,
                "sha256": digest.hexdigest(),
                "bytes": sizes,
            }
            if about is not None and made["sha256"] != about.get("sha256"):
                raise TrainError(
                    f"{parent} was trained on other text: {config} does not give its tokens any more"
                )
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
                packed.replace(folder)
    except OSError as error:
        raise DataError(
            f"cannot write the packed tokens of {parent or 'the run'}: {error}"
        ) from error
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

    The documents are shuffled with `seed` and joined, each with the end-of-text token before it; a
    row may hold the end of one document and the beginning of the next. The last, incomplete row is
    dropped. A stream, which is shuffled already, is packed as it comes.

    Raises:
        DataError: the documents do not fill one row.
        TokenizerError: the tokenizer has no end-of-text token.
    """
    with TemporaryFile() as file:
        return _write_rows(file, documents, tokenizer, n_ctx, seed).int()


def _write_rows(
    file: IO[bytes],
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    n_ctx: int,
    seed: int,
) -> Int[Tensor, "seq n_ctx"]:
    """`pack_tokens` into an empty, open file, which the rows are mapped from; a batch at a time is
    in memory.
    """
    if (end_of_text := tokenizer.eos_token_id) is None:
        raise TokenizerError(
            "the tokenizer has no end-of-text token (eos_token) to put before each document"
        )
    if isinstance(documents, Sequence):
        documents = random.Random(seed).sample(documents, len(documents))
    # A copy: the original may still truncate and pad as it was last asked to, as by
    # `model.to_tokens`.
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
        raise DataError(
            f"the documents are {n_tokens} tokens, fewer than one row of n_ctx = {n_ctx}"
        )
    file.truncate((n_tokens - n_tokens % n_ctx) * dtype.itemsize)
    return _mapped(file, tokenizer, n_ctx)


def _dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype[Any]:
    """uint16 if every token fits, else int32."""
    return np.dtype("H" if max(tokenizer.get_vocab().values()) < 2**16 else "i")


def _mapped(
    file: str | Path | IO[bytes], tokenizer: PreTrainedTokenizerFast, n_ctx: int
) -> Int[Tensor, "seq n_ctx"]:
    # "c": whoever writes into the tensor, the file stays as it is; torch warns of memory it must
    # not write.
    return torch.from_numpy(np.memmap(file, _dtype(tokenizer), "c")).view(-1, n_ctx)
