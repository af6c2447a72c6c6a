"""The pairs of a task: how they are split, kept with a circuit, and used again."""

import dataclasses
import json
import random
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micro import (
    MICRO_TASK,
    QUICK_SETTINGS,
    micro_circuit,
    micro_corpus,
    micro_model,
    save_micro,
    save_pairs,
)
from tl_sparse.circuits import Circuit, circuit_task
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, CircuitError, ConfigError, TaskError
from tl_sparse.pruning import PruneConfig, heldout_pairs, prune, prune_edges, task_splits
from tl_sparse.pruning.splits import split_pairs
from tl_sparse.tasks import PARTS, TASKS, Pair, Task

QUICK = PruneConfig(**QUICK_SETTINGS)
#: All numbers of pairs are the defaults.
DEFAULT_NUMBERS = PruneConfig(target_loss=QUICK.target_loss, steps=QUICK.steps)


def pairs_of(n_pairs):
    """Pairs of the micro task, each with other fillers."""
    rng = random.Random(0)
    drawn = {}  # as keys: each pair once, in their order
    while len(drawn) < n_pairs:
        drawn[MICRO_TASK.pair(rng)] = None
    return list(drawn)


def task_of(n_pairs):
    pairs = pairs_of(n_pairs)
    return dataclasses.replace(MICRO_TASK, name="own", sample=lambda rng: rng.choice(pairs).prompts)


def numbers(split):
    return tuple(len(split.part(part)) for part in PARTS)


# --- numbers


@pytest.mark.parametrize(
    ("n_pairs", "expected"), [(40, (28, 6, 6)), (12, (8, 2, 2)), (600, (400, 100, 100))]
)
def test_a_task_with_fewer_pairs_than_the_defaults_is_divided_in_proportion(n_pairs, expected):
    train, select, judge = expected
    message = (
        f"^task own has {n_pairs} pairs: {train} train the gates, {select} select the size, "
        f"{judge} judge the circuit$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        assert numbers(split_pairs(task_of(n_pairs), PruneConfig())) == expected
    assert len(caught) == 1


def test_numbers_that_were_chosen_are_kept_and_the_others_divide_the_rest():
    with pytest.warns(UserWarning, match="20 train the gates, 10 select the size, 10 judge"):
        assert numbers(split_pairs(task_of(40), PruneConfig(train_pairs=20))) == (20, 10, 10)


@settings(max_examples=10, deadline=None)
@given(st.integers(12, 60), st.integers(0, 5))
def test_any_split_covers_all_pairs_is_disjoint_and_leaves_no_part_empty(n_pairs, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split = split_pairs(task_of(n_pairs), PruneConfig(seed=seed))
    parts = [set(split.part(part)) for part in PARTS]
    assert set.union(*parts) == set(pairs_of(n_pairs))
    assert sum(map(len, parts)) == n_pairs
    assert min(map(len, parts)) >= 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4))
def test_numbers_that_were_chosen_are_exactly_those_of_the_split(train, select, judge, further):
    config = PruneConfig(train_pairs=train, selection_pairs=select, heldout_pairs=judge)
    split = split_pairs(task_of(train + select + judge + further), config)
    assert numbers(split) == (train, select, judge)
    assert len({pair for part in PARTS for pair in split.part(part)}) == train + select + judge


@pytest.mark.parametrize(
    ("n_pairs", "changes", "kind", "message"),
    [
        (
            7,
            {},
            TaskError,
            "task own has 7 pairs of distinct prompts; at least 12 are needed, to train the gates, "
            "to select the size and to judge the circuit",
        ),
        (1, {}, TaskError, "task own has 1 pair of distinct prompts; at least 12 are needed"),
        (
            40,
            {"heldout_pairs": 35},
            ConfigError,
            "heldout_pairs = 35 (--heldout-pairs) is not possible: task own has 40 pairs of "
            "distinct prompts, and train_pairs and selection_pairs need at least 10 of them",
        ),
        (
            40,
            {"train_pairs": 39, "selection_pairs": 10},
            ConfigError,
            "train_pairs = 39 (--train-pairs) and selection_pairs = 10 (--selection-pairs) are not "
            "possible: task own has 40 pairs of distinct prompts, and heldout_pairs need at least "
            "2 of them",
        ),
    ],
)
def test_too_few_pairs_are_one_error_that_says_what_there_is(n_pairs, changes, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        split_pairs(task_of(n_pairs), PruneConfig(**changes))


def test_built_in_tasks_draw_what_they_always_drew():
    """Of three seeds: bundled circuits and published figures depend on them."""
    config = PruneConfig(seed=2, train_pairs=4, selection_pairs=3, heldout_pairs=2)
    task = TASKS["single_double_quote"]
    split = split_pairs(task, config)
    used = set()
    for part, number in (("selection", 6), ("heldout", 7), ("training", 8)):
        rng = random.Random(number)
        expected = []
        while len(expected) < len(split.part(part)):
            pair = task.pair(rng)
            if used.isdisjoint(pair.prompts):
                used.update(pair.prompts)
                expected.append(pair)
        assert list(split.part(part)) == expected


def test_a_task_that_is_split_stays_so(micro):
    with pytest.warns(UserWarning, match="task own has 40 pairs"):
        split = split_pairs(task_of(40), PruneConfig())
    again = Task.from_pairs(split)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split_pairs(again, PruneConfig(seed=3)) == split
        training, selection, heldout = task_splits(micro, again, PruneConfig())
    assert heldout.prompts[:2] == split.heldout[0].prompts
    assert (training.n_pairs, selection.n_pairs, heldout.n_pairs) == (28, 6, 6)
    fewer = split_pairs(again, PruneConfig(heldout_pairs=4))
    assert fewer == dataclasses.replace(split, heldout=split.heldout[:4])
    message = "heldout_pairs = 7 (--heldout-pairs) is not possible: task own has 6 pairs with the "
    with pytest.raises(ConfigError, match=re.escape(message)):
        split_pairs(again, PruneConfig(heldout_pairs=7))


# --- answers


def test_a_shortened_answer_is_warned_of_once_per_task(micro, monkeypatch):
    task = dataclasses.replace(task_of(40), candidates=(" yes", " no no"))
    config = PruneConfig(train_pairs=8, selection_pairs=8, heldout_pairs=8)
    message = "^task own: ' no no' is not one token .*; its beginning ' no ' stands for it$"
    with pytest.warns(UserWarning, match=message) as caught:
        task_splits(micro, task, config)
    assert len(caught) == 1
    monkeypatch.setitem(TASKS, "own", task)  # the answers of built-in tasks are meant to be
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, heldout = task_splits(micro, task, config)
    assert heldout.shortened == {" no no": " no "}


# --- with a circuit


@pytest.fixture(scope="module")
def found():
    """A circuit of an own task of 40 pairs, with its evaluation."""
    with pytest.warns(UserWarning, match="task own has 40 pairs"):
        return prune(micro_model(), task_of(40), micro_corpus(), DEFAULT_NUMBERS, progress=False)


def test_a_circuit_of_an_own_task_keeps_its_pairs_in_its_folder(found, micro, tmp_path):
    circuit, evaluation = found
    assert numbers(circuit.pairs) == (28, 6, 6)
    assert (circuit.pairs.name, circuit.pairs.candidates) == ("own", (" yes", " no"))
    circuit.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["circuit.json", "circuit.safetensors", "pairs.jsonl"]
    loaded = Circuit.load(tmp_path)
    assert loaded.pairs == circuit.pairs
    data = heldout_pairs(loaded, micro)
    assert data.n_pairs == evaluation.n_pairs == 6
    assert data.prompts[::2] == tuple(pair.first_prompt for pair in circuit.pairs.heldout)
    loaded.save(tmp_path)  # the same again
    dataclasses.replace(loaded, pairs=None).save(tmp_path, overwrite=True)
    assert not (tmp_path / "pairs.jsonl").exists()
    assert Circuit.load(tmp_path).pairs is None


def test_a_circuit_of_a_built_in_task_keeps_none(micro, monkeypatch):
    monkeypatch.setitem(TASKS, "micro", MICRO_TASK)
    circuit, evaluation = prune(micro, "micro", micro_corpus(), QUICK, progress=False)
    assert circuit.pairs is None
    _, _, heldout = task_splits(micro, MICRO_TASK, QUICK)
    assert heldout_pairs(circuit, micro).prompts == heldout.prompts
    assert prune_edges(circuit, micro, config=QUICK, progress=False)[0].pairs is None
    assert evaluation.n_pairs == 8


def test_other_pairs_are_none_that_the_search_used(found, micro):
    circuit, _ = found
    searched = circuit.pairs.searched_prompts
    for task in (None, "own", task_of(40)):
        data = heldout_pairs(circuit, micro, task, n_pairs=4, seed=1)
        assert data.n_pairs == 4
        assert searched.isdisjoint(data.prompts)
    again = heldout_pairs(circuit, micro, task_of(40))
    assert set(again.prompts) == set(heldout_pairs(circuit, micro).prompts)
    larger = heldout_pairs(circuit, micro, task_of(60), seed=0)
    assert larger.n_pairs == 60 - 34
    assert searched.isdisjoint(larger.prompts)
    message = (
        "n_pairs (--pairs) is 7, and must be at most 6: of task own the circuit keeps only the "
        "pairs with which it was made, 34 pairs that found it and 6 pairs to judge it; give others "
        "with --task FILE"
    )
    with pytest.raises(TaskError, match=re.escape(message)):
        heldout_pairs(circuit, micro, n_pairs=7)
    with pytest.raises(TaskError, match=r"n_pairs \(--pairs\) is 0; it must be at least 1"):
        heldout_pairs(circuit, micro, n_pairs=0)


def test_a_circuit_that_records_no_settings_is_judged_on_new_pairs(micro):
    circuit = micro_circuit(micro)
    data = heldout_pairs(circuit, micro, task_of(40))
    assert data.n_pairs == 40
    assert heldout_pairs(circuit, micro, task_of(40), n_pairs=5, seed=1).n_pairs == 5


def test_a_task_that_is_not_known_is_asked_for(micro):
    message = (
        "the circuit has no pairs, and the task 'micro' of this circuit is not built in; give it "
        "as the argument task, or as --task with a file of pairs, *.jsonl"
    )
    with pytest.raises(CircuitError, match=re.escape(message)):
        heldout_pairs(micro_circuit(micro), micro)
    with pytest.raises(CircuitError, match=r"has no pairs, and its task is not built in; give it"):
        circuit_task(dataclasses.replace(micro_circuit(micro), task=""))
    assert circuit_task(micro_circuit(micro), MICRO_TASK) is MICRO_TASK


def test_edges_are_pruned_with_the_same_pairs(found, micro):
    circuit, _ = found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smaller, evaluation = prune_edges(circuit, micro, config=DEFAULT_NUMBERS, progress=False)
    assert smaller.pairs == circuit.pairs
    assert evaluation.n_pairs == 6


def test_circuits_made_from_others_keep_pairs_of_the_same_split(found, micro):
    circuit, _ = found
    pairs = circuit.pairs
    assert circuit.restricted({0}).pairs == pairs
    assert circuit.of_size(2).pairs == pairs
    assert circuit.without(circuit.nodes[:1], micro).pairs == pairs
    assert circuit.with_means(dict(circuit.means)).pairs == pairs
    assert (circuit | circuit.of_size(2)).pairs == pairs
    other = dataclasses.replace(pairs, heldout=pairs.training, training=pairs.heldout)
    for combined in (
        circuit & dataclasses.replace(circuit, pairs=other),
        circuit - dataclasses.replace(circuit, pairs=None),
    ):
        assert combined.pairs is None


# --- files


def test_circuits_without_an_entry_for_pairs_are_read(micro, tmp_path):
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.json"
    values = json.loads(path.read_text())
    del values["pairs"], values["tl_sparse_checksum"]
    path.write_text(json.dumps(values))
    assert Circuit.load(tmp_path).pairs is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"pairs\.jsonl is missing; it was saved together with"),
        (lambda path: path.write_text(path.read_text()[:-9]), r"pairs\.jsonl does not belong to"),
    ],
)
def test_damaged_pairs_are_noticed(found, tmp_path, damage, message):
    found[0].save(tmp_path)
    damage(tmp_path / "pairs.jsonl")
    with pytest.raises(CheckpointError, match=message):
        Circuit.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line", "message"),
    [
        ({"candidates": [1]}, "", "circuit.json: malformed entry 'pairs': not enough values"),
        ({"candidates": 3}, "", "circuit.json: malformed entry 'pairs': "),
        ({}, "{}\n", r"pairs.jsonl, line 41 must be {"),
    ],
)
def test_damaged_pairs_without_checksums_are_named(found, tmp_path, changes, line, message):
    found[0].save(tmp_path)
    path = tmp_path / "circuit.json"
    values = json.loads(path.read_text())
    del values["tl_sparse_checksum"], values["files"]["pairs.jsonl"]
    values["pairs"] |= changes
    path.write_text(json.dumps(values))
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Circuit.load(tmp_path)


def test_a_file_of_the_users_own_is_not_replaced(found, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"pairs\.jsonl exists already, and does not belong to a"):
        found[0].save(tmp_path)
    assert (tmp_path / "pairs.jsonl").read_text() == "mine"
    assert not (tmp_path / "circuit.json").exists()
    found[0].save(tmp_path, overwrite=True)
    assert Circuit.load(tmp_path).pairs == found[0].pairs


def test_pairs_that_are_none_are_refused(micro):
    with pytest.raises(CircuitError, match="pairs must be a TaskPairs or None"):
        dataclasses.replace(micro_circuit(micro), pairs=[Pair("a", "b", "c", "d")])


# --- from the command line


def test_every_command_takes_a_circuit_of_an_own_task_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = save_micro(tmp_path / "model")
    save_pairs(tmp_path / "own.jsonl", n_pairs=40)
    flags = ["--steps=30", f"--target-loss={QUICK.target_loss}"]
    with pytest.warns(UserWarning, match="task own has 40 pairs: 28 train the gates") as caught:
        assert main(["prune", model, "own.jsonl", "--out", "first", "--edges", *flags]) == 0
    assert len([w for w in caught if "has 40 pairs" in str(w.message)]) == 1
    (tmp_path / "own.jsonl").unlink()
    assert main(["evaluate", "first", "--model", model, "-o", "figures.json"]) == 0
    assert main(["view", "first/edges", "--model", model, "-o", "page.html"]) == 0
    assert main(["export", "first/edges", "--model", model, "-o", "graph.json"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["task"], figures["evaluation"]["n_pairs"]) == ("own", 6)
    assert "own" in json.loads((tmp_path / "graph.json").read_text())["metadata"]["slug"]
    assert main(["prune", model, "first/pairs.jsonl", "--out", "again", *flags]) == 0
    first, again = Circuit.load("first"), Circuit.load("again")
    assert again.nodes == first.nodes
    assert [again.pairs.part(part) for part in PARTS] == [first.pairs.part(part) for part in PARTS]
    capsys.readouterr()
    assert main(["evaluate", "first", "--model", model, "--pairs", "50"]) == 1
    assert "n_pairs (--pairs) is 50, and must be at most 6" in capsys.readouterr().err
