"""Searches that try no circuit above a limit."""

import dataclasses

import pytest

from micro import MICRO_TASK, NODES, QUICK_SETTINGS, micro_corpus
from tl_sparse.errors import ConfigError, PruneError
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.pruner import prune
from tl_sparse.pruning.ranking import Ranking

CONFIG = PruneConfig(**QUICK_SETTINGS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"include": (NODES[0],)},
        {"method": "any_size", "steps": 60},
        {"method": "integrated_gradients"},
        {"robust": "subsets", "subsets": 4},
        {"robust": "adversary", "adversary_steps": 5, "adversaries": 1},
    ],
    ids=str,
)
def test_a_circuit_of_as_many_nodes_as_the_limit_is_found(micro, changes):
    config = dataclasses.replace(CONFIG, max_nodes=3, **changes)
    circuit, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert [str(node) for node in circuit.nodes] == NODES
    assert circuit.measured["config"]["max_nodes"] == 3


@pytest.mark.parametrize("changes", [{}, {"exclude": ("0.mlp_out 1",)}, {"restarts": 2}], ids=str)
def test_no_size_above_the_limit_is_tried(micro, monkeypatch, changes):
    sizes = []
    circuit_of_size = Ranking.circuit

    def recorded(ranking, size, *removed):
        sizes.append(size)
        return circuit_of_size(ranking, size, *removed)

    monkeypatch.setattr(Ranking, "circuit", recorded)
    config = dataclasses.replace(CONFIG, max_nodes=2, **changes)
    with pytest.raises(PruneError, match="up to the 2 nodes that max_nodes allows: with these, "):
        prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert max(sizes) == 2


def test_a_limit_that_all_nodes_are_within_changes_nothing(micro):
    config = dataclasses.replace(CONFIG, max_nodes=1000)
    circuit, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert [str(node) for node in circuit.nodes] == NODES


def test_the_limit_has_room_for_the_nodes_that_are_included():
    with pytest.raises(ConfigError, match=r"max_nodes = 1 .* at least 2, the number of nodes that"):
        PruneConfig(max_nodes=1, include=NODES[:2])
    assert PruneConfig(max_nodes=2, include=NODES[:2]).max_nodes == 2
