"""Checking the tokens that users give, and finding padding among them."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.arrays import as_tokens, check_vocabulary
from tl_sparse.errors import DataError
from tl_sparse.hooks.points import TLModel


@checked("tokens")
def tokens_for(model: TLModel, tokens: object, name: str = "tokens") -> Int[Tensor, "batch pos"]:
    """The tokens as `as_tokens` returns them, if they are in the vocabulary of `model`.

    Args:
        name: what the tokens are called in error messages.

    Raises:
        DataError: as for `as_tokens`, or if a token is not in the vocabulary.
    """
    integers = as_tokens(tokens, name)
    check_vocabulary(integers, model.cfg.d_vocab)
    return integers


@checked("mask")
def mask_of(mask: object, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The mask as booleans, on the device of `tokens`, from booleans or from 0 and 1.

    Raises:
        DataError: if it does not have the shape of `tokens`, or has other values.
    """
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        mask = torch.from_numpy(mask)
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        raise DataError(
            f"a mask must have the shape of its tokens, {list(tokens.shape)}, unlike "
            f"{_described(mask)}"
        )
    is_real = mask != 0
    if not bool((is_real == mask).all()):
        raise DataError("a mask must be 1 for each real token, and 0 for padding")
    return is_real.to(tokens.device)


def _described(value: object) -> str:
    """The dtype and shape of a tensor or array; the type of anything else."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} of {list(value.shape)}"
    return f"a {type(value).__name__}"


def looks_padded(tokens: Int[Tensor, "batch pos"], tokenizer: Any) -> bool:
    """Whether rows seem to have been padded to the same length with the tokenizer's padding token.

    Where the padding token also begins or ends texts, one at an end of a row may do just that, as
    in packed corpora. Then it takes two of them at the right end of a row, or three at the left, to
    look padded; and in no row may two of them follow each other elsewhere, as they do around empty
    documents.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return False
    is_pad = tokens == pad
    is_leading = is_pad.cumprod(1)
    is_trailing = is_pad.flip(1).cumprod(1).flip(1)
    n_leading = int(is_leading.sum(1).max())
    n_trailing = int(is_trailing.sum(1).max())
    if pad not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return max(n_leading, n_trailing) > 0
    is_inside = is_pad & (is_leading == 0) & (is_trailing == 0)
    has_empty_documents = bool((is_inside[:, 1:] & is_inside[:, :-1]).any())
    return (n_trailing > 1 or n_leading > 2) and not has_empty_documents


@checked()
def check_not_padded(tokens: Int[Tensor, "batch pos"], model: TLModel) -> None:
    """Check tokens that are given without a mask.

    Raises:
        DataError: if they look padded; the message says that a mask is needed.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None and looks_padded(tokens, tokenizer):
        raise DataError(
            f"the tokens look padded: some rows begin or end with {tokenizer.pad_token!r}, the "
            "padding token. Means would count the padding, so give a mask that is 1 for each real "
            "token and 0 for padding (1 everywhere, if these tokens are real)"
        )
