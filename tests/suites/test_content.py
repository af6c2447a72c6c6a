"""What circuits belong to: models, texts and tasks are compared by what they hold."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import tl_sparse
from helpers import must_not_run
from micro import QUICK_SETTINGS, micro_corpus, save_micro, save_pairs
from tl_sparse.checkpoints.corpus_sample import CORPUS_SAMPLE
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.errors import ConfigError, PruneError, SuiteError
from tl_sparse.files import write_tensors
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.suites import suite
from tl_sparse.suites.content import check_unchanged, content_of_model, content_of_task
from tl_sparse.suites.jobs import read_report
from tl_sparse.suites.suite import run_suite
from tl_sparse.tasks.task import TASKS

pytestmark = pytest.mark.any_line

CONFIG = PruneConfig(**QUICK_SETTINGS)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a model, a task, and a suite of them that has run in `out`."""
    folder = tmp_path_factory.mktemp("first")
    model = save_micro(folder / "one")
    task = save_pairs(folder / "micro.jsonl")
    run_suite(model, task, folder / "out", 0, CONFIG)
    return folder


@pytest.fixture
def place(first, tmp_path):
    """A copy of all that."""
    return shutil.copytree(first, tmp_path / "place")


def retrain(folder):
    """Another model in the same folder; the change is too small for a circuit to refuse it."""
    model = tl_sparse.load(folder, "cpu")
    with torch.no_grad():
        model.unembed.W_U.mul_(1.001)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    write_tensors(Path(folder, CORPUS_SAMPLE), {"tokens": micro_corpus()})


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def go_on(place, seeds, model=None, task=None):
    """Continue the suite in a copy."""
    return run_suite(
        model or place / "one", task or place / "micro.jsonl", place / "out", seeds, CONFIG
    )


@pytest.fixture
def nothing_searched(monkeypatch):
    monkeypatch.setattr(suite, "prune", must_not_run("a finished circuit is searched again"))


def test_the_same_contents_may_be_somewhere_else(place, nothing_searched):
    go_on(place, 0)


def test_a_suite_of_a_model_that_was_retrained_is_refused(place, nothing_searched):
    before = files_of(place / "out")
    retrain(place / "one")
    with pytest.raises(
        SuiteError,
        match=r"one/micro/0 was made with other contents of the model one\. Continue with those, "
        "or give another folder",
    ):
        go_on(place, (0, 1))
    assert files_of(place / "out") == before


def test_a_later_suite_of_the_same_process_takes_the_new_model(place):
    losses = []
    for name in ("before", "after"):
        run_suite(place / "one", place / "micro.jsonl", place / name, 0, CONFIG)
        losses.append(read_report(place / name / "one" / "micro" / "0").node_pruned.loss)
        retrain(place / "one")
    assert losses[0] != losses[1]


def test_a_suite_of_another_corpus_in_the_same_folder_is_refused(place, nothing_searched):
    write_tensors(place / "one" / CORPUS_SAMPLE, {"tokens": micro_corpus()[:10]})
    with pytest.raises(SuiteError, match="made with other contents of the corpus of one"):
        go_on(place, 1)


def test_a_suite_of_other_pairs_in_a_file_of_the_same_name_is_refused(place, nothing_searched):
    (place / "other").mkdir()
    other = save_pairs(place / "other" / "micro.jsonl", n_pairs=100)
    with pytest.raises(SuiteError, match="made with other contents of the task micro"):
        go_on(place, 1, task=other)


def older(folder):
    """Write the job.json of a folder as it was before contents and checksums were in it."""
    path = folder / "job.json"
    values = json.loads(path.read_text())
    del values["content"], values["tl_sparse_checksum"]
    path.write_text(json.dumps(values))


def test_an_older_suite_goes_on(first, place, nothing_searched):
    older(place / "out" / "one" / "micro" / "0")
    go_on(place, 0, model=first / "one")


def test_an_older_suite_of_another_model_is_refused(first, place, nothing_searched):
    """Its circuits tell which model they belong to; without a circuit, the folder tells."""
    folder = place / "out" / "one" / "micro" / "0"
    older(folder)
    with pytest.raises(SuiteError, match=f"model = '{first / 'one'}', now '{place / 'one'}'"):
        go_on(place, 1)
    circuit = Circuit.load(folder)
    sketch = {name: [2 * value + 1 for value in row] for name, row in circuit.model.sketch.items()}
    of_another = dataclasses.replace(circuit.model, sketch=sketch)
    kept = (folder / "job.json").read_bytes()
    shutil.rmtree(folder)
    dataclasses.replace(circuit, model=of_another).save(folder)
    (folder / "job.json").write_bytes(kept)
    with pytest.raises(SuiteError, match="micro/0 was made with another model of that name"):
        go_on(place, 1, model=first / "one")


def test_what_is_replaced_while_a_suite_runs_is_noticed(place, monkeypatch):
    def prune(*arguments):
        save_pairs(place / "micro.jsonl", n_pairs=100)
        raise PruneError("none")

    monkeypatch.setattr(suite, "prune", prune)
    with pytest.raises(SuiteError, match="task micro, which must not change while it runs"):
        go_on(place, (0, 1, 2))
    assert (place / "out" / "one" / "micro" / "1").is_dir()
    assert not (place / "out" / "one" / "micro" / "2").exists()


def test_a_single_weight_makes_another_model(micro):
    before = content_of_model("one", micro, micro_corpus())
    with torch.no_grad():
        micro.blocks[0].attn.W_V[0, 0, 0] += 1e-6
    after = content_of_model("one", micro, micro_corpus())
    assert before.keys() == after.keys() == {"model one", "corpus of one"}
    with pytest.raises(SuiteError, match="other contents of the model one, which must not change"):
        check_unchanged(before, after)


def test_each_built_in_task_has_a_hash_of_its_own():
    hashes = {name: content_of_task(name)[f"task {name}"] for name in TASKS}
    assert len(set(hashes.values())) == len(TASKS)
    assert content_of_task("var_if") == content_of_task("var_if")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("models", 3),
        ("models", {"one": 1}.values()),
        ("tasks", None),
        ("tasks", [b"micro"]),
        ("out", 7),
        ("out", ""),
        ("seeds", "0"),
        ("seeds", [0, True]),
        ("seeds", [0, 0]),
        ("seeds", 1.5),
        ("config", {"steps": 3}),
        ("corpus", 3),
        ("workers", "two"),
        ("workers", True),
        ("device", 0),
    ],
)
def test_arguments_of_the_wrong_type_are_named(field, value, first, tmp_path):
    arguments = {"models": first / "one", "tasks": first / "micro.jsonl", "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match=rf"^{field} = .* is not possible; it must be"):
        run_suite(**arguments | {field: value})
    assert not (tmp_path / "out").exists()


def test_names_that_no_folder_can_have_are_refused(first, tmp_path):
    nameless = save_pairs(tmp_path / "..jsonl")
    with pytest.raises(ConfigError, match=r"tasks = \[.*\.\.jsonl'\] is not possible"):
        run_suite(first / "one", nameless, tmp_path / "out", 0, CONFIG)
