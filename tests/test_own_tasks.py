"""Tasks of the user's own, from start to end, as the page on tasks shows them."""

import json
import re
import shlex
from pathlib import Path

import pytest

import tl_sparse
from tl_sparse.circuits import export
from tl_sparse.cli import main
from tl_sparse.pruning import PruneConfig

#: The package is the same on both lines of TransformerLens, and this takes seconds.
pytestmark = pytest.mark.any_line

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
#: The section of tasks from a function, and that of tasks from a file.
FUNCTION = PAGE.split("## A task from a function\n")[1].split("\n## ")[0]
FILE = PAGE.split("## A task from a file\n")[1].split("\n## ")[0]
FILES = [f"{kind}_{number}" for kind in ("data", "words", "table") for number in range(4)]
QUICK = {
    "steps": 30,
    "train_pairs": 64,
    "ranking_pairs": 8,
    "selection_pairs": 16,
    "cleanup_pairs": 8,
    "heldout_pairs": 16,
}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """In an empty folder; a small part of the corpus, which takes less time."""

    def first_rows(*arguments):
        return tl_sparse.load_corpus(*arguments)[:8]

    monkeypatch.setattr("tl_sparse.pruning.means.load_corpus", first_rows)
    monkeypatch.setattr("tl_sparse.view.contents.load_corpus", first_rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_task_from_a_function(quick, monkeypatch, capsys):
    monkeypatch.setattr("tl_sparse.pruning.pruner.as_config", lambda _: PruneConfig(**QUICK))
    namespace = {"tl_sparse": tl_sparse, "model": tl_sparse.load("tiny-python-sparse")}
    for snippet in re.findall(r"```python\n(.*?)```", FUNCTION, flags=re.DOTALL):
        exec(snippet, namespace)
    evaluation, circuit = namespace["evaluation"], namespace["brackets"]
    assert evaluation.circuit.loss < 0.25
    assert 0 < circuit.n_nodes < 100
    assert f"circuit={evaluation.circuit!r}" in capsys.readouterr().out
    assert "brackets" in (quick / "brackets.html").read_text()
    export(circuit, namespace["model"], "brackets.json")
    graph = json.loads((quick / "brackets.json").read_text())
    assert graph["metadata"]["prompt"] in {p.first_prompt for p in circuit.pairs.heldout}


@pytest.mark.slow  # the commands with a small model: tests/pruning/test_splits.py
def test_a_task_from_a_file(quick):
    (line,) = re.findall(r"```json\n(.*)\n```", FILE)
    lines = [line.replace("data", name) for name in FILES]
    (quick / "files.jsonl").write_text("\n".join(lines))
    (block,) = re.findall(r"```sh\n(.*?)```", FILE, flags=re.DOTALL)
    for command in block.splitlines():
        words = shlex.split(command, comments=True)
        if words[1] == "prune":
            words += ["--steps=40", "--ranking-pairs=8"]
        assert main(words[1:]) == 0
    first, again = tl_sparse.Circuit.load("my-files"), tl_sparse.Circuit.load("my-files-1")
    assert first.measured["heldout"]["circuit"]["loss"] < 0.25
    assert again.pairs.heldout == first.pairs.heldout
    assert {pair.first_answer for pair in first.pairs.heldout} == {" as"}
