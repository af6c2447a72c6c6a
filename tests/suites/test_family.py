"""The family of a model in which two value channels carry the answer, each of which is enough.

Its first circuit uses the stronger one, the next the other; then there is none.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from helpers import command_flags, must_not_run
from micro import QUICK_SETTINGS, W_O, micro_corpus, micro_model, save_micro, save_pairs
from tl_sparse.checkpoints.corpus_sample import CORPUS_SAMPLE
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, ConfigError, DataError, SuiteError
from tl_sparse.evaluation.kinship import Family
from tl_sparse.files import read_json, write_json, write_tensors
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.suites import family_jobs, family_results
from tl_sparse.suites.family import find_family
from tl_sparse.suites.family_results import family_table
from tl_sparse.view import plots

pytestmark = pytest.mark.any_line

#: The ranking by integrated gradients has the stronger path before the weaker one with any seed.
SETTINGS = QUICK_SETTINGS | {
    "target_loss": 0.01,
    "method": "integrated_gradients",
    "exchanges": 0,
}
CONFIG = PruneConfig(**SETTINGS)
STRONG = ["0.attn_in 0", "0.attn_v h0.0", "0.attn_out 2"]
WEAK = ["0.attn_in 0", "0.attn_v h0.1", "0.attn_out 2"]
CORE = ["0.attn_in 0", "0.attn_out 2"]


def two_path_model():
    """The micro model with a second, weaker value channel beside the first."""
    model = micro_model()
    with torch.no_grad():
        model.blocks[0].attn.W_V[0, 0, 1] = 1.0
        model.blocks[0].attn.W_O[0, 1, 2] = W_O
    return model


def make_place(folder):
    """A folder with the model, a file of the task, and a folder for the family."""
    model = folder / "two_paths"
    two_path_model().save_pretrained(model)
    write_tensors(model / CORPUS_SAMPLE, {"tokens": micro_corpus()})
    return str(model), save_pairs(folder / "micro.jsonl"), folder / "out"


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def counting(monkeypatch, stop_at=None):
    """The calls of `prune` and `find_circuit`, the real ones; one of them is interrupted."""
    calls = []

    def counted(search):
        def counts(model, task, corpus_or_means, config, *rest, **options):
            calls.append((config.seed, config.exclude))
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return search(model, task, corpus_or_means, config, *rest, **options)

        return counts

    for name in ("prune", "find_circuit"):
        monkeypatch.setattr(family_jobs, name, counted(getattr(family_jobs, name)))
    return calls


@dataclasses.dataclass
class Finished:
    """A family of two seeds that has run to its end."""

    model: str
    task: str
    out: Path
    calls: list[tuple[int, tuple[str, ...]]]
    family: Family


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    model, task, out = make_place(tmp_path_factory.mktemp("family"))
    with pytest.MonkeyPatch.context() as patched:
        calls = counting(patched)
        family = find_family(model, task, out, (0, 1), config=CONFIG)
    return Finished(model, task, out, calls, family)


def test_the_rounds_are_the_strong_path_the_weak_one_and_none(finished):
    rounds = finished.family.rounds
    assert [[search.nodes for search in each.found] for each in rounds] == [
        [STRONG, STRONG],
        [WEAK, WEAK],
        [],
    ]
    assert [each.newly_forbidden for each in rounds] == [[], [STRONG[1]], [WEAK[1]]]
    assert [each.forbidden for each in rounds] == [[], [STRONG[1]], [STRONG[1], WEAK[1]]]
    assert finished.family.ending == "exhausted"
    assert "no" in rounds[2].searches[0].problem


def test_the_core_is_what_both_paths_share(finished):
    family = finished.family
    assert family.core == CORE
    assert family.needed_later == [WEAK[1]]
    candidates = {each.node: each for each in family.core_candidates}
    assert candidates.keys() == set(STRONG)
    for node in CORE:
        assert candidates[node].loss_without.value == pytest.approx(math.log(2))
        assert candidates[node].problem
    dispensable = candidates[STRONG[1]]
    assert dispensable.loss_without.value < 0.01
    assert dispensable.problem is None


def test_a_node_without_which_the_model_does_the_task_is_not_searched(finished):
    """Two seeds in three rounds, and a search for each node of the core."""
    excluded = [exclude for _, exclude in finished.calls]
    assert len(excluded) == 2 * 3 + 2
    assert {exclude[0] for exclude in excluded if len(exclude) == 1} == {*CORE, STRONG[1]}
    assert excluded.count((STRONG[1],)) == 2  # the two searches of round 1


def test_figures_are_those_computed_by_hand(finished):
    family = finished.family
    assert [each.cost for each in family.rounds] == [1, 1, None]
    assert [each.overlap for each in family.rounds] == [1, 1, None]
    assert family.overlap_within == 1
    assert family.overlap_between == pytest.approx(2 / 4)
    expected = 3 * 3 / family.n_model_nodes
    assert family.overlap_by_chance == pytest.approx(expected / (6 - expected))
    assert family.occurrences == {CORE[0]: 4, CORE[1]: 4, STRONG[1]: 2, WEAK[1]: 2}


def test_the_two_paths_stand_in_for_each_other(finished):
    related = finished.family.relatedness
    (weak,) = related.relatives
    assert (related.first, weak.name) == ("round 0", "round 1")
    assert (weak.n_own_first, weak.n_own, weak.overlap) == (1, 1, 0.5)
    # Without one path the model is the circuit of the other.
    assert weak.without_first.value == pytest.approx(related.losses["round 1"].value)
    assert weak.without.value == pytest.approx(related.losses["round 0"].value)
    assert weak.without_both.value == pytest.approx(math.log(2))
    assert weak.union.value == pytest.approx(related.full_loss.value)
    assert related.no_nodes_loss.value == pytest.approx(math.log(2))
    # All prompts with the same answer have the same logits, so nothing is left to correlate.
    assert weak.agreement is None


def test_results_are_written_as_json_a_table_and_a_picture(finished):
    values = read_json(finished.out / "family.json")
    assert Family.from_dict(values) == finished.family
    table = (finished.out / "family.md").read_text()
    assert table == family_table(finished.family)
    assert "4 circuits in 2 rounds of 3, with the seeds 0, 1. Then nothing was left" in table
    assert "| 1 | 1 | 2 of 2 | 2, 2 | 3, 3 |" in table
    assert "## The core: 2 nodes of 3 that all circuits of round 0 have" in table
    assert "| 0.attn_v h0.0 | no |" in table
    picture = (finished.out / "family.svg").read_text()
    assert "no circuit with any seed" in picture


def test_what_is_there_is_not_searched_again(finished, monkeypatch):
    for module, name in (
        (family_jobs, "prune"),
        (family_jobs, "find_circuit"),
        (family_results, "relatedness"),
        (family_results, "backups"),
    ):
        monkeypatch.setattr(module, name, must_not_run(f"{name} is repeated"))
    again = find_family(finished.model, finished.task, finished.out, (0, 1), config=CONFIG)
    assert again == finished.family


@pytest.mark.parametrize("change", ["removed", "damaged", "of other circuits"])
def test_comparisons_are_measured_again_if_they_are_not_known(finished, tmp_path, change):
    out = shutil.copytree(finished.out, tmp_path / "out")
    path = out / "family.json"
    values = read_json(path)
    if change == "removed":
        path.unlink()
    elif change == "damaged":
        path.write_text("{")
    else:
        values["relatedness"] = None
        values["rounds"][1]["searches"] = values["rounds"][0]["searches"]
        write_json(path, values)
    again = find_family(finished.model, finished.task, out, (0, 1), config=CONFIG)
    assert again == finished.family


def test_a_core_whose_search_has_a_limit(place):
    """The rest of the model, more nodes than that, is no circuit; the weaker path alone is one."""
    model, task, out = place
    config = dataclasses.replace(CONFIG, max_nodes=3)
    family = find_family(model, task, out, 0, 1, config)
    candidates = {each.node: each for each in family.core_candidates}
    assert family.core == CORE
    assert candidates[STRONG[1]].n_nodes == 3
    assert candidates[STRONG[1]].problem is None
    assert "the 3 nodes that max_nodes allows" in candidates[CORE[0]].problem
    assert "| 0.attn_v h0.0 | no |" in (out / "family.md").read_text()


def names_of_all_nodes(out):
    circuit = Circuit.load(out / "rounds" / "0" / "0")
    kept = {name: torch.ones_like(mask) for name, mask in circuit.kept.items()}
    return dataclasses.replace(circuit, kept=kept).node_names


def test_settings_that_leave_no_node_are_refused(place, tmp_path, finished):
    model, task, out = place
    config = dataclasses.replace(CONFIG, exclude=names_of_all_nodes(finished.out))
    with pytest.raises(ConfigError, match="exclude names all 24 nodes of the model, so no circuit"):
        find_family(model, task, out, 0, config=config)


def test_a_family_that_forbids_all_nodes_that_are_left_is_exhausted(place, finished):
    """Any node is a circuit that is no better than chance, as long as it may be used."""
    model, task, out = place
    others = [name for name in names_of_all_nodes(finished.out) if name != STRONG[0]]
    config = dataclasses.replace(CONFIG, target_loss=1.0, exclude=tuple(others))
    with pytest.warns(UserWarning, match="not below chance"):
        family = find_family(model, task, out, 0, config=config)
    assert [len(each.found) for each in family.rounds] == [1, 0]
    assert "exclude names all 24 nodes of the model" in family.rounds[1].searches[0].problem
    assert (family.ending, family.core, family.needed_later) == ("exhausted", [], STRONG[:1])


def test_a_family_that_ran_out_of_rounds_goes_on(place, finished, monkeypatch):
    model, task, out = place
    family = find_family(model, task, out, [0], 1, CONFIG)
    assert (len(family.rounds), family.ending) == (1, "out of rounds")
    assert family.relatedness is None
    calls = counting(monkeypatch)
    assert find_family(model, task, out, [0], 3, CONFIG).ending == "exhausted"
    assert [exclude for _, exclude in calls] == [(STRONG[1],), (STRONG[1], WEAK[1])]


def test_an_interrupted_family_goes_on(place, monkeypatch, capsys):
    model, task, out = place
    calls = counting(monkeypatch, stop_at=2)
    command = ["family", model, task, "--out", str(out), "--seeds", "0,1", "--rounds", "1"]
    command += command_flags(SETTINGS)
    assert main(command) == 1
    assert "interrupted; finished work is kept" in capsys.readouterr().err
    assert len(list(out.glob("rounds/0/*/job.json"))) == 1
    assert not list(out.rglob(".*"))
    assert main(command) == 0
    assert len({seed for seed, _ in calls[:3]}) == 2  # the interrupted one again
    assert "2 circuits in 1 round of 1" in capsys.readouterr().out


def test_a_folder_of_other_settings_is_refused(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    other = dataclasses.replace(CONFIG, steps=31)
    with pytest.raises(SuiteError, match="was made with steps = 30, now 31"):
        find_family(finished.model, finished.task, out, (0, 1), config=other)
    with pytest.raises(SuiteError, match=r"was made with seeds = \[0, 1\], now \[0\]"):
        find_family(finished.model, finished.task, out, 0, config=CONFIG)
    task = save_pairs(tmp_path / "other.jsonl")
    with pytest.raises(SuiteError, match="was made with task = 'micro', now 'other'"):
        find_family(finished.model, task, out, (0, 1), config=CONFIG)
    model = save_micro(tmp_path / "another")
    with pytest.raises(SuiteError, match="was made with model = 'two_paths', now 'another'"):
        find_family(model, finished.task, out, (0, 1), config=CONFIG)
    model = save_micro(tmp_path / "two_paths")
    with pytest.raises(SuiteError, match="other contents of the model two_paths"):
        find_family(model, finished.task, out, (0, 1), config=CONFIG)


def test_a_damaged_job_is_named(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    path = out / "rounds" / "1" / "0" / "job.json"
    values = read_json(path)
    del values["search"]["nodes"]
    write_json(path, values)
    with pytest.raises(SuiteError, match=r"job\.json is damaged: 'search\.nodes' is missing"):
        find_family(finished.model, finished.task, out, (0, 1), config=CONFIG)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"job\.json"):
        find_family(finished.model, finished.task, out, (0, 1), config=CONFIG)


def test_a_task_that_the_model_does_not_solve_has_no_family(place, tmp_path):
    model, _, out = place
    task = save_pairs(tmp_path / "wrong.jsonl", (" no", " yes"))
    family = find_family(model, task, out, 0, config=CONFIG)
    assert (family.ending, family.n_circuits) == ("no circuit", 0)
    assert "full model's loss on wrong" in family.rounds[0].searches[0].problem
    assert "There is no circuit with any seed." in (out / "family.md").read_text()
    assert not (out / "family.svg").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] is not possible; it must be all different"),
        ({"max_rounds": 0}, "max_rounds = 0 is not possible; it must be at least 1"),
        ({"workers": 0}, "workers = 0"),
        ({"config": CONFIG.__dict__}, "config"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(change, message, place):
    model, task, out = place
    with pytest.raises(ConfigError, match=message):
        find_family(**{"model": model, "task": task, "out": out, "config": CONFIG, **change})
    assert not out.exists()


def test_a_folder_of_something_else_is_refused(place, tmp_path):
    model, task, _ = place
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"is not the folder of a family: it holds notes\.txt"):
        find_family(model, task, tmp_path / "else", config=CONFIG)


def test_included_nodes_are_never_forbidden(place):
    model, task, out = place
    config = dataclasses.replace(CONFIG, include=("0.attn_v.0",))
    family = find_family(model, task, out, 0, config=config)
    assert len(family.rounds) == 1
    assert family.ending == "exhausted"
    assert family.core == CORE


def test_the_plot_of_the_folder(finished, tmp_path, capsys):
    picture = tmp_path / "family.png"
    assert main(["plot", "family", str(finished.out), "-o", str(picture)]) == 0
    assert picture.exists()
    empty = dataclasses.replace(finished.family, rounds=[], occurrences={})
    with pytest.raises(DataError, match="there is nothing to draw"):
        plots.family(dataclasses.asdict(empty))
    with pytest.raises(DataError, match="is not what `tl-sparse family` writes"):
        plots.family(json.loads("{}"))
