"""Preparation of a tokenizer for a model."""

import copy

from transformers import PreTrainedTokenizerBase

from tl_sparse.data import END_OF_TEXT
from tl_sparse.errors import TokenizerError
from tl_sparse.tasks import encoding


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, d_vocab: int
) -> tuple[PreTrainedTokenizerBase, bool]:
    """Check and copy a tokenizer; in the copy, end-of-text fills in for missing special tokens.

    This replaces TransformerLens' own set-up, which reloads a tokenizer from its source and
    therefore fails for a tokenizer that was made in memory.

    Returns:
        The copy, and whether it prepends the BOS token to a text by itself.

    Raises:
        TokenizerError: if `tokenizer` is not a tokenizer, its vocabulary is larger than `d_vocab`,
            or it has no end-of-text token.
    """
    if not hasattr(tokenizer, "add_special_tokens") or not hasattr(tokenizer, "all_special_tokens"):
        raise TokenizerError(
            f"a tokenizer from transformers is needed, not {type(tokenizer).__name__}"
        )
    n_tokens = len(tokenizer)
    if n_tokens > d_vocab:
        raise TokenizerError(
            f"the tokenizer has {n_tokens} tokens, more than the model's d_vocab = {d_vocab}"
        )
    tokenizer = copy.deepcopy(tokenizer)
    end = _end_of_text(tokenizer)
    roles = ("eos_token", "pad_token", "bos_token")
    missing = [role for role in roles if getattr(tokenizer, role) is None]
    tokenizer.add_special_tokens(dict.fromkeys(missing, end))
    return tokenizer, _prepends_bos(tokenizer)


def _prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        ids = tokenizer.encode("a")
    except Exception:  # the Rust library's own, for a vocabulary without "a" and an unknown token
        special = set(tokenizer.all_special_ids)
        ordinary = (token for token in tokenizer.get_vocab().values() if token not in special)
        token = tokenizer.decode([next(ordinary, tokenizer.eos_token_id)])
        with encoding(f"{token!r}, which it says itself"):
            ids = tokenizer.encode(token)
    return len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, END_OF_TEXT):
        if token is not None and token in vocabulary:
            return str(token)
    raise TokenizerError(
        f"the tokenizer has no end-of-text token: neither eos_token nor {END_OF_TEXT!r} in its "
        "vocabulary; tokenizer.add_special_tokens({'eos_token': …}) names it"
    )
