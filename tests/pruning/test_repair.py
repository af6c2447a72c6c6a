"""A robust circuit is at last tried under fresh subsets, and mended where it fails."""

import dataclasses

import pytest
import torch

from micro import QUICK_SETTINGS, cancelling_model
from pruning.test_exchanges import READ, WRITE, circuit_of, ranking_and_data
from tl_sparse.errors import ConfigError
from tl_sparse.evaluation.subsets import random_subsets
from tl_sparse.pruning import adversaries, sizes
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.edges import CutEdges, without_superfluous_edges
from tl_sparse.pruning.repair import OuterNodes, repaired
from tl_sparse.pruning.seeds import seed_of_attack, seed_of_batch, seed_of_opponent

pytestmark = pytest.mark.any_line

CONFIG = PruneConfig(**QUICK_SETTINGS, robust="subsets", fresh_subsets=16)
#: Two of three value channels, of the weights 1, 3 and -3.
FIRST, SECOND = "0.attn_v h0.0", "0.attn_v h0.1"
#: It is right while all else is held, and knows nothing when the third of these channels is left.
CHEAT = (READ, SECOND, WRITE)


def names_after_repair(config, passes=True):
    """The names of the nodes of the cheat after its repair.

    Args:
        passes: whether circuits pass the criterion.
    """
    model = cancelling_model()
    ranking, data = ranking_and_data(model, config)
    criterion = Criterion(model, config)
    criterion.passes = lambda *arguments, **settings: passes
    circuit = circuit_of(ranking, *CHEAT)
    return mended(circuit, ranking, criterion, data).node_names


def mended(circuit, ranking, criterion, data):
    nodes = OuterNodes(circuit, ranking, criterion, data.train)
    return repaired(nodes, criterion, data.selection)


def test_the_node_is_added_that_a_fresh_subset_shows_to_be_missing():
    assert names_after_repair(CONFIG) == (READ, FIRST, SECOND, WRITE)


@pytest.mark.parametrize("settings", [{"robust": "none"}, {"fresh_subsets": 0}])
def test_without_fresh_subsets_nothing_is_added(settings):
    assert names_after_repair(dataclasses.replace(CONFIG, **settings)) == CHEAT


def test_the_circuit_is_kept_if_the_larger_one_does_not_pass():
    assert names_after_repair(CONFIG, passes=False) == CHEAT


def test_each_round_also_tries_the_subsets_of_the_search():
    """Under one of which an added node may do harm; here, one makes the cheat fail."""
    model = cancelling_model()
    ranking, data = ranking_and_data(model, CONFIG)
    circuit = circuit_of(ranking, *CHEAT)
    criterion = Criterion(model, CONFIG, [third_channel(circuit)])
    criterion.fresh_subsets = lambda circuit, i: []
    assert mended(circuit, ranking, criterion, data).node_names == (READ, FIRST, SECOND, WRITE)


def test_subsets_that_left_the_criterion_are_tried_at_last():
    """Otherwise `prune_edges`, which begins with all of them, could refuse the circuit."""
    model = cancelling_model()
    config = dataclasses.replace(CONFIG, subsets=1, fresh_subsets=0)
    ranking, data = ranking_and_data(model, config)
    circuit = circuit_of(ranking, *CHEAT)
    harmless = {name: torch.zeros_like(mask) for name, mask in circuit.kept.items()}
    criterion = Criterion(model, config, [third_channel(circuit)])
    criterion._join(harmless)
    assert criterion.passes(circuit, data.selection, n_others=0)
    after = mended(circuit, ranking, criterion, data)
    assert after.node_names == (READ, FIRST, SECOND, WRITE)
    fresh = Criterion(model, config, [third_channel(circuit)])
    assert fresh.passes(after, data.selection, n_others=0)


def test_a_repair_adds_no_excluded_node():
    model = cancelling_model()
    ranking, data = ranking_and_data(model, CONFIG)
    first = int(ranking.gates.index["blocks.0.attn.hook_v"][0, 0])
    ranking.fixed.excluded[first] = True
    circuit = circuit_of(ranking, *CHEAT)
    criterion = Criterion(model, CONFIG)
    after = mended(circuit, ranking, criterion, data)
    assert FIRST not in after.node_names


def test_a_repair_adds_no_more_nodes_than_the_search_allows():
    model = cancelling_model()
    ranking, data = ranking_and_data(model, CONFIG)
    ranking.largest = len(CHEAT)
    circuit = circuit_of(ranking, *CHEAT)
    criterion = Criterion(model, CONFIG)
    after = mended(circuit, ranking, criterion, data)
    assert after.node_names == CHEAT


class Useless:
    """Additions that never lower the loss; see `Additions`."""

    def __init__(self, circuit):
        self.circuit = circuit
        self.n_added = 0

    def candidates(self, subset):
        return [1]

    def circuit_with(self, part):
        return self.circuit

    def add(self, part):
        self.n_added += 1


def test_parts_that_do_not_help_are_not_added_without_end():
    model = cancelling_model()
    ranking, data = ranking_and_data(model, CONFIG)
    circuit = circuit_of(ranking, *CHEAT)
    useless = Useless(circuit)
    criterion = Criterion(model, CONFIG)
    criterion.fresh_subsets = lambda circuit, i: [third_channel(circuit)] if i == 0 else []
    repaired(useless, criterion, data.selection)
    # Three in the first round, and three in each of the five others, in which it is tried again.
    assert useless.n_added == 3 * 6


def third_channel(circuit):
    """The subset under which the cheat knows nothing."""
    subset = {name: torch.zeros_like(mask) for name, mask in circuit.kept.items()}
    subset["blocks.0.attn.hook_v"][0, 2] = True
    return subset


def test_edges_are_put_back_that_a_fresh_subset_shows_to_be_missing():
    """Without the two edges of the first channel, the circuit is the cheat."""
    model = cancelling_model()
    ranking, data = ranking_and_data(model, CONFIG)
    circuit = circuit_of(ranking, READ, FIRST, SECOND, WRITE)
    criterion = Criterion(model, CONFIG)
    cuts = CutEdges(circuit, criterion)
    of_first = [edge for edge in cuts.edges if FIRST in (str(edge.source), str(edge.target))]
    cuts.cut(of_first)
    assert cuts.circuit.node_names == CHEAT
    after = repaired(cuts, criterion, data.selection)
    assert after.node_names == (READ, FIRST, SECOND, WRITE)
    assert cuts.n_added == 2


def test_subsets_of_a_search_are_neither_fresh_nor_those_that_judge():
    """Random subsets of one seed are nested, so no two of the three may have the same."""
    model = cancelling_model()
    ranking, _ = ranking_and_data(model, CONFIG)
    criterion = Criterion.of_config(ranking.empty, model, CONFIG)
    judging = random_subsets(ranking.empty, CONFIG.subsets, CONFIG.seed)
    fresh = criterion.fresh_subsets(ranking.empty, 0)
    assert len(fresh) == 16
    drawn = [bits_of(subsets[8]) for subsets in (criterion.subsets, fresh, judging)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(drawn[i], drawn[j])


def bits_of(subset):
    return torch.cat([mask.flatten() for mask in subset.values()])


def test_adversaries_do_not_start_where_gates_or_others_did():
    seeds = [seed_of_opponent(0), *(seed_of_attack(0, attack) for attack in range(6))]
    batches = [seed_of_batch(0, batch) for batch in range(40)]
    assert len({0, *seeds, *batches}) == 1 + len(seeds) + len(batches)
    assert min(*seeds, *batches) > 1000  # the seeds with which circuits are judged


def test_adversaries_also_attack_the_circuit_whose_edges_are_cut(monkeypatch):
    """The cheat passes without random subsets; an adversary leaves the third channel."""
    model = cancelling_model()
    config = dataclasses.replace(CONFIG, robust="adversary", subsets=1, fresh_subsets=0)
    ranking, data = ranking_and_data(model, dataclasses.replace(config, robust="none"))
    circuit = circuit_of(ranking, READ, FIRST, SECOND, WRITE)
    attacks = []

    def attack(circuit, *arguments, seed, **settings):
        attacks.append(seed)
        return third_channel(circuit)

    monkeypatch.setattr(adversaries, "learned_subset", attack)
    criterion = Criterion(model, config)
    criterion._others = iter([])
    after = without_superfluous_edges(circuit, criterion, data.train, data.selection, False)
    assert after.node_names == (READ, FIRST, SECOND, WRITE)
    assert attacks == [seed_of_attack(config.seed, attack) for attack in (3, 4, 5)]
    assert len(criterion.required) == 1


def test_a_negative_number_of_fresh_subsets_is_refused():
    with pytest.raises(ConfigError, match=r"fresh_subsets = -1 is not possible.*at least 0"):
        PruneConfig(fresh_subsets=-1)


@pytest.mark.parametrize(("large", "n_repairs"), [(3, 2), (6, 1)])
def test_a_large_circuit_is_made_smaller_again_once_it_is_mended(monkeypatch, large, n_repairs):
    """The first repair adds two useless nodes; small circuits keep what they were given."""
    model = cancelling_model()
    config = dataclasses.replace(CONFIG, subsets=4)
    found = []
    real = sizes.repaired

    def generous(additions, *arguments, **options):
        circuit = real(additions, *arguments, **options)
        if not found:
            circuit = circuit | circuit_of(ranking, "0.mlp_neuron 0", "0.mlp_neuron 1")
        found.append(circuit.node_names)
        return circuit

    ranking, data = ranking_and_data(model, dataclasses.replace(config, robust="none"))
    monkeypatch.setattr(sizes, "repaired", generous)
    monkeypatch.setattr(sizes, "_LARGE", large)
    monkeypatch.setattr(sizes, "MOST_REPAIRS", 2)
    criterion = Criterion.of_config(ranking.empty, model, config)
    circuit = circuit_of(ranking, READ, FIRST, SECOND, WRITE)
    after = sizes._mended(circuit, ranking, criterion, data.train, data.selection, False)
    assert len(found) == n_repairs
    assert len(found[0]) == 6
    assert after.node_names == found[-1]
    if n_repairs == 2:
        assert after.node_names == (READ, FIRST, SECOND, WRITE)


def test_a_search_that_begins_again_meets_the_subsets_at_first_and_those_required():
    model = cancelling_model()
    ranking, _ = ranking_and_data(model, CONFIG)
    empty = ranking.empty
    drawn = [dict(empty.kept), dict(empty.kept)]
    joined, required = dict(empty.kept), dict(empty.kept)
    criterion = Criterion(model, dataclasses.replace(CONFIG, subsets=1), drawn)
    criterion.add(required)
    criterion._join(joined)
    assert list(map(id, criterion.subsets)) == list(map(id, [joined, required, drawn[0]]))
    criterion.begin_again()
    assert list(map(id, criterion.subsets)) == list(map(id, [required, *drawn]))
