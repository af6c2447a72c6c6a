"""A circuit loses nodes one by one, until it needs all that are left."""

import dataclasses
import math

import pytest
import torch

from micro import QUICK_SETTINGS, W_O, W_U, WRITTEN, wide_head_model
from pruning.test_exchanges import (
    LARGE,
    MEDIUM,
    READ,
    SMALL,
    TINY,
    WRITE,
    circuit_of,
    ranking_and_data,
)
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.effects import Effects
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.refinement import Refinement, refined

pytestmark = pytest.mark.any_line

#: Every circuit reaches this loss, so that `Passing` alone decides.
CONFIG = PruneConfig(**(QUICK_SETTINGS | {"target_loss": 0.9}))
WEIGHTS = [0.6 * W_O, 0.4 * W_O, 0.2 * W_O, 0.1 * W_O]
ALL = (READ, LARGE, MEDIUM, SMALL, TINY, WRITE)


class Passing(Criterion):
    """Circuits pass if the given function of the names of their nodes says so."""

    def __init__(self, model, config, names_pass):
        super().__init__(model, config)
        self.names_pass = names_pass

    def passes(self, circuit, data, n_others=None):
        return self.names_pass(circuit.node_names)

    passes_quickly = passes


def tiny_after_medium(names):
    """Whether the circuit reads and writes, and has the tiny channel as long as the medium one."""
    return {READ, LARGE, WRITE} <= set(names) and (TINY in names or MEDIUM not in names)


def loss_of(share):
    """The loss if the channels write this share of what the micro model writes."""
    written = share * WRITTEN
    logit_difference = 2 * W_U * written / math.sqrt((1 + written**2) / 4)
    return math.log1p(math.exp(-logit_difference))


def left_of_all(most_tests=None):
    """The names of the nodes that are left of all, and the number of tests."""
    model = wide_head_model(WEIGHTS)
    config = dataclasses.replace(CONFIG, removal_tests=most_tests)
    ranking, data = ranking_and_data(model, config)
    criterion = Passing(model, config, tiny_after_medium)
    kept = ranking.gates.of_nodes(circuit_of(ranking, *ALL).kept)
    with phase("removing nodes", False) as bar:
        refinement = Refinement(kept, ranking, criterion, data.train, data.selection, bar)
        refinement.remove_superfluous()
    return ranking.of_gates(refinement.kept).node_names, refinement.budget.n_tried


def test_a_node_is_tried_again_when_others_are_gone():
    """The tiny channel, which does least, is tried first, and can only be removed last."""
    names, _ = left_of_all()
    assert names == (READ, LARGE, WRITE)


def test_the_effect_of_a_node_is_that_of_holding_it():
    """Also under a subset that leaves all nodes, in which nothing seems to need the circuit."""
    model = wide_head_model(WEIGHTS)
    ranking, data = ranking_and_data(model, CONFIG)
    circuit = circuit_of(ranking, *ALL)
    all_nodes = {name: torch.ones_like(mask) for name, mask in circuit.kept.items()}
    kept = ranking.gates.of_nodes(circuit.kept)
    large = int(ranking.gates.index["blocks.0.attn.hook_v"][0, 0])
    for subsets in ([], [all_nodes]):
        effects = Effects(kept, ranking, Criterion(model, CONFIG, subsets), data)
        assert effects.loss == pytest.approx(loss_of(1.3), rel=1e-3)
        rise = effects.rises([large])[large]
        assert rise == pytest.approx(loss_of(0.7) - loss_of(1.3), rel=1e-3)
        assert effects.slopes[large] < 0


def test_the_effects_of_nodes_are_means_over_several_subsets():
    """The medium channel is outside. It is left in the second of the subsets, and not the first."""
    model = wide_head_model(WEIGHTS)
    ranking, data = ranking_and_data(model, CONFIG)
    circuit = circuit_of(ranking, READ, LARGE, WRITE)
    nothing = {name: torch.zeros_like(mask) for name, mask in circuit.kept.items()}
    medium = circuit_of(ranking, MEDIUM).kept
    kept = ranking.gates.of_nodes(circuit.kept)
    large = int(ranking.gates.index["blocks.0.attn.hook_v"][0, 0])
    effects = Effects(kept, ranking, Criterion(model, CONFIG, [nothing, medium]), data)
    loss = (loss_of(0.6) + loss_of(1.0)) / 2
    loss_without = (loss_of(0.0) + loss_of(0.4)) / 2
    assert effects.loss == pytest.approx(loss, rel=1e-3)
    assert effects.rises([large])[large] == pytest.approx(loss_without - loss, rel=1e-3)


@pytest.mark.parametrize("most", [0, 1])
def test_removal_ends_after_the_most_tests(most):
    names, n_tests = left_of_all(most)
    assert names == ALL
    assert n_tests == most


def test_nodes_that_an_exchange_makes_superfluous_are_removed():
    """With the medium channel in place of the last two, the small one is no longer needed."""
    last = "0.attn_v h0.4"
    written = {LARGE: 6, MEDIUM: 4, SMALL: 2, TINY: 1, last: 1}

    def writes_enough(names):
        total = sum(written.get(name, 0) for name in names)
        return {READ, WRITE} <= set(names) and total >= 10

    model = wide_head_model([*WEIGHTS, 0.1 * W_O])
    config = dataclasses.replace(CONFIG, exchanges=4)
    ranking, data = ranking_and_data(model, config)
    criterion = Passing(model, config, writes_enough)
    circuit = circuit_of(ranking, READ, LARGE, SMALL, TINY, last, WRITE)
    smaller = refined(circuit, ranking, criterion, data.train, data.selection)
    assert smaller.node_names == (READ, LARGE, MEDIUM, WRITE)
