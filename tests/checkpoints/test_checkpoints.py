"""Model folders: OpenAI's and ours are read exactly, and anything damaged is named."""

import contextlib
import json
import os
import pickle
import shutil
import stat

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

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
from tl_sparse import SparseConfig, create, load
from tl_sparse.checkpoints.network import resolve_device
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import CheckpointError, ConfigError, TLSparseError, TokenizerError
from tl_sparse.files import read_json, write_json, write_tensors
from tl_sparse.outputs import replacing

# --- the original implementation

GOLDEN_MODELS = ["sweep", "sink", "catpos", "dense"]
#: Golden activation → hook, in the block of the layer.
HOOK_OF = {
    "attn.act_in": "ln1.hook_read",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.y": "attn.hook_z",
    "attn.resid_delta": "hook_attn_out",
    "mlp.act_in": "ln2.hook_read",
    "mlp.post_act": "mlp.hook_post",
    "mlp.resid_delta": "hook_mlp_out",
    "resid_in": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
}


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_computes_what_the_original_implementation_computes(name):
    model = load(GOLDEN / name, device="cpu")
    assert not model.training
    assert model.cfg.model_name == name
    expected = load_file(GOLDEN / name / "expected.safetensors")
    tokens, logits = expected.pop("tokens"), expected.pop("logits")
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-4)
    cached_logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(cached_logits, logits, rtol=0, atol=1e-4)
    assert len(expected) == 11 * model.cfg.n_layers + 1
    for recorded, value in expected.items():
        layer, _, place = recorded.removeprefix("act/").partition(".")
        if recorded == "act/final_resid":
            hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        else:
            hook = f"blocks.{layer}.{HOOK_OF[place]}"
        ours = cache[hook].flatten(2)
        torch.testing.assert_close(
            ours, value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=recorded
        )
        if model.sparse_cfg.abs_topk:
            assert torch.equal(ours == 0, value == 0), f"{recorded}: other entries are kept"


def test_golden_configurations():
    paper = dict.fromkeys(
        ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out"),
        0.25,
    )
    small = dict(
        n_layers=2,
        d_model=32,
        d_vocab=48,
        n_ctx=32,
        logits_bias=True,
        bigram_table=True,
        positions="added",
    )
    configs = {name: load(GOLDEN / name, device="cpu").sparse_cfg for name in GOLDEN_MODELS}
    assert configs["sweep"] == SparseConfig(**small, n_heads=4, d_head=8, d_mlp=128, abs_topk=paper)
    assert configs["sink"] == SparseConfig(
        **small | dict(n_layers=3, d_model=24),
        n_heads=6,
        d_head=4,
        d_mlp=96,
        abs_topk=paper,
        attn_sinks=True,
    )
    assert configs["catpos"] == SparseConfig(
        **small | dict(bigram_table=False, positions="concatenated"),
        n_heads=4,
        d_head=8,
        d_mlp=64,
        abs_topk=paper,
        d_pos=8,
    )
    assert configs["dense"] == SparseConfig(
        **small | dict(logits_bias=False), n_heads=2, d_head=16, d_mlp=128
    )


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_saving_and_loading_again_changes_no_bit(name, tmp_path):
    model = load(GOLDEN / name, device="cpu")
    model.save_pretrained(tmp_path / "new" / "copy")
    again = load(tmp_path / "new" / "copy", device="cpu")
    assert_same_model(again, model)
    assert sorted(path.name for path in (tmp_path / "new" / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def assert_same_model(model, expected):
    assert type(model) is type(expected)
    assert model.sparse_cfg == expected.sparse_cfg
    weights, expected_weights = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == expected_weights[name].dtype
        assert torch.equal(tensor, expected_weights[name]), name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in expected.named_parameters() if p.requires_grad}
    tokens = random_tokens(model)
    assert torch.equal(model(tokens), expected(tokens))


@settings(max_examples=25)
@given(config=sparse_configs())
def test_any_model_of_ours_comes_back_exactly(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(config)
    model.save_pretrained(folder)
    assert_same_model(load(folder, device="cpu"), model)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
    model = tiny_model(full_config(biases=False), dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    kept = load(tmp_path, device="cpu")  # None keeps the file's
    assert_same_model(kept, model)
    assert kept.cfg.dtype == getattr(torch, dtype)
    for given_dtype in ("float32", torch.float32):
        cast = load(tmp_path, device="cpu", dtype=given_dtype)
        assert (
            {p.dtype for p in cast.parameters()}
            == {cast.b_Q.dtype, cast.cfg.dtype}
            == {torch.float32}
        )
        assert torch.equal(cast.W_in, model.W_in.float())
    fresh = create(full_config(), 0, device="cpu", dtype=dtype)
    assert {p.dtype for p in fresh.parameters()} == {fresh.cfg.dtype} == {getattr(torch, dtype)}


def test_a_file_of_several_dtypes_is_read_in_the_widest(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    without_checksums(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["unembed.W_U"] = weights["unembed.W_U"].double()
    save_file(weights, tmp_path / "model.safetensors")
    mixed = load(tmp_path, device="cpu")
    assert {p.dtype for p in mixed.parameters()} == {mixed.cfg.dtype} == {torch.float64}
    tokens = random_tokens(model)
    torch.testing.assert_close(mixed(tokens).float(), model(tokens))


def test_the_tokenizer_is_saved_beside_the_model(tmp_path):
    words = ["<|endoftext|>", "a", "b", "c"]
    model = tiny_model(tokenizer=word_tokenizer(words))
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu")
    assert torch.equal(again("c a b"), model("c a b"))
    without_checksums(tmp_path)
    word_tokenizer([*words, *"defghijk"]).save_pretrained(tmp_path)
    with pytest.raises(
        TokenizerError, match="the tokenizer has 12 tokens, more than the model's d_vocab = 11"
    ):
        load(tmp_path, device="cpu")


def test_a_tokenizer_does_not_outlive_its_model(tmp_path):
    tiny_model(tokenizer=word_tokenizer(["<|endoftext|>", "a"])).save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path, overwrite=True)
    assert load(tmp_path, device="cpu").tokenizer is None
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("write", [write_openai, write_circuitgpt, write_sparse_pretrain])
def test_a_model_of_another_format_is_not_written_over(write, tmp_path):
    """What is saved beside it would not be what is read."""
    write(tmp_path, tiny_model())
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        CheckpointError, match=f"cannot write .*{tmp_path.name}: a model of another format"
    ):
        tiny_model(seed=1, tokenizer=word_tokenizer(["<|endoftext|>", "a"])).save_pretrained(
            tmp_path
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize(
    "name", ["beeg_config.json", "final_model.pt", "pytorch_model.bin", "config.json"]
)
def test_half_a_model_of_another_format_is_not_written_over(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"cannot write .*, with {name}"):
        tiny_model().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [name]


# --- OpenAI's format


def as_openai_can_say_it(config):
    """The nearest configuration that OpenAI's format can hold."""
    fraction = max(config.abs_topk.values(), default=None)
    sinusoidal = config.sinusoidal and config.positions == "concatenated"
    values = config.to_dict() | {
        "abs_topk": dict.fromkeys(config.abs_topk, fraction),
        "sinusoidal": sinusoidal,
    }
    return SparseConfig.from_dict(values)


@settings(max_examples=40)
@given(config=sparse_configs())
def test_every_feature_is_read_from_openais_format(config, tmp_path_factory):
    try:
        config = as_openai_can_say_it(config)
    except ConfigError:  # the shared fraction keeps no entry of a smaller location
        config = SparseConfig.from_dict(config.to_dict() | {"abs_topk": {}, "sinusoidal": False})
    model = tiny_model(config)
    folder = write_openai(tmp_path_factory.mktemp("openai"), model)
    assert_same_model(load(folder, device="cpu"), model)


def test_absent_keys_have_the_published_defaults(tmp_path):
    model = tiny_model(
        n_heads=2, d_head=3, d_mlp=24, normalization="layer", norm_bias=True, tied_unembed=True
    )
    written = json.loads((write_openai(tmp_path, model) / "beeg_config.json").read_text())
    optional = set(written) - {"block_size", "vocab_size", "n_layer", "n_head", "d_model"}
    loaded = load(write_openai(tmp_path, model, drop=optional), device="cpu")
    assert_same_model(loaded, model)
    assert loaded.sparse_cfg.act_fn == "gelu"
    # Null is the default too, and a fraction without locations acts at four of them.
    loaded = load(
        write_openai(tmp_path, model, drop=["afrac_loctypes"], afrac=0.5, d_head=None, d_mlp=None),
        device="cpu",
    )
    four = dict.fromkeys(("attn_in", "attn_out", "mlp_in", "mlp_out"), 0.5)
    assert loaded.sparse_cfg == tiny_config(
        n_heads=2,
        d_head=3,
        d_mlp=24,
        normalization="layer",
        norm_bias=True,
        tied_unembed=True,
        abs_topk=four,
    )


def test_older_and_harmless_keys(tmp_path):
    model = tiny_model()
    older = write_openai(
        tmp_path,
        model,
        drop=["d_mlp"],
        n_mlp=10,
        bigram_table_rank=None,
        use_tied_aux_matrix=False,
        dropout=0.1,
        pfrac=None,
        lr=1e-3,
    )
    assert_same_model(load(older, device="cpu"), model)


def test_an_all_zero_position_table_means_no_positions(tmp_path):
    model = tiny_model(positions="added")
    with torch.no_grad():
        model.pos_embed.W_pos.zero_()
    loaded = load(write_openai(tmp_path, model), device="cpu")
    assert loaded.sparse_cfg.positions == "none"
    tokens = random_tokens(model)
    assert torch.equal(loaded(tokens), model(tokens))


def test_a_tied_unembedding_must_be_the_embedding(tmp_path):
    model = tiny_model(tied_unembed=True)
    folder = write_openai(tmp_path, model)
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    del weights["lm_head.weight"]  # absent: nothing to contradict
    torch.save(weights, folder / "final_model.pt")
    assert_same_model(load(folder, device="cpu"), model)
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    torch.save(weights, folder / "final_model.pt")
    with pytest.raises(
        CheckpointError, match=r"final_model\.pt: tied_unembed is true, but lm_head\.weight differs"
    ):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bigram_table_rank=8), "bigram_table_rank must be null"),
        (dict(use_tied_aux_matrix=True), "use_tied_aux_matrix must be false"),
        (dict(rotary=True), "unknown keys rotary; they may change what the model computes"),
        (dict(n_layer="2"), "n_layers = '2' .* of type int"),
        (dict(n_layer=10**12), "n_layers = 1000000000000 .* at most"),
        (dict(n_layer=3), "the configuration has 3 layers, but the file has 1"),
        (dict(block_size=0), "n_ctx = 0 .* at least 1"),
        (dict(vocab_size=10**12), "d_vocab = 1000000000000 .* at most"),
        (
            dict(vocab_size=12),
            r"embed\.W_E has shape \[11, 6\], but the configuration needs \[12, 6\]",
        ),
        (dict(d_model="6"), "d_model = '6' .* an integer of at least 1"),
        (dict(d_model=7), r"c_attn\.weight of shape \[45, 6\] does not fit the configuration"),
        (dict(n_head=0), "n_head = 0 .* an integer of at least 1"),
        (dict(n_head=True), "n_head = True .* an integer of at least 1"),
        (dict(d_head=4), r"c_attn\.weight of shape \[45, 6\] does not fit the configuration"),
        (dict(d_head=-5), "d_head = -5 .* at least 1"),
        (dict(n_head=64, d_head=None), "d_head = 0 .* at least 1"),
        (dict(d_mlp=11), r"mlp\.W_in has shape \[6, 10\], but the configuration needs \[6, 11\]"),
        (dict(d_pos_emb="4"), "d_pos = '4' .* of type int"),
        (dict(d_pos_emb=4), "c_attn.weight of shape .* does not fit the configuration"),
        (dict(rms_norm="false"), "rms_norm = 'false' .* true or false"),
        (dict(rms_norm=False), r"missing blocks\.0\.ln1\.b|unexpected"),
        (dict(ln_bias=1), "ln_bias = 1 .* true or false"),
        (dict(sinusoidal_cat_pos_emb=None), "sinusoidal_cat_pos_emb = None .* true or false"),
        (dict(sink=1), "attn_sinks = 1 .* of type bool"),
        (dict(sink=True), r"missing blocks\.0\.attn\.sink"),
        (dict(bias=False), r"unexpected blocks\.0\.attn\.b_K"),
        (dict(enable_bigram_table=False), r"unexpected bigram\.W_bigram"),
        (dict(activation_type="silu"), "act_fn = 'silu' .* one of gelu, relu"),
        (
            dict(residual_activation_type="gelu"),
            "residual_activation_type = 'gelu' must be 'identity' or 'relu'",
        ),
        (dict(afrac="0.5"), r"abs_topk\['attn_in'\] = '0.5' .* a fraction"),
        (dict(afrac=1.5), r"abs_topk\['attn_in'\] = 1.5 .* a fraction"),
        (
            dict(afrac_loctypes="attn_in,mlp_gate", afrac=0.5),
            "abs_topk location = 'mlp_gate' .* one of resid_pre",
        ),
        (
            dict(afrac_loctypes=["attn_in"]),
            r"afrac_loctypes = \['attn_in'\] must be names separated by commas",
        ),
    ],
)
def test_impossible_openai_configurations(changes, message, tmp_path):
    folder = write_openai(
        tmp_path / "broken", tiny_model(bigram_table=True, abs_topk={"attn_in": 0.5})
    )
    values = json.loads((folder / "beeg_config.json").read_text()) | {"ln_bias": True} | changes
    (folder / "beeg_config.json").write_text(json.dumps(values))
    with pytest.raises(TLSparseError, match=f"(?s)broken.*({message})"):
        load(folder, device="cpu")


def test_missing_openai_keys_are_named(tmp_path):
    folder = write_openai(tmp_path, tiny_model(), drop=["n_layer", "block_size"])
    with pytest.raises(ConfigError, match=r"beeg_config\.json: missing keys block_size, n_layer"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transformer.h.0.mlp.gate": torch.ones(3)},
            r"unknown tensor 'transformer\.h\.0\.mlp\.gate'",
        ),
        (
            {"transformer.h.7.ln_1.weight": torch.ones(6)},
            "the configuration has 1 layer, but the file has 2",
        ),
        (
            {"transformer.ln_f.weight": torch.ones(7)},
            r"ln_final\.w has shape \[7\], .* needs \[6\]",
        ),
        (
            {"lm_head.weight": torch.ones(3, 11, 6)},
            r"unembed\.W_U has shape \[6, 11, 3\], .* needs \[6, 11\]",
        ),
        (
            {"transformer.h.0.attn.c_attn.weight": torch.tensor(1.0)},
            r"c_attn\.weight of shape \[\] does not fit",
        ),
        (
            {"transformer.h.0.attn.c_proj.bias": torch.full((6,), torch.inf)},
            "attn.b_O has entries that are NaN",
        ),
        (
            {"transformer.wpe.weight": torch.full((8, 6), torch.nan)},
            "pos_embed.W_pos has entries that are NaN",
        ),
        ({"transformer.wte.weight": torch.ones(11, 6).int()}, r"embed\.W_E has dtype torch\.int32"),
        ({"transformer.wte.weight": "many"}, "final_model.pt: 'transformer.wte.weight' is a str"),
        (
            {"transformer.wte.weight": torch.ones(11, 6).to_sparse()},
            "transformer.wte.weight is not a dense tensor",
        ),
        (
            {"transformer.wte.weight": torch.ones(11, 6, device="meta")},
            "transformer.wte.weight is not a dense tensor",
        ),
        ({7: torch.ones(3)}, "final_model.pt: 7 is a Tensor; each entry must be a named tensor"),
        ({"model": {"transformer.wte.weight": torch.ones(3)}}, "final_model.pt: 'model' is a dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:The use of `x.T`", "ignore:Sparse")
def test_damaged_openai_weights(changes, message, tmp_path):
    folder = write_openai(tmp_path / "broken", tiny_model())
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    torch.save(weights | changes, folder / "final_model.pt")
    with pytest.raises(CheckpointError, match=f"broken.*{message}"):
        load(folder, device="cpu")


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_code_in_a_weights_file_is_not_run(write, tmp_path):
    folder, trap = write_openai(tmp_path / "model", tiny_model()), tmp_path / "trap"
    path = folder / "final_model.pt"
    write({"transformer.wte.weight": Attack(trap)}, path)
    with pytest.raises(CheckpointError, match=r"final_model\.pt is refused: .* could run code"):
        load(folder, device="cpu")
    assert not trap.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert trap.exists()  # the attack works on whoever does not look


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_openai_weights(share, tmp_path):
    folder = write_openai(tmp_path, tiny_model())
    path = folder / "final_model.pt"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"final_model\.pt is truncated or damaged"):
        load(folder, device="cpu")
    torch.save([torch.ones(2)], path)
    with pytest.raises(
        CheckpointError, match=r"final_model\.pt must hold a dictionary of tensors, not a list"
    ):
        load(folder, device="cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"there is no file .*final_model\.pt"):
        load(folder, device="cpu")


# --- our own folders, damaged


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(abs_topk={"attn_in": 0.5}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Without checksums, so that the reader itself must notice what is damaged."""
    return without_checksums(shutil.copytree(saved, tmp_path / "broken"))


def test_folders_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"^there is no folder '.*absent'"):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file' is a file, not the folder of a model"):
        load(str(tmp_path / "file"))
    with pytest.raises(
        CheckpointError, match=r"holds no model: neither config\.json .* nor beeg_config\.json"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(n_layer=1),
            "config.json: unknown configuration key 'n_layer'; did you mean 'n_layers'",
        ),
        (dict(n_layers=0), "config.json: n_layers = 0 .* at least 1"),
        (dict(n_layers=True), "config.json: n_layers = True .* of type int"),
        (dict(n_layers="1"), "config.json: n_layers = '1' .* of type int"),
        (dict(n_layers=1.0), "config.json: n_layers = 1.0 .* of type int"),
        (dict(n_layers=10**12), "config.json: n_layers = 1000000000000 .* at most"),
        (dict(n_layers=10**8), "the configuration has 100000000 layers, and at most 1000 are read"),
        (dict(n_layers=2), "the configuration has 2 layers, but the file has 1"),
        (dict(d_model=10**12), "config.json: d_model = 1000000000000 .* at most"),
        (
            dict(d_model=10**8, n_heads=10**8, d_head=10**8),
            "the sizes in the configuration are impossibly large",
        ),
        (
            dict(d_vocab=10**8),
            r"W_E has shape \[11, 6\], but the configuration needs \[100000000, 6\]",
        ),
        (dict(d_mlp=None), "config.json: d_mlp = None .* of type int"),
        (dict(abs_topk=[]), r"config.json: abs_topk = \[\] .* a mapping"),
        (
            dict(abs_topk={"attn_in": float("nan")}),
            r"config.json: abs_topk\['attn_in'\] = nan .* a fraction",
        ),
        (dict(biases=False), r"unexpected blocks\.0\.attn\.b_K"),
        (dict(attn_sinks=True), r"missing blocks\.0\.attn\.sink"),
        (dict(tied_unembed=True), r"unexpected unembed\.W_U"),
        (dict(model_type="llama"), "is a dense model, which TransformerLens opens"),
        (dict(model_type=None), "config.json: model_type is not 'tl_sparse'"),
        (dict(format_version=2), "config.json: format_version is not 1"),
    ],
)
def test_impossible_configurations(changes, message, folder):
    values = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(TLSparseError, match=f"broken.*{message}"):
        load(folder, device="cpu")


def test_missing_configuration_keys_are_named(folder):
    values = read_json(folder / "config.json")
    del values["d_head"], values["n_ctx"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match=r"config\.json: missing configuration keys: d_head, n_ctx"
    ):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"n_layers": 1,', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b'"text"', "must hold a JSON object, not a str"),
        (b"null", "must hold a JSON object, not a NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "beeg_config.json"])
def test_configurations_that_are_no_json_object(name, text, message, folder):
    (folder / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"broken/{name} {message}"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "ln_final.w",
            lambda x: None,
            r"tensors do not fit the configuration: missing ln_final\.w",
        ),
        (
            "ln_final.v",
            lambda x: torch.ones(6),
            r"tensors do not fit the configuration: unexpected ln_final\.v",
        ),
        (
            "blocks.3.ln1.w",
            lambda x: torch.ones(6),
            "the configuration has 1 layer, but the file has 2",
        ),
        (
            "embed.W_E",
            lambda x: x.T.contiguous(),
            r"embed\.W_E has shape \[6, 11\], .* needs \[11, 6\]",
        ),
        (
            "embed.W_E",
            lambda x: x[None].clone(),
            r"embed\.W_E has shape \[1, 11, 6\], .* needs \[11, 6\]",
        ),
        ("embed.W_E", lambda x: x / 0 * 0, "embed.W_E has entries that are NaN or infinite"),
        ("unembed.W_U", lambda x: x / 0, "unembed.W_U has entries that are NaN or infinite"),
        (
            "embed.W_E",
            lambda x: x.long(),
            r"embed\.W_E has dtype torch\.int64; weights must be floating-point",
        ),
        (
            "embed.W_E",
            lambda x: x > 0,
            r"embed\.W_E has dtype torch\.bool; weights must be floating-point",
        ),
        ("embed.W_E", lambda x: x.to(torch.float8_e4m3fn), r"embed\.W_E has dtype torch\.float8"),
    ],
)
def test_damaged_weights(name, change, message, folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name] = change(weights.get(name))
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=f"broken.*{message}"):
        load(folder, device="cpu")


def test_a_layer_with_a_number_that_no_integer_has(folder, tmp_path):
    number = "7" * 5000
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {f"blocks.{number}.ln1.w": torch.ones(6)}, folder / "model.safetensors")
    theirs = write_openai(tmp_path / "openai", tiny_model())
    weights = torch.load(theirs / "final_model.pt", weights_only=True)
    torch.save(
        weights | {f"transformer.h.{number}.ln_1.weight": torch.ones(6)}, theirs / "final_model.pt"
    )
    for path in (folder, theirs):
        with pytest.raises(CheckpointError, match=f"unexpected blocks.{number}.ln1.w"):
            load(path, device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights(share, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load(folder, device="cpu")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no file .*broken/model\.safetensors"):
        load(folder, device="cpu")


def _raising(error):
    def stub(*args, **kwargs):
        raise error

    return stub


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_here_is_not_offered(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", _raising(RuntimeError("not here")))
    with pytest.raises(ConfigError) as caught:
        resolve_device(device)
    why = "because torch finds no GPU here"
    assert str(caught.value) == f"device = {device!r} is not possible, {why}; use 'cpu'"


def test_the_gpus_that_are_here_are_offered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", _raising(RuntimeError("not here")))
    with pytest.raises(ConfigError) as caught:
        resolve_device("cuda:7")
    here = "'cpu' or 'cuda:0' or 'cuda:1'"
    assert str(caught.value) == f"device = 'cuda:7' is not possible; use {here}"


@pytest.mark.parametrize("device", ["gpu", "cuda:999", "xla", 1.5])
def test_impossible_devices(device, saved):
    for make in (
        lambda: load(saved, device=device),
        lambda: create(tiny_config(), 0, device=device),
    ):
        with pytest.raises(ConfigError, match=f"device = {device!r} is not possible.*use 'cpu'"):
            make()


@pytest.mark.parametrize(
    "dtype", ["float33", "int32", "", "Tensor", torch.int8, torch.float8_e4m3fn, 32]
)
def test_impossible_dtypes(dtype, saved):
    for make in (lambda: load(saved, dtype=dtype), lambda: create(tiny_config(), 0, dtype=dtype)):
        with pytest.raises(
            ConfigError, match=f"dtype = {dtype!r} is not possible; use one of float32, float64"
        ):
            make()


@pytest.mark.parametrize("source", [None, 3, b"folder"])
def test_what_is_no_place_of_a_model(source):
    with pytest.raises(CheckpointError, match=f"^{str(source)!r} is not a folder"):
        load(source)


def test_impossible_arguments(saved):
    for make in (lambda: load(saved, tokenizer=3), lambda: create(tiny_config(), 0, tokenizer=3)):
        with pytest.raises(TokenizerError, match="tokenizer = 3 is not a tokenizer"):
            make()
    for seed in (None, "0", 0.5, 2**64, -(2**63) - 1):
        with pytest.raises(
            ConfigError, match=f"seed = {seed!r} is not possible; it must be an integer of 64 bits"
        ):
            create(tiny_config(), seed)
    for seed in (2**64 - 1, -(2**63)):
        create(tiny_config(), seed)
    with pytest.raises(
        ConfigError, match=r"config = \{\} is not possible; it must be a SparseConfig"
    ):
        create({}, 0)


# --- writing


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(OSError("disk full"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(failure, raised, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise failure

    with pytest.raises(raised):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"  # readers see the old file to the end
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_failed_save_leaves_the_old_model(folder, monkeypatch):
    old = load(folder, device="cpu")

    def failing(tensors, path, **options):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", failing)
    with pytest.raises(CheckpointError, match=r"cannot write .*broken.*: disk full"):
        tiny_model(seed=1).save_pretrained(folder, overwrite=True)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same_model(load(folder, device="cpu"), old)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/config\.json"):
        write_json(tmp_path / "file" / "config.json", {})
    with pytest.raises(CheckpointError, match=r"cannot write .*/file: "):
        tiny_model().save_pretrained(tmp_path / "file")


def test_files_are_made_as_the_umask_says(tmp_path, monkeypatch):
    old = os.umask(0o027)
    try:
        monkeypatch.setattr(
            os, "umask", None
        )  # which is the whole process's: not even for a moment
        write_json(tmp_path / "a", {})
        write_tensors(tmp_path / "b", {"x": torch.ones(2)})
    finally:
        monkeypatch.undo()
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


# --- fingerprints


@pytest.mark.parametrize(
    "config", [full_config(), tiny_config(), full_config(sinusoidal=True, tied_unembed=True)]
)
def test_a_fingerprint_survives_dtypes_and_files(config, tmp_path):
    model = create(config, 5, device="cpu")
    expected = fingerprint(model)
    assert expected.difference(fingerprint(model)) is None
    model.save_pretrained(tmp_path)
    for dtype in ("float64", "float32", "bfloat16", "float16", "float32"):
        loaded = load(tmp_path, device="cpu", dtype=dtype)
        assert expected.difference(fingerprint(loaded)) is None
        assert fingerprint(loaded).difference(expected) is None
        loaded.save_pretrained(tmp_path, overwrite=True)


def test_a_fingerprint_tells_models_apart():
    model = create(full_config(), 0, device="cpu")
    ours = fingerprint(model)
    assert "other weights in embed.W_E" in ours.difference(
        fingerprint(create(full_config(), 1, device="cpu"))
    )
    other = create(full_config(act_fn="gelu"), 0, device="cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert "another architecture" in ours.difference(fingerprint(other))


MATRICES = [
    "embed.W_E",
    "blocks.0.attn.W_Q",
    "blocks.1.attn.W_O",
    "blocks.1.mlp.W_in_pos",
    "bigram.W_bigram",
]


@pytest.mark.parametrize("name", MATRICES)
def test_a_fingerprint_sees_one_matrix_change_by_five_percent(name):
    for seed in range(10):
        model = create(full_config(), seed, device="cpu")
        ours, matrix = fingerprint(model), model.get_parameter(name)
        original = matrix.detach().clone()
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed))
        for change in (original, noise * original.norm() / noise.norm()):
            with torch.no_grad():
                matrix.copy_(original + 0.05 * change)
            assert ours.difference(fingerprint(model)) == f"other weights in {name}"
