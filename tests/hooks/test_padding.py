"""Means leave padding out: with masks, and not without them."""

import numpy as np
import pytest
import torch

from helpers import random_tokens, stock_model, tiny_model, word_tokenizer
from micro import micro_corpus, micro_model
from tl_sparse.errors import DataError
from tl_sparse.hooks import mean_activations, recording_means
from tl_sparse.hooks.tokens import looks_padded
from tl_sparse.pruning.means import corpus_means

NAMES = ["blocks.0.hook_resid_post", "blocks.0.attn.hook_z"]
#: The number of real tokens of each row.
LENGTHS = [3, 8, 1, 5]
WORDS = [f"w{i}" for i in range(10)]
#: The ids of the words at which texts end, and with which rows are padded.
END, PAD = 10, 10
SEPARATE_PAD = 11


def tokenizer(pad):
    special = dict(bos_token="<end>", eos_token="<end>", pad_token=pad)
    return word_tokenizer([*WORDS, "<end>", "<pad>"], **special)


def ours():
    return tiny_model(d_vocab=12, n_layers=1, positions="added", dtype=torch.float64)


def dense():
    model = stock_model(d_vocab=12, n_ctx=8)
    return model.to(torch.float64) if hasattr(model, "to") else model.double()


def padded(side):
    """Random tokens, padded to 8 positions on this side, and their mask."""
    tokens = torch.full((len(LENGTHS), 8), SEPARATE_PAD)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        place = slice(length) if side == "right" else slice(8 - length, None)
        tokens[row, place] = random_tokens(ours(), 1, length, seed=row)[0] % 10
        mask[row, place] = 1
    return tokens, mask


def means_of_each_row(model):
    tokens, _ = padded("right")
    rows = [row[None, :length] for row, length in zip(tokens, LENGTHS, strict=True)]
    return mean_activations(model, NAMES, rows)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.int32, np.int64])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [ours, dense])
def test_a_mask_leaves_padding_out_in_any_batches(make, side, kind):
    model = make()
    tokens, mask = padded(side)
    if kind is np.int64:
        tokens, mask = tokens.numpy(), mask.numpy()
        split = np.array_split
    else:
        tokens, mask = tokens.to(torch.int32), mask.to(kind)
        split = torch.tensor_split
    expected = means_of_each_row(model)
    for n_batches in (1, 2, 4):
        batches, masks = split(tokens, n_batches), split(mask, n_batches)
        found = mean_activations(model, NAMES, batches, masks)
        for name in NAMES:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", ["<pad>", "<end>"])
def test_padding_without_a_mask_is_refused(side, pad):
    model = ours()
    model.tokenizer = tokenizer(pad)
    tokens, mask = padded(side)
    tokens[tokens == SEPARATE_PAD] = model.tokenizer.pad_token_id
    with pytest.raises(DataError, match=f"look padded: .* with '{pad}'.* give a mask"):
        mean_activations(model, NAMES, [tokens])
    with pytest.raises(DataError, match=f"look padded: .* with '{pad}'.* give a mask"):
        corpus_means(model, tokens)
    mean_activations(model, NAMES, [tokens], [mask])


PACKED = [
    [[1, 2, END, 4], [5, 6, 7, 8]],
    [[1, 2, 3, END], [END, 5, 6, 7]],  # a text ends where a row does
    [[END, END, 2, 3], [END, 5, 6, 7]],  # each row begins with the first token, then a text ends
    [[1, END, END, END], [END, END, 2, END], [3, END, END, 4]],  # empty texts
    [[END], [END]],
]


@pytest.mark.parametrize("rows", PACKED)
def test_packed_texts_do_not_look_padded(rows):
    assert not looks_padded(torch.tensor(rows), tokenizer("<end>"))


PADDED = [
    ("<end>", [[1, 2, END, END], [1, 2, 3, 4]]),
    ("<end>", [[END, END, END, 1], [END, 2, 3, 4]]),
    ("<pad>", [[1, 2, 3, SEPARATE_PAD], [1, 2, 3, 4]]),
    ("<pad>", [[SEPARATE_PAD, 2, 3, 4], [1, 2, 3, 4]]),
]


@pytest.mark.parametrize(("pad", "rows"), PADDED)
def test_what_looks_padded(pad, rows):
    assert looks_padded(torch.tensor(rows), tokenizer(pad))
    assert not looks_padded(torch.tensor(rows), None)


def test_masks_that_do_not_fit():
    model = ours()
    tokens, mask = padded("right")
    for wrong, message in [
        (mask[:2], r"shape of its tokens, \[4, 8\], unlike torch.int64 of \[2, 8\]"),
        (mask * 2, "must be 1 for each real token, and 0 for padding"),
        ("11", "unlike a str"),
        (mask * 0, "the masks leave out every position"),
    ]:
        with pytest.raises(DataError, match=message):
            mean_activations(model, NAMES, [tokens], [wrong])
    for masks in ([], [mask, mask]):
        with pytest.raises(DataError, match="one mask for each batch"):
            mean_activations(model, NAMES, [tokens], masks)


def test_a_mask_can_be_set_for_each_run():
    model = ours()
    tokens, mask = padded("right")
    with recording_means(model, NAMES) as means:
        means.mask = mask.bool()
        model(tokens)
    expected = means_of_each_row(model)
    found = means.result(torch.float64)
    torch.testing.assert_close(found[NAMES[0]], expected[NAMES[0]], rtol=1e-9, atol=1e-9)


def test_corpus_means_with_a_mask_are_those_of_the_real_tokens():
    model = ours()
    expected = means_of_each_row(model)
    for side in ("right", "left"):
        tokens, mask = padded(side)
        with pytest.warns(UserWarning, match="the means over 17 tokens"):
            found = corpus_means(model, tokens, batch_size=8, mask=mask)
        name = "blocks.0.attn.hook_z"
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, np.uint16])
def test_tokens_of_any_integer_dtype(dtype):
    model = micro_model()
    corpus = micro_corpus()
    expected = mean_activations(model, NAMES, [corpus])
    tokens = corpus.numpy().astype(dtype) if dtype is np.uint16 else corpus.to(dtype)
    found = mean_activations(model, NAMES, [tokens])
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    means = corpus_means(model, tokens)
    torch.testing.assert_close(means[NAMES[1]], expected[NAMES[1]])


WRONG = [
    ("text", r"must be integers \[batch, pos\]|must be numbers \[batch, pos\]"),
    ([[1, 2], [3]], r"must be numbers \[batch, pos\], with rows of equal length"),
    (torch.ones(2, 3), r"integers .*, not torch.float32 of \[2, 3\]"),
    (torch.full((2, 3), torch.nan), r"integers .*, not torch.float32 of \[2, 3\]"),
    (torch.ones(2, 3, dtype=torch.bool), r"integers .*, not torch.bool of \[2, 3\]"),
    (torch.ones(2, 2, 2, dtype=torch.long), r"integers .*, not torch.int64 of \[2, 2, 2\]"),
    (torch.ones(0, 3, dtype=torch.long), r"must not be empty, as those of shape \[0, 3\]"),
    (np.ones((2, 3)), r"integers .*, not torch.float64 of \[2, 3\]"),
    (torch.full((2, 3), 36), r"in \[0, 36\), the model's vocabulary"),
    (torch.full((2, 3), -1), r"in \[0, 36\), the model's vocabulary"),
]


@pytest.mark.parametrize(("tokens", "message"), WRONG)
def test_tokens_that_are_none(tokens, message):
    model = micro_model()
    with pytest.raises(DataError, match=message):
        mean_activations(model, NAMES, [tokens])
    with pytest.raises(DataError, match=message):
        corpus_means(model, tokens)
