"""The pruner: what it leaves unchanged, its splits, and what it refuses. Found circuits are in test_circuit.py."""

import dataclasses

import pytest
import torch

from micro import LOSS, MICRO_TASK, NODES, micro_circuit, micro_corpus, micro_model
from tl_sparse.config import PruneConfig
from tl_sparse.errors import ConfigError, HookNameError, PruneError, TaskError, TokenizerError
from tl_sparse.hooks import NodeGates, mean_activations
from tl_sparse.nodes import node_hooks
from tl_sparse.pruning import discretise, frozen, prune, task_splits

CONFIG = PruneConfig(
    target_loss=2 * LOSS, steps=60, train_pairs=64, selection_pairs=16, heldout_pairs=16, pairs_per_step=8
)


@pytest.fixture
def micro():
    return micro_model()


def empty(micro):
    circuit = micro_circuit(micro)
    return dataclasses.replace(circuit, kept={name: mask & False for name, mask in circuit.kept.items()})


def test_model_comes_back_as_it_was(micro):
    micro.train()
    micro.blocks[0].attn.W_V.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in micro.named_parameters()}
    prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
    assert micro.training
    assert micro.blocks[0].attn.training
    assert [name for name, p in micro.named_parameters() if not p.requires_grad] == ["blocks.0.attn.W_V"]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in micro.named_parameters())
    assert all(not point.has_hooks() for point in micro.hook_dict.values())


def test_frozen_restores_after_an_exception(micro):
    micro.train()
    with pytest.raises(ZeroDivisionError), frozen(micro):
        _ = 1 / 0
    with frozen(micro):
        assert not micro.training
        assert not any(p.requires_grad for p in micro.parameters())
    assert micro.training
    assert all(p.requires_grad for p in micro.parameters())


def test_splits_are_disjoint_and_repeatable(micro):
    splits = task_splits(micro, MICRO_TASK, CONFIG)
    prompts = [set(data.prompts) for data in splits]
    assert [data.n_pairs for data in splits] == [64, 16, 16]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    again = task_splits(micro, MICRO_TASK, dataclasses.replace(CONFIG, train_pairs=8))
    assert again[1].prompts == splits[1].prompts  # the judges do not depend on how much is trained on
    assert again[2].prompts == splits[2].prompts


def test_a_seed_makes_pruning_repeatable(micro):
    circuits = [prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)[0] for _ in range(2)]
    assert circuits[0].nodes == circuits[1].nodes
    assert circuits[0].measured == circuits[1].measured


@pytest.mark.parametrize("learned", [1, 3, 20])
def test_bisection_from_any_learned_size_ends_at_the_smallest_prefix(micro, learned):
    """With τ ranking the three nodes first, every start must end at exactly these three."""
    means = mean_activations(micro, list(node_hooks(micro).values()), [micro_corpus()])
    gates = NodeGates(means, init_bias=0.0, init_scale=0.0, seed=0)
    flat = torch.linspace(0.0, -0.5, gates.tau.numel())
    read, value, written = (gates.index[f"blocks.0.{n}"] for n in ("ln1.hook_read", "attn.hook_v", "hook_attn_out"))
    flat[torch.stack([read[0], value[0, 0], written[2]])] = torch.tensor([1.0, 0.9, 0.8])
    ranked = flat.sort(descending=True).values
    with torch.no_grad():
        gates.tau.copy_(flat - (ranked[learned - 1] + ranked[learned]) / 2)
    assert int((gates.tau > 0).sum()) == learned
    _, selection, _ = task_splits(micro, MICRO_TASK, CONFIG)
    found = discretise(empty(micro), micro, gates, selection, CONFIG)
    assert [str(node) for node in found.nodes] == NODES
    assert found.of_size(3).nodes == found.nodes


def test_leftover_nodes_are_dropped(micro):
    """Ten useless nodes ranked above the circuit's own must not survive."""
    means = mean_activations(micro, list(node_hooks(micro).values()), [micro_corpus()])
    gates = NodeGates(means, init_bias=-0.5, init_scale=0.0, seed=0)
    with torch.no_grad():
        gates.tau[gates.index["blocks.0.hook_mlp_out"]] = 1.0
        gates.tau[gates.index["blocks.0.mlp.hook_post"]] = 1.0
        gates.tau[gates.index["blocks.0.ln1.hook_read"][0]] = gates.tau[gates.index["blocks.0.attn.hook_v"][0, 0]] = 0.5
        gates.tau[gates.index["blocks.0.hook_attn_out"][2]] = 0.5
    _, selection, _ = task_splits(micro, MICRO_TASK, CONFIG)
    found = discretise(empty(micro), micro, gates, selection, CONFIG)
    assert [str(node) for node in found.nodes] == NODES
    # In the ranking the kept nodes are before all others, and within each group the order is that of the gates.
    assert found.of_size(3).nodes == found.nodes
    assert {node.location for node in found.of_size(9).nodes} == {"attn_in", "attn_v", "attn_out", "mlp_neuron", "mlp_out"}


def test_target_below_what_the_model_reaches(micro):
    config = dataclasses.replace(CONFIG, target_loss=LOSS / 2)
    with pytest.raises(PruneError, match=f"full model's loss on micro is {LOSS:.3f}.*above the target loss"):
        prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)


def test_too_few_distinct_prompts(micro):
    with pytest.raises(TaskError, match="pairs of distinct prompts"):
        prune(micro, MICRO_TASK, micro_corpus(), dataclasses.replace(CONFIG, train_pairs=40_000), progress=False)


def test_model_without_tokenizer(micro):
    micro._tokenizer = None  # TransformerBridge
    micro.__dict__["tokenizer"] = None  # HookedTransformer
    with pytest.raises(TokenizerError, match="needs the model's tokenizer"):
        prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)


def test_candidate_that_is_not_a_single_token(micro):
    task = dataclasses.replace(MICRO_TASK, candidates=(" yes", " yes no"))
    # ` yes ` (to this tokenizer the same as ` yes`) stands for the longer answer, and that is the other one.
    with pytest.raises(TokenizerError, match=r"answers ' yes' and ' yes no' of task micro .* are ' yes' and ' yes '$"):
        prune(micro, task, micro_corpus(), CONFIG, progress=False)


def test_unknown_location(micro):
    with pytest.raises(HookNameError, match="attn_x"):
        node_hooks(micro, ["attn_x"])


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("target_loss", 0.0, "above 0"),
        ("steps", 0, "at least 1"),
        ("lr", "fast", "a number"),
        ("beta2", 1.0, r"in \[0, 1\)"),
        ("init_bias", 2.0, r"in \[-1, 1\]"),
        ("k_coef", 0.0, "above 0"),
        ("cleanup_pairs", 0, "at least 1"),
        ("ablated_accuracy", 0.4, r"in \[0.5, 1\]"),
        ("seed", -1, "at least 0"),
        ("heldout_pairs", 0, "at least 1"),
    ],
)
def test_impossible_settings(field, value, valid):
    with pytest.raises(ConfigError, match=f"{field} = .*must be {valid}"):
        PruneConfig(**{field: value})
