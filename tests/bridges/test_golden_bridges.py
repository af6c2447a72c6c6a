"""A published kind of bridge model, and what the original implementation computed from it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tl_sparse
from helpers import GOLDEN
from tl_sparse.bridges.streams import run_with_streams
from tl_sparse.errors import BridgeError, CheckpointError, ConfigError

FOLDER = GOLDEN / "bridges"
TOLERANCE = dict(rtol=0, atol=1e-4)
#: The file that published models have beside config.json; AbsTopK is also on the stream in it.
AS_TRAINED = """
dense_model:
  repo_id: someone/dense
sparsity:
  enable_activation_sparsity: true
  activation_topk_fraction: 0.25
  activation_sparsity_locations: attn_in,mlp_in,resid_mid,resid_pre
bridges:
  bridge_act_fn: abstopk
"""


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def bridges():
    return tl_sparse.load_bridges(FOLDER / "bridge", dense=FOLDER / "dense", device="cpu")


@torch.no_grad()
def test_both_models(bridges, expected):
    tokens = expected["tokens"]
    torch.testing.assert_close(bridges.sparse(tokens), expected["sparse_logits"], **TOLERANCE)
    torch.testing.assert_close(bridges.dense(tokens), expected["dense_logits"], **TOLERANCE)


@torch.no_grad()
def test_streams_and_maps_at_every_site(bridges, expected):
    dense = run_with_streams(bridges.dense, expected["tokens"]).read
    sparse = run_with_streams(bridges.sparse, expected["tokens"]).written
    encoded = bridges.encoded(expected["tokens"])
    assert len(bridges.sites) == 5
    for i, site in enumerate(bridges.sites):
        found = {
            "dense_resid": dense[i],
            "sparse_resid": sparse[i],
            "encoded": bridges.encode(site, dense[i]),
            "decoded": bridges.decode(site, sparse[i]),
        }
        for name, stream in found.items():
            torch.testing.assert_close(stream, expected[f"{name}/{i}"], **TOLERANCE)
        assert torch.equal(encoded[site], found["encoded"])
        # k = max(1, int(32 / 4)) entries are kept.
        assert set((found["encoded"] != 0).sum(-1).flatten().tolist()) == {8}


@torch.no_grad()
def test_hybrids_at_every_site(bridges, expected):
    for i, site in enumerate(bridges.sites):
        to_sparse = bridges.hybrid(expected["tokens"], site, "dense_to_sparse")
        to_dense = bridges.hybrid(expected["tokens"], site, "sparse_to_dense")
        torch.testing.assert_close(to_sparse, expected[f"hybrid_d2s/{i}"], **TOLERANCE)
        torch.testing.assert_close(to_dense, expected[f"hybrid_s2d/{i}"], **TOLERANCE)


def test_all_losses(bridges, expected):
    losses = bridges.losses(expected["tokens"])
    columns = {
        "nmse_encoder": [site.nmse_encoder for site in losses.sites],
        "nmse_decoder": [site.nmse_decoder for site in losses.sites],
        "kl_d2s": [site.kl_dense_to_sparse for site in losses.sites],
        "kl_s2d": [site.kl_sparse_to_dense for site in losses.sites],
        "kl_sparse": losses.kl_sparse,
        "ce_sparse": losses.ce_sparse,
    }
    for name, found in columns.items():
        torch.testing.assert_close(torch.tensor(found), expected[f"loss/{name}"], **TOLERANCE)


def copied(tmp_path):
    folder = tmp_path / "bridge"
    shutil.copytree(FOLDER / "bridge", folder)
    return folder


def test_the_training_config_decides_where_absolute_topk_is(tmp_path, bridges):
    """The published config.json leaves out the locations of the training; the yaml has them."""
    folder = copied(tmp_path)
    (folder / "training_config.yaml").write_text(AS_TRAINED)
    with pytest.warns(UserWarning, match="as it was trained, with AbsTopK at attn_in, mlp_in, res"):
        model = tl_sparse.load(folder, device="cpu")
    expected = dict.fromkeys(("attn_in", "mlp_in", "resid_post_attn", "resid_pre"), 0.25)
    assert model.sparse_cfg.abs_topk == expected

    by_config = bridges.sparse.sparse_cfg.abs_topk
    chosen = tl_sparse.load(folder, device="cpu", abs_topk=by_config)  # without a warning
    assert chosen.sparse_cfg.abs_topk == by_config
    tokens = torch.arange(20)[None]
    assert torch.equal(chosen(tokens), bridges.sparse(tokens))
    assert not torch.allclose(model(tokens), chosen(tokens), atol=1e-2)


def test_files_that_agree_give_no_warning(tmp_path, recwarn):
    folder = copied(tmp_path)
    lines = AS_TRAINED.splitlines()
    without = [line for line in lines if "locations" not in line]  # by default, the eight
    (folder / "training_config.yaml").write_text("\n".join(without))
    model = tl_sparse.load(folder, device="cpu")
    assert len(model.sparse_cfg.abs_topk) == 8
    assert not [w for w in recwarn if "AbsTopK" in str(w.message)]


def test_a_local_checkpoint_has_its_configuration_in_the_folder_above(tmp_path, bridges):
    values = json.loads((FOLDER / "bridge" / "config.json").read_text())
    sections = {
        "dense_model": {"repo_id": "", "local_path": str(FOLDER / "dense")},
        "sparse_model": values["model_config"],
        "sparsity": values["sparsity_config"],
        "bridges": {"encoder_afrac": 0.25, "bridge_act_fn": "abstopk"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
    checkpoint = copied(tmp_path).rename(tmp_path / "checkpoint-100")
    (checkpoint / "config.json").unlink()
    (checkpoint / "extra_state.json").write_text('{"step": 100}')
    opened = tl_sparse.load_bridges(checkpoint, device="cpu")
    tokens = torch.arange(20)[None]
    for site in bridges.sites:
        found = opened.hybrid(tokens, site, "dense_to_sparse")
        assert torch.equal(found, bridges.hybrid(tokens, site, "dense_to_sparse"))


def test_a_dense_model_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"someone/dense.*give it with dense=.* alone"):
        tl_sparse.load_bridges(FOLDER / "bridge", device="cpu")
    assert tl_sparse.load(FOLDER / "bridge", device="cpu").cfg.d_model == 32


def test_missing_maps(tmp_path):
    folder = copied(tmp_path)
    (folder / "bridges.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no bridges: neither bridges\.json"):
        tl_sparse.load_bridges(folder, FOLDER / "dense", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bridges.4.decoder.linear.bias"), r"missing sites\.4\.decoder\.bias"),
        (lambda t: t.update({"bridges.5.encoder.linear.bias": torch.zeros(32)}), "unexpected sit"),
        (lambda t: t["bridges.0.encoder.linear.bias"].fill_(torch.nan), "NaN or infinite"),
        (
            lambda t: t.update({"bridges.0.encoder.linear.weight": torch.zeros(32, 25)}),
            r"is torch\.float32 of shape \[32, 25\]; the two models need floats of \[32, 24\]",
        ),
        (
            lambda t: t.update({f"bridges.{i}.encoder.log_eps": torch.zeros(32) for i in range(4)}),
            r"missing sites\.4\.encoder\.log_eps",
        ),
    ],
    ids=["a site is missing", "a site too many", "NaN", "another width", "a threshold is missing"],
)
def test_wrong_maps(tmp_path, change, message):
    folder = copied(tmp_path)
    tensors = torch.load(folder / "bridges.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "bridges.bin")
    with pytest.raises(CheckpointError, match=message):
        tl_sparse.load_bridges(folder, FOLDER / "dense", device="cpu")


def test_thresholds_that_the_configuration_denies(tmp_path):
    folder = copied(tmp_path)
    (folder / "training_config.yaml").write_text(AS_TRAINED)
    tensors = torch.load(folder / "bridges.bin", weights_only=True)
    tensors |= {f"bridges.{i}.encoder.log_eps": torch.zeros(32) for i in range(5)}
    torch.save(tensors, folder / "bridges.bin")
    with pytest.raises(CheckpointError, match=r"has thresholds \(log_eps\), but .* says AbsTopK"):
        tl_sparse.load_bridges(folder, FOLDER / "dense", device="cpu")


def test_a_threshold_encoder_keeps_what_is_large_enough(tmp_path):
    folder = copied(tmp_path)
    tensors = torch.load(folder / "bridges.bin", weights_only=True)
    log_eps = torch.linspace(-3, 1, 32)
    tensors |= {f"bridges.{i}.encoder.log_eps": log_eps for i in range(5)}
    torch.save(tensors, folder / "bridges.bin")
    bridges = tl_sparse.load_bridges(folder, FOLDER / "dense", device="cpu")
    dense = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(0))
    z = dense @ tensors["bridges.1.encoder.linear.weight"].T
    z = z + tensors["bridges.1.encoder.linear.bias"]
    expected = torch.where(z.abs() >= log_eps.exp(), z, 0.0)
    torch.testing.assert_close(bridges.encode("blocks.0.hook_resid_mid", dense), expected)


def test_an_impossible_fraction(tmp_path):
    folder = copied(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["bridges_config"]["encoder_afrac"] = 2
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: encoder_afrac = 2 is not possible"):
        tl_sparse.load_bridges(folder, FOLDER / "dense", device="cpu")


def test_a_mask_that_is_not_causal(tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(FOLDER / "dense", folder)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors["blocks.1.attn.causal_mask"] = torch.ones_like(tensors["blocks.1.attn.causal_mask"])
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.causal_mask is not the causal ma"):
        tl_sparse.load(folder, device="cpu")


def test_a_dense_model_of_another_size(bridges):
    with pytest.raises(BridgeError, match="has 3 layers, the sparse one 2"):
        tl_sparse.load_bridges(FOLDER / "bridge", GOLDEN / "sink", device="cpu")
