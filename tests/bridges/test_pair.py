"""Bridges between small models: hybrids, changes that are carried over, and files."""

import dataclasses
import json
import math

import pytest
import torch

import tl_sparse
from helpers import (
    ON_3,
    circuit_means,
    full_config,
    has_hooks,
    random_circuit,
    random_tokens,
    stock_model,
    tiny_config,
    tiny_model,
    word_tokenizer,
)
from tl_sparse import checksums
from tl_sparse.bridges.carrying import NodeChange
from tl_sparse.bridges.losses import Target, nmse
from tl_sparse.bridges.maps import Maps
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.sites import site_names, site_number
from tl_sparse.bridges.streams import changing_stream, continued, run_with_streams
from tl_sparse.errors import (
    BridgeError,
    CheckpointError,
    CircuitError,
    ConfigError,
    DataError,
    HookNameError,
    UnsupportedError,
)
from tl_sparse.files import read_json

SITES = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"]


def identity_maps(model, fraction=1.0):
    """Maps between two streams of the same width that change nothing."""
    width = model.cfg.d_model
    maps = Maps(2 * model.cfg.n_layers + 1, width, width, fraction=fraction)
    maps.to(next(model.parameters()).dtype)
    with torch.no_grad():
        for site in maps.sites:
            for linear in (site.encoder.linear, site.decoder):
                linear.weight.copy_(torch.eye(width))
                linear.bias.zero_()
    return maps


def random_maps(dense, sparse, seed=0, **options):
    torch.manual_seed(seed)
    n_sites = 2 * sparse.cfg.n_layers + 1
    maps = Maps(n_sites, dense.cfg.d_model, sparse.cfg.d_model, **options)
    return maps.to(next(sparse.parameters()).dtype)


def small_bridges(**options):
    """A stock model of TransformerLens' own and a sparse one of another width."""
    dense = stock_model(n_layers=2, d_vocab=11)
    sparse = tiny_model(tiny_config(n_layers=2, abs_topk={"mlp_neuron": 0.5}))
    return Bridges(sparse, dense, random_maps(dense, sparse, **options))


def test_names_and_numbers_of_sites():
    assert site_names(1) == SITES
    assert [site_number(name, 1) for name in SITES] == [0, 1, 2]
    assert site_number("blocks.1.hook_resid_pre", 2) == site_number("blocks.0.hook_resid_post", 2)
    for wrong in ("blocks.1.hook_resid_pre", "blocks.0.hook_q", "", 3):
        with pytest.raises(HookNameError, match=r"not a site of bridges.*blocks\.0\.hook_resid_pr"):
            site_number(wrong, 1)


@pytest.mark.parametrize("config", [tiny_config(n_layers=2), full_config()], ids=["plain", "full"])
def test_a_model_that_continues_from_its_own_stream_is_itself(config):
    """Also with a ReLU and AbsTopK on the stream, since the stream after them is taken."""
    model = tiny_model(config, dtype=torch.float64)
    tokens = random_tokens(model)
    with torch.no_grad():
        run = run_with_streams(model, tokens)
        assert torch.equal(run.logits, model(tokens))
        for site, stream in enumerate(run.read):
            torch.testing.assert_close(continued(model, tokens, site, stream), run.logits)
    assert not has_hooks(model)


def test_streams_before_absolute_topk_on_them():
    model = tiny_model(full_config(), dtype=torch.float64)
    cfg = model.sparse_cfg
    run = run_with_streams(model, random_tokens(model))
    k_after = {"pre": cfg.topk("resid_pre"), "mid": cfg.topk("resid_post_attn")}
    for site, kind in enumerate(["pre", "mid", "pre", "mid"]):
        written, read = run.written[site], run.read[site]
        kept = read != 0
        assert int(kept.sum(-1).max()) <= k_after[kind]
        torch.testing.assert_close(written[kept], read[kept])
        if site == 0:  # later, ReLU and AbsTopK have left few entries
            assert int((written != 0).sum()) > int(kept.sum())


def test_a_stock_model_continues_from_the_stream_of_another_prompt():
    """Then its logits are those of the other prompt, whose stream has everything."""
    model = stock_model(n_layers=2)
    tokens, others = random_tokens(model, seed=1), random_tokens(model, seed=2)
    with torch.no_grad():
        other = run_with_streams(model, others)
        for site, stream in enumerate(other.read):
            torch.testing.assert_close(continued(model, tokens, site, stream), other.logits)
            with changing_stream(model, site, lambda _, new=stream: new):
                torch.testing.assert_close(model(tokens), other.logits)


def test_hybrids_of_a_model_with_itself_are_the_model():
    model = tiny_model(tiny_config(n_layers=2), dtype=torch.float64)
    bridges = Bridges(model, model, identity_maps(model))
    tokens = random_tokens(model)
    for site in bridges.sites:
        for direction in ("dense_to_sparse", "sparse_to_dense"):
            torch.testing.assert_close(bridges.hybrid(tokens, site, direction), model(tokens))
    losses = bridges.losses(tokens)
    assert losses.ce_dense == losses.ce_sparse
    for site in losses.sites:
        assert site.nmse_encoder == site.nmse_decoder == 0
        assert abs(site.kl_dense_to_sparse) < 1e-12
        assert abs(site.kl_sparse_to_dense) < 1e-12


def test_hybrids_go_through_the_maps():
    bridges = small_bridges()
    tokens = random_tokens(bridges.sparse)
    with torch.no_grad():
        dense = run_with_streams(bridges.dense, tokens)
        site = "blocks.0.hook_resid_post"
        stream = bridges.encode(site, dense.read[2])
        expected = bridges.sparse(stream, start_at_layer=1, tokens=tokens)
        found = bridges.hybrid(tokens, "blocks.1.hook_resid_pre", "dense_to_sparse")
    torch.testing.assert_close(found, expected)


def test_normalised_squared_error_by_hand():
    target = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])  # the mean is (2, 0): both are 1 away from it
    predicted = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
    torch.testing.assert_close(nmse(predicted, target), torch.tensor((1.0 + 9.0) / 2))


def test_divergence_by_hand():
    logits = torch.tensor([[[0.75, 0.2, 0.05]]]).log()
    other = torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    kl = 0.75 * math.log(3) + 0.2 * math.log(0.4) + 0.05 * math.log(0.2)
    torch.testing.assert_close(Target.of(logits).kl(other), torch.tensor(kl))
    # Of the two likeliest tokens, 0.75 and 0.2 become 15/19 and 4/19; 0.25 and 0.5 become 1/3, 2/3.
    first, second = 15 / 19, 4 / 19
    kl_of_two = first * math.log(3 * first) + second * math.log(1.5 * second)
    torch.testing.assert_close(Target.of(logits, 2).kl(other), torch.tensor(kl_of_two))


# --- changes that are carried over


@pytest.fixture
def twins():
    """A model bridged to itself: what is carried over at the last site is the change itself."""
    model = tiny_model(
        tiny_config(n_layers=2, abs_topk={"attn_in": 0.7, "mlp_neuron": 0.5}), dtype=torch.float64
    )
    return Bridges(model, model, identity_maps(model))


def test_a_circuit_is_carried_over(twins):
    circuit = random_circuit(twins.sparse)
    tokens = random_tokens(twins.sparse)
    with circuit.applied(twins.sparse):
        expected = twins.sparse(tokens)
    with twins.carried(circuit, tokens) as added:
        found, cache = twins.dense.run_with_cache(tokens)
    torch.testing.assert_close(found, expected)
    before = twins.dense.run_with_cache(tokens)[1]["blocks.1.hook_resid_post"]
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], before + added)
    assert not has_hooks(twins.dense)


@pytest.mark.parametrize(
    ("node", "site"),
    [
        ("0.attn_v h1.2", "blocks.0.hook_resid_mid"),
        ("0.attn_out 3", "blocks.0.hook_resid_mid"),
        ("0.mlp_neuron 4", "blocks.0.hook_resid_post"),
        ("1.mlp_out 2", "blocks.1.hook_resid_post"),
    ],
)
def test_a_node_acts_from_the_first_site_that_sees_it(twins, node, site):
    tokens, others = random_tokens(twins.sparse, seed=1), random_tokens(twins.sparse, seed=2)
    change = NodeChange.from_run(twins.sparse, [node], others)
    with change.applied(twins.sparse):
        expected = twins.sparse(tokens)
    with twins.carried(change, tokens):
        found = twins.dense(tokens)
    torch.testing.assert_close(found, expected)
    with twins.carried(change, tokens, site):
        torch.testing.assert_close(twins.dense(tokens), expected)


def test_means_and_strength(twins):
    model = twins.sparse
    circuit = random_circuit(model)
    tokens = random_tokens(model)
    change = NodeChange.to_means(circuit, model, ["0.mlp_neuron 4", "0.mlp_neuron 5"])
    assert {name: int(mask.sum()) for name, mask in change.nodes.items()} == {
        "blocks.0.mlp.hook_post": 2
    }
    with twins.carried(change, tokens) as whole:
        pass
    with twins.carried(change, tokens, strength=0.25) as quarter:
        pass
    torch.testing.assert_close(quarter, whole / 4)
    with twins.carried(change, tokens, strength=0.0):
        torch.testing.assert_close(twins.dense(tokens), model(tokens))


def test_reads_are_carried_to_where_they_are_read(twins):
    """The stream changes so that the norm, whose scale is kept, passes on the new value."""
    model = twins.sparse
    tokens, others = random_tokens(model, seed=1), random_tokens(model, seed=2)
    change = NodeChange.from_run(model, ["1.attn_in 2"], others)
    with twins.carried(change, tokens) as added:
        pass
    _, cache = model.run_with_cache(tokens)
    stream = cache["blocks.1.hook_resid_pre"]
    scale = stream.square().mean(-1).sqrt()
    name = "blocks.1.ln1.hook_read"
    difference = change.values[name][..., 2] - cache[name][..., 2]
    expected = torch.zeros_like(stream)
    expected[..., 2] = difference * scale / model.blocks[1].ln1.w[2]
    torch.testing.assert_close(added, expected)


def test_any_context_of_hooks_is_carried_over(twins):
    model = twins.sparse
    tokens = random_tokens(model)
    zero = [("blocks.0.hook_mlp_out", lambda activation, hook: torch.zeros_like(activation))]
    expected = model.run_with_hooks(tokens, fwd_hooks=zero)
    with twins.carried(model.hooks(fwd_hooks=zero), tokens, "blocks.0.hook_resid_post"):
        torch.testing.assert_close(twins.dense(tokens), expected)
    with pytest.raises(ConfigError, match="site must name a site"):
        twins.carried(model.hooks(fwd_hooks=zero), tokens).__enter__()


def test_changes_that_cannot_be_made(twins):
    model = twins.sparse
    tokens = random_tokens(model)
    for node in ("7.mlp_neuron 1", "0.mlp_neuron 99"):
        with pytest.raises(CircuitError, match="has no node"):
            NodeChange.from_run(model, [node], tokens)
    change = NodeChange.from_run(model, ["0.mlp_neuron 1"], tokens)
    with (
        twins.carried(change, tokens),
        pytest.raises(DataError, match=r"for tokens of shape \[2, 8\], and .* runs on \[1, 8\]"),
    ):
        twins.dense(tokens[:1])
    with pytest.raises(ConfigError, match="strength = nan"):
        twins.carried(change, tokens, strength=math.nan).__enter__()
    with pytest.raises(HookNameError, match="is not a site"):
        twins.carried(change, tokens, "blocks.9.hook_resid_pre").__enter__()
    assert not has_hooks(twins.dense)


# --- files


def test_saved_bridges_are_the_same(tmp_path):
    bridges = small_bridges(kind="threshold", log_eps=-0.5)
    bridges.with_record({"note": "mine"}).save_pretrained(tmp_path)
    opened = tl_sparse.load_bridges(tmp_path, bridges.dense)
    assert opened.record == {"note": "mine"}
    assert opened.maps.kind == "threshold"
    tokens = random_tokens(bridges.sparse)
    with torch.no_grad():
        for site in bridges.sites:
            for direction in ("dense_to_sparse", "sparse_to_dense"):
                found = opened.hybrid(tokens, site, direction)
                assert torch.equal(found, bridges.hybrid(tokens, site, direction))
    alone = tl_sparse.load(tmp_path, device="cpu")
    assert torch.equal(alone(tokens), bridges.sparse(tokens))


def test_another_dense_model_is_noticed(tmp_path):
    bridges = small_bridges()
    bridges.save_pretrained(tmp_path)
    other = stock_model(n_layers=2, d_vocab=11, seed=3)
    with pytest.warns(UserWarning, match="does not have the weights that it had when the bridges"):
        tl_sparse.load_bridges(tmp_path, other)


def test_files_that_do_not_name_the_dense_model(tmp_path):
    bridges = small_bridges()
    bridges.dense.cfg.model_name = ""
    bridges.save_pretrained(tmp_path)
    with pytest.raises(BridgeError, match="do not name the dense model; give it with dense="):
        tl_sparse.load_bridges(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 9}, "a newer tl_sparse wrote it"),
        ({"dense": "x"}, "dense and record must be JSON objects"),
        ({"encoder": "relu"}, "encoder = 'relu' is not possible; it must be one of abs_topk, thre"),
        ({"fraction": 0}, "fraction = 0 is not possible; it must be a fraction"),
    ],
)
def test_wrong_descriptions(tmp_path, changed, message):
    bridges = small_bridges()
    bridges.save_pretrained(tmp_path)
    path = tmp_path / "bridges.json"
    values = json.loads(path.read_text()) | changed
    values.pop(checksums.ENTRY)
    path.write_text(json.dumps(values))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        tl_sparse.load_bridges(tmp_path, bridges.dense)


def test_a_card_shows_the_losses_by_site():
    bridges = small_bridges()
    losses = bridges.losses(random_tokens(bridges.sparse, 3))
    bridges = bridges.with_record({"bridge_losses": dataclasses.asdict(losses)})
    assert bridges.recorded_losses() == losses
    card = bridges.card("someone/bridged")
    assert "with bridges to a dense one" in card
    assert 'tl_sparse.load_bridges("someone/bridged")' in card
    for site in bridges.sites:
        assert site in card


def test_what_is_pushed_to_the_hub(tmp_path, monkeypatch):
    """All files and the card; not the folder of the dense model, which is on this machine."""
    dense_folder, pushed = tmp_path / "dense", tmp_path / "pushed"
    tiny_model().save_pretrained(dense_folder)
    dense = tl_sparse.load(dense_folder, device="cpu")
    record = {"bridge_losses": {}, "seed": 3}
    sparse = tiny_model(seed=1)
    bridges = Bridges(sparse, dense, Maps(3, 6, 6), record, dense_source=str(dense_folder))

    def push(repo_id, write, card, **options):
        write(pushed)
        (pushed / "README.md").write_text(repo_id)
        return f"pushed {options}"

    monkeypatch.setattr("tl_sparse.bridges.pair.push_folder", push)
    assert bridges.push_to_hub("me/mine", private=True) == "pushed {'private': True}"
    assert read_json(pushed / "training.json") == record
    assert read_json(pushed / "bridges.json")["dense"]["source"] == "dense"
    assert str(tmp_path) not in (pushed / "bridges.json").read_text()
    opened = tl_sparse.load_bridges(pushed, dense)
    tokens = random_tokens(sparse)
    assert torch.equal(opened.sparse(tokens), sparse(tokens))


# --- models that do not fit


def test_models_that_do_not_fit():
    sparse = tiny_model(tiny_config(n_layers=2))
    maps = Maps(5, 6, 6)
    with pytest.raises(BridgeError, match="the dense model has 1 layers, the sparse one 2"):
        Bridges(sparse, stock_model(n_layers=1, d_vocab=11), maps)
    with pytest.raises(BridgeError, match="has 24 tokens in its vocabulary, the sparse one 11"):
        Bridges(sparse, stock_model(n_layers=2, d_vocab=24), maps)
    dense = stock_model(n_layers=2, d_vocab=11)
    with pytest.raises(BridgeError, match="for 6 channels of the dense stream, the models have 8"):
        Bridges(sparse, dense, maps)
    with pytest.raises(BridgeError, match="for 3 sites, the models have 5"):
        Bridges(sparse, dense, Maps(3, 8, 6))


def test_other_tokenizers_do_not_fit():
    words = ["<s>", *"abcdefghij"]
    tokenizers = [word_tokenizer(each, bos_token="<s>") for each in (words, words[::-1])]
    models = [tiny_model(tiny_config(), tokenizer=each) for each in tokenizers]
    with pytest.raises(BridgeError, match=r"different tokenizers: .* is token 0 of the sparse"):
        Bridges(models[0], models[1], Maps(3, 6, 6))
    same = tiny_model(tiny_config(), tokenizer=tokenizers[0], seed=3)
    assert Bridges(models[0], same, Maps(3, 6, 6)).sites == SITES


@pytest.mark.skipif(not ON_3, reason="such a model is easily made on TransformerLens 3 only")
def test_a_dense_model_whose_mlp_reads_beside_attention():
    dense = stock_model(n_layers=1, d_vocab=11, parallel_attn_mlp=True)
    with pytest.raises(UnsupportedError, match=r"has no blocks\.0\.hook_resid_mid"):
        Bridges(tiny_model(), dense, Maps(3, 8, 6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b.encode(SITES[0], torch.zeros(2, 3)), DataError, "must be 8 wide, not 3"),
        (lambda b: b.decode(SITES[0], torch.zeros(2, 8)), DataError, "must be 6 wide, not 8"),
        (lambda b: b.encode(SITES[0], torch.zeros(8).long()), DataError, "tensor of floats"),
        (lambda b: b.encode("x", torch.zeros(8)), HookNameError, "not a site"),
        (lambda b: b.hybrid([[1, 2]], SITES[0], "up"), ConfigError, "direction = 'up'"),
        (lambda b: b.hybrid([[1, 99]], SITES[0], "dense_to_sparse"), DataError, "vocabulary"),
        (lambda b: b.losses([[1]]), DataError, "at least two positions"),
        (lambda b: b.losses([[1, 2]], 0), ConfigError, "batch_size = 0"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(small_bridges())


def test_means_are_needed_to_hold_nodes():
    model = tiny_model()
    circuit = random_circuit(model)
    assert circuit_means(model, random_tokens(model)).keys() >= circuit.kept.keys()
    bare = type(circuit)(circuit.kept, {}, circuit.model, "m", "t")
    with pytest.raises(CircuitError, match="no means at which nodes could be held"):
        NodeChange.to_means(bare, model)
