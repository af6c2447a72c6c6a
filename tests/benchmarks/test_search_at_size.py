"""README: the time and memory of a search in a model of d_model 2048 and 8 layers.

Its weights are random, 1 in 256 of them nonzero and held compact, and the circuit of the micro task
is planted in it. Figures without what makes a search faster at size stand beside those with it.
"""

import math
import resource
import time
from functools import partial

import pytest
import torch

import tl_sparse
from benchmarks.test_sparse_execution import best_times
from helpers import node_means
from micro import MICRO_TASK, VOCABULARY, W_O, W_V, micro_corpus, micro_tokenizer
from tl_sparse.hooks import NodeGates, frozen
from tl_sparse.network import blocks
from tl_sparse.network.compact import Compact
from tl_sparse.network.holder import WeightsHolder
from tl_sparse.pruning import groups, sizes
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.gates import gated_loss
from tl_sparse.pruning.means import corpus_means
from tl_sparse.pruning.pruner import prune
from tl_sparse.pruning.splits import task_splits

TURNS = 3
D_MODEL, N_LAYERS, ONE_IN = 2048, 8, 256
#: The planted circuit: a value channel of one block carries the letter to the last position.
LAYER = 3
#: So large that the planted channels are among the quarter that AbsTopK keeps.
LOUD = 4.0


@torch.no_grad()
def model_with_a_planted_circuit(d_model, n_layers, one_in):
    """Random sparse weights, held compact, and the circuit of `micro_model` in block `LAYER`."""
    config = tl_sparse.SparseConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=d_model // 16,
        d_head=16,
        d_mlp=4 * d_model,
        d_vocab=len(VOCABULARY),
        n_ctx=8,
        abs_topk=tl_sparse.paper_topk(0.25),
    )
    model = tl_sparse.create(config, seed=0, tokenizer=micro_tokenizer(), device="cpu")
    generator = torch.Generator().manual_seed(0)
    for _, _, weight in _matrices(model):
        _keep_one_in(one_in, weight, generator)
    model.embed.W_E[VOCABULARY["A"], 0] = LOUD
    model.embed.W_E[VOCABULARY["B"], 0] = -LOUD
    attn = model.blocks[LAYER].attn
    attn.W_V[0, 0, 0] = W_V
    attn.W_O[0, 0, 2] = W_O
    model.unembed.W_U[2, VOCABULARY["yes"]] = LOUD
    model.unembed.W_U[2, VOCABULARY["no"]] = -LOUD
    for module, name, weight in _matrices(model):
        module.hold_compact(name, Compact.of(weight))
    return model


def _matrices(model):
    """The matrices of the blocks, each with its name in the module that holds it."""
    for module in model.network.modules():
        if isinstance(module, WeightsHolder):
            for name, weight in list(module.named_parameters(recurse=False)):
                if name.startswith("W_"):
                    yield module, name, weight


def _keep_one_in(one_in, weight, generator):
    """Keep this share of the entries, drawn at random."""
    flat = weight.view(-1)
    kept = torch.randint(len(flat), (len(flat) // one_in,), generator=generator)
    values = flat[kept]
    flat.zero_()
    flat[kept] = values


def search_config(**changes):
    quick = dict(steps=60, train_pairs=256, selection_pairs=64, heldout_pairs=64, cleanup_pairs=32)
    return PruneConfig(**(quick | {"ranking_pairs": 16, "exchanges": 4} | changes))


def computing_everything(patch):
    """Undo what makes a search faster at size."""
    patch.setattr(blocks, "is_overwritten", lambda hook_point, made_by: False)
    patch.setattr(groups, "SMALL", math.inf)
    patch.setattr(sizes, "SMALL", math.inf)


def gigabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def test_a_gate_step():
    """While 16, 8, 4 or 2 of the 16 attentions and MLPs write, and the others are held."""
    model = model_with_a_planted_circuit(D_MODEL, N_LAYERS, ONE_IN)
    config = search_config()
    train, _, _ = task_splits(model, MICRO_TASK, config)
    means = node_means(model, micro_corpus())
    gates = NodeGates(means, init_bias=0.5, init_scale=0.0, seed=0)
    writes = [name for name in gates.index if name.endswith(("_attn_out", "_mlp_out"))]

    def step(n_open):
        loss = gated_loss(
            model, gates, train.first(16), config, gates.openings(), closed=writes[n_open:]
        )
        (loss + 1e-3 * gates.expected_size()).backward()

    with frozen(model):
        runs = {n_open: partial(step, n_open) for n_open in (16, 8, 4, 2)}
        took = best_times(runs, TURNS)
    for n_open, seconds in took.items():
        print(
            f"gate step, d_model {D_MODEL} x {N_LAYERS}, 1/{ONE_IN}, {n_open} of 16 sublayers "
            f"write: {1e3 * seconds:.0f} ms, {seconds / took[16]:.2f} of the step with all; "
            f"{gigabytes():.1f} GB at most"
        )
    assert took[2] < 0.5 * took[16]


def test_a_whole_search():
    model = model_with_a_planted_circuit(D_MODEL, N_LAYERS, ONE_IN)
    before = gigabytes()
    means = corpus_means(model, micro_corpus(), 64)
    for name in ("with", "without"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "without":
                computing_everything(patch)
            start = time.perf_counter()
            circuit, evaluation = prune(
                model, MICRO_TASK, config=search_config(), means=means, progress=False
            )
        print(
            f"search in d_model {D_MODEL} x {N_LAYERS}, 1/{ONE_IN}, {name}: "
            f"{time.perf_counter() - start:.0f} s, {circuit.n_nodes} of {circuit.n_candidates} "
            f"nodes, held-out loss {evaluation.circuit.loss:.3f}, {gigabytes():.1f} GB at most "
            f"({before:.1f} before)"
        )
        assert circuit.n_nodes <= 5
