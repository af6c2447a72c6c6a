"""At the end of a search, nodes outside the circuit take the place of two of its own."""

import dataclasses

import pytest
import torch

from micro import MICRO_TASK, QUICK_SETTINGS, W_O, micro_corpus, micro_model, wide_head_model
from tl_sparse.hooks.gates import NodeGates
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion, SearchData, evenly
from tl_sparse.pruning.exchanges import exchanged
from tl_sparse.pruning.fixed import FixedGates
from tl_sparse.pruning.phases import phase
from tl_sparse.pruning.pruner import prune
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.pruning.splits import task_splits

pytestmark = pytest.mark.any_line

#: The second channel writes as much as the last two together.
WEIGHTS = [0.6 * W_O, 0.4 * W_O, 0.2 * W_O, 0.2 * W_O]
#: Enough for a circuit that writes as much as 0.8 · W_O, which has a loss of 5.5e-4.
CONFIG = PruneConfig(**(QUICK_SETTINGS | {"target_loss": 7e-4}))
READ, WRITE = "0.attn_in 0", "0.attn_out 2"
LARGE, MEDIUM, SMALL, TINY = (f"0.attn_v h0.{channel}" for channel in range(4))


def ranking_and_data(model, config):
    empty, _ = prune(model, MICRO_TASK, micro_corpus(), config, progress=False)
    gates = NodeGates(
        {name: empty.means[name] for name in empty.kept}, init_bias=0.0, init_scale=0.0, seed=0
    )
    ranking = Ranking(empty, gates, FixedGates.of_config(empty, gates, config))
    train, selection, _ = task_splits(model, MICRO_TASK, config)
    return ranking, SearchData(train, selection, selection)


def circuit_of(ranking, *names):
    empty = dataclasses.replace(
        ranking.empty, kept={n: torch.zeros_like(m) for n, m in ranking.empty.kept.items()}
    )
    hooks = empty.hooks
    for name in names:
        node = empty.node(name)
        empty.kept[hooks[node.layer, node.location]].view(-1)[node.index] = True
    return empty


def exchanged_nodes(circuit, ranking, criterion, data):
    """The names of the circuit's nodes after exchanges."""
    kept = ranking.gates.of_nodes(circuit.kept)
    with phase("removing nodes", False) as bar:
        smaller = exchanged(kept, ranking, criterion, data, bar)
    return ranking.of_gates(smaller).node_names


def test_one_node_takes_the_place_of_two():
    model = wide_head_model(WEIGHTS)
    ranking, data = ranking_and_data(model, CONFIG)
    three = circuit_of(ranking, READ, LARGE, SMALL, TINY, WRITE)
    criterion = Criterion(model, CONFIG)
    assert exchanged_nodes(three, ranking, criterion, data) == (READ, LARGE, MEDIUM, WRITE)


@pytest.mark.parametrize("settings", [{"include": (SMALL, LARGE)}, {"exclude": (MEDIUM,)}])
def test_nodes_that_are_always_or_never_used_are_not_exchanged(settings):
    model = wide_head_model(WEIGHTS)
    config = dataclasses.replace(CONFIG, **settings)
    ranking, data = ranking_and_data(model, config)
    three = circuit_of(ranking, READ, LARGE, SMALL, TINY, WRITE)
    criterion = Criterion(model, config)
    assert exchanged_nodes(three, ranking, criterion, data) == three.node_names


def test_a_few_pairs_are_spread_evenly():
    _, selection, _ = task_splits(micro_model(), MICRO_TASK, CONFIG)
    assert evenly(selection, 4).prompts[::2] == selection.prompts[::4]
    assert evenly(selection, 100).n_pairs == selection.n_pairs
