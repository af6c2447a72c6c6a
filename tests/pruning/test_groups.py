"""Large circuits lose nodes in groups, led by gradients."""

import dataclasses

import pytest
import torch

from helpers import node_means
from micro import MICRO_TASK, NODES, QUICK_SETTINGS, W_O, micro_corpus, micro_model, wide_head_model
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
