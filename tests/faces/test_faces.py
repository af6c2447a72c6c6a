"""The network: against a recomputation by hand, at every hook, and as a TransformerLens model on
both lines.
"""

import copy
import math
import pickle
from importlib.metadata import version

import numpy as np
import pytest
import torch
import transformer_lens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from helpers import (
    cancels,
    full_config,
    random_tokens,
    sparse_configs,
    tiny_config,
    tiny_model,
    word_tokenizer,
)
from tl_sparse.errors import DataError, TokenizerError
from tl_sparse.hooks import abs_topk

few = settings(max_examples=60, deadline=None, derandomize=True)


# --- by hand


def run_by_hand(model, tokens, edits=None):
    """Logits and the value at each hook, in plain NumPy and float64, written from METHOD §1 alone.

    `edits` maps hook names to functions that replace the value there.
    """
    cfg, cache, edits = model.sparse_cfg, {}, edits or {}
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    tokens = tokens.numpy()
    n_batch, length = tokens.shape

    def at(name, value):
        cache[name] = edits[name](value) if name in edits else value
        return cache[name]

    def topk(location, x):
        if location not in cfg.abs_topk:
            return x
        k = int(cfg.abs_topk[location] * x.shape[-1])
        kept = np.argsort(-abs(x), axis=-1)[..., :k]
        out = np.zeros_like(x)
        np.put_along_axis(out, kept, np.take_along_axis(x, kept, axis=-1), axis=-1)
        return out

    def scale_of(x):
        eps = 2.0**-52 if cfg.normalization == "rms" else 1e-5
        return np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True) if cfg.normalization == "layer" else x
        normalized = at(f"{name}.hook_normalized", x / at(f"{name}.hook_scale", scale_of(x)))
        return normalized * w[f"{name}.w"] + w.get(f"{name}.b", 0.0)

    def read(name, location, x):
        out = norm(name, x)
        if cfg.positions == "concatenated":
            p = (
                channels - channels.mean(-1, keepdims=True)
                if cfg.normalization == "layer"
                else channels
            )
            p = p / scale_of(p) * w[f"{name}.w_pos"] + w.get(f"{name}.b_pos", 0.0)
            out = np.concatenate([out, p], -1)
        return at(f"{name}.hook_read", topk(location, out))

    def with_positions(name):
        return (
            np.concatenate([w[name], w[f"{name}_pos"]], axis=-2) if f"{name}_pos" in w else w[name]
        )

    def attention(name, x):
        qkv = {}
        for letter in "QKV":
            matrix, bias = (
                with_positions(f"{name}.W_{letter}"),
                w.get(f"{name}.b_{letter}", np.zeros((cfg.n_heads, 1))),
            )
            heads = [x @ matrix[h] + bias[h] for h in range(cfg.n_heads)]
            together = topk(f"attn_{letter.lower()}", np.concatenate(heads, -1))
            split = together.reshape(n_batch, length, cfg.n_heads, cfg.d_head)
            qkv[letter] = at(f"{name}.hook_{letter.lower()}", split)
        scores = np.full((n_batch, cfg.n_heads, length, length), -np.inf)
        for b, h, i, j in np.ndindex(scores.shape):
            if j <= i:
                scores[b, h, i, j] = qkv["Q"][b, i, h] @ qkv["K"][b, j, h] / math.sqrt(cfg.d_head)
        scores = at(f"{name}.hook_attn_scores", scores)
        pattern = np.zeros_like(scores)
        for b, h, i in np.ndindex(scores.shape[:3]):
            weights = np.exp(scores[b, h, i])
            sink = np.exp(w[f"{name}.sink"][h]) if cfg.attn_sinks else 0.0
            pattern[b, h, i] = weights / (weights.sum() + sink)
        pattern = at(f"{name}.hook_pattern", pattern)
        z = np.zeros((n_batch, length, cfg.n_heads, cfg.d_head))
        for b, h, i in np.ndindex(scores.shape[:3]):
            z[b, i, h] = sum(pattern[b, h, i, j] * qkv["V"][b, j, h] for j in range(length))
        z = at(f"{name}.hook_z", z)
        return sum(z[:, :, h] @ w[f"{name}.W_O"][h] for h in range(cfg.n_heads)) + w.get(
            f"{name}.b_O", 0.0
        )

    def mlp(name, x):
        pre = at(
            f"{name}.hook_pre", x @ with_positions(f"{name}.W_in") + w.get(f"{name}.b_in", 0.0)
        )
        if cfg.act_fn == "gelu":
            post = pre * 0.5 * (1 + np.vectorize(math.erf)(pre / math.sqrt(2)))
        else:
            post = np.maximum(pre, 0)
        post = at(f"{name}.hook_post", topk("mlp_neuron", post))
        return post @ w[f"{name}.W_out"] + w.get(f"{name}.b_out", 0.0)

    def stream(x):
        return np.maximum(x, 0) if cfg.resid_relu else x

    if cfg.positions != "none":
        table = np.stack([w["pos_embed.W_pos"][:length]] * n_batch)
        channels = at("hook_pos_embed" if cfg.positions == "added" else "hook_pos", table)
    resid = at("hook_embed", w["embed.W_E"][tokens])
    resid = resid + channels if cfg.positions == "added" else resid
    for i in range(cfg.n_layers):
        block = f"blocks.{i}"
        resid = at(f"{block}.hook_resid_pre", topk("resid_pre", resid))
        attn_out = topk(
            "attn_out", attention(f"{block}.attn", read(f"{block}.ln1", "attn_in", resid))
        )
        resid = topk("resid_post_attn", stream(resid + at(f"{block}.hook_attn_out", attn_out)))
        resid = at(f"{block}.hook_resid_mid", resid)
        mlp_out = topk("mlp_out", mlp(f"{block}.mlp", read(f"{block}.ln2", "mlp_in", resid)))
        resid = topk("resid_post_mlp", stream(resid + at(f"{block}.hook_mlp_out", mlp_out)))
        resid = at(f"{block}.hook_resid_post", resid)
    W_U = w["embed.W_E"].T if cfg.tied_unembed else w["unembed.W_U"]
    logits = norm("ln_final", resid) @ W_U + w.get("unembed.b_U", 0.0)
    if cfg.bigram_table:
        logits = logits + at("hook_bigram", w["bigram.W_bigram"][tokens])
    return logits, cache


def assert_close(ours, by_hand, name="logits"):
    np.testing.assert_allclose(ours.detach().numpy(), by_hand, rtol=1e-10, atol=1e-10, err_msg=name)


@few
@given(config=sparse_configs(), seed=st.integers(0, 1000))
def test_logits_and_every_activation_are_those_computed_by_hand(config, seed):
    model = tiny_model(config, seed, torch.float64)
    tokens = random_tokens(config, length=3, seed=seed)
    logits, values = run_by_hand(model, tokens)
    assert_close(model(tokens), logits)  # fused attention
    cached_logits, cache = model.run_with_cache(tokens)  # hooks on the scores: explicit attention
    assert_close(cached_logits, logits)
    assert set(cache) == set(values)
    for name, value in values.items():
        assert_close(cache[name], value, name)


@few
@given(config=sparse_configs(), seed=st.integers(0, 1000))
def test_gradients_are_those_of_the_network_computed_by_hand(config, seed):
    """Along a random direction in the space of all weights, by a central difference of the NumPy
    logits.
    """
    model = tiny_model(config, seed, torch.float64)
    tokens = random_tokens(config, length=3, seed=seed)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in weights.items()
    }
    share = torch.randn(model(tokens).shape, generator=generator, dtype=torch.float64)
    (model(tokens) * share).sum().backward()
    slope = sum(
        float((p.grad * direction[name]).sum()) for name, p in weights.items() if p.grad is not None
    )

    def along(step):
        with torch.no_grad():
            for name, p in weights.items():
                p.add_(direction[name], alpha=step)
            value = float((run_by_hand(model, tokens)[0] * share.numpy()).sum())
            for name, p in weights.items():
                p.sub_(direction[name], alpha=step)
        return value

    # Where AbsTopK or a ReLU changes its choice between the two ends there is no slope: a smaller
    # step.
    differences = [(along(step) - along(-step)) / (2 * step) for step in (1e-5, 1e-6, 1e-7)]
    scale = 1 + abs(slope)
    assert min(abs(difference - slope) for difference in differences) / scale < 1e-6


HOOKS_OF_ONE_LAYER = [
    "hook_embed",
    "hook_pos",
    "blocks.0.hook_resid_pre",
    "blocks.0.ln1.hook_scale",
    "blocks.0.ln1.hook_normalized",
    "blocks.0.ln1.hook_read",
    "blocks.0.attn.hook_q",
    "blocks.0.attn.hook_k",
    "blocks.0.attn.hook_v",
    "blocks.0.attn.hook_attn_scores",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.0.hook_resid_mid",
    "blocks.0.ln2.hook_scale",
    "blocks.0.ln2.hook_normalized",
    "blocks.0.ln2.hook_read",
    "blocks.0.mlp.hook_pre",
    "blocks.0.mlp.hook_post",
    "blocks.0.hook_mlp_out",
    "blocks.0.hook_resid_post",
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    "hook_bigram",
]


#: Hook points that act with a flag of `cfg` only; TransformerLens 4 knows some of them under a
#: second name.
FLAGGED_HOOKS = [
    *(
        f"blocks.0.{name}"
        for name in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
    ),
    "blocks.0.attn.hook_result",
]
SECOND_NAMES = [
    f"blocks.0.attn.hook_{name}" for name in ("attn_in", "q_input", "k_input", "v_input")
]


def test_hook_names_are_exactly_these():
    model = tiny_model(full_config(n_layers=1))
    tokens = random_tokens(model)
    assert sorted(model.run_with_cache(tokens)[1]) == sorted(HOOKS_OF_ONE_LAYER)
    second_names = [] if version("transformer-lens").startswith("3.") else SECOND_NAMES
    assert sorted(model.hook_dict) == sorted([*HOOKS_OF_ONE_LAYER, *FLAGGED_HOOKS, *second_names])
    added = tiny_model(positions="added")
    expected = {"hook_pos_embed", *HOOKS_OF_ONE_LAYER} - {"hook_pos", "hook_bigram"}
    assert set(added.run_with_cache(tokens)[1]) == expected
    plain = tiny_model()
    assert set(plain.run_with_cache(tokens)[1]) == expected - {"hook_pos_embed"}


@pytest.mark.parametrize("name", [*HOOKS_OF_ONE_LAYER, "hook_pos_embed"])
def test_a_value_replaced_at_a_hook_is_what_the_next_operation_uses(name):
    changes = dict(positions="added", d_pos=0) if name == "hook_pos_embed" else {}
    model = tiny_model(
        full_config(resid_relu=False, act_fn="gelu", **changes), seed=3, dtype=torch.float64
    )
    tokens = random_tokens(model, length=4)
    plain, values = run_by_hand(model, tokens)
    noise = np.random.default_rng(0).uniform(0.5, 1.5, values[name].shape)
    edited, _ = run_by_hand(model, tokens, {name: lambda x: x * noise + 0.1 * noise})

    def replace(value, hook):
        return value * torch.from_numpy(noise) + 0.1 * torch.from_numpy(noise)

    assert_close(model.run_with_hooks(tokens, fwd_hooks=[(name, replace)]), edited)
    assert abs(edited - plain).max() > 1e-3
    assert_close(model(tokens), plain)  # nothing stays attached


def test_gradients_reach_hooks_and_every_trained_parameter():
    model = tiny_model(full_config(sinusoidal=True, abs_topk={}, resid_relu=False, act_fn="gelu"))
    gradients = {}
    names = ["blocks.0.ln1.hook_read", "blocks.1.mlp.hook_post"]
    backward = [(name, lambda grad, hook: gradients.update({hook.name: grad})) for name in names]
    with model.hooks(bwd_hooks=backward):
        model(random_tokens(model), return_type="loss").backward()
    assert gradients["blocks.0.ln1.hook_read"].shape == (2, 8, 10)
    assert gradients["blocks.1.mlp.hook_post"].shape == (2, 8, 10)
    untouched = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == {
        "pos_embed.W_pos"
    }  # without a sink b_K would be another: it moves all scores alike


# --- AbsTopK


# Small integers: many ties, and whole rows of zeros.
rows_with_ties = npst.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.integers(-2, 2).map(float),
)


@few
@given(x=rows_with_ties, k=st.integers(1, 12))
def test_abs_topk_keeps_exactly_k_also_among_equals(x, k):
    k = min(k, x.shape[1])
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
    ):  # the last one takes the path of GPUs
        leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
        out = abs_topk(leaf, k)
        out.sum().backward()
        kept = leaf.grad  # 1 where a gradient passes, 0 elsewhere
        assert ((kept == 0) | (kept == 1)).all()
        assert kept.sum(-1).eq(k).all()
        torch.testing.assert_close(out.detach(), leaf.detach() * kept, rtol=0, atol=0)
        magnitudes = out.detach().abs().sort(-1, descending=True).values[:, :k]
        assert magnitudes.tolist() == (-np.sort(-abs(x)))[:, :k].tolist()


@few
@given(seed=st.integers(0, 10**6), k=st.integers(1, 20))
def test_abs_topk_is_that_of_a_sort_where_magnitudes_differ(seed, k):
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.zeros_like(x)
    for row, out in zip(x.view(-1, 20), expected.view(-1, 20), strict=True):
        for i in sorted(range(20), key=lambda i: -abs(row[i]))[:k]:
            out[i] = row[i]
    assert torch.equal(abs_topk(x, k), expected)
    # float32 values that bfloat16 holds exactly: both paths see the same numbers.
    coarse = x.bfloat16()
    by_partition, by_sorting = abs_topk(coarse.float(), k), abs_topk(coarse, k).float()
    assert torch.equal(by_partition.abs().sort(-1).values, by_sorting.abs().sort(-1).values)
    strided = x.transpose(1, 2)
    assert torch.equal(abs_topk(strided, 2), abs_topk(strided.contiguous(), 2))


# --- padding, partial runs, losses


@few
@given(config=sparse_configs(), seed=st.integers(0, 1000))
def test_padding_changes_nothing_at_real_tokens(config, seed):
    model = tiny_model(config, seed, torch.float64)
    tokens = random_tokens(config, batch=2, seed=seed)  # the whole context
    assume(not cancels(model, tokens))
    real = config.n_ctx - 2
    left, right = torch.ones_like(tokens), torch.ones_like(tokens)
    left[0, :2] = 0  # the first row is shorter than the second
    right[0, real:] = 0
    padded = model(tokens, attention_mask=left)
    torch.testing.assert_close(padded[:1, 2:], model(tokens[:1, 2:]), rtol=0, atol=1e-10)
    torch.testing.assert_close(padded[1], model(tokens)[1], rtol=0, atol=1e-10)
    for mask in (right, None):
        padded = model(tokens, attention_mask=mask)
        torch.testing.assert_close(padded[:1, :real], model(tokens[:1, :real]), rtol=0, atol=1e-10)
        torch.testing.assert_close(padded[1], model(tokens)[1], rtol=0, atol=1e-10)


@few
@given(config=sparse_configs(), seed=st.integers(0, 1000))
def test_two_partial_runs_are_one_full_run(config, seed):
    model = tiny_model(config, seed, torch.float64)
    tokens = random_tokens(config, seed=seed)
    logits, cache = model.run_with_cache(tokens)
    for layer in range(config.n_layers):
        resid = model(tokens, stop_at_layer=layer)
        entered = abs_topk(resid, config.topk("resid_pre") or config.d_model)
        torch.testing.assert_close(
            entered, cache[f"blocks.{layer}.hook_resid_pre"], rtol=0, atol=1e-12
        )
        rest = model(resid, start_at_layer=layer, tokens=tokens)
        torch.testing.assert_close(rest, logits, rtol=0, atol=1e-12)
        negative = model(tokens, stop_at_layer=layer - config.n_layers)
        assert torch.equal(negative, resid)
    first_block = model(
        model(tokens, stop_at_layer=0), start_at_layer=0, stop_at_layer=1, tokens=tokens
    )
    torch.testing.assert_close(first_block, cache["blocks.0.hook_resid_post"], rtol=0, atol=1e-12)


def test_a_partial_run_asks_for_the_tokens_it_needs():
    model = tiny_model(bigram_table=True)
    tokens = random_tokens(model)
    resid = model(tokens, stop_at_layer=0)
    with pytest.raises(DataError, match=r"start_at_layer needs tokens=…"):
        model(resid, start_at_layer=0)
    with pytest.raises(DataError, match="start_at_layer needs the residual stream"):
        model(tokens, start_at_layer=0)
    without_table = tiny_model()
    resid = without_table(tokens, stop_at_layer=0)
    torch.testing.assert_close(without_table(resid, start_at_layer=0), without_table(tokens))
    with pytest.raises(DataError, match=r"start_at_layer needs tokens=…"):
        without_table(resid, start_at_layer=0, return_type="loss")


def test_return_types_and_the_loss():
    model = tiny_model(dtype=torch.float64)
    tokens = random_tokens(model)
    logits = model(tokens)
    assert torch.equal(model(tokens, return_type="logits"), logits)
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    expected = torch.stack(
        [-log_probs[:, i].gather(1, tokens[:, i + 1, None])[:, 0] for i in range(7)], dim=1
    )
    loss = model(tokens, return_type="loss")
    torch.testing.assert_close(loss, expected.mean(), rtol=0, atol=1e-12)
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(per_token, expected, rtol=0, atol=1e-12)
    both = model(tokens, return_type="both")
    assert torch.equal(both[0], logits)
    assert torch.equal(both[1], loss)
    assert model(tokens, return_type=None) is None
    assert torch.equal(model(tokens[0]), logits[:1])  # one sequence is a batch of one
    with pytest.raises(DataError, match=r"return_type = 'probs'.*'logits', 'loss', 'both' or None"):
        model(tokens, return_type="probs")


def test_positions_are_counted_from_zero_unless_given():
    model = tiny_model(positions="added", dtype=torch.float64)
    tokens = random_tokens(model, length=4)
    shifted = torch.tensor([[3, 4, 5, 6]] * 2)
    with torch.no_grad():
        plain, moved = model(tokens), model(tokens, position_ids=shifted)
        model.pos_embed.W_pos[:4] = model.pos_embed.W_pos[3:7].clone()
    assert not torch.allclose(plain, moved)
    torch.testing.assert_close(model(tokens), moved, rtol=0, atol=1e-12)


def test_sinusoids():
    config = tiny_config(positions="concatenated", d_pos=5, sinusoidal=True)
    table = tiny_model(config).state_dict()["pos_embed.W_pos"]
    assert table.shape == (8, 5)
    for pos, channel in np.ndindex(8, 5):
        angle = pos / 10000 ** (2 * (channel // 2) / 5)
        assert float(table[pos, channel]) == pytest.approx(
            [math.sin, math.cos][channel % 2](angle), abs=1e-6
        )


# --- a TransformerLens model

STATE_DICT_KEYS = [
    "embed.W_E", "pos_embed.W_pos", "blocks.0.ln1.w", "blocks.0.ln1.b", "blocks.0.ln1.w_pos",
    "blocks.0.ln1.b_pos", "blocks.0.ln2.w", "blocks.0.ln2.b", "blocks.0.ln2.w_pos",
    "blocks.0.ln2.b_pos", "blocks.0.attn.W_Q", "blocks.0.attn.W_Q_pos", "blocks.0.attn.b_Q",
    "blocks.0.attn.W_K", "blocks.0.attn.W_K_pos", "blocks.0.attn.b_K", "blocks.0.attn.W_V",
    "blocks.0.attn.W_V_pos", "blocks.0.attn.b_V", "blocks.0.attn.W_O", "blocks.0.attn.b_O",
    "blocks.0.attn.sink", "blocks.0.mlp.W_in", "blocks.0.mlp.W_in_pos", "blocks.0.mlp.b_in",
    "blocks.0.mlp.W_out", "blocks.0.mlp.b_out", "ln_final.w", "ln_final.b", "unembed.W_U",
    "unembed.b_U", "bigram.W_bigram",
]  # fmt: skip


def test_state_dict_keys_are_the_same_on_both_lines():
    model = tiny_model(full_config(n_layers=1))
    assert sorted(model.state_dict()) == sorted(STATE_DICT_KEYS)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(STATE_DICT_KEYS)
    children = {
        "embed",
        "hook_embed",
        "pos_embed",
        "hook_pos",
        "blocks",
        "ln_final",
        "unembed",
        "bigram",
    }
    assert {name for name, _ in model.named_children()} == children | {"hook_bigram"}
    minimal = tiny_model(biases=False, tied_unembed=True).state_dict()
    kept = (
        "ln1.w",
        "ln2.w",
        "attn.W_Q",
        "attn.W_K",
        "attn.W_V",
        "attn.W_O",
        "mlp.W_in",
        "mlp.W_out",
    )
    assert sorted(minimal) == sorted(
        ["embed.W_E", "ln_final.w", *(f"blocks.0.{name}" for name in kept)]
    )


def test_is_a_model_of_the_installed_line():
    model = tiny_model(full_config())
    if version("transformer-lens").startswith("3."):
        assert isinstance(model, transformer_lens.HookedTransformer)
    else:
        from transformer_lens.model_bridge import TransformerBridge

        assert isinstance(model, TransformerBridge)
    sizes = dict(n_layers=2, d_model=6, n_heads=3, d_head=5, d_mlp=10, d_vocab=11, n_ctx=8)
    assert {name: getattr(model.cfg, name) for name in sizes} == sizes
    assert model.W_Q.shape == model.W_K.shape == model.W_V.shape == (2, 3, 6, 5)
    assert model.W_O.shape == (2, 3, 5, 6)
    assert model.W_in.shape == (2, 6, 10)
    assert model.W_out.shape == (2, 10, 6)
    assert model.W_E.shape == (11, 6)
    assert model.W_U.shape == (6, 11)
    assert model.b_Q.shape == (2, 3, 5)
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert f"{nonzero:,} of {total:,} parameters nonzero" in repr(model)


def test_biases_that_a_model_does_not_have_read_as_zeros():
    model = tiny_model(biases=False)
    for bias, shape in (
        (model.b_Q, (1, 3, 5)),
        (model.b_O, (1, 6)),
        (model.b_in, (1, 10)),
        (model.b_U, (11,)),
    ):
        assert bias.shape == shape
        assert not bias.any()


def test_a_seed_decides_the_weights():
    first, again, other = (tiny_model(full_config(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("config", [full_config(), full_config(tied_unembed=True, biases=False)])
def test_a_copy_is_equal_and_independent(copied, config):
    model = tiny_model(config)
    tokens = random_tokens(model)
    logits = model(tokens)
    model.run_with_cache(tokens)  # what a run leaves on the modules must not stop a copy
    twin = copied(model)
    assert type(twin) is type(model)
    assert twin.sparse_cfg == config
    assert torch.equal(twin(tokens), logits)
    assert set(twin.run_with_cache(tokens)[1]) == set(model.run_with_cache(tokens)[1])
    assert set(twin.hook_dict) == set(model.hook_dict)
    twin.set_use_hook_mlp_in(True)  # the copy's flags are the copy's
    assert "blocks.0.hook_mlp_in" in twin.run_with_cache(tokens)[1]
    assert "blocks.0.hook_mlp_in" not in model.run_with_cache(tokens)[1]
    with torch.no_grad():
        twin.embed.W_E.mul_(-2)
    assert torch.equal(model(tokens), logits)
    by_hand, _ = run_by_hand(twin, tokens)  # also the copy's tied unembedding is the copy's
    np.testing.assert_allclose(twin(tokens).detach().numpy(), by_hand, atol=1e-4)


def test_training_mode_changes_no_number():
    model = tiny_model(full_config())
    tokens = random_tokens(model)
    assert not any(module.training for module in model.modules())
    logits = model(tokens)
    assert model.train() is model
    assert all(module.training for module in model.modules())
    assert torch.equal(model(tokens), logits)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_moving_to_another_dtype_moves_everything():
    model = tiny_model(full_config(biases=False))
    tokens = random_tokens(model)
    expected, _ = run_by_hand(model, tokens)
    moved = model.to(torch.float64)
    assert_close(moved(tokens), expected)
    model.to(torch.bfloat16)
    logits, cache = model.run_with_cache(tokens)
    assert {value.dtype for value in (logits, model.b_Q, *cache.values())} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(DataError, match=r"a sequence of 9 tokens does not fit .* n_ctx = 8"):
        tiny_model()(torch.zeros(1, 9, dtype=torch.long))


# --- text

WORDS = ["<|endoftext|>", "a", "b", "c", "d"]


def test_text_needs_a_tokenizer_that_fits():
    with pytest.raises(TokenizerError, match=r"no tokenizer.*token ids"):
        tiny_model()("a b")
    with pytest.raises(TokenizerError, match="the tokenizer has 12 tokens, the model d_vocab = 11"):
        tiny_model(tokenizer=word_tokenizer([*WORDS, *"efghijk"]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_different_length_give_what_each_gives_alone(side):
    model = tiny_model(full_config(), dtype=torch.float64, tokenizer=word_tokenizer(WORDS))
    assert model.to_tokens("a b d").tolist() == [[0, 1, 2, 4]]  # begin-of-text in front
    assert torch.equal(model("a b d"), model(torch.tensor([[0, 1, 2, 4]])))
    together = model(["c", "a b d"], padding_side=side)
    last = -1 if side == "left" else 1
    torch.testing.assert_close(together[0, last], model("c")[0, -1], rtol=0, atol=1e-10)
    torch.testing.assert_close(together[1, -1], model("a b d")[0, -1], rtol=0, atol=1e-10)
