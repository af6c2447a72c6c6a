"""Large circuits lose nodes in groups, led by gradients."""

import dataclasses

import pytest
import torch

from helpers import node_means
from micro import MICRO_TASK, NODES, QUICK_SETTINGS, W_O, micro_corpus, micro_model, wide_head_model
from pruning.test_exchanges import circuit_of
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.pruning import groups
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion, SearchData
from tl_sparse.pruning.elimination import Budget
from tl_sparse.pruning.fixed import FixedGates
from tl_sparse.pruning.means import corpus_means
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.slopes import slopes_at
from tl_sparse.pruning.splits import task_splits

pytestmark = pytest.mark.any_line
CONFIG = PruneConfig(**QUICK_SETTINGS)


class Search:
    """A search in a model of a few nodes, which has come to the removal of nodes."""

    def __init__(self, model, config=CONFIG):
        means = corpus_means(model, micro_corpus())
        of_nodes = node_means(model, micro_corpus())
        nothing = {
            name: torch.zeros_like(mean, dtype=torch.bool) for name, mean in of_nodes.items()
        }
        self.empty = Circuit(nothing, means, fingerprint(model), "micro", "micro")
        gates = NodeGates(of_nodes, init_bias=0.0, init_scale=0.0, seed=0)
        self.fixed = FixedGates.of_config(self.empty, gates, config)
        self.ranking = Ranking(self.empty, gates, self.fixed)
        self.criterion = Criterion(model, config)
        train, selection, _ = task_splits(model, MICRO_TASK, config)
        self.all = torch.ones_like(self.ranking.rank, dtype=torch.bool)
        full = self.ranking.of_gates(self.all)
        self.data = SearchData.around(full, self.criterion, train, selection)

    def left_by_groups(self, most_tests=None):
        """The names of the nodes that are left, and the number of tests."""
        budget = Budget(most_tests)
        with phase("removing nodes", False) as bar:
            kept = groups.without_groups(
                self.all, self.ranking, self.criterion, self.data, budget, bar
            )
        return self.ranking.of_gates(kept).node_names, budget.n_tried


def test_slopes_are_the_effects_to_first_order():
    """The loss is nearly linear in what the value channels write, and they write 3 : 1 : 0 : 0."""
    search = Search(wide_head_model([0.3 * W_O, 0.1 * W_O, 0.0, 0.0]))
    slopes = slopes_at(search.all, search.ranking, search.criterion, search.data.train)
    values = slopes[search.ranking.gates.index["blocks.0.attn.hook_v"]][0]
    assert values[0] < 0  # with the node, the loss is lower
    torch.testing.assert_close(values[1] / values[0], torch.tensor(1 / 3), rtol=1e-3, atol=0)
    assert values[2:].tolist() == [0, 0]


def test_groups_leave_what_the_task_needs(monkeypatch):
    monkeypatch.setattr(groups, "SMALL", 3)
    left, n_tests = Search(micro_model()).left_by_groups()
    assert list(left) == NODES
    assert n_tests < 21  # fewer than one for each node


USELESS = ("0.mlp_neuron 0", "0.mlp_neuron 1", "0.mlp_in 0", "0.mlp_out 0", "0.mlp_out 1")


def left_under_subsets(model, names, subsets, target_loss):
    """The names of the nodes that groups leave of a circuit which must withstand subsets.

    Args:
        subsets: the names of the nodes of each.
    """
    config = PruneConfig(**(QUICK_SETTINGS | {"target_loss": target_loss}), subsets=2)
    search = Search(model, config)
    circuit = circuit_of(search.ranking, *names)
    masks = [circuit_of(search.ranking, *subset).kept for subset in subsets]
    search.criterion = Criterion(model, config, masks)
    search.data = SearchData.around(
        circuit, search.criterion, search.data.train, search.data.selection
    )
    search.all = search.ranking.gates.of_nodes(circuit.kept)
    assert search.criterion.passes(circuit, search.data.selection)
    left, _ = search.left_by_groups()
    return left


def test_a_mild_subset_does_not_decide_how_much_the_loss_may_rise(monkeypatch):
    """Under the subset that is met first, the loss is far below that of the circuit alone."""
    monkeypatch.setattr(groups, "SMALL", 0)
    model = wide_head_model([0.3 * W_O, W_O])
    needed = (NODES[0], "0.attn_v h0.0", NODES[2])
    alone = Search(model)
    held = alone.criterion.loss(circuit_of(alone.ranking, *needed), alone.data.selection)
    mild = ("0.attn_v h0.1",)
    left = left_under_subsets(model, (*needed, *USELESS), [mild], target_loss=1.05 * held)
    assert sorted(left) == sorted(needed)


def test_a_node_that_matters_only_under_one_subset_is_not_the_first_to_go(monkeypatch):
    """What 3 is written to only makes up for the second value channel, where that is left.

    While it is held, the node has no slope at all, and the useless ones have a small one.
    """
    monkeypatch.setattr(groups, "SMALL", 0)
    model = wide_head_model([W_O, -2 * W_O])
    with torch.no_grad():
        model.blocks[0].attn.W_O[0, 1, 3] = 2 * W_O
        model.unembed.W_U[3] = model.unembed.W_U[2]
        model.blocks[0].mlp.W_in[1] = torch.tensor([1.0, 0.5])
        model.blocks[0].mlp.W_in[2, 1] = 1.0
        model.blocks[0].mlp.W_out[:, 2] = 1e-3
    needed = (*NODES, "0.attn_out 3")
    useless = ("0.mlp_in 1", "0.mlp_neuron 0", "0.mlp_neuron 1", "0.mlp_out 2", "0.mlp_in 2")
    subsets = [("0.attn_q h0.0",), ("0.attn_v h0.1",)]
    left = left_under_subsets(model, (*needed, *useless), subsets, target_loss=0.05)
    assert sorted(left) == sorted(needed)


def test_small_circuits_are_left_to_tests_of_single_nodes():
    search = Search(micro_model())
    left, n_tests = search.left_by_groups()
    assert len(left) == len(search.all)
    assert n_tests == 0


@pytest.mark.parametrize("most", [0, 2])
def test_groups_end_after_the_most_tests(monkeypatch, most):
    monkeypatch.setattr(groups, "SMALL", 3)
    left, n_tests = Search(micro_model()).left_by_groups(most)
    assert n_tests == most
    assert len(left) > 3


def test_nodes_that_are_always_used_stay(monkeypatch):
    monkeypatch.setattr(groups, "SMALL", 3)
    config = dataclasses.replace(CONFIG, include=("0.mlp_out 1",))
    left, _ = Search(micro_model(), config).left_by_groups()
    assert sorted(left) == sorted([*NODES, "0.mlp_out 1"])
