"""auto-circuit, on TransformerLens 3: edge attribution scores, and running a circuit."""

import random

import pytest
import torch
from edge_graph import Graph, with_edge_hooks
from tool_models import dense_model, prompts, requires, sparse_model

requires("auto_circuit", line=3)

import auto_circuit_shim  # noqa: F401
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import PatchType
from auto_circuit.utils.graph_utils import patchable_model
from transformer_lens import TransformerLensKeyValueCache

from tl_sparse.circuits.prune_scores import from_prune_scores, to_prune_scores
from tl_sparse.errors import UnsupportedError
from tl_sparse.evaluation.edge_attribution import edge_scores
from tl_sparse.evaluation.graph_runs import applying_graph
from tl_sparse.evaluation.running import all_next_token_logits
from tl_sparse.tasks.task_data import TaskData

MODELS = {
    "dense": dense_model,
    "sparse": sparse_model,
    "layer norm": lambda **changes: sparse_model(
        normalization="layer", norm_bias=True, act_fn="relu", **changes
    ),
}
LENGTH = 5


def wrapped(make, separate_qkv=True, seq_len=LENGTH, dtype=torch.float32):
    """The model as auto-circuit sees it, its prompts, and the answers before wrapping."""
    model = make(dtype=dtype)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    model.set_use_split_qkv_input(separate_qkv)
    model.set_use_attn_in(not separate_qkv)
    clean, corrupt = prompts(model, batch=2, length=LENGTH)
    answers = [torch.tensor([3])] * 2, [torch.tensor([4])] * 2
    loader = PromptDataLoader(
        PromptDataset(clean, corrupt, *answers), seq_len=seq_len, diverge_idx=0, batch_size=2
    )
    with torch.no_grad():
        ends = model(clean)[:, -1], model(corrupt)[:, -1]
    patchable = patchable_model(
        model, factorized=True, slice_output="last_seq", seq_len=seq_len, separate_qkv=separate_qkv
    )
    return patchable, loader, *ends


def scores_of(patchable, loader):
    return mask_gradient_prune_scores(
        patchable,
        loader,
        official_edges=None,
        grad_function="logit",
        answer_function="avg_diff",
        mask_val=0.0,
    )


def circuit_logits(patchable, loader, scores, count):
    """What the circuit of the `count` best edges answers, all others corrupt."""
    outputs = run_circuits(patchable, loader, [count], scores, patch_type=PatchType.TREE_PATCH)
    ((found, batches),) = outputs.items()
    assert found == count
    return next(iter(batches.values()))


@pytest.mark.parametrize("separate_qkv", [True, False])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_empty_circuit_is_the_corrupt_run_the_full_one_the_clean_run(make, separate_qkv):
    patchable, loader, clean_logits, corrupt_logits = wrapped(make, separate_qkv)
    scores = {
        name: torch.rand_like(mask) + 0.1 for name, mask in patchable.new_prune_scores().items()
    }
    assert (clean_logits - corrupt_logits).abs().max() > 0.1
    empty = circuit_logits(patchable, loader, scores, 0)
    torch.testing.assert_close(empty, corrupt_logits, atol=1e-5, rtol=0)
    full = circuit_logits(patchable, loader, scores, patchable.n_edges)
    torch.testing.assert_close(full, clean_logits, atol=1e-5, rtol=0)


def test_scores_are_the_derivatives_of_interpolating_edges_to_the_corrupt_run():
    """… of minus the answer difference, by difference quotients outside auto-circuit."""
    patchable, loader, *_ = wrapped(sparse_model, seq_len=None, dtype=torch.float64)
    scores = scores_of(patchable, loader)
    model = with_edge_hooks(sparse_model())
    clean, corrupt = prompts(model, length=LENGTH)
    with torch.no_grad():
        good, bad = model.run_with_cache(clean)[1], model.run_with_cache(corrupt)[1]

    @torch.no_grad()
    def along(edge, step):
        change = step * (bad[edge.src.module_name] - good[edge.src.module_name])
        change = change if edge.src.head_idx is None else change[:, :, edge.src.head_idx]

        def add(x, hook):
            x = x.clone()
            x[:, :, ... if edge.dest.head_idx is None else edge.dest.head_idx] += change
            return x

        logits = model.run_with_hooks(clean, fwd_hooks=[(edge.dest.module_name, add)])[:, -1]
        return -(logits[:, 3] - logits[:, 4]).mean()

    for edge in random.Random(0).sample(sorted(patchable.edges, key=lambda edge: edge.name), 30):
        slope = (along(edge, 1e-6) - along(edge, -1e-6)) / 2e-6
        torch.testing.assert_close(edge.prune_score(scores), slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 10, 40])
def test_a_circuit_answers_what_its_edges_compute(count):
    """The same circuit, evaluated by hooks on the model outside auto-circuit."""
    patchable, loader, *_ = wrapped(sparse_model, seq_len=None)
    scores = scores_of(patchable, loader)
    graph = Graph(with_edge_hooks(sparse_model(dtype=torch.float32)))
    clean, corrupt = prompts(graph.model, length=LENGTH)
    best = sorted(patchable.edges, key=lambda edge: -abs(edge.prune_score(scores)))[:count]
    names = {"blocks.0.hook_resid_pre": "hook_embed"}
    kept = {
        (
            (names.get(edge.src.module_name, edge.src.module_name), edge.src.head_idx),
            (edge.dest.module_name, edge.dest.head_idx),
        )
        for edge in best
    }
    assert kept <= set(graph.edges)
    assert len(graph.edges) == patchable.n_edges
    with torch.no_grad():
        expected = graph.logits(clean, graph.outputs(corrupt), kept)[:, -1]
    torch.testing.assert_close(
        circuit_logits(patchable, loader, scores, count), expected, atol=1e-5, rtol=0
    )


def test_the_two_ways_to_edge_attribution_agree():
    """auto-circuit's fast way by gradients of masks, and its slow one by hooks and caches."""
    patchable, loader, *_ = wrapped(sparse_model, seq_len=None)
    fast = scores_of(patchable, loader)
    slow = edge_attribution_patching_prune_scores(patchable, loader, official_edges=None)
    assert fast.keys() == slow.keys()
    assert max(scores.abs().max() for scores in fast.values()) > 0.1
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], atol=1e-5, rtol=1e-4)


def paired(clean, corrupt):
    """The clean and the corrupt prompts as pairs, whose answers are tokens 3 and 4."""
    n_prompts = 2 * len(clean)
    return TaskData(
        task="t",
        prompts=tuple(map(str, range(n_prompts))),
        tokens=torch.stack((clean, corrupt), dim=1).flatten(0, 1),
        last=torch.full((n_prompts,), LENGTH - 1),
        candidates=torch.tensor([[3, 4]] * n_prompts),
        correct=torch.arange(2).repeat(len(clean)),
    )


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_our_scores_are_those_of_auto_circuit(make, tmp_path):
    """Its scores of clean prompts against corrupt ones, and the other way round, are our mean."""
    clean, corrupt = prompts(make(), batch=2, length=LENGTH)
    patchable, loader, *_ = wrapped(make, seq_len=None)
    answers = [torch.tensor([4])] * 2, [torch.tensor([3])] * 2
    reversed_loader = PromptDataLoader(
        PromptDataset(corrupt, clean, *answers), seq_len=None, diverge_idx=0, batch_size=2
    )
    there = scores_of(patchable, loader)
    back = scores_of(patchable, reversed_loader)
    model = make(dtype=torch.float32)
    ours = to_prune_scores(edge_scores(model, paired(clean, corrupt), "eap"), tmp_path / "s.pt")
    assert there.keys() == ours.keys()
    for name, scores in ours.items():
        torch.testing.assert_close(scores, (there[name] + back[name]) / 2, atol=1e-5, rtol=1e-4)


def test_its_scores_make_the_same_circuit_here(tmp_path):
    patchable, loader, *_ = wrapped(sparse_model, seq_len=None)
    scores = scores_of(patchable, loader)
    torch.save(scores, tmp_path / "scores.pt")
    model = sparse_model(dtype=torch.float32)
    graph = from_prune_scores(tmp_path / "scores.pt", model)
    data = paired(*prompts(model, batch=2, length=LENGTH))
    for count in (5, 10, 40):
        run_context = applying_graph(graph.top(count), model, data)
        here = all_next_token_logits(model, data, run_context=run_context)[::2]
        there = circuit_logits(patchable, loader, scores, count)
        torch.testing.assert_close(here, there, atol=1e-5, rtol=0)


def test_a_key_value_cache_is_refused():
    """auto-circuit would continue from a cached prefix; our forward pass has no such cache."""
    patchable, loader, *_ = wrapped(sparse_model)
    cache = TransformerLensKeyValueCache.init_cache(patchable.cfg, "cpu", batch_size=2)
    patchable.kv_caches = {2: cache}
    with pytest.raises(UnsupportedError, match="past_kv_cache"):
        patchable(next(iter(loader)).clean)
