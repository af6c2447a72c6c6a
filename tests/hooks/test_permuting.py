"""Permuted weights: what changes within the context, and that nothing does after it."""

import pytest
import torch

import tl_sparse
from helpers import (
    copied_parameters,
    full_config,
    needs_numba,
    random_circuit,
    random_data,
    random_tokens,
    stock_model,
    tiny_model,
)
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.circuits.nodes import weight_matrices
from tl_sparse.errors import CircuitError, UnsupportedError
from tl_sparse.evaluation.judge import evaluate
from tl_sparse.hooks.permuting import permuted_weights

MODELS = {
    "sparse": lambda: tiny_model(full_config()),
    "dense": stock_model,
    "gated": lambda: stock_model(gated_mlp=True),
}
LAYER_MATRICES = {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_Q_pos", "W_K_pos", "W_V_pos",
                  "W_in_pos", "W_gate"}  # fmt: skip


def is_changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", MODELS)
def test_each_matrix_keeps_its_values_at_other_places(kind):
    model = MODELS[kind]()
    with torch.no_grad():  # half of the weights are zero
        for layer in range(model.cfg.n_layers):
            for _, _, weights in weight_matrices(model, layer):
                weights[weights < 0] = 0
    before = copied_parameters(model)
    matrices = [w.clone() for _, _, w in weight_matrices(model, 0)]
    with permuted_weights(model, seed=1):
        within = copied_parameters(model)
        permuted = [w.clone() for _, _, w in weight_matrices(model, 0)]
    after = copied_parameters(model)
    changed = is_changed(before, within)
    assert not is_changed(before, after)
    assert before.keys() == after.keys()
    for name in changed:
        assert torch.equal(before[name].flatten().sort()[0], within[name].flatten().sort()[0])
    for original, other in zip(matrices, permuted, strict=True):
        assert not torch.equal(original, other)
        assert original.count_nonzero() == other.count_nonzero()
    if kind == "sparse":
        assert {name.rpartition(".")[2] for name in changed} == LAYER_MATRICES - {"W_gate"}


def test_the_seed_decides_the_permutation():
    model = tiny_model(full_config())
    seen = []
    for seed in (1, 1, 2):
        with permuted_weights(model, seed):
            seen.append(copied_parameters(model))
    assert not is_changed(seen[0], seen[1])
    assert is_changed(seen[0], seen[2])


def test_weights_are_restored_after_an_exception():
    model = tiny_model()
    before = copied_parameters(model)
    with pytest.raises(KeyError), permuted_weights(model, seed=0):
        raise KeyError
    assert not is_changed(before, copied_parameters(model))


@needs_numba
@pytest.mark.parametrize("dense_weights", [True, False])
def test_sparse_execution_follows_the_weights(dense_weights, tmp_path):
    """With the nonzero weights alone the logits are those of the dense model, at any time."""
    saved = tiny_model(full_config(n_ctx=40))
    saved.save_pretrained(tmp_path)
    tokens = random_tokens(saved)
    options = {"device": "cpu", "dense_weights": dense_weights}
    dense = tl_sparse.load(tmp_path, device="cpu", kernels="dense")
    sparse = tl_sparse.load(tmp_path, kernels="sparse", **options)
    before = sparse(tokens)
    torch.testing.assert_close(before, dense(tokens))
    with permuted_weights(dense, seed=3), permuted_weights(sparse, seed=3):
        permuted = sparse(tokens)
        torch.testing.assert_close(permuted, dense(tokens))
    assert not torch.allclose(before, permuted)
    assert torch.equal(sparse(tokens), before)


def test_circuits_belong_to_the_weights_that_they_were_found_in():
    model = tiny_model()
    print_before = fingerprint(model)
    circuit = random_circuit(model)
    data = random_data(model)
    with permuted_weights(model, seed=0):
        assert print_before.difference(fingerprint(model)) is not None
        with pytest.raises(CircuitError, match="other weights"):
            evaluate(circuit, model, data)
        of_permuted = random_circuit(model)
        evaluate(of_permuted, model, data)
    assert print_before == fingerprint(model)
    evaluate(circuit, model, data)
    with pytest.raises(CircuitError, match="other weights"):
        evaluate(of_permuted, model, data)


def test_a_model_without_layers():
    model = torch.nn.Embedding(3, 2)
    model.hook_dict = {}
    with pytest.raises(UnsupportedError, match="has no weight matrices"), permuted_weights(model):
        pass
