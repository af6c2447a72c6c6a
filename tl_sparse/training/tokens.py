"""The tokens of a training run, and the order of its batches."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.arrays import as_tokens
from tl_sparse.checkpoints import CORPUS_ROWS
from tl_sparse.data import Corpus, packed_corpus
from tl_sparse.errors import DataError
from tl_sparse.training.config import TrainConfig


def packed_for(
    config: TrainConfig,
    required: Sequence[str],
    folder: Path | None = None,
    about: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Corpus:
    """The tokenizer and tokens for a run of `config`; see `packed_corpus`."""
    return packed_corpus(
        config.data,
        d_vocab=config.model.d_vocab,
        n_ctx=config.model.n_ctx,
        seed=config.seed,
        required=required,
        folder=folder,
        about=about,
        tokenizer=tokenizer,
    )


def training_tokens(tokens: Any) -> Int[Tensor, "batch pos"]:
    """`tokens`, integers of any dtype and kind of array, as rows that a model can be trained on.

    Raises:
        DataError: as for `as_tokens`, or if there is one position only, after which no token is to
            be predicted.
    """
    rows = as_tokens(tokens)
    if rows.shape[1] < 2:
        raise DataError(f"tokens must have at least two positions, not shape {list(rows.shape)}")
    # Gradients cannot be computed through a tensor that was made in `torch.inference_mode()`.
    return rows.clone() if rows.is_inference() else rows


def batches(
    tokens: Int[Tensor, "seq pos"], batch_size: int, seed: int, start: int = 0
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Endless batches of rows, in an order that depends only on the seed.

    Each epoch takes every row at most once. At the end of an epoch, rows that do not fill a batch
    are skipped.

    Args:
        tokens: the rows.
        batch_size: the number of rows in each batch; if there are fewer rows in all, every batch
            has all of them.
        seed: the seed of the order.
        start: the number of the first batch, from 0; a resumed run skips the batches before it.
    """
    for rows in islice(_batch_indices(len(tokens), batch_size, seed), start, None):
        yield tokens[rows].long()


def _batch_indices(n_rows: int, batch_size: int, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    """The row indices of each batch, in a new order for each epoch."""
    generator = torch.Generator().manual_seed(seed)
    full = min(batch_size, n_rows)
    while True:
        order = torch.randperm(n_rows, generator=generator)
        for rows in order.split(batch_size):
            if len(rows) == full:
                yield rows


def corpus_sample(corpus: Corpus, seed: int) -> dict[str, Int32[Tensor, "seq pos"]]:
    """The tensors of the file `CORPUS_SAMPLE` that is saved with a model: rows to train on.

    Args:
        corpus: the text of the run.
        seed: the seed of the run.
    """
    rows = next(batches(corpus.train, CORPUS_ROWS, seed))
    return {"tokens": rows.int()}


def tokens_per_step(config: TrainConfig, rows: Int[Tensor, "seq pos"]) -> int:
    """The number of tokens in a batch of `rows`, summed over all processes."""
    return min(config.batch_size, len(rows)) * config.model.n_ctx
