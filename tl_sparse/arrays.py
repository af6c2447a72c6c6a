"""Tokens and positions from the kinds of arrays that users have."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.errors import DataError


def as_tokens(tokens: object, name: str = "tokens") -> Int[Tensor, "batch pos"]:
    """Token ids `[batch, pos]` as int64.

    Args:
        tokens: a tensor, NumPy array or (nested) list of integers of any integer dtype. A single
            row `[pos]` becomes a batch of one.
        name: what the tokens are called in error messages.

    Raises:
        DataError: if the tokens are not integers, do not have this shape, or are none at all.
    """
    integers = as_integers(name, tokens)
    if integers.ndim == 1:
        integers = integers[None]
    if integers.ndim != 2:
        raise _not_integers(name, integers)
    if integers.numel() == 0:
        raise DataError(f"{name} must not be empty, as those of shape {list(integers.shape)} are")
    return integers


def check_vocabulary(tokens: Int[Tensor, "batch pos"], d_vocab: int) -> None:
    """Raise `DataError` if a token is outside the vocabulary."""
    lowest, highest = tokens.aminmax()
    if int(lowest) < 0 or int(highest) >= d_vocab:
        raise outside_vocabulary(d_vocab)


def outside_vocabulary(d_vocab: int) -> DataError:
    """The error for tokens of which one is outside the vocabulary."""
    return DataError(f"token ids must be in [0, {d_vocab}), the model's vocabulary")


def as_mask(mask: object) -> Tensor:
    """An attention mask of any dtype and kind of array as a tensor of the same shape.

    Raises:
        DataError: for anything else.
    """
    if isinstance(mask, Tensor):
        return mask
    return _from_array("attention_mask", mask)


def as_integers(name: str, values: object) -> Tensor:
    """Integers of any dtype and kind of array as an int64 tensor of the same shape.

    Raises:
        DataError: for anything else; it names them `name`.
    """
    if not isinstance(values, Tensor):
        values = _from_array(name, values)
    dtype = values.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise _not_integers(name, values)
    return values.long()


def _from_array(name: str, values: object) -> Tensor:
    try:
        array = np.asarray(values)
        if array.dtype.kind in "US":
            raise DataError(
                f"{name} must be integers [batch, pos], and these are texts; "
                "model.to_tokens(text) makes tokens"
            )
        if array.dtype.kind == "u":
            array = array.astype(np.int64)  # torch cannot compute with all unsigned dtypes
        return torch.from_numpy(array)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{name} must be numbers [batch, pos], with rows of equal length: {error}"
        ) from error


def _not_integers(name: str, values: Tensor) -> DataError:
    return DataError(
        f"{name} must be integers [batch, pos], not {values.dtype} of {list(values.shape)}"
    )
