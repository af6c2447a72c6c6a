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
from tl_sparse.errors import ConfigError, SuiteError
from tl_sparse.files import write_tensors
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.suites import suite
from tl_sparse.suites.content import check_unchanged, content_of_model, content_of_task
from tl_sparse.suites.jobs import read_report
from tl_sparse.suites.suite import run_suite

CONFIG = PruneConfig(**QUICK_SETTINGS)


@pytest.fixture
def model(tmp_path):
    return save_micro(tmp_path / "one")


@pytest.fixture
def task(tmp_path):
    return save_pairs(tmp_path / "micro.jsonl")


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


def test_a_suite_of_a_model_that_was_retrained_is_refused(model, task, tmp_path):
    out = tmp_path / "out"
    run_suite(model, task, out, 0, CONFIG)
    before = files_of(out)
    retrain(model)
    with pytest.raises(
        SuiteError,
        match=r"one/micro/0 was made with other contents of the model one\. Continue with those, "
        "or give another folder",
    ):
        run_suite(model, task, out, (0, 1), CONFIG)
    assert files_of(out) == before


def test_a_later_suite_of_the_same_process_takes_the_new_model(model, task, tmp_path):
    run_suite(model, task, tmp_path / "before", 0, CONFIG)
    retrain(model)
    run_suite(model, task, tmp_path / "after", 0, CONFIG)
    losses = []
    for name in ("before", "after"):
        report = read_report(tmp_path / name / "one" / "micro" / "0")
        losses.append(report.node_pruned.loss)
    assert losses[0] != losses[1]


def test_a_suite_of_another_corpus_in_the_same_folder_is_refused(model, task, tmp_path):
    run_suite(model, task, tmp_path / "out", 0, CONFIG)
    write_tensors(tmp_path / "one" / CORPUS_SAMPLE, {"tokens": micro_corpus()[:10]})
    with pytest.raises(SuiteError, match="made with other contents of the corpus of one"):
        run_suite(model, task, tmp_path / "out", 1, CONFIG)


def test_a_suite_of_other_pairs_in_a_file_of_the_same_name_is_refused(model, task, tmp_path):
    run_suite(model, task, tmp_path / "out", 0, CONFIG)
    (tmp_path / "other").mkdir()
    other = save_pairs(tmp_path / "other" / "micro.jsonl", n_pairs=100)
    with pytest.raises(SuiteError, match="made with other contents of the task micro"):
        run_suite(model, other, tmp_path / "out", 1, CONFIG)


def test_the_same_contents_may_move(model, task, tmp_path, monkeypatch):
    run_suite(model, task, tmp_path / "out", 0, CONFIG)
    (tmp_path / "moved").mkdir()
    moved = shutil.move(model, tmp_path / "moved" / "one")
    moved_task = shutil.move(task, tmp_path / "moved" / "micro.jsonl")
    monkeypatch.setattr(suite, "prune", must_not_run("a finished circuit is searched again"))
    run_suite(moved, moved_task, tmp_path / "out", 0, CONFIG)


def older(folder):
    """Write the job.json of a folder as it was before contents and checksums were in it."""
    path = folder / "job.json"
    values = json.loads(path.read_text())
    del values["content"], values["checksum"]
    path.write_text(json.dumps(values))


def test_an_older_suite_goes_on(model, task, tmp_path, monkeypatch):
    run_suite(model, task, tmp_path / "out", 0, CONFIG)
    older(tmp_path / "out" / "one" / "micro" / "0")
    monkeypatch.setattr(suite, "prune", must_not_run("a finished circuit is searched again"))
    run_suite(model, task, tmp_path / "out", 0, CONFIG)


def test_an_older_suite_of_another_model_is_refused(model, task, tmp_path):
    """Its circuits tell which model they belong to; without a circuit, the folder tells."""
    run_suite(model, task, tmp_path / "out", 0, CONFIG)
    folder = tmp_path / "out" / "one" / "micro" / "0"
    older(folder)
    other = save_micro(tmp_path / "elsewhere" / "one")
    with pytest.raises(SuiteError, match=f"model = '{model}', now '{other}'"):
        run_suite(other, task, tmp_path / "out", 1, CONFIG)
    circuit = Circuit.load(folder)
    sketch = {name: [2 * value + 1 for value in row] for name, row in circuit.model.sketch.items()}
    of_another = dataclasses.replace(circuit.model, sketch=sketch)
    shutil.rmtree(folder / "edges")
    for name in ("circuit.json", "circuit.safetensors"):
        (folder / name).unlink()
    kept = (folder / "job.json").read_bytes()
    shutil.rmtree(folder)
    dataclasses.replace(circuit, model=of_another).save(folder)
    (folder / "job.json").write_bytes(kept)
    with pytest.raises(SuiteError, match="micro/0 was made with another model of that name"):
        run_suite(model, task, tmp_path / "out", 1, CONFIG)


def test_what_is_replaced_while_a_suite_runs_is_noticed(model, task, tmp_path, monkeypatch):
    real = suite.prune

    def prune(*arguments):
        found = real(*arguments)
        save_pairs(tmp_path / "micro.jsonl", n_pairs=100)
        return found

    monkeypatch.setattr(suite, "prune", prune)
    with pytest.raises(SuiteError, match="task micro, which must not change while it runs"):
        run_suite(model, task, tmp_path / "out", (0, 1), CONFIG)
    assert (tmp_path / "out" / "one" / "micro" / "0").is_dir()
    assert not (tmp_path / "out" / "one" / "micro" / "1").exists()


def test_a_single_weight_makes_another_model(model):
    opened = tl_sparse.load(model, "cpu")
    before = content_of_model("one", opened, micro_corpus())
    with torch.no_grad():
        opened.blocks[0].attn.W_V[0, 0, 0] += 1e-6
    after = content_of_model("one", opened, micro_corpus())
    assert before.keys() == after.keys() == {"model one", "corpus of one"}
    with pytest.raises(SuiteError, match="other contents of the model one, which must not change"):
        check_unchanged(before, after)


def test_each_built_in_task_has_a_hash_of_its_own():
    hashes = {name: content_of_task(name)[f"task {name}"] for name in tl_sparse.TASKS}
    assert len(set(hashes.values())) == len(tl_sparse.TASKS)
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
def test_arguments_of_the_wrong_type_are_named(field, value, model, task, tmp_path):
    arguments = {"models": model, "tasks": task, "out": tmp_path / "out", "config": CONFIG}
    with pytest.raises(ConfigError, match=rf"^{field} = .* is not possible; it must be"):
        run_suite(**arguments | {field: value})
    assert not (tmp_path / "out").exists()


def test_names_that_no_folder_can_have_are_refused(model, tmp_path):
    nameless = save_pairs(tmp_path / "..jsonl")
    with pytest.raises(ConfigError, match=r"tasks = \[.*\.\.jsonl'\] is not possible"):
        run_suite(model, nameless, tmp_path / "out", 0, CONFIG)
