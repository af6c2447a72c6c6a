"""What a network computes does not depend on the dtype, except for the digits that it keeps."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import tl_sparse
from helpers import full_config, random_tokens, tiny_config, tiny_model
from tl_sparse.errors import ConfigError
from tl_sparse.files import read_json
from tl_sparse.network.config import SparseConfig
from tl_sparse.network.layers import Norm
from tl_sparse.training.measures import evaluate_loss

pytestmark = pytest.mark.any_line

HALVES = [torch.bfloat16, torch.float16]
SMALL = 2.0**-12  # its square is less than the machine epsilon of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_the_epsilon_of_a_norm_is_the_same_in_every_dtype(dtype):
    norm = Norm(tiny_config()).to(dtype)
    x = torch.full((1, 1, 6), SMALL, dtype=dtype)
    # The mean square is 2^-24, half of the epsilon of 2^-23: x / sqrt(1.5 · 2^-23).
    expected = torch.full((1, 1, 6), SMALL / (1.5 * 2.0**-23) ** 0.5, dtype=torch.float64)
    torch.testing.assert_close(norm(x), expected.to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "eps"),
    [
        ({}, 2.0**-23),
        ({"normalization": "layer"}, 1e-5),
        ({"norm_eps": 2.0**-7}, 2.0**-7),
        ({"normalization": "layer", "norm_eps": 1e-6}, 1e-6),
    ],
)
def test_the_epsilon_is_in_the_configuration_of_model_and_transformer_lens(changes, eps, tmp_path):
    model = tiny_model(tiny_config(**changes))
    assert model.sparse_cfg.eps == model.cfg.eps == eps
    model.save_pretrained(tmp_path)
    loaded = tl_sparse.load(tmp_path, device="cpu", dtype="bfloat16")
    assert loaded.sparse_cfg == model.sparse_cfg
    assert loaded.cfg.eps == eps
    assert {m.eps for m in loaded.network.modules() if isinstance(m, Norm)} == {eps}


@pytest.mark.parametrize("norm_eps", [0, -1e-5, 1, float("nan"), "1e-5", True])
def test_an_impossible_epsilon_is_refused(norm_eps):
    with pytest.raises(ConfigError, match=r"norm_eps = .* must be a number in \(0, 1\), or null"):
        tiny_config(norm_eps=norm_eps)


def test_a_configuration_without_the_epsilon_is_one_of_float32():
    values = tiny_config().to_dict()
    del values["norm_eps"]
    assert SparseConfig.from_dict(values).eps == torch.finfo(torch.float32).eps


def test_the_epsilon_of_bfloat16_stays_possible():
    config = tiny_config(norm_eps=torch.finfo(torch.bfloat16).eps)
    norm = Norm(config).bfloat16()
    x = 0.1 * torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16()
    # With eps=None, as in OpenAI's code, some versions of torch take this epsilon.
    theirs = F.rms_norm(x, [6], eps=torch.finfo(torch.bfloat16).eps)
    torch.testing.assert_close(norm(x), theirs, rtol=2.0**-7, atol=0)
    ordinary = Norm(tiny_config()).bfloat16()
    assert (ordinary(x) - theirs).abs().max() > 0.1


def test_the_epsilon_can_be_set_in_the_file_of_a_saved_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_json(path) | {"norm_eps": 2.0**-7}))
    model = tl_sparse.load(tmp_path, device="cpu", dtype="bfloat16")
    assert model.ln_final.eps == model.cfg.eps == 2.0**-7


def test_a_norm_in_float16_does_not_overflow():
    x = torch.full((1, 1, 6), 1000.0, dtype=torch.float16)  # its square is not a float16
    assert Norm(tiny_config()).half()(x).eq(1).all()


def test_losses_of_the_bundled_model_agree_in_three_dtypes():
    tokens = tl_sparse.load_corpus("tiny-python-sparse", None, 128)[:8]
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        model = tl_sparse.load("tiny-python-sparse", device="cpu", dtype=dtype)
        losses[dtype] = evaluate_loss(model, tokens, 8)
        assert model(tokens.long(), return_type="loss").dtype == torch.float32
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.01)
    assert losses["float16"] == pytest.approx(losses["float32"], abs=0.005)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_mean_loss_in_half_precision_keeps_the_digits_of_float32(dtype):
    model = tiny_model().to(dtype)
    tokens = random_tokens(model, batch=64)
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    logits = model(tokens).float()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert per_token.dtype == torch.float32
    torch.testing.assert_close(model(tokens, return_type="loss"), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("attn_sinks", [True, False])
def test_explicit_and_fused_attention_agree_in_half_precision(dtype, attn_sinks):
    # Without AbsTopK, in which entries that rounding makes equal are chosen at random.
    config = dataclasses.replace(full_config(attn_sinks=attn_sinks), abs_topk={})
    model = tiny_model(config)
    tokens = random_tokens(model)
    expected = model(tokens)
    model.to(dtype)
    explicit, cache = model.run_with_cache(tokens)
    assert cache["blocks.0.attn.hook_pattern"].dtype == torch.float32
    for logits in (model(tokens), explicit):
        assert logits.dtype == dtype
        error = (logits.float() - expected).norm() / expected.norm()
        assert error < 8 * torch.finfo(dtype).eps
