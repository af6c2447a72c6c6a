"""Smaller tools of TransformerLens on our models, on both lines: head_detector, SVDInterpreter,
compositions of heads, test_prompt, evals."""

import pytest
import torch
from tool_models import dense_model, prompts, sparse_model
from transformer_lens import SVDInterpreter, evals, utilities
from transformer_lens.head_detector import detect_head

from tl_sparse.errors import DataError

TEXT = "a b c a b"
TOKENS = ["<|endoftext|>", "a", "b", "c", "a", "b"]

# Which (query, key) positions of TEXT are a head's that …
PATTERNS = {
    "previous_token_head": [(i, i - 1) for i in range(1, 6)],  # … looks one token back
    "duplicate_token_head": [(4, 1), (5, 2)],  # … looks at the same token before
    "induction_head": [(4, 2), (5, 3)],  # … looks behind the same token before
}


@pytest.fixture(params=[dense_model, sparse_model], ids=["dense", "sparse"])
def model(request):
    return request.param(dtype=torch.float32)


@pytest.mark.parametrize("name", PATTERNS)
def test_detect_head(model, name):
    """The share of each head's attention that fits the pattern; a sink's share never counts."""
    with torch.no_grad():
        scores = detect_head(model, TEXT, name)
        cache = model.run_with_cache(TEXT)[1]
    for layer in (0, 1):
        pattern = cache["pattern", layer][0]
        found = sum(pattern[:, query, key] for query, key in PATTERNS[name])
        torch.testing.assert_close(scores[layer], found / pattern.sum((1, 2)), atol=1e-6, rtol=0)


def test_detect_a_head_that_is_there():
    """A previous-token head by hand: q and k match each position to the one before."""
    model = dense_model(
        dtype=torch.float32, d_model=10, normalization="rms", norm_bias=False, biases=False
    )
    with torch.no_grad():
        model.embed.W_E.zero_()
        model.pos_embed.W_pos.copy_(torch.eye(8, 10))
        attn = model.blocks[0].attn
        model.blocks[0].ln1.w.fill_(1)
        attn.W_Q.zero_()
        attn.W_K.zero_()
        attn.W_K[1, :5] = 10 * torch.eye(5)  # position i to channel i of the key
        attn.W_Q[1, 1:6] = 10 * torch.eye(5)  # position i to channel i − 1 of the query
        scores = detect_head(model, TEXT, "previous_token_head", exclude_bos=False)
    # All of the attention of the positions 1 … 5, and position 0's, which can only be its own.
    assert scores[0, 1] == pytest.approx(5 / 6, abs=1e-4)
    assert scores[0, 0] < 0.4


@pytest.mark.parametrize("tied", [False, True])
def test_svd_interpreter(tied):
    """Singular vectors, read in the vocabulary; up to sign."""
    model = sparse_model(dtype=torch.float32, tied_unembed=tied)
    interpreter = SVDInterpreter(model)
    attn, mlp, ln2 = model.blocks[1].attn, model.blocks[1].mlp, model.blocks[1].ln2
    matrices = {
        "OV": (attn.W_V[2] @ attn.W_O[2], dict(head_index=2)),
        "w_in": (mlp.W_in.T * ln2.w, {}),
        "w_out": (mlp.W_out, {}),
    }
    for name, (matrix, where) in matrices.items():
        found = interpreter.get_singular_vectors(name, layer_index=1, num_vectors=3, **where)[:, 0]
        directions = torch.linalg.svd(matrix.detach())[2][:3]
        expected = model.W_U.detach().T @ directions.T
        torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=1e-3)


def test_compositions_of_heads(model):
    """Of the stream's weights alone: concatenated positions are no part of a composition."""
    w_q, w_k, w_v, w_o = model.W_Q, model.W_K, model.W_V, model.W_O
    torch.testing.assert_close(model.QK.AB[1, 2], w_q[1, 2] @ w_k[1, 2].T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.OV.AB[0, 1], w_v[0, 1] @ w_o[0, 1], atol=1e-5, rtol=1e-5)
    ov = w_v[0, 1] @ w_o[0, 1]
    reads = {
        "Q": w_q[1, 2] @ w_k[1, 2].T,
        "K": (w_q[1, 2] @ w_k[1, 2].T).T,
        "V": w_v[1, 2] @ w_o[1, 2],
    }
    for kind, read in reads.items():
        scores = model.all_composition_scores(kind)
        scores = getattr(scores, "scores", scores)
        expected = (ov @ read).norm() / (ov.norm() * read.norm())
        torch.testing.assert_close(scores[0, 1, 1, 2], expected, atol=1e-5, rtol=1e-4)
        assert (scores[1] == 0).all(), "no head is before another of its own layer"


def test_test_prompt(model, capsys):
    utilities.test_prompt(TEXT, "d", model, prepend_space_to_answer=False)
    out = capsys.readouterr().out
    with torch.no_grad():
        logits = model(TEXT)[0, -1]
    rank = int((logits > logits[model.to_single_token("d")]).sum())
    assert f"Tokenized prompt: {TOKENS}" in out
    assert f"Ranks of the answer tokens: [('d', {rank})]" in out


def test_evals(model):
    tokens, _ = prompts(model, batch=4)
    with torch.no_grad():
        found = evals.evaluate_on_dataset(
            model, [{"tokens": tokens[:2]}, {"tokens": tokens[2:]}], device="cpu"
        )
        assert float(found) == pytest.approx(model(tokens, return_type="loss").item(), abs=1e-5)
        # It draws token ids up to 20000.
        with pytest.raises(DataError, match=r"token ids must be in \[0, 11\)"):
            evals.induction_loss(model, subseq_len=3, batch_size=2, device="cpu")
