"""Damaged files of suites and searches: each is read right, or refused with an error of ours."""

import json
import random

import pytest

import tl_sparse
from damage import ODD, changed, entries
from micro import QUICK_SETTINGS, save_micro, save_pairs
from tl_sparse.errors import CheckpointError, ConfigError, SuiteError, TLSparseError
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.suites import suite
from tl_sparse.suites.jobs import CircuitFigures, Job, JobReport, read_report, write_report
from tl_sparse.suites.results import collected, results_table
from tl_sparse.suites.suite import run_suite

pytestmark = pytest.mark.any_line

CONFIG = PruneConfig(**QUICK_SETTINGS | {"steps": 50})
FIGURES = CircuitFigures(
    nodes=3,
    edges=2,
    seconds=1.5,
    loss=0.02,
    standard_error=0.001,
    accuracy_without=0.5,
    kept=["0.attn_in.0", "0.attn_v.0", "0.attn_out.2"],
)
REPORT = JobReport(
    problem=None,
    node_pruned=FIGURES,
    edge_pruned=FIGURES,
    settings={"config": {"steps": 30}, "corpus": None},
    content={"model one": "a", "task micro": "b"},
)


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "one" / "micro" / "0"
    write_report(folder, REPORT)
    return Job("one", "micro", 0, folder)


def test_a_report_is_read_as_it_was_written(job):
    assert read_report(job.folder) == REPORT


def test_every_entry_of_a_job_is_checked(job):
    """Without a checksum, as files had none before."""
    path = job.folder / "job.json"
    good = json.loads(path.read_text())
    del good["tl_sparse_checksum"]
    messages = []
    for place in entries(good):
        for odd in ODD:
            path.write_text(json.dumps(changed(good, place, odd)))
            try:
                results_table(collected([job])).encode()
            except TLSparseError as error:
                messages.append((place, str(error)))
    assert len(messages) > 100
    for place, message in messages:
        assert str(path) in message
        assert place[0] in message or "is not valid JSON" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": []}, r"'settings' is \[\], which must be an object"),
        ({"node_pruned": 1}, "'node_pruned' is 1, which must be an object"),
        ({"node_pruned": {}}, "'node_pruned.nodes' is missing"),
        ({"problem": 3}, "'problem' is 3, which must be text"),
        ({"node_pruned": None, "problem": None}, "it has neither 'node_pruned' nor a 'problem'"),
        ({"edge_pruned": {"kept": [[]]}}, "'edge_pruned.nodes' is missing"),
        ({"content": {"model one": 3}}, "'content.model one' is 3, which must be text"),
    ],
)
def test_a_damaged_job_is_named_with_its_field(change, message, job):
    path = job.folder / "job.json"
    good = json.loads(path.read_text())
    del good["tl_sparse_checksum"]
    path.write_text(json.dumps(good | change))
    with pytest.raises(SuiteError, match=f"{path} is damaged: {message}; remove the folder"):
        read_report(job.folder)


def test_changed_bytes_of_a_job_are_noticed(job):
    path = job.folder / "job.json"
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(good)
        damaged[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            report = read_report(job.folder)
        except TLSparseError:
            continue
        assert report == REPORT  # white space, or the name of the checksum itself


def test_a_job_that_is_cut_short_is_refused(job):
    path = job.folder / "job.json"
    good = path.read_bytes()
    for length in range(0, len(good.rstrip()), 7):
        path.write_bytes(good[:length])
        with pytest.raises(TLSparseError, match=r"job\.json"):
            read_report(job.folder)


@pytest.fixture
def finished(tmp_path):
    """The arguments of a suite that has run, and the folder of its only job."""
    model = save_micro(tmp_path / "one")
    task = save_pairs(tmp_path / "micro.jsonl")
    out = tmp_path / "out"
    run_suite(model, task, out, 0, CONFIG)
    return (model, task, out), out / "one" / "micro" / "0"


def test_damage_is_found_before_anything_is_searched(finished, monkeypatch):
    arguments, folder = finished

    def prune(*arguments):
        pytest.fail("a circuit is searched")

    monkeypatch.setattr(suite, "prune", prune)
    path = folder / "job.json"
    path.write_text(path.read_text().replace('"nodes": 3', '"nodes": 4'))
    with pytest.raises(CheckpointError, match=r"job.json is damaged, or was edited after it was"):
        run_suite(*arguments, (0, 1), CONFIG)
    path.unlink()
    with pytest.raises(TLSparseError, match=r"there is no file .*job\.json"):
        run_suite(*arguments, (0, 1), CONFIG)


def test_damage_in_a_study_is_an_error_of_ours(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from tl_sparse.suites import optuna_search

    monkeypatch.setattr(optuna_search, "_n_edges", lambda *arguments: 4)
    arguments = save_micro(tmp_path / "one"), save_pairs(tmp_path / "micro.jsonl"), tmp_path / "out"
    best, _ = optuna_search.search(*arguments, n_trials=2, config=CONFIG)
    journal = tmp_path / "out" / "study.journal"
    good = journal.read_text().splitlines()
    places = [(i, place) for i, line in enumerate(good) for place in entries(json.loads(line))]
    generator = random.Random(0)
    refused = 0
    for number, place in generator.sample(places, 25):
        damaged = json.dumps(changed(json.loads(good[number]), place, generator.choice(ODD)))
        journal.write_text("\n".join([*good[:number], damaged, *good[number + 1 :]]) + "\n")
        try:
            optuna_search.search(*arguments, n_trials=2, config=CONFIG)
        except (SuiteError, ConfigError):
            refused += 1
    assert refused > 5
    journal.write_text("\n".join(good) + '\n{"op_code":5,"wor')  # the disk was full
    assert optuna_search.search(*arguments, n_trials=2, config=CONFIG)[0] == best


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    pytest.importorskip("optuna")
    arguments = save_micro(tmp_path / "one"), save_pairs(tmp_path / "micro.jsonl"), tmp_path / "out"
    mine = tmp_path / "thesis.txt"
    mine.write_text("no line end")
    with pytest.raises(SuiteError, match="cannot use the storage"):
        tl_sparse.suites.search(*arguments, n_trials=1, storage=mine, config=CONFIG)
    assert mine.read_text() == "no line end"
