"""The initial values of the bigram table."""

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.hooks import TLModel

_ROWS_AT_ONCE = 4096  # bounds the memory of counting


@torch.no_grad()
def start_bigram_from_counts(
    model: TLModel, tokens: Int[Tensor, "seq pos"], prior: float = 10.0
) -> None:
    """Set the bigram table to log p(next token | current token), as counted in `tokens`.

    Args:
        model: a model with a bigram table.
        tokens: the training tokens.
        prior: the number of counts, distributed as the unigrams are, that is added to each row to
            smooth the rows of rare tokens.
    """
    table = model.network.bigram.W_bigram
    counts = _bigram_counts(tokens, d_vocab=len(table)).double()
    unigram = counts.sum(0) + 1  # so that no token has probability 0
    smoothed = counts + prior * unigram / unigram.sum()
    table.copy_((smoothed / smoothed.sum(1, keepdim=True)).log())


def _bigram_counts(tokens: Int[Tensor, "seq pos"], d_vocab: int) -> Int[Tensor, "d_vocab d_vocab"]:
    """The number of times that one token follows another within a row of `tokens`.

    The rows of the result are the current token, and the columns the next token.
    """
    counts = torch.zeros(d_vocab**2, dtype=torch.long)
    for rows in tokens.split(_ROWS_AT_ONCE):
        pairs = rows[:, :-1].long() * d_vocab + rows[:, 1:].long()
        counts += torch.bincount(pairs.flatten(), minlength=d_vocab**2)
    return counts.view(d_vocab, d_vocab)
