"""The hub model that OpenAI packaged, sparse_pretrain's models, and our storage of zeros."""

import contextlib
import json
import random
import zipfile
from base64 import b64encode
from itertools import pairwise

import pytest
import regex
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from test_checkpoints import as_openai_can_say_it, assert_same_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from formats import write_circuitgpt, write_openai, write_sparse_pretrain
from helpers import (
    GOLDEN,
    full_config,
    random_tokens,
    sparse_configs,
    tiny_config,
    tiny_model,
    without_checksums,
    word_tokenizer,
)
from tl_sparse import SparseConfig, create, load, paper_topk
from tl_sparse.checkpoints.formats import read_checkpoint
from tl_sparse.checkpoints.network import build_network
from tl_sparse.data.tokenizer import load_tokenizer
from tl_sparse.errors import CheckpointError, ConfigError, TLSparseError, TokenizerError
from tl_sparse.files import read_json, read_torch

pytestmark = pytest.mark.any_line

# --- openai/circuit-sparsity


@settings(max_examples=20)
@given(config=sparse_configs())
def test_the_packaged_model_is_that_of_the_folder(config, tmp_path_factory):
    with contextlib.suppress(ConfigError):
        config = as_openai_can_say_it(config)
    config = SparseConfig.from_dict(config.to_dict() | {"abs_topk": {}, "sinusoidal": False})
    model = tiny_model(config)
    folder = tmp_path_factory.mktemp("hub")
    assert_same_model(load(write_circuitgpt(folder, model), device="cpu"), model)
    if config.tied_unembed:  # safetensors files hold a tied weight once
        write_circuitgpt(folder, model, drop=["circuit_model.lm_head.weight"])
        assert_same_model(load(folder, device="cpu"), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(max_position_embeddings=9), "max_position_embeddings = 9 must be block_size = 8"),
        (dict(num_hidden_layers=2), "num_hidden_layers = 2 must be n_layer = 1"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings = True must be tied_unembed = False"),
        (dict(mup=True), "mup must be false"),
        (dict(bigram_table_rank=4), "bigram_table_rank must be null"),
        (dict(rope_theta=1e4), "unknown keys rope_theta"),
        (
            dict(n_layer=2, num_hidden_layers=2),
            "the configuration has 2 layers, but the file has 1",
        ),
    ],
)
def test_impossible_configurations_of_the_packaged_model(changes, message, tmp_path):
    folder = write_circuitgpt(tmp_path, tiny_model(), **changes)
    with pytest.raises(TLSparseError, match=message):
        load(folder, device="cpu")


def test_names_in_the_packaged_model(tmp_path):
    folder = write_circuitgpt(tmp_path, tiny_model())
    weights = load_file(folder / "model.safetensors")
    wte = weights["circuit_model.transformer.wte.weight"]
    for name, message in [
        ("lm_head.weight", "'lm_head.weight'; all names must start with"),
        ("circuit_model.x", "'x'"),
    ]:
        save_file(weights | {name: wte.clone()}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: unknown tensor {message}"):
            load(folder)
    save_file(weights | {"circuit_model.wte.weight": wte.clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wte\.weight is in the file twice"):
        load(folder)


def test_code_in_a_repository_is_never_run(tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "modeling.py").write_text(f"open({str(trap)!r}, 'w')")
    values = {"model_type": "other", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"model_type is not 'tl_sparse' .*auto_map\) is never run"
    ):
        load(tmp_path)
    for strange in (["circuitgpt"], 1, None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": strange}))
        with pytest.raises(CheckpointError, match=r"not a format that tl_sparse knows$"):
            load(tmp_path)
    assert not trap.exists()


# --- OpenAI's folders: what is left over for them


def test_without_flash_the_original_has_a_mask_and_no_sinks(tmp_path):
    model = tiny_model()
    folder = write_openai(tmp_path, model, flash=False, sink=True)
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    weights["transformer.h.0.attn.bias"] = torch.ones(8, 8).tril().view(1, 1, 8, 8)
    torch.save(weights, folder / "final_model.pt")
    assert_same_model(load(folder, device="cpu"), model)


def test_two_names_of_one_size(tmp_path):
    model = tiny_model()
    assert_same_model(
        load(write_openai(tmp_path, model, d_mlp=None, n_mlp=10), device="cpu"), model
    )
    assert_same_model(load(write_openai(tmp_path, model, n_mlp=10), device="cpu"), model)
    with pytest.raises(ConfigError, match="d_mlp = 10 and n_mlp = 11 must be equal"):
        load(write_openai(tmp_path, model, n_mlp=11), device="cpu")


def test_a_mis_shaped_matrix_of_the_right_size_is_refused(tmp_path):
    folder = write_openai(tmp_path, tiny_model(d_model=15, n_heads=3, d_head=5, d_mlp=15))
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"):
        changed = weights[name].reshape(15, -1)
        torch.save(weights | {name: changed}, folder / "final_model.pt")
        with pytest.raises(CheckpointError, match=r"of shape \[15, .*does not fit|has shape"):
            load(folder)


# --- sparse_pretrain


def test_computes_what_sparse_pretrain_computes():
    model = load(GOLDEN / "sparse_pretrain", device="cpu")
    assert model.cfg.model_name == "sparse_pretrain"
    assert model.sparse_cfg == SparseConfig(
        n_layers=2,
        d_model=32,
        n_heads=4,
        d_head=8,
        d_mlp=128,
        d_vocab=48,
        n_ctx=32,
        abs_topk=paper_topk(0.25),
        attn_sinks=True,
        bigram_table=True,
    )
    expected = load_file(GOLDEN / "sparse_pretrain" / "expected.safetensors")
    torch.testing.assert_close(model(expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)


SIZES = dict(n_heads=2, d_head=3)  # 2 · 3 is tiny_config's d_model


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize(
    "features",
    [
        dict(),
        dict(normalization="layer", norm_bias=True, act_fn="relu", tied_unembed=True),
        dict(positions="added", biases=False, attn_sinks=True, bigram_table=True, n_layers=2),
        dict(abs_topk=dict.fromkeys(("resid_pre", "attn_q", "resid_post_attn", "mlp_neuron"), 0.5)),
        dict(abs_topk=dict.fromkeys(("attn_in", "mlp_out"), 1.0)),
    ],
)
def test_every_feature_is_read_from_sparse_pretrains_format(features, safetensors, tmp_path):
    model = tiny_model(**SIZES, **features)
    folder = write_sparse_pretrain(tmp_path, model, safetensors=safetensors)
    assert_same_model(load(folder, device="cpu"), model)


def test_absent_keys_have_sparse_pretrains_defaults(tmp_path):
    model = tiny_model(**SIZES, d_mlp=24, attn_sinks=True, bigram_table=True)
    required = {"n_layer", "d_model", "n_ctx", "d_head", "vocab_size"}
    written = json.loads((write_sparse_pretrain(tmp_path, model) / "config.json").read_text())
    optional = written["model_config"].keys() - required
    assert_same_model(
        load(write_sparse_pretrain(tmp_path, model, drop=optional), device="cpu"), model
    )
    values = json.loads((tmp_path / "config.json").read_text())
    for sparsity, expected in [
        ({}, paper_topk(0.25)),
        ({"activation_topk_fraction": 0.5}, paper_topk(0.5)),
        ({"enable_activation_sparsity": False}, {}),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(values | {"sparsity_config": sparsity}))
        assert load(tmp_path, device="cpu").sparse_cfg.abs_topk == expected
    del values["sparsity_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load(tmp_path, device="cpu").sparse_cfg.abs_topk == {}


def test_at_least_one_entry_is_kept(tmp_path):
    sparsity = dict(
        enable_activation_sparsity=True,
        activation_sparsity_locations="attn_in,mlp_neuron,resid_mid",
    )
    for fraction in (0.1, 0.0):
        folder = write_sparse_pretrain(
            tmp_path,
            tiny_model(**SIZES),
            sparsity=sparsity | {"activation_topk_fraction": fraction},
        )
        cfg = load(folder, device="cpu").sparse_cfg
        assert {name: cfg.topk(name) for name in cfg.abs_topk} == dict(
            attn_in=1, mlp_neuron=1, resid_post_attn=1
        )


def test_without_flash_attention_sparse_pretrain_ignores_its_sinks(tmp_path):
    model = tiny_model(**SIZES)
    extra = {
        "blocks.0.attn.causal_mask": torch.ones(8, 8).tril().view(1, 1, 8, 8),
        "blocks.0.attn.attn_fn.sink_logit": torch.ones(2),
    }
    changes = dict(use_flash_attention=False, use_attention_sinks=True)
    assert_same_model(
        load(write_sparse_pretrain(tmp_path, model, extra=extra, **changes), device="cpu"), model
    )
    with pytest.raises(CheckpointError, match=r"unexpected blocks\.0\.attn\.sink"):
        load(write_sparse_pretrain(tmp_path, model, extra=extra), device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(d_head=4), "d_model = 6 .* a multiple of d_head = 4"),
        (dict(d_head=0), "d_head = 0 .* an integer of at least 1"),
        (dict(d_model=None), "d_model = None .* an integer of at least 1"),
        (dict(n_layer=2), "the configuration has 2 layers, but the file has 1"),
        (dict(use_rms_norm=1), "use_rms_norm = 1 .* true or false"),
        (dict(activation="silu"), "act_fn = 'silu' .* one of gelu, relu"),
        (dict(rotary=True), "unknown keys rotary"),
        (dict(drop=["vocab_size", "n_ctx"]), "missing keys n_ctx, vocab_size"),
        (
            dict(tie_embeddings=True),
            r"pytorch_model\.bin: tied_unembed is true, but lm_head\.weight differs",
        ),
        (dict(sparsity={"activation_kind": "relu"}), "unknown keys activation_kind"),
        (
            dict(sparsity={"activation_topk_fraction": 1.5}),
            r"activation_topk_fraction = 1.5 .* in \[0, 1\]",
        ),
        (
            dict(sparsity={"activation_topk_fraction": True}),
            r"activation_topk_fraction = True .* in \[0, 1\]",
        ),
        (
            dict(sparsity={"activation_sparsity_locations": "attn_in, mlp_in"}),
            "= 'attn_in, mlp_in' .* of resid_pre, ",
        ),
        (
            dict(sparsity={"activation_sparsity_locations": ["attn_in"]}),
            r"locations = \['attn_in'\] .* of resid_pre, ",
        ),
        (
            dict(sparsity={"enable_activation_sparsity": "yes"}),
            "enable_activation_sparsity = 'yes' .* true or false",
        ),
    ],
)
def test_impossible_sparse_pretrain_configurations(changes, message, tmp_path):
    folder = write_sparse_pretrain(tmp_path / "broken", tiny_model(**SIZES), **changes)
    with pytest.raises(TLSparseError, match=f"broken.*{message}"):
        load(folder)


def test_sparse_pretrain_sections_are_objects(tmp_path):
    for values in ({"model_config": []}, {"model_config": {}, "sparsity_config": 1}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=r"_config = .* a JSON object"):
            load(tmp_path)


# --- zeros at no cost


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


@pytest.fixture(scope="module")
def sparse_model():
    """A model with 1 % of the entries of every matrix nonzero, and with some -0.0 among them."""
    model = create(
        SparseConfig(2, 256, 16, 16, 1024, 512, 128, attn_sinks=True, tied_unembed=True),
        0,
        device="cpu",
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[torch.rand(parameter.shape, generator=generator) > 0.01] = 0.0
                parameter.flatten()[:3] = -0.0
    return model


@pytest.mark.parametrize(
    ("dtype", "share"), [("float32", 0.03), ("bfloat16", 0.05), ("float16", 0.05)]
)
def test_zeros_take_no_space_and_no_bit_is_lost(dtype, share, sparse_model, tmp_path):
    sparse_model.save_pretrained(tmp_path / "float32")
    model = load(tmp_path / "float32", device="cpu", dtype=dtype)
    model.save_pretrained(tmp_path / "compact")
    model.save_pretrained(tmp_path / "dense", dense=True)
    sizes = [
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("compact", "dense")
    ]
    assert sizes[0] <= share * sizes[1]
    weights = model.state_dict()
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == weights.keys()
    for name in ("compact", "dense"):
        assert json.loads((tmp_path / name / "config.json").read_text())["storage"] == name
        again = load(tmp_path / name, device="cpu")
        assert_same_model(again, model)
        assert all(
            torch.equal(bits(again.state_dict()[key]), bits(x)) for key, x in weights.items()
        )


def test_what_compact_storage_does_not_make_smaller_stays_dense(tmp_path):
    model = tiny_model(full_config())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path, overwrite=True)
    assert_same_model(load(tmp_path, device="cpu"), model)


def test_folders_that_do_not_say_how_they_are_stored(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, dense=True)
    values = read_json(tmp_path / "config.json")
    del values["storage"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same_model(load(tmp_path, device="cpu"), model)
    (tmp_path / "config.json").write_text(json.dumps(values | {"storage": "zip"}))
    with pytest.raises(
        CheckpointError, match=r"config\.json: storage = 'zip' must be 'compact' or 'dense'"
    ):
        load(tmp_path)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("positions", None, r" needs all of ln_final\.w\.values, "),
        ("shape", None, r" needs all of ln_final\.w\.values, "),
        ("values", None, r" needs all of ln_final\.w\.values, "),
        ("positions", int32(3, 5), r"\.positions must be 1-D, with one int32 for each"),
        ("positions", int32(1, 3, 5).long(), r"\.positions must be 1-D, with one int32 for each"),
        ("positions", int32(1, 3, 5)[None], r"\.positions must be 1-D, with one int32 for each"),
        ("values", torch.ones(3, 1), r"\.positions must be 1-D, with one int32 for each"),
        ("positions", int32(3, 5, 5), r"\.positions must increase"),
        ("positions", int32(5, 3, 9), r"\.positions must increase"),
        ("positions", int32(-1, 3, 5), r"\.positions must .* indices into shape \[256\]"),
        ("positions", int32(1, 3, 256), r"\.positions must .* indices into shape \[256\]"),
        ("shape", torch.tensor([-256]), r"\.shape must be a 1-D int64 tensor of at most 8 sizes"),
        ("shape", torch.tensor([256.0]), r"\.shape must be a 1-D int64 tensor of at most 8 sizes"),
        ("shape", torch.tensor(256), r"\.shape must be a 1-D int64 tensor of at most 8 sizes"),
        ("shape", torch.ones(9).long(), r"\.shape must be a 1-D int64 tensor of at most 8 sizes"),
        (
            "shape",
            torch.tensor([128, 2]),
            r" has shape \[128, 2\], but the configuration needs \[256\]",
        ),
        ("shape", torch.tensor([2**62, 2**62]), r" has shape \[4611686018427387904, "),
        ("values", torch.tensor([1.0, torch.nan, 2.0]), " has entries that are NaN or infinite"),
        ("values", torch.ones(3).int(), r" has dtype torch\.int32"),
    ],
)
def test_damaged_compact_tensors(part, value, message, tmp_path):
    config = tiny_config(d_model=256)
    create(config, 0, device="cpu").save_pretrained(tmp_path)
    without_checksums(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["ln_final.w"]
    parts = {"values": torch.ones(3), "positions": int32(1, 3, 5), "shape": torch.tensor([256])} | {
        part: value
    }
    save_file(
        weights | {f"ln_final.w.{name}": x for name, x in parts.items() if x is not None}, path
    )
    with pytest.raises(CheckpointError, match=rf"ln_final\.w{message}"):
        load(tmp_path)


def test_a_tensor_both_dense_and_compact(tmp_path):
    create(tiny_config(d_model=256), 0, device="cpu").save_pretrained(tmp_path)
    without_checksums(tmp_path)
    path = tmp_path / "model.safetensors"
    parts = {"values": torch.ones(1), "positions": int32(1), "shape": torch.tensor([256])}
    save_file(load_file(path) | {f"ln_final.w.{name}": x for name, x in parts.items()}, path)
    with pytest.raises(CheckpointError, match=r"ln_final\.w is in the file twice"):
        load(tmp_path)


# --- reading


def test_a_model_is_independent_of_its_file(tmp_path):
    for write in (save_model_in, write_openai, write_circuitgpt):
        model = tiny_model()
        folder = write(tmp_path / write.__name__, model)
        loaded = load(folder, device="cpu")
        for path in folder.iterdir():
            path.write_bytes(bytes(path.stat().st_size))
        assert_same_model(loaded, model)
        assert all(parameter.is_contiguous() for parameter in loaded.parameters())


def save_model_in(folder, model):
    model.save_pretrained(folder)
    return folder


def test_build_network_takes_what_it_reads(tmp_path):
    checkpoint = read_checkpoint(write_openai(tmp_path, tiny_model()))
    network = build_network(checkpoint, tmp_path, dtype=torch.float64)
    assert not checkpoint.tensors
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}


@pytest.mark.filterwarnings("ignore:.*non-zipfile")
def test_files_of_old_torch(tmp_path):
    model = tiny_model()
    folder = write_openai(tmp_path, model)
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    torch.save(weights, folder / "final_model.pt", _use_new_zipfile_serialization=False)
    assert_same_model(load(folder, device="cpu"), model)


def rezip(path, change):
    """The archive at `path` with its records as `change` (name, content) gives them."""
    with zipfile.ZipFile(path) as archive:
        records = [change(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, compression in records:
            archive.writestr(name, content, compression)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, content: (name, content, zipfile.ZIP_DEFLATED), "overlap or are compressed"),
        (
            lambda name, content: (
                name,
                content[: len(content) // 2 if "/data/" in name else None],
                0,
            ),
            "record",
        ),
        (lambda name, content: (name, content.replace(b"FloatStorage", b"HalfStorage"), 0), ""),
    ],
)
def test_archives_that_contradict_themselves(change, message, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(300)}, path)
    rezip(path, change)
    with pytest.raises(CheckpointError, match=rf"x\.pt is .*{message}"):
        read_torch(path)


def test_a_changed_byte_in_an_archive_is_seen(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(300)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"x\.pt is truncated or damaged: the checksum of x/data/0 is wrong"
    ):
        read_torch(path)


def test_one_value_seen_many_times_is_not_a_tensor(tmp_path):
    folder = write_openai(tmp_path, tiny_model())
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    weights["transformer.wpe.weight"] = torch.zeros(1).expand(10**12)
    torch.save(weights, folder / "final_model.pt")
    with pytest.raises(CheckpointError, match=r"wpe\.weight is not a dense tensor"):
        load(folder)


# --- tokenizers


def test_a_tokenizer_can_be_given(tmp_path):
    words = ["<|endoftext|>", "a", "b", "c"]
    model, tokenizer = tiny_model(), word_tokenizer(words)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "alone.json").write_bytes((tmp_path / "tokenizer" / "tokenizer.json").read_bytes())
    assert load(tmp_path / "model").tokenizer is None
    for given_tokenizer in (
        tokenizer,
        tmp_path / "tokenizer",
        str(tmp_path / "tokenizer"),
        tmp_path / "tokenizer" / "tokenizer.json",
        tmp_path / "alone.json",
    ):
        loaded = load(tmp_path / "model", device="cpu", tokenizer=given_tokenizer)
        assert loaded.to_tokens("c a b", prepend_bos=False).tolist() == [[3, 1, 2]]
    # It is this one, not the one beside the model.
    word_tokenizer([*words, *"defghijkl"]).save_pretrained(tmp_path / "model")
    assert len(load(tmp_path / "model", tokenizer=tokenizer).tokenizer) == 4
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in .*absent"):
        load(tmp_path / "model", tokenizer=tmp_path / "absent")
    with pytest.raises(
        TokenizerError, match="the tokenizer has 13 tokens, more than the model's d_vocab = 11"
    ):
        load(tmp_path / "model")


TEXT = """def f(x):
    return x + 1  # naïve

for item in items:
    print('café', item, 1234)


  x = 'don't' """


@pytest.fixture(scope="module")
def like_gpt2():
    """A byte-level BPE tokenizer that cuts text as GPT-2's does; and its tokens, bytes by rank."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet)
    )
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocab = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return backend, [bytes(bytes_of[letter] for letter in token) for token, _ in vocab]


def tiktoken_ids(text, ranks):
    """tiktoken's algorithm: in each piece, merge the pair of lowest rank while there is one."""
    ids = []
    for piece in regex.findall(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text
    ):
        parts = [bytes([byte]) for byte in piece.encode()]
        while piece.encode() not in parts:
            pairs = [
                (ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks
            ]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def write_tiktoken(path, tokens):
    path.write_text(
        "".join(f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )


def test_tiktoken_vocabularies(like_gpt2, tmp_path):
    tokens = like_gpt2[1]
    write_tiktoken(tmp_path / "x.tiktoken", tokens)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    generator = random.Random(0)
    for source in (tmp_path, tmp_path / "x.tiktoken"):
        tokenizer = load_tokenizer(source)
        assert len(tokenizer) == len(tokens) + 1
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == len(tokens)
        for text in (
            TEXT,
            *("".join(generator.choices(TEXT + "é\u20ac\U0001f600", k=60)) for _ in range(100)),
        ):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == tiktoken_ids(text, ranks)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    model = tiny_model(d_vocab=len(tokens) + 1)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert loaded.to_tokens(TEXT[:5]).tolist() == [[len(tokens), *tiktoken_ids(TEXT[:5], ranks)]]


def test_a_vocabulary_with_its_merges(like_gpt2, tmp_path):
    backend, _ = like_gpt2
    backend.model.save(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT, add_special_tokens=False) == backend.encode(TEXT).ids
    assert load_tokenizer(tmp_path / "vocab.json").get_vocab() == backend.get_vocab()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],  # without the token of a byte
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, "YWJj 0"],
        lambda lines: [*lines, "YWJj"],
        lambda lines: [*lines, "YWJj many"],
        lambda lines: [*lines, "*** 999"],
        lambda lines: [],
    ],
)
def test_damaged_tiktoken_files(change, like_gpt2, tmp_path):
    path = tmp_path / "x.tiktoken"
    write_tiktoken(path, like_gpt2[1])
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(TokenizerError, match=r"x\.tiktoken is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_openais_folders_have_openais_tokenizer(tmp_path, monkeypatch):
    words = ["<|endoftext|>", *map(str, range(2047))]
    word_tokenizer(words).save_pretrained(tmp_path / "tokenizer")
    asked = []

    def openai_tokenizer(local_only):
        asked.append(local_only)
        return tmp_path / "tokenizer"

    monkeypatch.setattr("tl_sparse.checkpoints.loading.openai_tokenizer", openai_tokenizer)
    model = tiny_model(d_vocab=2048)
    folder = write_openai(tmp_path / "model", model)
    assert load(folder).to_tokens("7 5", prepend_bos=False).tolist() == [[8, 6]]
    assert load(folder, tokenizer=word_tokenizer(words[:9])).tokenizer.vocab_size == 9
    assert load(write_openai(tmp_path / "other", tiny_model())).tokenizer is None
    assert load(write_openai(tmp_path / "other", model, tokenizer_name="gpt2_2k")).tokenizer is None
    assert asked == [True]  # a folder here needs no network …
    assert (
        load(write_openai(tmp_path / "other", model, drop=["tokenizer_name"])).tokenizer is not None
    )
    monkeypatch.setattr("tl_sparse.checkpoints.loading.find", lambda source, revision: folder)
    assert load("csp_yolo1").tokenizer is not None
    assert asked == [True, True, False]  # … which a published name may
    monkeypatch.setattr("tl_sparse.checkpoints.loading.openai_tokenizer", lambda local_only: None)
    assert load(folder).tokenizer is None


def test_names(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert load("mine").cfg.model_name == load(tmp_path / "mine").cfg.model_name == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert load(".").cfg.model_name == "mine"
    monkeypatch.setattr(
        "tl_sparse.checkpoints.loading.find", lambda source, revision: tmp_path / "mine"
    )
    loaded = load("user/repo", revision="v1")
    assert loaded.cfg.model_name == "user/repo"
    tokens = random_tokens(model)
    assert torch.equal(loaded.to("cpu")(tokens), model(tokens))


@pytest.mark.slow
def test_random_bytes_are_no_model(tmp_path):
    generator = random.Random(0)
    folder = write_openai(tmp_path, tiny_model())
    for _ in range(200):
        (folder / "final_model.pt").write_bytes(
            b"PK\x03\x04" + generator.randbytes(generator.randrange(500))
        )
        with pytest.raises(CheckpointError):
            load(folder)
