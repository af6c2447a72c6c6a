"""Small dense models of Hugging Face on the command line, in folders and in the hub's cache."""

import json

import pytest
import torch
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tl_sparse
from helpers import LINE, command_flags, must_not_run, only_on, random_circuit
from loopback import cache_snapshot
from micro import VOCABULARY, micro_tokenizer, save_pairs
from tl_sparse.checkpoints import open_model
from tl_sparse.cli import main
from tl_sparse.errors import CheckpointError, UnsupportedError

#: A model that was not trained knows nothing: any loss is good enough to see the pruner run.
PRUNE = {
    "target_loss": 5.0,
    "steps": 2,
    "train_pairs": 8,
    "selection_pairs": 4,
    "heldout_pairs": 4,
    "init_bias": 1.0,
    "device": "cpu",
}
FLAGS = [*command_flags(PRUNE), "--no-warm-start"]


def save_gpt2(folder):
    """A GPT-2 of two narrow layers, with the tokenizer of the micro model."""
    torch.manual_seed(0)
    sizes = dict(n_positions=16, n_ctx=16, n_embd=8, n_layer=2, n_head=2)
    config = GPT2Config(vocab_size=len(VOCABULARY), bos_token_id=0, eos_token_id=0, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    micro_tokenizer().save_pretrained(folder)
    return folder


def save_llama(folder):
    """A Llama of two narrow layers, whose query heads share keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    micro_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    (folder / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        words = [*VOCABULARY, "A f1 end", "B f2 end"] * 40
        (folder / "text" / name).write_text(" ".join(words))
    save_pairs(folder / "micro.jsonl")
    save_gpt2(folder / "small-gpt2")
    return folder


@pytest.fixture
def in_cache(places, tmp_path, monkeypatch):
    """The small GPT-2 in the hub's cache, where real ones would be after a download."""
    files = {path.name: path.read_bytes() for path in (places / "small-gpt2").iterdir()}
    for name in ("gpt2", "someone/small-gpt2"):
        cache_snapshot(tmp_path / "hub", name, files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def prune(places, model, out, *flags):
    words = ["prune", str(model), str(places / "micro.jsonl"), "--out", str(out)]
    return main([*words, "--corpus", str(places / "text"), *FLAGS, *flags])


@only_on(4, "TransformerLens 3 opens only models that it lists by name")
@pytest.mark.parametrize("save", [save_gpt2, save_llama])
def test_a_dense_model_in_a_folder(save, places, tmp_path, capsys):
    model = save(tmp_path / "small")
    assert prune(places, model, tmp_path / "circuit", "-q") == 0
    printed = capsys.readouterr()
    assert "Circuit of micro in small" in printed.out
    assert "Loading weights" not in printed.err
    assert tl_sparse.Circuit.load(tmp_path / "circuit").model_name == "small"


@only_on(4, "TransformerLens 3 opens only models that it lists by name")
def test_a_circuit_of_a_dense_model_is_shown_and_measured(places, tmp_path, capsys):
    model = str(places / "small-gpt2")
    random_circuit(open_model(model, "cpu"), share=0.02).save(tmp_path / "circuit")
    given = [str(tmp_path / "circuit"), "--model", model, "--device", "cpu"]
    given += ["--task", str(places / "micro.jsonl")]
    assert main(["view", *given, "-o", str(tmp_path / "page.html")]) == 0
    error = capsys.readouterr().err
    assert "the page has no passages: " in error
    assert "give text like that it was trained on with --corpus" in error
    figures = tmp_path / "figures.json"
    assert main(["evaluate", *given, "--pairs", "4", "-o", str(figures)]) == 0
    assert json.loads(figures.read_text())["evaluation"]["n_pairs"] == 4
    assert main(["export", *given, "-o", str(tmp_path / "circuit.dot")]) == 0


@pytest.mark.parametrize("name", ["gpt2", "someone/small-gpt2"])
def test_a_dense_model_by_name(name, places, in_cache, tmp_path, capsys):
    """TransformerLens 3 opens it if it lists the name, and says so if not."""
    status = prune(places, name, tmp_path / "circuit", "-q")
    if LINE == 3 and name != "gpt2":
        assert status == 1
        assert "TransformerLens 3 does not list by name" in capsys.readouterr().err
    else:
        assert status == 0
        assert tl_sparse.Circuit.load(tmp_path / "circuit").model_name == name


@only_on(3, "TransformerLens 4 opens a folder")
def test_a_folder_on_transformer_lens_3(places):
    with pytest.raises(UnsupportedError, match="TransformerLens 3 does not list by name"):
        open_model(places / "small-gpt2", "cpu")


@only_on(4, "TransformerLens 3 opens only models that it lists by name")
def test_weights_are_as_they_are(places):
    model = open_model(places / "small-gpt2", "cpu")
    tokens = torch.arange(10)[None]
    stored = GPT2LMHeadModel.from_pretrained(places / "small-gpt2")
    assert not model.training
    torch.testing.assert_close(model(tokens), stored(tokens).logits)


@pytest.mark.parametrize("command", ["prune", "suite", "search"])
def test_a_dense_model_without_a_text(command, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tl_sparse.checkpoints.dense.open_model", must_not_run("opening it"))
    model = str(places / "small-gpt2")
    words = {
        "prune": ["prune", model, "var_if"],
        "suite": ["suite", model, "--tasks", "var_if"],
        "search": ["search", model, "var_if"],
    }
    assert main([*words[command], "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{model} is a dense model, with which no sample of text is stored" in error
    assert "--corpus" in error


def test_load_says_how_a_dense_model_is_opened(places):
    call = {
        3: "HookedTransformer.from_pretrained_no_processing",
        4: "TransformerBridge.boot_transf",
    }
    for source in ("gpt2", places / "small-gpt2"):
        with pytest.raises(CheckpointError) as caught:
            tl_sparse.load(source)
        message = f"{source} is a dense model, which TransformerLens opens: {call[LINE]}"
        assert str(caught.value).startswith(message)


@only_on(4, "TransformerLens 3 opens only models that it lists by name")
def test_a_dense_model_that_transformer_lens_cannot_open(tmp_path):
    micro_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(CheckpointError) as caught:
        open_model(tmp_path, "cpu")
    message = str(caught.value)
    assert message.startswith(f"TransformerLens cannot open the dense model {tmp_path}: ")
    assert len(message) < 500


def test_a_dense_model_without_a_tokenizer(places, tmp_path, capsys):
    save_gpt2(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    assert prune(places, tmp_path / "bare", tmp_path / "circuit") == 1
    assert f"no tokenizer is beside the model in {tmp_path / 'bare'}" in capsys.readouterr().err
