"""Arguments of unusual kinds: each works, or is refused with an error of the package."""

import dataclasses
import os

import pytest
import torch

from tl_sparse.data import (
    DataConfig,
    find_tokenizer,
    load_documents,
    load_tokenizer,
    pack_tokens,
    train_tokenizer,
)
from tl_sparse.errors import ConfigError, DataError, TokenizerError

pytestmark = pytest.mark.any_line

TEXTS = ["x = 1\n" * 20, "y = 2\n" * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 258)


def test_a_mapping_is_a_configuration():
    config = DataConfig(stdlib_chars=0, idiom_chars=5_000)
    assert load_documents(dataclasses.asdict(config)) == load_documents(config)
    assert load_documents({"stdlib_chars": 0, "idiom_chars": 5_000}) == load_documents(config)


@pytest.mark.parametrize("config", [None, "builtin", 3, ["builtin"], {"sources": "x"}])
def test_what_is_no_configuration(config):
    with pytest.raises(ConfigError):
        load_documents(config)


@pytest.mark.parametrize("source", ["a\0b", None, 3, os.curdir.encode()])
def test_what_is_no_source(source):
    with pytest.raises(ConfigError, match=r"source = .* is not possible; it must be"):
        DataConfig(source)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("x = 1", "documents must be texts in a list, not a str"),
        (None, "documents must be texts in a list, not a NoneType"),
        ([b"x = 1"], "each document must be text, not bytes"),
        (["x = 1", None], "each document must be text, not NoneType"),
        (["x = \ud800"], "a document holds half a character"),
        ([], "the documents have 0 tokens"),
        ([""], "the documents have 1 tokens, fewer than one row of n_ctx = 4; give more text"),
    ],
)
def test_what_cannot_be_packed(documents, message, tokenizer):
    with pytest.raises(DataError, match=message):
        pack_tokens(documents, tokenizer, 4, seed=0)


@pytest.mark.parametrize("sizes", [(0, 0), (-1, 0), (1.5, 0), ("4", 0), (True, 0), (4, None)])
def test_sizes_that_are_not_possible(sizes, tokenizer):
    with pytest.raises(ConfigError, match=r"(n_ctx|seed) = .* is not possible; it must be an int"):
        pack_tokens(TEXTS, tokenizer, *sizes)


@pytest.mark.parametrize("wrong", [None, "gpt2", 3])
def test_what_is_no_tokenizer(wrong):
    with pytest.raises(TokenizerError, match="is not a fast tokenizer of transformers"):
        pack_tokens(TEXTS, wrong, 4, seed=0)


def test_documents_may_come_one_by_one(tokenizer):
    rows = pack_tokens(iter(TEXTS), tokenizer, 4, seed=0)
    assert rows.dtype == torch.int32


@pytest.mark.parametrize("texts", ["x = 1", None, [b"x"], [3], ["\ud800"]])
def test_what_no_tokenizer_is_trained_on(texts):
    with pytest.raises(TokenizerError, match=r"(must be|half a character)"):
        train_tokenizer(texts, 258)
    with pytest.raises(TokenizerError, match=r"(must be|half a character)"):
        train_tokenizer(TEXTS, 300, required=texts)


@pytest.mark.parametrize("size", [256, 258.0, "258", None, True])
def test_vocabularies_that_are_not_possible(size):
    with pytest.raises(TokenizerError, match=r"vocab_size is .*; a byte-level tokenizer needs an"):
        train_tokenizer(TEXTS, size)


@pytest.mark.parametrize("source", [None, 3, b"folder", "a\0b"])
def test_what_is_no_path(source):
    with pytest.raises(TokenizerError, match="is not the path of a tokenizer or its folder"):
        find_tokenizer(source)
    with pytest.raises(TokenizerError, match="is not the path of a tokenizer or its folder"):
        load_tokenizer(source)
