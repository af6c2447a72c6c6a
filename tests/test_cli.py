"""The command line end to end, and messages after mistakes."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

import tl_sparse
from helpers import command_flags
from micro import (
    EDGES,
    LOSS,
    MICRO_TASK,
    QUICK_SETTINGS,
    micro_circuit,
    micro_corpus,
    micro_model,
    save_micro,
    save_pairs,
)
from tl_sparse.bridges.effects_records import DenseEffects
from tl_sparse.bridges.maps import Maps
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.sites import site_names
from tl_sparse.cli import main
from tl_sparse.cli.parser import build_parser
from tl_sparse.cli.training import train_config
from tl_sparse.data.corpus import pack_tokens
from tl_sparse.data.documents import load_documents
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.records import record_from
from tl_sparse.training.measures import evaluate_loss

ROOT = Path(__file__).parents[1]
TINY = {
    "d_model": 16,
    "n_heads": 2,
    "d_head": 4,
    "d_mlp": 32,
    "d_vocab": 512,
    "n_ctx": 128,
    "steps": 4,
    "batch_size": 4,
    "l0_fraction": 0.25,
    "stdlib_chars": 20_000,
    "idiom_chars": 60_000,
    "device": "cpu",
}
TINY_FLAGS = command_flags(TINY)
# A model of four steps knows nothing: any loss is good enough to see the pruner run.
PRUNE = {
    "target_loss": 5.0,
    "steps": 3,
    "train_pairs": 16,
    "selection_pairs": 8,
    "heldout_pairs": 8,
}
PRUNE_FLAGS = command_flags(PRUNE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    assert main(["train", "--out", str(folder), "--seed", "3", *TINY_FLAGS]) == 0
    return folder


def test_train_writes_a_model_that_opens_with_its_tokenizer_and_record(trained):
    model = tl_sparse.load(trained, device="cpu")
    record = json.loads((trained / "training.json").read_text())
    assert model.sparse_cfg.d_model == 16
    assert (
        model.to_string(model.to_tokens("print('the red house')")[0, 1:])
        == "print('the red house')"
    )
    assert len(model.tokenizer) == 512
    assert record["config"]["seed"] == record["config"]["data"]["seed"] == 3
    assert record["config"]["model"]["d_mlp"] == 32
    assert {"torch", "transformer-lens", "tl-sparse", "python"} <= set(record["versions"])
    assert record["training_tokens_seen"] == 4 * 4 * 128
    assert record["nonzero_weights"] < record["weights"]
    # The record is enough to make the same text again, and its loss is of the model that was saved.
    documents = load_documents(tl_sparse.DataConfig(**record["config"]["data"]))
    validation = pack_tokens(documents.validation, model.tokenizer, 128, seed=3)
    assert evaluate_loss(model, validation, batch_size=7) == pytest.approx(
        record["validation_loss"], abs=1e-5
    )


def test_trained_weights_are_sparse_and_a_seed_repeats_them(trained, tmp_path):
    assert main(["train", "--out", str(tmp_path / "again"), "--seed", "3", *TINY_FLAGS]) == 0
    first, second = (
        tl_sparse.load(folder, device="cpu") for folder in (trained, tmp_path / "again")
    )
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert int(first.blocks[0].mlp.W_out.count_nonzero()) == 16 * 32 / 4


def test_a_file_changes_the_preset_and_flags_change_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    lines = (
        "steps: 7",
        "lr: 1e-3",
        "seed: 5",
        "model: {d_mlp: 64, abs_topk: {attn_in: 0.5}}",
        "data: {source: text}",
    )
    path.write_text("\n".join(lines))

    def read(*arguments):
        return train_config(build_parser().parse_args(["train", "--out", "x", *arguments]))

    config = read(str(path))
    assert (config.steps, config.lr, config.seed, config.data.source) == (7, 1e-3, 5, "text")
    assert (config.model.d_mlp, config.model.d_model, config.model.abs_topk) == (
        64,
        128,
        {"attn_in": 0.5},
    )
    flagged = read(
        str(path),
        "--steps",
        "9",
        "--d-mlp",
        "32",
        "--abs-topk",
        "0.25",
        "--seed",
        "6",
        "--no-attn-sinks",
    )
    assert (flagged.steps, flagged.model.d_mlp, flagged.lr) == (9, 32, 1e-3)
    assert (flagged.seed, flagged.data.seed, flagged.model.attn_sinks) == (6, 6, False)
    assert flagged.model.abs_topk == tl_sparse.paper_topk(0.25)
    assert read("--preset", "paper-1x", "--abs-topk", "1").model.abs_topk == {}
    assert read("--preset", "paper-1x").model.n_layers == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "config.yaml: unknown configuration key 'stepz'; did you mean 'steps'?"),
        ("- 1", "must hold a mapping of fields to values, not a list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_configuration_file(text, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def run_prune(model, task, out, *flags):
    command = ["prune", str(model), str(task), "--out", str(out), "--device", "cpu"]
    assert main([*command, *PRUNE_FLAGS, *flags]) == 0
    return tl_sparse.Circuit.load(out)


def test_prune_writes_a_circuit_and_prints_what_it_is(trained, tmp_path, capsys):
    out = tmp_path / "circuit"
    circuit = run_prune(trained, "single_double_quote", out)
    printed = capsys.readouterr().out
    model = tl_sparse.load(trained, device="cpu")
    assert circuit.task == "single_double_quote"
    assert circuit.model_name == "model"
    assert circuit.n_nodes == 0  # any loss is good enough, and so that of no nodes
    assert "0 nodes of" in printed
    assert f"{len(circuit.edges(model))} edges" in printed
    for score in ("the full model", "the circuit alone", "without the circuit"):
        assert score in printed
    assert (out / "report.txt").read_text().strip() in printed
    heldout = circuit.measured["heldout"]
    assert f"{heldout['circuit']['loss']:.3f}" in printed
    assert heldout["n_pairs"] == 8


def test_prune_takes_means_over_other_text(trained, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n" * 200)
    (tmp_path / "b.py").write_text("y = 2\n" * 200)
    corpus = str(tmp_path / "*.py")
    circuit = run_prune(trained, "single_double_quote", tmp_path / "c", "--corpus", corpus)
    own = tl_sparse.load_corpus(trained, None, 128)
    assert circuit.measured["corpus_tokens"] != own.numel()


def test_prune_takes_a_file_of_pairs(trained, tmp_path, capsys):
    lines = []
    for n in range(32):
        pair = {"prompts": [f"print([{n}", f"print(({n}"], "answers": ["])", "))"]}
        lines.append(json.dumps(pair))
    task = tmp_path / "brackets.jsonl"
    task.write_text("\n".join(lines))
    circuit = run_prune(trained, task, tmp_path / "circuit", "--init-bias", "1")
    assert circuit.task == "brackets"
    assert "\nCircuit of brackets in model\n====" in capsys.readouterr().out


def test_report_of_a_task_in_which_each_pair_has_its_answers():
    """The entries of the (un)embedding are those of one pair, with its answers as tokens."""

    def sample(rng):
        return *MICRO_TASK.sample(rng), " yes", " no"

    model = micro_model()
    each = dataclasses.replace(MICRO_TASK, candidates=None, sample=sample)
    config = PruneConfig(
        target_loss=2 * LOSS, steps=60, train_pairs=64, selection_pairs=16, heldout_pairs=16
    )
    circuit, evaluation = tl_sparse.prune(model, each, micro_corpus(), config, progress=False)
    of_one = tl_sparse.report(circuit, model, MICRO_TASK, evaluation)
    of_each = tl_sparse.report(circuit, model, each, evaluation)
    assert of_each.startswith("Circuit of micro in ")
    assert "?" not in of_each.splitlines()[0]
    assert "What one pair's tokens bring" in of_each
    in_the_words_of_one = of_each.replace("one pair's tokens", "the task's tokens")
    assert in_the_words_of_one.split("\n")[3:] == of_one.split("\n")[3:]
    assert "2  +3.000  -3.000" in re.sub(" +", "  ", of_each)


FIRST_EDGE = "{} → {}  {:+.3f}".format(*EDGES[0])


@pytest.fixture
def pruned(tmp_path, capsys):
    """The folder of a circuit of the micro model, and the command that evaluates it."""
    model = save_micro(tmp_path / "model")
    task = save_pairs(tmp_path / "micro.jsonl")
    out = str(tmp_path / "circuit")
    flags = command_flags(QUICK_SETTINGS)
    assert main(["prune", model, task, "--out", out, *flags]) == 0
    capsys.readouterr()
    return out, ["evaluate", out, "--model", model, "--task", task]


def test_evaluate_measures_a_circuit_on_held_out_pairs(pruned, tmp_path):
    circuit, command = pruned
    assert main([*command, "-o", str(tmp_path / "all.json")]) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    # The pairs, and so the figures, that prune judged it by.
    assert found["evaluation"] == tl_sparse.Circuit.load(circuit).measured["heldout"]
    assert found["kinds"] == {
        "attn_in": 1,
        "attn_v": 1,
        "attn_out": 1,
        "attn_in → attn_v": 1,
        "attn_v → attn_out": 1,
    }
    by_size = {sized["n_nodes"]: sized["circuit"]["loss"] for sized in found["ladder"]}
    assert by_size[3] == pytest.approx(LOSS, rel=1e-3)
    assert by_size[2] == pytest.approx(math.log(2))
    assert [sized["n_nodes"] for sized in found["random"]] == [3] * 8
    assert found["effects"][FIRST_EDGE] == pytest.approx(math.log(2) - LOSS, abs=1e-4)


def test_evaluate_prints_what_it_measured(pruned, capsys):
    _, command = pruned
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "On 8 held-out pairs" in printed
    assert "… the rest resampled" in printed
    assert "nodes ranked highest" in printed
    assert "mean loss at random: " in printed
    assert FIRST_EDGE in printed


def test_evaluate_takes_other_pairs_that_pruning_did_not_see(pruned, tmp_path, monkeypatch):
    circuit, command = pruned
    from tl_sparse.pruning import task_splits

    real = tl_sparse.evaluation.full_evaluation
    seen = []

    def remembering(*arguments, **options):
        seen.append(arguments[2])
        return real(*arguments, **options)

    monkeypatch.setattr("tl_sparse.evaluation.full_evaluation", remembering)
    assert main([*command, "--pairs", "64", "--seed", "0"]) == 0
    config = PruneConfig(**tl_sparse.Circuit.load(circuit).measured["config"])
    task = tl_sparse.get_task(command[-1])
    train, selection, _ = task_splits(micro_model(), task, config)
    (data,) = seen
    assert data.n_pairs == 64
    assert not set(data.prompts) & {*train.prompts, *selection.prompts}


def test_evaluate_measures_a_bridged_dense_model_too(pruned, tmp_path, capsys):
    _, command = pruned
    folder = str(tmp_path / "model")
    assert main([*command, "--dense", folder]) == 1
    assert "has no bridges to a dense model" in capsys.readouterr().err
    model = tl_sparse.load(folder, device="cpu")
    model.cfg.model_name = "nowhere/dense"  # it names the dense model in the files
    Bridges(model, model, Maps(3, 4, 4)).save_maps(tmp_path / "model")
    with pytest.warns(UserWarning, match="nothing is measured in the dense model"):
        assert main(command) == 0
    assert "in the dense model" not in capsys.readouterr().out
    assert main([*command, "--dense", str(tmp_path / "nowhere")]) == 1
    assert "cannot be opened" in capsys.readouterr().err

    out = tmp_path / "all.json"
    assert main([*command, "--dense", folder, "-o", str(out)]) == 0
    assert "Through the bridges, in the dense model, on 8 pairs" in capsys.readouterr().out
    effects = record_from(DenseEffects, json.loads(out.read_text())["dense_effects"])
    assert effects.interchanged.flips.value == 1
    assert [site.site for site in effects.sites] == site_names(1)


def test_evaluate_names_what_is_missing(tmp_path, capsys):
    micro_circuit(micro_model()).save(tmp_path / "circuit")
    command = ["evaluate", str(tmp_path / "circuit")]
    assert main(command) == 1
    assert "give the circuit's model with --model" in capsys.readouterr().err
    command += ["--model", save_micro(tmp_path / "model")]
    assert main(command) == 1
    assert "the task 'micro' of this circuit is not built in" in capsys.readouterr().err
    command += ["--task", save_pairs(tmp_path / "micro.jsonl")]
    assert main([*command, "--pairs", "0"]) == 1
    assert "n_pairs (--pairs) is 0; it must be at least 1" in capsys.readouterr().err
    assert main([*command, "--pairs", "16"]) == 0
    assert "On 16 held-out pairs" in capsys.readouterr().out


def test_fractions_of_groups_are_json(capsys):
    flags = ["train", "--out", "x", "--l0-groups"]
    assert train_config(build_parser().parse_args([*flags, '{"*.W_O": 0.5}'])).l0_groups == {
        "*.W_O": 0.5
    }
    with pytest.raises(SystemExit):
        build_parser().parse_args([*flags, "*.W_O=0.5"])
    assert "argument --l0-groups: invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--out", "OUT", "--steps", "0"],
            "steps = 0 is not possible; it must be at least 1",
        ),
        (["train", "--out", "OUT", "--n-heads", "0"], "n_heads = 0"),
        (["train", "--out", "OUT", "--abs-topk", "0.001"], "abs_topk['attn_in'] = 0.001"),
        (["train", "--out", "OUT", "--source", "nowhere/*.py"], "nowhere"),
        (["train", "--out", "OUT", "--device", "tpu9"], "device = 'tpu9'"),
        (["train", "--out", "FULL"], "must be a new or an empty folder"),
        (
            ["prune", "MODEL", "single_double_qoute", "--out", "OUT"],
            "did you mean 'single_double_quote'?",
        ),
        (
            ["prune", "MODEL", "nowhere.jsonl", "--out", "OUT"],
            "there is no file nowhere.jsonl",
        ),
        (
            ["prune", "nowhere", "single_double_quote", "--out", "OUT"],
            "there is no folder 'nowhere', nor a model of that name",
        ),
        (
            ["prune", "MODEL", "single_double_quote", "--out", "FULL"],
            "must be a new or an empty folder",
        ),
        (["prune", "MODEL", "single_double_quote", "--out", "OUT", "--lr", "-1"], "lr = -1.0"),
        (["prune", "MODEL", "single_double_quote", "--out", "OUT"], "above the target loss 0.15"),
        (["demo", "--out", "FULL"], "holds files that are not from an earlier demo"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(arguments, message, trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full"), "MODEL": str(trained)}
    status = main([places.get(argument, argument) for argument in arguments])
    error = capsys.readouterr().err
    assert status == 1
    assert message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("tl-sparse: error: ")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_unknown_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", "x", "--learning-rate", "1"])
    assert stopped.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_demo_at_small_size(tmp_path, monkeypatch, capsys):
    """Trained first; here the few steps teach the model nothing, and it says so."""
    less_text = load_documents(tl_sparse.DataConfig(stdlib_chars=20_000, idiom_chars=400_000))
    monkeypatch.setattr(
        "tl_sparse.checkpoints.corpus_sample.load_documents", lambda config: less_text
    )
    command = ["demo", "--train", "--out", str(tmp_path / "demo"), "--steps", "2"]
    assert main([*command, "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "Training a small transformer" in printed.out
    assert "full model's loss on single_double_quote" in printed.err
    assert (tmp_path / "demo" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "demo" / "circuit").exists()
