"""Texts as tokens, or an error that says why they are none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tl_sparse.arguments import checked
from tl_sparse.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked()
def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, without special tokens around it.

    Raises:
        ArgumentError: if `text` is not a text.
        TokenizerError: if the tokenizer has no tokens for a part of the text.
    """
    with encoding(repr(text[:40])):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@contextmanager
def encoding(what: str) -> Iterator[None]:
    """Within the context, a tokenizer that fails raises `TokenizerError`.

    A vocabulary of whole words has no tokens for other words if it has no unknown token.

    Args:
        what: the text that is encoded, for the message.
    """
    try:
        yield
    except Exception as error:  # the Rust library raises a bare Exception
        raise TokenizerError(
            f"the tokenizer has no tokens for {what}: {error}; use words of its vocabulary, or a "
            "tokenizer with an unknown token (unk_token)"
        ) from error
