"""The pairs of a task for what is learned on them, or measured by gradients."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from tl_sparse.arguments import checked
from tl_sparse.config import check
from tl_sparse.tasks import TaskData

#: So many batches are drawn at a time.
_DRAWN_TOGETHER = 16


@checked()
def random_batches(data: TaskData, pairs_per_batch: int, seed: int) -> Iterator[TaskData]:
    """An endless iterator over random batches of pairs.

    Several batches are drawn at a time and sorted by length, so that each has pairs of similar
    length and little computation is spent on padding.

    Raises:
        ConfigError: if `pairs_per_batch` is below 1.
    """
    check(pairs_per_batch >= 1, "pairs_per_batch", pairs_per_batch, "at least 1")
    return _random_batches(data, min(pairs_per_batch, data.n_pairs), seed)


def _random_batches(data: TaskData, size: int, seed: int) -> Iterator[TaskData]:
    generator = torch.Generator().manual_seed(seed)
    lengths = data.last.view(-1, 2).amax(1).cpu()
    while True:
        drawn = torch.randperm(data.n_pairs, generator=generator)[: _DRAWN_TOGETHER * size]
        by_length = drawn[lengths[drawn].argsort(stable=True)]
        # Of almost equal size, so that no pair counts for more in a small last batch.
        batches = by_length.tensor_split(math.ceil(len(by_length) / size))
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield data.pairs(batches[i])


def ordinary(data: TaskData) -> TaskData:
    """Data that gradients can flow past, even if they were made in `torch.inference_mode`."""
    return replace(
        data,
        tokens=data.tokens.clone(),
        last=data.last.clone(),
        candidates=data.candidates.clone(),
        correct=data.correct.clone(),
    )
