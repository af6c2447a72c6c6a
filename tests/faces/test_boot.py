"""Our folders opened by transformers' Auto classes and by TransformerLens 4's boot."""

import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tl_sparse.checkpoints.hf
from helpers import full_config, random_tokens, tiny_model, word_tokenizer
from tl_sparse.errors import UnsupportedError

WORDS = ["<|endoftext|>", "a", "b", "c", "d"]
on_4 = pytest.mark.skipif(
    version("transformer-lens").startswith("3."), reason="boot_transformers came with 4"
)


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(full_config(), tokenizer=word_tokenizer(WORDS, eos_token="<|endoftext|>"))
    model.save_pretrained(tmp_path / "model")
    torch.save(model(random_tokens(model)), tmp_path / "logits.pt")
    return tmp_path / "model"


def test_transformers_auto_classes_read_our_folder(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = random_tokens(full_config())
    assert torch.equal(model(tokens).logits, torch.load(folder.parent / "logits.pt"))
    assert AutoConfig.from_pretrained(folder).sparse_cfg == full_config()
    assert not model.training
    assert "blocks.0.attn.W_Q" in dict(model.named_parameters())


@on_4
def test_boot_transformers_gives_our_model(folder):
    from transformer_lens.model_bridge import TransformerBridge

    ours = tl_sparse.load(folder, device="cpu")
    booted = TransformerBridge.boot_transformers(str(folder), device="cpu")
    assert type(booted) is type(ours)
    tokens = random_tokens(ours)
    logits, cache = booted.run_with_cache(tokens)
    expected_logits, expected_cache = ours.run_with_cache(tokens)
    assert torch.equal(logits, expected_logits)
    assert list(cache) == list(expected_cache)
    assert all(torch.equal(cache[name], expected_cache[name]) for name in cache)
    assert list(booted.hook_dict) == list(ours.hook_dict)
    assert list(booted.state_dict()) == list(ours.state_dict())
    sizes = (
        "n_layers",
        "d_model",
        "n_heads",
        "d_head",
        "d_mlp",
        "d_vocab",
        "n_ctx",
        "act_fn",
        "eps",
        "dtype",
    )
    assert all(getattr(booted.cfg, name) == getattr(ours.cfg, name) for name in sizes)
    # What the stock forward would get wrong: padding, the bigram table after a partial run,
    # strings.
    assert torch.equal(
        booted(["a b", "d"], padding_side="left"), ours(["a b", "d"], padding_side="left")
    )
    resid = booted(tokens, stop_at_layer=1)
    torch.testing.assert_close(booted(resid, start_at_layer=1, tokens=tokens), logits)
    assert booted.generate(
        "a b", max_new_tokens=3, do_sample=False, verbose=False
    ) == ours.generate("a b", max_new_tokens=3, do_sample=False, verbose=False)


@on_4
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boot_transformers_in_another_dtype(stored, dtype, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = word_tokenizer(WORDS, eos_token="<|endoftext|>")
    model = tiny_model(biases=False, tokenizer=tokenizer).to(
        dtype=stored
    )  # zeros stand for the biases
    model.save_pretrained(tmp_path)
    booted = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=dtype)
    tokens = random_tokens(model)
    assert booted(tokens).dtype == dtype
    torch.testing.assert_close(
        booted(tokens), tl_sparse.load(tmp_path, device="cpu", dtype=dtype)(tokens)
    )


def test_transformers_form_of_a_model_is_whole(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.float64}
    model.save_pretrained(tmp_path / "again")
    tokens = random_tokens(full_config())
    expected = model(tokens).logits
    torch.testing.assert_close(tl_sparse.load(tmp_path / "again", device="cpu")(tokens), expected)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")(tokens).logits,
        expected,
    )
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert fresh(tokens).logits.isfinite().all()
    assert fresh.embed.W_E.std() > 0
    with pytest.raises(UnsupportedError, match="device_map is not possible"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")


@on_4
def test_one_import_is_enough_in_a_fresh_process(folder):
    (entry_point,) = entry_points(group="transformer_lens.architectures", name="SparseTransformer")
    assert entry_point.load().__name__ == "SparseArchitectureAdapter"
    program = (
        "import sys, torch, tl_sparse.checkpoints.hf\n"
        "from transformer_lens.model_bridge import TransformerBridge as B\n"
        "model = B.boot_transformers(sys.argv[1], device='cpu')\n"
        "tokens = torch.load(sys.argv[2])\n"
        "assert torch.equal(model(tokens), torch.load(sys.argv[3]))\n"
    )
    tokens, logits = folder.parent / "tokens.pt", folder.parent / "logits.pt"
    torch.save(random_tokens(full_config()), tokens)
    subprocess.run([sys.executable, "-c", program, folder, tokens, logits], check=True)


def test_importing_the_package_registers_nothing():
    program = (
        "import tl_sparse.checkpoints; from transformers import AutoConfig\n"
        "try: AutoConfig.for_model('tl_sparse')\n"
        "except ValueError: print('unknown')\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert out.strip() == "unknown"
