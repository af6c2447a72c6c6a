"""Node pruning: the model stays unchanged; splits, rankings, restarts, and errors."""

import dataclasses
import math
import random
import warnings

import pytest
import torch

from helpers import full_config, has_hooks, node_means, stock_model, tiny_model
from micro import (
    FILLERS,
    LOSS,
    MICRO_TASK,
    NODES,
    QUICK_SETTINGS,
    W_U,
    WRITTEN,
    micro_circuit,
    micro_corpus,
    micro_tokenizer,
)
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    HookNameError,
    PruneError,
    TokenizerError,
)
from tl_sparse.evaluation.judge import score
from tl_sparse.evaluation.running import task_loss
from tl_sparse.hooks import NodeGates, mean_activations
from tl_sparse.hooks.points import hooked
from tl_sparse.pruning import means as means_module
from tl_sparse.pruning import pruner as pruning
from tl_sparse.pruning import start as start_module
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.elimination import Budget, eliminate
from tl_sparse.pruning.fixed import FixedGates
from tl_sparse.pruning.gates import attribution
from tl_sparse.pruning.means import task_means
from tl_sparse.pruning.pruner import corpus_means, find_circuit, frozen, prune, prune_edges
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.sizes import discretise
from tl_sparse.pruning.splits import task_splits

CONFIG = PruneConfig(
    target_loss=2 * LOSS,
    steps=60,
    train_pairs=64,
    selection_pairs=16,
    heldout_pairs=16,
    pairs_per_step=8,
)


QUICK = PruneConfig(**QUICK_SETTINGS)


def empty(micro):
    circuit = micro_circuit(micro)
    return dataclasses.replace(
        circuit, kept={name: mask & False for name, mask in circuit.kept.items()}
    )


def test_model_comes_back_as_it_was(micro):
    micro.train()
    micro.blocks[0].attn.W_V.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in micro.named_parameters()}
    prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
    assert micro.training
    assert micro.blocks[0].attn.training
    assert [name for name, p in micro.named_parameters() if not p.requires_grad] == [
        "blocks.0.attn.W_V"
    ]
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in micro.named_parameters()
    )
    assert not has_hooks(micro)


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
    assert (
        again[1].prompts == splits[1].prompts
    )  # the other pairs do not depend on the number of training pairs
    assert again[2].prompts == splits[2].prompts


def test_a_seed_makes_pruning_repeatable(micro):
    circuits = [
        prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)[0] for _ in range(2)
    ]
    assert circuits[0].nodes == circuits[1].nodes
    assert circuits[0].measured == circuits[1].measured


def chosen(empty_circuit, model, gates, selection):
    """What discretise makes of gates whose τ are given."""
    ranking = Ranking(empty_circuit, gates, FixedGates.of_config(empty_circuit, gates, CONFIG))
    return discretise(ranking, Criterion(model, CONFIG), selection, selection)


@pytest.mark.parametrize("learned", [1, 3, 20])
def test_bisection_from_any_learned_size_ends_at_the_smallest_prefix(micro, learned):
    """If τ ranks the three nodes first, bisection from any size must end at exactly these three."""
    means = node_means(micro, micro_corpus())
    gates = NodeGates(means, init_bias=0.0, init_scale=0.0, seed=0)
    flat = torch.linspace(0.0, -0.5, gates.tau.numel())
    read, value, written = (
        gates.index[f"blocks.0.{n}"] for n in ("ln1.hook_read", "attn.hook_v", "hook_attn_out")
    )
    flat[torch.stack([read[0], value[0, 0], written[2]])] = torch.tensor([1.0, 0.9, 0.8])
    ranked = flat.sort(descending=True).values
    with torch.no_grad():
        gates.tau.copy_(flat - (ranked[learned - 1] + ranked[learned]) / 2)
    assert int((gates.tau > 0).sum()) == learned
    _, selection, _ = task_splits(micro, MICRO_TASK, CONFIG)
    found = chosen(empty(micro), micro, gates, selection)
    assert [str(node) for node in found.nodes] == NODES
    assert found.of_size(3).nodes == found.nodes


class PassingAt22(Criterion):
    """All pairs let only 22 nodes pass, some of the pairs 21 too."""

    def passes(self, circuit, data):
        return circuit.n_nodes == 22

    def passes_quickly(self, circuit, data):
        return circuit.n_nodes in (21, 22)


def test_a_size_that_passes_is_not_given_up_for_a_larger_one(micro):
    """From 21, the next size that would be tried is 23, and then all 24."""
    gates = NodeGates(node_means(micro, micro_corpus()), init_bias=0.0, init_scale=0.0, seed=0)
    with torch.no_grad():
        gates.tau.copy_(torch.where(torch.arange(24) < 22, 0.5, -0.5))
    nothing = empty(micro)
    _, selection, _ = task_splits(micro, MICRO_TASK, CONFIG)
    ranking = Ranking(nothing, gates, FixedGates.of_config(nothing, gates, CONFIG))
    config = dataclasses.replace(CONFIG, exchanges=0)
    found = discretise(ranking, PassingAt22(micro, config), selection, selection)
    assert found.n_nodes == 22


def test_leftover_nodes_are_dropped(micro):
    """Ten useless nodes that rank above the circuit's own nodes must be removed."""
    means = node_means(micro, micro_corpus())
    gates = NodeGates(means, init_bias=-0.5, init_scale=0.0, seed=0)
    with torch.no_grad():
        gates.tau[gates.index["blocks.0.hook_mlp_out"]] = 1.0
        gates.tau[gates.index["blocks.0.mlp.hook_post"]] = 1.0
        gates.tau[gates.index["blocks.0.ln1.hook_read"][0]] = gates.tau[
            gates.index["blocks.0.attn.hook_v"][0, 0]
        ] = 0.5
        gates.tau[gates.index["blocks.0.hook_attn_out"][2]] = 0.5
    _, selection, _ = task_splits(micro, MICRO_TASK, CONFIG)
    found = chosen(empty(micro), micro, gates, selection)
    assert [str(node) for node in found.nodes] == NODES
    # In the ranking the kept nodes are before all others, and within each group the order is that
    # of the gates.
    parts = [
        torch.cat([found.scores[n][mask == kept] for n, mask in found.kept.items()])
        for kept in (True, False)
    ]
    assert parts[0].min() > parts[1].max()
    locations = {node.location for node in found.of_size(9).nodes}
    assert locations == {"attn_in", "attn_v", "attn_out", "mlp_neuron", "mlp_out"}


# Rankings of the nodes


def loss_of(strength):
    """The loss of the micro model with its circuit's three nodes open to this fraction."""
    a = WRITTEN * strength**3
    return math.log1p(math.exp(-2 * W_U * a / math.sqrt((1 + a * a) / 4)))


def slope(strength):
    """The derivative of `loss_of` with respect to one of the three fractions alone."""
    a = WRITTEN * strength**3
    by_a = 4 * W_U / (1 + a * a) ** 1.5  # of the difference of the logits, 4 W_U a / sqrt(1 + a²)
    return -by_a * (a / strength) / (1 + math.exp(4 * W_U * a / math.sqrt(1 + a * a)))


def test_the_slope_on_paper_is_a_derivative():
    for strength in (0.2, 0.7, 1.0):
        rise = (loss_of(strength + 1e-5) - loss_of(strength - 1e-5)) / 2e-5
        assert 3 * slope(strength) == pytest.approx(rise, rel=1e-6)


@pytest.mark.parametrize("batch_size", [2, 6, 256])
@pytest.mark.parametrize(
    ("method", "points"),
    [("attribution", [1.0]), ("integrated_gradients", [0.125, 0.375, 0.625, 0.875])],
)
def test_attribution_on_paper(micro, method, points, batch_size):
    """The circuit's nodes have equal attributions, Σ gradient · (x - mean); all others have 0."""
    config = dataclasses.replace(CONFIG, method=method, batch_size=batch_size, ranking_pairs=9)
    circuit, (train, _, _) = micro_circuit(micro), task_splits(micro, MICRO_TASK, CONFIG)
    means = {name: circuit.means[name] for name in circuit.kept}
    gates = NodeGates(means, init_bias=0.1, init_scale=0.0, seed=0)
    with frozen(micro):
        found = gates.at_nodes(attribution(micro, gates, train, config))
    expected = sum(map(slope, points)) / len(points)
    for name, kept in circuit.kept.items():
        torch.testing.assert_close(found[name], kept * expected, rtol=1e-4, atol=1e-8)
    assert gates.tau.grad is None
    assert not has_hooks(micro)


def test_attribution_against_differences():
    """On a random model, attribution equals the finite difference of the loss for each node."""
    smooth = full_config(d_vocab=36, resid_relu=False, abs_topk={"attn_v": 0.7, "mlp_neuron": 0.7})
    model = tiny_model(smooth, dtype=torch.float64, tokenizer=micro_tokenizer())
    _, data, _ = task_splits(model, MICRO_TASK, CONFIG)
    names = list(node_hooks(model).values())
    means = mean_activations(model, names, [micro_corpus()])
    gates = NodeGates(means, init_bias=0.1, init_scale=0.0, seed=0)

    def loss(name, at, strength):
        def mixed(activation, hook):
            mean = means[name].expand_as(activation)
            share = torch.ones_like(means[name])
            share[at] = strength
            return mean + share * (activation - mean)

        with hooked(model, {name: mixed}), torch.no_grad():
            return task_loss(model, data).item()

    with frozen(model):
        found = gates.at_nodes(
            attribution(model, gates, data, dataclasses.replace(CONFIG, method="attribution"))
        )
    checked = 0
    for name in names:
        at = tuple(size // 2 for size in means[name].shape)
        near = loss(name, at, 1 + 1e-5) - loss(name, at, 1 - 1e-5)
        assert found[name][at].item() == pytest.approx(near / 2e-5, rel=1e-3, abs=1e-8), name
        checked += abs(near) > 1e-9
    assert checked >= 8


def test_attribution_mixes_with_what_resampling_holds(micro):
    """The derivative of the loss as a node moves from its value on the partner to its own."""
    config = dataclasses.replace(CONFIG, method="attribution", ablation="resample")
    train, _, _ = task_splits(micro, MICRO_TASK, config)
    circuit = micro_circuit(micro)
    means = {name: circuit.means[name] for name in circuit.kept}
    gates = NodeGates(means, init_bias=0.1, init_scale=0.0, seed=0)
    with frozen(micro):
        found = gates.at_nodes(attribution(micro, gates, train, config))
    letters = train.tokens[: 2 * 64, 3]
    is_swapped = (train.partners.tokens[:128, 3] != letters).double().mean().item()
    # A partner with the other letter doubles the distance to the mean of zero; one with the same
    # letter changes nothing.
    for name, kept in circuit.kept.items():
        torch.testing.assert_close(
            found[name], kept * (2 * is_swapped * slope(1.0)), rtol=1e-4, atol=1e-8
        )


def ranked(micro, monkeypatch, **changes):
    """Hook name → τ of the gates with which learning starts."""
    start = {}

    def remember(model, gates, *_):
        start.update(gates.at_nodes(gates.tau.data))

    monkeypatch.setattr(pruning, "learn_gates", remember)
    config = dataclasses.replace(CONFIG, init_scale=0.0, **changes)
    prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    return start


def test_a_warm_start_ranks_the_nodes_before_they_are_learned(micro, monkeypatch):
    start, kept = ranked(micro, monkeypatch), micro_circuit(micro).kept
    ours = torch.cat([start[name][kept[name]] for name in kept])
    others = torch.cat([start[name][~kept[name]] for name in kept])
    assert len(ours) == 3
    assert ours.min() > others.max()
    assert ours.min() > 0


def test_a_cold_start_is_where_the_settings_say(micro, monkeypatch):
    start = ranked(micro, monkeypatch, warm_start=False, init_bias=0.25)
    assert all((tau == 0.25).all() for tau in start.values())


@pytest.mark.parametrize("method", ["learned", "attribution", "integrated_gradients", "random"])
def test_every_method_gives_a_circuit_that_reaches_the_target(micro, method, monkeypatch):
    calls = []
    real = pruning.learn_gates

    def counting(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(pruning, "learn_gates", counting)
    config = dataclasses.replace(CONFIG, method=method)
    circuit, evaluation = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert len(calls) == (method == "learned")
    assert evaluation.circuit.loss == pytest.approx(LOSS, abs=1e-6)
    assert set(NODES) <= {str(node) for node in circuit.nodes}
    # A random ranking has these three nodes first once in 2,024 times.
    assert (circuit.n_nodes == 3) == (method != "random")
    assert circuit.measured["config"]["method"] == method
    assert circuit.of_size(circuit.n_nodes).nodes == circuit.nodes


def test_a_seed_decides_the_random_ranking(micro):
    def ranked_at_random(seed):
        config = dataclasses.replace(CONFIG, method="random", seed=seed)
        circuit, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
        return circuit

    first = ranked_at_random(0)
    assert ranked_at_random(0).nodes == first.nodes
    assert ranked_at_random(1).of_size(9).nodes != first.of_size(9).nodes


def test_a_random_ranking_needs_no_noise_on_gates(micro):
    """Without it, the first nodes of the model would rank first."""
    config = dataclasses.replace(CONFIG, method="random", init_scale=0.0)
    circuit, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    config = dataclasses.replace(config, init_scale=0.1, init_bias=1.0)
    other, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert circuit.of_size(9).nodes == other.of_size(9).nodes
    assert {node.location for node in circuit.of_size(9).nodes} != {"attn_in", "attn_q", "attn_k"}


@pytest.mark.parametrize(
    "changes",
    [
        dict(warm_start=False, steps=100),
        dict(tied_qk=True),
        dict(ablation="zero"),
        dict(ablation="resample"),
        dict(necessity=1.0, ablated_accuracy=0.5),
        dict(necessity=1.0, ablated_accuracy=0.5, ablation="resample"),
        dict(init_bias=-0.5),
        dict(restarts=2),
        dict(steer_rate=0.0, steer_now=0.0),
        dict(batch_size=1),
    ],
    ids=str,
)
def test_the_micro_circuit_is_found_with_any_settings(micro, changes):
    config = dataclasses.replace(CONFIG, **changes)
    circuit, evaluation = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert [str(node) for node in circuit.nodes] == NODES
    assert evaluation.circuit.loss == pytest.approx(LOSS, abs=1e-6)
    assert circuit.measured["config"] == config.to_json()
    assert not has_hooks(micro)


def test_the_channels_of_the_embedding_can_be_nodes(micro, tmp_path):
    """Only the first of the four channels distinguishes A from B."""
    config = dataclasses.replace(CONFIG, embed_gates=True)
    circuit, evaluation = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert [str(node) for node in circuit.nodes] == ["0.embed_out 0", *NODES]
    assert evaluation.circuit.loss < CONFIG.target_loss
    tokens = micro_corpus()[:5]
    nothing = Circuit(
        {"hook_embed": torch.zeros(4, dtype=torch.bool)}, circuit.means, circuit.model
    )
    with nothing.applied(micro):
        _, cache = micro.run_with_cache(tokens)
    torch.testing.assert_close(
        cache["hook_embed"], circuit.means["hook_embed"].expand(*tokens.shape, 4)
    )
    circuit.save(tmp_path / "circuit")
    reopened = Circuit.load(tmp_path / "circuit")
    assert reopened.nodes == circuit.nodes
    assert "1 embed_out" in repr(reopened)


# The values at which dropped nodes are held


def with_constant(micro):
    """The answer depends on a constant that the MLP writes: only zero ablation destroys it."""
    with torch.no_grad():
        micro.blocks[0].mlp.b_out[3] = 1.0
        micro.unembed.W_U[3, 4], micro.unembed.W_U[3, 5] = 10.0, -10.0
        micro.unembed.W_U[1, 4], micro.unembed.W_U[1, 5] = -10.0, 10.0
    return micro


@pytest.mark.parametrize(
    ("ablation", "more"), [("mean", []), ("zero", ["0.mlp_out 3"]), ("resample", [])]
)
def test_circuits_for_each_ablation(micro, ablation, more, monkeypatch):
    held = []

    class Spy(NodeGates):
        def attached(self, model, **options):
            held.append(options["values"] or self.means)
            return super().attached(model, **options)

    monkeypatch.setattr(start_module, "NodeGates", Spy)
    settings = {"target_loss": 0.01, "ablation": ablation, "necessity": 0.5, "exchanges": 0}
    config = dataclasses.replace(CONFIG, **settings)
    circuit, evaluation = prune(
        with_constant(micro), MICRO_TASK, micro_corpus(), config, progress=False
    )
    assert [str(node) for node in circuit.nodes] == [*NODES, *more]
    chosen = {"mean": evaluation.circuit, "zero": evaluation.zero, "resample": evaluation.resample}
    expected = math.log1p(math.exp(-2 * W_U * WRITTEN / math.sqrt((2 + WRITTEN**2) / 4)))
    assert chosen[ablation].loss == pytest.approx(expected, rel=1e-3)
    assert (evaluation.zero.loss > 1) == (ablation != "zero")
    selection = circuit.measured["selection"]["circuit"]["loss"]
    assert selection == pytest.approx(expected, rel=1e-3)  # under the ablation it was found with
    means = mean_activations(micro, list(circuit.kept), [micro_corpus()])
    assert all(torch.allclose(circuit.means[name], mean) for name, mean in means.items())
    # The gates were learned with the same held values with which the circuit alone, and the model
    # without the circuit, are judged. The last run measured the effects of nodes.
    assert len(held) == 2 * config.steps + 1
    for values in held[:-1]:
        assert values.keys() == means.keys()
        for name, value in values.items():
            if ablation == "resample":
                assert value.shape[0] in (8, 16)
                assert value.shape[2:] == means[name].shape
            else:
                assert torch.equal(value, circuit.means[name] * (ablation == "mean"))


# Restarts and tied gates


def test_restarts_keep_the_smallest_by_edges_then_nodes(micro, monkeypatch):
    """Each restart has its own seed; of two equally small circuits, the first is kept."""
    micro.blocks[0].attn.W_V.data[0, 1, 1] = 0.1
    best = micro_circuit(micro)

    def wider(*nodes):
        kept = {name: mask.clone() for name, mask in best.kept.items()}
        for name, at in nodes:
            kept[f"blocks.0.{name}"][at] = True
        return dataclasses.replace(best, kept=kept)

    found = [
        wider(("ln1.hook_read", 1), ("attn.hook_v", (0, 1))),  # one more edge
        wider(*(("hook_mlp_out", i) for i in range(4))),  # four nodes more
        wider(*(("hook_mlp_out", i) for i in range(3))),  # three nodes more, but no edge
        wider(*(("ln2.hook_read", i) for i in range(3))),
    ]
    seeds = []

    def search(empty, model, train, selection, config, progress, stage):
        seeds.append(config.seed)
        return found[len(seeds) - 1]

    monkeypatch.setattr(pruning, "_search", search)
    config = dataclasses.replace(CONFIG, restarts=4, seed=7)
    circuit, evaluation = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert seeds == [7, 8, 9, 10]
    assert circuit.nodes == found[2].nodes
    assert (evaluation.n_nodes, evaluation.n_edges) == (6, 2)
    assert circuit.measured["config"]["restarts"] == 4


@pytest.mark.parametrize(
    ("changes", "edges"),
    [({}, False), ({}, True), ({"robust": "subsets", "subsets": 4, "means_over": "task"}, False)],
)
def test_the_circuit_that_is_found_without_judging_it(micro, changes, edges):
    """It is the one of `prune` and `prune_edges`, without their scores."""
    config = dataclasses.replace(QUICK, **changes)
    means = corpus_means(micro, micro_corpus())
    judged, _ = prune(micro, MICRO_TASK, config=config, means=means, progress=False)
    if edges:
        judged, _ = prune_edges(judged, micro, MICRO_TASK, config, progress=False)
    stage = "edges" if edges else "nodes"
    found = find_circuit(micro, MICRO_TASK, means, config, stage)
    assert found.nodes == judged.nodes
    assert found.edges(micro) == judged.edges(micro)
    assert found.edge_set == judged.edge_set
    assert found.measured == {"config": config.to_json()}
    assert not has_hooks(micro)


def test_a_search_that_stops_at_a_size_removes_no_nodes(micro):
    config = dataclasses.replace(QUICK, method="random")
    means = corpus_means(micro, micro_corpus())
    found = find_circuit(micro, MICRO_TASK, means, config, "size")
    assert set(NODES) < {str(node) for node in found.nodes}
    without = dataclasses.replace(config, exclude=NODES[:1])
    with pytest.raises(PruneError, match="no circuit was found at any size"):
        find_circuit(micro, MICRO_TASK, means, without, "size")
    with pytest.raises(ArgumentError, match=r"stage must be .*'size', 'nodes', 'edges'.* 'end'"):
        find_circuit(micro, MICRO_TASK, means, config, "end")


def test_a_restart_that_finds_nothing_does_not_end_the_others(micro, monkeypatch):
    best = micro_circuit(micro)

    def search(empty, model, train, selection, config, progress, stage):
        if config.seed == 1:
            return best
        raise PruneError(f"nothing with seed {config.seed}")

    monkeypatch.setattr(pruning, "_search", search)
    config = dataclasses.replace(CONFIG, restarts=2)
    circuit, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert circuit.nodes == best.nodes
    config = dataclasses.replace(CONFIG, restarts=2, seed=2)
    with pytest.raises(PruneError, match="nothing with seed 2"):
        prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_queries_and_keys_are_kept_together(tied):
    """On a random model, they also have the same rank."""
    model = tiny_model(n_layers=2, n_heads=2, d_head=3, d_vocab=36, tokenizer=micro_tokenizer())
    _, selection, _ = task_splits(model, MICRO_TASK, CONFIG)
    full = score(model, selection).loss
    config = dataclasses.replace(CONFIG, target_loss=1.02 * full, tied_qk=tied, steps=10)
    circuit, _ = prune(model, MICRO_TASK, micro_corpus(), config, progress=False)
    for i in range(2):
        for of in (circuit.scores, circuit.kept) if tied else (circuit.scores,):
            assert torch.equal(of[f"blocks.{i}.attn.hook_q"], of[f"blocks.{i}.attn.hook_k"]) == tied
    assert circuit.of_size(circuit.n_nodes).nodes == circuit.nodes


def test_queries_that_share_keys_cannot_be_tied_to_them(micro):
    model = stock_model(d_vocab=36, n_key_value_heads=1)
    model.tokenizer = micro.tokenizer
    config = dataclasses.replace(CONFIG, target_loss=100.0, steps=1)
    prune(model, MICRO_TASK, micro_corpus(), config, progress=False)
    tied = dataclasses.replace(config, tied_qk=True)
    with pytest.raises(
        PruneError,
        match=r"tied_qk needs a key channel for each query channel; .*\[2, 4\].*\[1, 4\]",
    ):
        prune(model, MICRO_TASK, micro_corpus(), tied, progress=False)


# Errors


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (pruning, "learn_gates"),
        (pruning, "discretise"),
        (pruning, "_judged"),
        (means_module, "mean_activations"),
        (start_module, "attribution"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_model_is_as_it_was_after_an_exception(micro, module, step, monkeypatch):
    def failing(*arguments, **options):
        raise ZeroDivisionError

    micro.train()
    micro.blocks[0].attn.W_V.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in micro.named_parameters()}
    monkeypatch.setattr(module, step, failing)
    with pytest.raises(ZeroDivisionError):
        prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
    assert micro.training
    assert [name for name, p in micro.named_parameters() if not p.requires_grad] == [
        "blocks.0.attn.W_V"
    ]
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in micro.named_parameters()
    )
    assert not has_hooks(micro)


def test_no_set_of_nodes_is_necessary(micro):
    """If prompts end in the token asked about, its embedding reaches the logits past all nodes."""
    with torch.no_grad():
        micro.unembed.W_U[0, 4], micro.unembed.W_U[0, 5] = W_U, -W_U
    task = dataclasses.replace(MICRO_TASK, sample=_ends_in, same_end=False)
    config = dataclasses.replace(CONFIG, target_loss=0.1, ablated_accuracy=0.6, steps=5)
    message = (
        r"no circuit was found at any size that was tried, up to all 24 nodes: with these, the "
        r"loss is 0\.\d+ \(it must be at most 0\.1\), and the accuracy of the model without them "
        r"is \d+\.\d% \(it must be at most 60\.0%\)"
    )
    with pytest.raises(PruneError, match=message):
        prune(micro, task, micro_corpus(), config, progress=False)
    circuit, _ = prune(
        micro,
        task,
        micro_corpus(),
        dataclasses.replace(config, ablated_accuracy=1.0),
        progress=False,
    )
    assert circuit.n_nodes <= 1  # no node is needed, but the search begins with one


def _ends_in(rng):
    fillers = " ".join(rng.choice(FILLERS) for _ in range(3))
    return f"{fillers} A", f"{fillers} B"


def test_target_below_what_the_model_reaches(micro):
    config = dataclasses.replace(CONFIG, target_loss=LOSS / 2)
    with pytest.raises(
        PruneError, match=f"full model's loss on micro is {LOSS:.3f}.*above the target loss"
    ):
        prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)


@pytest.mark.parametrize(("n_pairs", "are_few"), [(49, True), (50, False)])
def test_a_refusal_says_on_how_many_pairs_the_model_was_measured(n_pairs, are_few, micro):
    config = dataclasses.replace(CONFIG, target_loss=LOSS / 2, selection_pairs=n_pairs)
    with pytest.raises(PruneError) as error:
        prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    message = str(error.value)
    assert f", on {n_pairs} selection pairs), above the target loss" in message
    advice = "So few pairs can mislead: give the task more of them, or give selection_pairs"
    assert (advice in message) == are_few


def test_a_task_that_the_model_does_not_do(micro):
    first, second = MICRO_TASK.candidates
    task = dataclasses.replace(MICRO_TASK, candidates=(second, first))  # the wrong way round
    with pytest.raises(PruneError, match="no better than guessing, so the model does not do this"):
        prune(micro, task, micro_corpus(), CONFIG, progress=False)


def test_too_few_distinct_prompts(micro):
    few = dataclasses.replace(
        MICRO_TASK, sample=lambda rng: MICRO_TASK.sample(random.Random(rng.randrange(80)))
    )
    message = (
        r"^train_pairs = 64 \(--train-pairs\) and selection_pairs = 16 \(--selection-pairs\) and "
        r"heldout_pairs = 16 \(--heldout-pairs\) are not possible: task micro has 80 pairs of "
        r"distinct prompts$"
    )
    with pytest.raises(ConfigError, match=message):
        prune(micro, few, micro_corpus(), CONFIG, progress=False)


def test_model_without_tokenizer(micro):
    micro._tokenizer = None  # TransformerBridge
    micro.__dict__["tokenizer"] = None  # HookedTransformer
    with pytest.raises(TokenizerError, match="needs the model's tokenizer"):
        prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)


def test_candidate_that_is_not_a_single_token(micro):
    task = dataclasses.replace(MICRO_TASK, candidates=(" yes", " yes no"))
    # The longest beginning of ` yes no` that is one token is ` yes `. This tokenizer maps it to the
    # same token as ` yes`, the other candidate.
    with pytest.raises(
        TokenizerError,
        match=r"answers ' yes' and ' yes no' of task micro .* are ' yes' and ' yes '$",
    ):
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
        ("train_pairs", 0, "at least 1"),
        ("selection_pairs", 0, "at least 1"),
        ("heldout_pairs", 0, "at least 1"),
        ("pairs_per_step", 0, "at least 1"),
        ("ranking_pairs", 0, "at least 1"),
        ("restarts", 0, "at least 1"),
        ("restarts", 1.5, "of type int"),
        ("max_nodes", 0, "None, or a whole number of at least 1"),
        ("max_nodes", 10.0, "None, or a whole number"),
        ("batch_size", 0, "at least 1"),
        ("steer_to", 0.0, "above 0"),
        ("steer_rate", -0.1, "at least 0"),
        ("steer_now", -0.1, "at least 0"),
        ("steer_now", float("nan"), "at least 0"),
        ("grad_clip", 0.0, "above 0"),
        ("temperature", 0.0, "above 0"),
        ("beta1", -0.1, r"in \[0, 1\)"),
        ("weight_decay", -0.1, "at least 0"),
        ("init_scale", -0.1, "at least 0"),
        ("necessity", -0.1, "at least 0"),
        ("warm_start", 1, "of type bool"),
        ("tied_qk", "yes", "of type bool"),
        ("method", "gradient", "one of"),
        ("ablation", "median", "one of"),
    ],
)
def test_impossible_settings(field, value, valid):
    with pytest.raises(ConfigError, match=f"{field} = .*must be {valid}"):
        PruneConfig(**{field: value})


def test_a_corpus_too_small_for_stable_means_is_warned_of(micro):
    rows = micro_corpus()
    with pytest.warns(
        UserWarning,
        match=r"the means over 12 tokens have a standard error of about \d+% of their size",
    ):
        corpus_means(micro, rows[[0, 3]])  # one row has an A, the other a B


@pytest.mark.parametrize("n_rows", [0, 1])
def test_a_corpus_without_two_rows_is_refused(micro, n_rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=rf"shape \[0, 6\] are|one is \[{n_rows}, 6\]"):
            corpus_means(micro, micro_corpus()[:n_rows])


def test_the_warning_names_the_line_of_the_user(micro):
    rows = micro_corpus()[[0, 3]]
    calls = [
        lambda: corpus_means(micro, rows),
        lambda: prune(micro, MICRO_TASK, rows, QUICK, progress=False),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="the means over 12 tokens") as warned:
            call()
        assert warned[0].filename == __file__


def test_means_over_the_corpus_are_those_of_all_rows(micro):
    rows = micro_corpus()[:7]
    whole = node_means(micro, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = corpus_means(micro, rows, batch_size=8)
    for name, mean in whole.items():
        torch.testing.assert_close(means[name], mean, rtol=1e-6, atol=1e-6)


def test_means_over_the_task_leave_padding_out(micro):
    config = dataclasses.replace(CONFIG, means_over="task")
    circuit, _ = prune(micro, MICRO_TASK, micro_corpus()[:1], config, progress=False)
    train, _, _ = task_splits(micro, MICRO_TASK, config)
    expected = mean_activations(
        micro, list(circuit.kept), [train.trimmed().tokens]
    )  # all prompts have the same length
    for name, mean in expected.items():
        torch.testing.assert_close(circuit.means[name], mean, rtol=1e-5, atol=1e-6)


def test_means_over_the_task_are_taken_in_batches(micro):
    train, _, _ = task_splits(micro, MICRO_TASK, CONFIG)
    sizes = []
    hook = micro.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        in_batches = task_means(micro, train, embed=False, batch_size=5)
    finally:
        hook.remove()
    assert max(sizes) == 5
    assert sum(sizes) == 2 * train.n_pairs
    for name, mean in task_means(micro, train, embed=False).items():
        torch.testing.assert_close(in_batches[name], mean)


@pytest.mark.parametrize(
    ("kept", "final", "tests"), [(set(), 40, 6), ({0, 7, 8, 30}, 25, 36), (set(range(40)), 0, 40)]
)
def test_elimination_takes_all_that_goes_and_gives_back_what_was_too_much(kept, final, tests):
    """All of 40 go in groups of 1, 2, 4, 8, 16 and 9; if none can go, they are tried one by one."""
    tried = []

    def holds(gone):
        tried.append(gone)
        return kept.isdisjoint(gone)

    decided = []
    gone = eliminate(range(40), holds, lambda gone: len(gone) <= final, decided.append)
    assert gone == sorted(set(range(40)) - kept)[:final]
    assert sum(decided) == 40  # as many as the progress bar counts
    assert len(tried) == tests


def test_elimination_goes_on_after_a_case_that_only_the_thorough_test_knew():
    """The thorough test knows of a node that must stay; once it has failed, the quick one does."""
    needed: set[int] = set()

    def decides(gone):
        if 3 in gone:
            needed.add(3)
        return needed.isdisjoint(gone)

    gone = eliminate(range(40), needed.isdisjoint, decides, lambda n: None)
    assert gone == [0, 1, 2, *range(4, 40)]


@pytest.mark.parametrize(("most", "expected"), [(0, 0), (1, 1), (3, 7), (6, 40), (9, 40)])
def test_elimination_ends_after_the_most_tests(most, expected):
    """All could go, in groups of 1, 2, 4, 8, 16 and 9."""
    gone = eliminate(range(40), lambda gone: True, lambda gone: True, lambda n: None, Budget(most))
    assert gone == list(range(expected))


def test_dropping_nodes_makes_no_tensor_beside_the_model(micro):
    """Pruning on a GPU used to fail here: a tensor was created on the default device, the CPU."""
    means = mean_activations(micro, list(node_hooks(micro).values()), [micro_corpus()])
    gates = NodeGates(means, init_bias=0.5, init_scale=0.0, seed=0)
    _, selection, _ = task_splits(micro, MICRO_TASK, CONFIG)
    candidates = empty(micro)
    with torch.device("meta"):  # a tensor created without a device lands there, and the test fails
        found = chosen(candidates, micro, gates, selection)
    assert [str(node) for node in found.nodes] == NODES


def test_nodes_that_cannot_be_gated_are_noticed_before_pairs_are_drawn(micro, monkeypatch):
    def no_nodes(model, embed, kind):
        raise HookNameError("no nodes here")

    def not_drawn(rng):
        pytest.fail("a pair is drawn")

    monkeypatch.setattr("tl_sparse.pruning.pruner.gated_hooks", no_nodes)
    task = dataclasses.replace(MICRO_TASK, name="own", sample=not_drawn)
    with pytest.raises(HookNameError, match="no nodes here"):
        prune(micro, task, micro_corpus(), CONFIG, progress=False)
