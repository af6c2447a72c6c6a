"""Searches against subsets and adversaries, for other objectives, and with fixed nodes."""

import contextlib
import dataclasses
import math
from pathlib import Path

import pytest
import torch

from helpers import has_hooks, stock_model
from micro import (
    LOSS,
    MICRO_TASK,
    NODES,
    QUICK_SETTINGS,
    VOCABULARY,
    W_O,
    W_V,
    cancelling_model,
    micro_circuit,
    micro_corpus,
    micro_data,
    micro_model,
    micro_tokenizer,
)
from tl_sparse.checkpoints.loading import load
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.errors import ArgumentError, CircuitError, ConfigError, PruneError
from tl_sparse.evaluation import adversary as adversary_module
from tl_sparse.evaluation.adversary import adversary_score, learned_subset
from tl_sparse.evaluation.holding import holding_circuit
from tl_sparse.evaluation.judge import evaluate, score
from tl_sparse.evaluation.objectives import all_objective_losses, with_reference
from tl_sparse.evaluation.subsets import random_subsets, subset_scores
from tl_sparse.hooks.points import recording
from tl_sparse.pruning import adversaries, pruner
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.pruner import prune, prune_edges
from tl_sparse.tasks.task_data import make_task_data

pytestmark = pytest.mark.any_line

CONFIG = PruneConfig(**QUICK_SETTINGS)
READ, WRITE = "0.attn_in 0", "0.attn_out 2"
QUOTE_CIRCUIT = Path(__file__).parents[1] / "benchmarks/quote_circuit"
FIRST, SECOND, THIRD = (f"0.attn_v h0.{channel}" for channel in range(3))


def found(model, task=MICRO_TASK, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    circuit, evaluation = prune(model, task, micro_corpus(), config, progress=False)
    return circuit, evaluation


# --- a circuit whose errors cancel


def test_a_search_that_holds_all_else_finds_a_circuit_that_cheats():
    model = cancelling_model()
    circuit, evaluation = found(model)
    assert len(circuit.nodes) == 3
    assert THIRD not in circuit.node_names
    assert evaluation.circuit.loss <= CONFIG.target_loss
    scores = subset_scores(circuit, model, micro_data(model, n_pairs=8), n_subsets=24)
    assert scores.worst.loss >= math.log(2) - 1e-6
    assert scores.worst.accuracy == 0


@pytest.mark.parametrize("robust", ["subsets", "adversary"])
def test_a_robust_search_does_not(robust):
    model = cancelling_model()
    circuit, evaluation = found(model, robust=robust)
    assert circuit.node_names == (READ, FIRST, SECOND, WRITE)
    assert evaluation.circuit.loss <= CONFIG.target_loss
    scores = subset_scores(circuit, model, micro_data(model, n_pairs=8), n_subsets=24)
    assert scores.worst.loss <= CONFIG.target_loss
    attacked = adversary_score(circuit, model, micro_data(model), micro_data(model), steps=20)
    assert attacked.score.loss <= CONFIG.target_loss
    fewer, _ = prune_edges(
        circuit, model, config=dataclasses.replace(CONFIG, robust=robust), progress=False
    )
    assert fewer.nodes == circuit.nodes
    assert not has_hooks(model)


def test_adversaries_attack_the_circuit_that_the_search_returns(monkeypatch):
    """Not the larger one of the chosen size, from which nodes are removed afterwards."""
    attacked = []

    def attack(circuit, *arguments, **settings):
        attacked.append(circuit.node_names)
        return learned_subset(circuit, *arguments, **settings)

    monkeypatch.setattr(adversaries, "learned_subset", attack)
    circuit, _ = found(cancelling_model(), robust="adversary")
    assert len(attacked) == CONFIG.adversaries
    assert attacked[-1] == circuit.node_names


def test_a_test_of_a_circuit_meets_subsets_that_it_has_not_seen():
    """The cheat fails when the third channel is as it is; the subset that shows this is kept."""
    model = cancelling_model()
    data = micro_data(model, n_pairs=8)
    cheat, _ = found(model)
    harmless = {name: torch.zeros_like(mask) for name, mask in cheat.kept.items()}
    harmful = dict(harmless)
    harmful["blocks.0.attn.hook_v"] = harmless["blocks.0.attn.hook_v"].clone()
    harmful["blocks.0.attn.hook_v"][0, 2] = True
    others = [harmless, harmful]
    criterion = Criterion(model, CONFIG, [harmless], others)
    assert criterion.passes_quickly(cheat, data)  # it meets the first of the others
    assert not criterion.passes_quickly(cheat, data)  # and the second
    assert len(criterion.subsets) == 2
    assert criterion.hardest is harmful
    assert not criterion.passes(cheat, data)
    criterion = Criterion(model, CONFIG, [], others)
    assert criterion.passes(cheat, data, n_others=0)
    assert not criterion.passes(cheat, data)


class Measured(Criterion):
    """A criterion under which circuits have given losses, which notes how many pairs were tried."""

    def __init__(self, model, mean, spread):
        super().__init__(model, CONFIG, [{}])
        self.mean = mean
        self.spread = spread
        self.n_pairs_tried = []

    def losses(self, circuit, data, left=None):
        self.n_pairs_tried.append(data.n_pairs)
        every_other_pair = torch.tensor([-1.0, 1.0]).repeat(data.n_pairs // 2)
        of_pairs = self.mean + self.spread * every_other_pair
        return of_pairs.repeat_interleave(2)  # the two prompts of a pair have the same loss


@pytest.mark.parametrize(
    ("share_of_target", "withstands", "n_pairs_tried"),
    [
        (0.5, True, [12]),  # clear on a few pairs
        (2.0, False, [12]),
        (0.99, True, [12, 36]),  # in doubt, so the others are tried too
        (1.01, False, [12, 36]),
    ],
)
def test_a_subset_is_tried_on_all_pairs_only_if_a_few_leave_a_doubt(
    share_of_target, withstands, n_pairs_tried
):
    """The losses of pairs are a tenth of the target above or below their mean."""
    model = cancelling_model()
    circuit, _ = found(model)
    target = CONFIG.target_loss
    criterion = Measured(model, share_of_target * target, target / 10)
    assert criterion.withstands(circuit, micro_data(model, n_pairs=48), {}) is withstands
    assert criterion.n_pairs_tried == n_pairs_tried


def test_however_long_a_search_takes_it_tries_a_bounded_number_of_subsets():
    circuit = micro_circuit(cancelling_model())
    config = dataclasses.replace(CONFIG, robust="subsets", subsets=2)
    others = Criterion.of_config(circuit, cancelling_model(), config)._others
    drawn = [next(others)["blocks.0.attn.hook_v"] for _ in range(11)]
    assert torch.equal(drawn[10], drawn[0])  # five times as many as the criterion has
    assert not torch.equal(drawn[1], drawn[0])


def test_a_criterion_keeps_the_subsets_that_made_circuits_fail_most_recently():
    """The third one takes the place of the first. One that is added takes the place of none."""
    model = cancelling_model()
    data = micro_data(model, n_pairs=8)
    cheat, _ = found(model)
    subsets = []
    for read in range(3):  # all leave the channel for which the cheat fails, and another one
        subset = {name: torch.zeros_like(mask) for name, mask in cheat.kept.items()}
        subset["blocks.0.attn.hook_v"][0, 2] = True
        subset["blocks.0.hook_mlp_out"][read] = True
        subsets.append(subset)
    config = dataclasses.replace(CONFIG, subsets=2)
    criterion = Criterion(model, config, [], subsets)
    for _ in range(3):
        assert not criterion._withstands_others(cheat, data, 1)
    assert list(map(id, criterion.subsets)) == [id(subsets[2]), id(subsets[1])]
    criterion.add(subsets[0])
    assert list(map(id, criterion.subsets)) == [id(subsets[0]), id(subsets[2]), id(subsets[1])]
    for subset in subsets[1:]:  # what all circuits must withstand never leaves
        criterion._join(dict(subset))
    assert len(criterion.subsets) == 3
    assert any(subset is subsets[0] for subset in criterion.subsets)


def test_a_loss_that_is_no_number_passes_no_test():
    model = cancelling_model()
    data = micro_data(model, n_pairs=32)
    cheat, _ = found(model)
    criterion = Criterion(model, CONFIG)
    assert criterion.passes(cheat, data)
    criterion.losses = lambda circuit, data, left=None: torch.full((2 * data.n_pairs,), torch.nan)
    assert not criterion.passes(cheat, data)
    assert not criterion.passes_quickly(cheat, data)
    assert criterion.fails_clearly(cheat, data)


def test_a_model_whose_loss_is_no_number_is_not_searched():
    model = micro_model()
    with torch.no_grad():
        model.unembed.W_U[2, VOCABULARY["no"]] = torch.nan
    with pytest.raises(PruneError, match="the full model's loss on micro is nan"):
        prune(model, MICRO_TASK, micro_corpus(), CONFIG, progress=False)


def test_all_restarts_are_tried_under_the_same_subsets(monkeypatch):
    """Those of the seed, under which `prune_edges` then tries the circuit too."""
    criteria = []
    real = pruner.discretise

    def spy(ranking, criterion, *arguments):
        criteria.append(list(criterion.subsets))
        return real(ranking, criterion, *arguments)

    monkeypatch.setattr(pruner, "discretise", spy)
    found(cancelling_model(), robust="subsets", restarts=2)
    first, second = criteria
    for subset, other in zip(first, second, strict=True):
        for name, mask in subset.items():
            assert torch.equal(mask, other[name])


def test_an_error_names_the_loss_that_is_too_large():
    """The second channel is enough while all others are held, but not while the third is left."""
    model = cancelling_model()
    message = r"loss is 0\.\d+ while some nodes outside are left as they are \(it must be at most"
    with pytest.raises(PruneError, match=message):
        found(model, robust="subsets", exclude=(FIRST, THIRD))


def test_criteria_with_other_targets_have_the_same_subsets():
    """One that makes a circuit fail under a stricter target counts for the criterion too."""
    model = cancelling_model()
    cheat, _ = found(model)
    harmful = {name: torch.zeros_like(mask) for name, mask in cheat.kept.items()}
    harmful["blocks.0.attn.hook_v"][0, 2] = True
    criterion = Criterion(model, CONFIG, [], [harmful])
    stricter = criterion.with_target(CONFIG.target_loss / 2)
    assert not stricter.passes_quickly(cheat, micro_data(model, n_pairs=8))
    assert criterion.hardest is harmful


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
@pytest.mark.parametrize("robust", ["subsets", "adversary"])
def test_a_dense_model_is_searched_against_opponents(robust, ablation):
    model = stock_model(d_vocab=len(VOCABULARY))
    model.tokenizer = micro_tokenizer()
    settings = {"target_loss": 0.69, "allow_failing_model": True, "steps": 4, "adversary_steps": 2}
    config = dataclasses.replace(CONFIG, robust=robust, ablation=ablation, **settings)
    corpus = torch.randint(model.cfg.d_vocab, (40, 8), generator=torch.Generator().manual_seed(0))
    with contextlib.suppress(PruneError):  # a random model need not have a circuit
        prune(model, MICRO_TASK, corpus, config, progress=False)
    assert not has_hooks(model)


def test_an_adversary_that_may_leave_one_node_finds_the_one_that_matters():
    model = cancelling_model()
    circuit, _ = found(model)
    data = micro_data(model)
    left = learned_subset(circuit, model, data, budget=1, steps=40)
    assert {name: mask.sum().item() for name, mask in left.items() if mask.any()} == {
        "blocks.0.attn.hook_v": 1
    }
    assert left["blocks.0.attn.hook_v"][0, 2]
    attacked = adversary_score(circuit, model, data, data, budget=1, steps=40, restarts=2)
    assert attacked.n_left == 1
    assert attacked.score.accuracy == 0
    assert len(attacked.losses) == 2
    none = adversary_score(circuit, model, data, data, budget=0, steps=1, restarts=1)
    assert none.n_left == 0
    assert none.score.loss == pytest.approx(
        score(model, data, run_context=holding_circuit(circuit, model)).loss
    )


def test_an_adversary_that_may_leave_all_nodes_does_not():
    """With all nodes left, the circuit would be the model, and right."""
    model = cancelling_model()
    circuit, _ = found(model)
    data = micro_data(model)
    n_outside = circuit.n_candidates - circuit.n_nodes
    attacked = adversary_score(circuit, model, data, data, budget=n_outside, steps=40, restarts=1)
    assert attacked.n_left < n_outside
    assert attacked.score.accuracy == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_an_adversary_that_may_leave_few_nodes_finds_those_that_act_together(seed):
    """A query channel and its key channel do next to nothing without each other.

    Four nodes, of which two are such a pair, bring the loss to 0.50 to 0.61 for each of four seeds.
    An adversary that has learned with this budget from the start reaches at most 0.17.
    """
    model = load("tiny-python-sparse", device="cpu")
    circuit = Circuit.load(QUOTE_CIRCUIT)
    data = make_task_data(circuit.task, model.tokenizer, 64, seed=1)
    attacked = adversary_score(
        circuit, model, data, data, budget=4, steps=40, restarts=1, seed=seed
    )
    assert attacked.n_left == 4
    assert attacked.score.loss > 0.4


def test_random_subsets_are_spread_over_all_shares():
    circuit = micro_circuit(micro_model())
    subsets = random_subsets(circuit, 8, seed=3)
    sizes = [sum(int(mask.sum()) for mask in subset.values()) for subset in subsets]
    assert sizes[0] < sizes[-1]
    again = random_subsets(circuit, 8, seed=3)
    for subset, same in zip(subsets, again, strict=True):
        assert all(torch.equal(mask, same[name]) for name, mask in subset.items())


def test_an_adversary_needs_means_and_the_circuits_own_model():
    model = micro_model()
    data, circuit = micro_data(model), micro_circuit(model)
    with pytest.raises(CircuitError, match="no means to hold nodes at"):
        learned_subset(dataclasses.replace(circuit, means={}), model, data)
    with pytest.raises(CircuitError, match="this circuit belongs to the model"):
        subset_scores(circuit, cancelling_model(), data)
    for settings, message in (
        ({"budget": -1}, "budget = -1 is not possible"),
        ({"steps": 0}, "steps = 0 is not possible"),
        ({"lr": 0.0}, "lr = 0.0 is not possible"),
    ):
        with pytest.raises(ConfigError, match=message):
            learned_subset(circuit, model, data, **settings)


def test_an_adversary_that_makes_the_model_diverge_ends_there(micro, monkeypatch):
    losses = []

    def diverging(*arguments):
        loss = real(*arguments)
        losses.append(loss)
        return loss * math.nan if len(losses) >= 3 else loss

    real = adversary_module._Adversary._loss
    monkeypatch.setattr(adversary_module._Adversary, "_loss", diverging)
    circuit = micro_circuit(micro)
    left = learned_subset(circuit, micro, micro_data(micro), steps=10)
    assert len(losses) == 3
    budgeted = learned_subset(circuit, micro, micro_data(micro), budget=2, steps=10)
    assert sum(int(mask.sum()) for mask in budgeted.values()) <= 2
    assert not any((left[name] & kept).any() for name, kept in circuit.kept.items())
    assert not has_hooks(micro)


# --- what is asked of a circuit


def test_objectives_by_hand():
    """Of three tokens with probabilities 1/2, 1/4 and 1/4, the first is right, the second wrong."""
    from tl_sparse.evaluation.objectives import objective_losses

    data = micro_data(micro_model(), n_pairs=1)
    data = dataclasses.replace(
        data,
        candidates=torch.tensor([[0, 1], [0, 1]]),
        correct=torch.tensor([0, 0]),
        reference=torch.tensor([[0.25, 0.5, 0.25]] * 2).log(),
    )
    logits = torch.tensor([[0.5, 0.25, 0.25]] * 2).log()
    expected = {
        "candidates": math.log(1.5),
        "next_token": math.log(2),
        "model": 0.25 * math.log(0.5) + 0.5 * math.log(2) + 0.25 * math.log(1),
    }
    for objective, loss in expected.items():
        losses = objective_losses(logits, data, objective)
        torch.testing.assert_close(losses, torch.full((2,), loss))


def test_the_divergence_from_the_model_needs_a_reference(micro):
    data = micro_data(micro)
    with pytest.raises(ArgumentError, match=r"with_reference\(model, data\) measures it first"):
        all_objective_losses(micro, data, "model")
    of_model = all_objective_losses(micro, with_reference(micro, data), "model")
    torch.testing.assert_close(of_model, torch.zeros_like(of_model), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="objective = 'other' is not possible"):
        all_objective_losses(micro, data, "other")


@pytest.mark.parametrize("objective", ["model", "next_token"])
def test_the_micro_circuit_is_found_with_other_objectives(micro, objective):
    full = evaluate(micro_circuit(micro), micro, micro_data(micro)).full.next_token
    target = 0.01 if objective == "model" else 1.1 * full.loss
    circuit, evaluation = found(micro, objective=objective, target_loss=target)
    assert set(NODES) <= set(circuit.node_names)
    reached = evaluation.circuit.next_token
    assert (reached.kl if objective == "model" else reached.loss) <= target
    assert not evaluation.misses_target


def test_a_term_for_necessity_fits_one_objective_alone():
    with pytest.raises(ConfigError, match="it must be 0 with this objective"):
        PruneConfig(objective="model", necessity=0.5)


# --- norms


def test_norms_have_the_scales_of_the_full_model(micro):
    """RMSNorm divides by sqrt((1 + a²) / 4): with nothing kept, a would be 0."""
    data = micro_data(micro)
    circuit, evaluation = found(micro, freeze_norms=True)
    assert circuit.frozen_norms
    assert list(map(str, circuit.nodes)) == NODES
    assert evaluation.circuit.loss == pytest.approx(LOSS, rel=1e-4)
    nothing = circuit.without(circuit.nodes, micro)
    with holding_circuit(nothing, micro)(data), recording(micro, ["ln_final.hook_scale"]) as held:
        micro(data.trimmed().tokens)
    with recording(micro, ["ln_final.hook_scale"]) as full:
        micro(data.trimmed().tokens)
    torch.testing.assert_close(held["ln_final.hook_scale"], full["ln_final.hook_scale"])
    for context in (circuit.applied, circuit.ablated):
        with pytest.raises(CircuitError, match="holding_circuit"):
            context(micro)


def test_frozen_norms_are_kept_in_files(micro, tmp_path):
    circuit = dataclasses.replace(micro_circuit(micro), frozen_norms=True)
    circuit.save(tmp_path / "circuit")
    assert Circuit.load(tmp_path / "circuit").frozen_norms


# --- nodes that are always or never used


def test_included_nodes_are_always_used(micro):
    circuit, _ = found(micro, include=("0.mlp_out 3", "0.attn_q h0.1"))
    assert set(circuit.node_names) == {*NODES, "0.mlp_out 3", "0.attn_q h0.1"}


def test_excluded_nodes_are_never_used(micro):
    with torch.no_grad():  # the second channel of the head carries the answer too
        micro.blocks[0].attn.W_V[0, 0, 1] = W_V
        micro.blocks[0].attn.W_O[0, 1, 2] = W_O
    channels = {"0.attn_v h0.0", "0.attn_v h0.1"}
    first, _ = found(micro)
    (used,) = channels.intersection(first.node_names)
    second, _ = found(micro, exclude=(used,))
    assert channels.intersection(second.node_names) == channels - {used}
    with pytest.raises(PruneError, match="that was tried, up to all 22 nodes"):
        found(micro, exclude=channels_of(first))


def channels_of(circuit):
    """The nodes of a circuit whose removal leaves no way for the answer."""
    return tuple(name for name in circuit.node_names if "attn_v" not in name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ("0.attn_q h7.0",)}, "exclude = '0.attn_q h7.0' is not possible"),
        ({"include": ("9.mlp_out 0",)}, "include = '9.mlp_out 0' is not possible"),
        ({"include": ("nonsense",)}, "'nonsense' is not a node"),
    ],
)
def test_nodes_that_the_model_does_not_have_are_refused(micro, settings, message):
    with pytest.raises(ConfigError, match=message):
        found(micro, **settings)


def test_excluding_all_nodes_is_refused(micro):
    everything = micro_circuit(micro)
    kept = {name: torch.ones_like(mask) for name, mask in everything.kept.items()}
    names = dataclasses.replace(everything, kept=kept).node_names
    with pytest.raises(ConfigError, match="exclude names all"):
        found(micro, exclude=names)


@pytest.mark.parametrize("names", ["0.mlp_out 3", [1], {"0.mlp_out 3"}])
def test_names_are_a_tuple_or_list_of_texts(names):
    with pytest.raises(ConfigError, match="it must be names of nodes"):
        PruneConfig(exclude=names)


def test_no_node_is_both_included_and_excluded():
    with pytest.raises(ConfigError, match="without the nodes that are excluded"):
        PruneConfig(exclude=("0.mlp_out 3",), include=["0.mlp_out 3"])


# --- rankings for any size, and models that cannot do the task


def test_one_ranking_serves_all_sizes(micro):
    circuit, _ = found(micro, method="any_size", steps=60)
    assert list(map(str, circuit.nodes)) == NODES
    assert [str(node) for node in circuit.of_size(3).nodes] == NODES
    assert all(bool((score.abs() <= 3).all()) for score in circuit.scores.values())


def test_a_search_where_the_model_fails_is_possible_if_asked_for(micro):
    with torch.no_grad():
        micro.unembed.W_U.zero_()
    with pytest.raises(PruneError, match="the full model's loss"):
        found(micro)
    with pytest.raises(PruneError, match="no circuit was found at any size"):
        found(micro, allow_failing_model=True)
