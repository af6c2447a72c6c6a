"""The network against a NumPy one written by hand, and as a TransformerLens model on both lines."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import transformer_lens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import (
    ON_3,
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

few = settings(max_examples=40)


# --- by hand


class NetworkByHand:
    """The network in plain NumPy and float64, written from the paper's architecture alone.

    Attributes:
        cache: the value at each hook of the last run.
        edits: hook name → a function that replaces the value there.
    """

    def __init__(self, model, edits=None):
        self.cfg = model.sparse_cfg
        self.w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        self.edits = edits or {}
        self.cache = {}

    def run(self, tokens):
        cfg = self.cfg
        resid = self.at("hook_embed", self.w["embed.W_E"][tokens])
        self.positions = self.position_channels(tokens)
        if cfg.positions == "added":
            resid = resid + self.positions
        for layer in range(cfg.n_layers):
            resid = self.block(f"blocks.{layer}", resid)
        W_U = self.w["embed.W_E"].T if cfg.tied_unembed else self.w["unembed.W_U"]
        logits = self.norm("ln_final", resid) @ W_U + self.w.get("unembed.b_U", 0.0)
        if cfg.bigram_table:
            logits = logits + self.at("hook_bigram", self.w["bigram.W_bigram"][tokens])
        return logits

    def position_channels(self, tokens):
        if self.cfg.positions == "none":
            return None
        n_batch, length = tokens.shape
        table = np.stack([self.w["pos_embed.W_pos"][:length]] * n_batch)
        return self.at("hook_pos_embed" if self.cfg.positions == "added" else "hook_pos", table)

    def block(self, name, resid):
        resid = self.at(f"{name}.hook_resid_pre", self.topk("resid_pre", resid))
        attn_in = self.read(f"{name}.ln1", "attn_in", resid)
        attn_out = self.topk("attn_out", self.attention(f"{name}.attn", attn_in))
        resid = self.relu_of_stream(resid + self.at(f"{name}.hook_attn_out", attn_out))
        resid = self.at(f"{name}.hook_resid_mid", self.topk("resid_post_attn", resid))
        mlp_in = self.read(f"{name}.ln2", "mlp_in", resid)
        mlp_out = self.topk("mlp_out", self.mlp(f"{name}.mlp", mlp_in))
        resid = self.relu_of_stream(resid + self.at(f"{name}.hook_mlp_out", mlp_out))
        return self.at(f"{name}.hook_resid_post", self.topk("resid_post_mlp", resid))

    def attention(self, name, x):
        q, k, v = [self.heads(name, letter, x) for letter in "QKV"]
        scores = self.at(f"{name}.hook_attn_scores", self.causal_scores(q, k))
        pattern = self.at(f"{name}.hook_pattern", self.softmax(name, scores))
        z = np.zeros_like(q)
        for b, h, i in np.ndindex(pattern.shape[:3]):
            for j, weight in enumerate(pattern[b, h, i]):
                z[b, i, h] += weight * v[b, j, h]
        z = self.at(f"{name}.hook_z", z)
        by_head = [z[:, :, h] @ self.w[f"{name}.W_O"][h] for h in range(self.cfg.n_heads)]
        return sum(by_head) + self.w.get(f"{name}.b_O", 0.0)

    def heads(self, name, letter, x):
        """Queries, keys or values [batch, pos, head, d_head]; AbsTopK is over all heads at once."""
        cfg = self.cfg
        matrix = self.with_position_rows(f"{name}.W_{letter}")
        bias = self.w.get(f"{name}.b_{letter}", np.zeros((cfg.n_heads, cfg.d_head)))
        by_head = [x @ matrix[h] + bias[h] for h in range(cfg.n_heads)]
        together = self.topk(f"attn_{letter.lower()}", np.concatenate(by_head, -1))
        split = together.reshape(*x.shape[:2], cfg.n_heads, cfg.d_head)
        return self.at(f"{name}.hook_{letter.lower()}", split)

    def causal_scores(self, q, k):
        n_batch, length, n_heads, d_head = q.shape
        scores = np.full((n_batch, n_heads, length, length), -np.inf)
        for b, h, i, j in np.ndindex(scores.shape):
            if j <= i:
                scores[b, h, i, j] = q[b, i, h] @ k[b, j, h] / math.sqrt(d_head)
        return scores

    def softmax(self, name, scores):
        """A sink is one more term of the sum below."""
        pattern = np.zeros_like(scores)
        for b, h, i in np.ndindex(scores.shape[:3]):
            weights = np.exp(scores[b, h, i])
            sink = np.exp(self.w[f"{name}.sink"][h]) if self.cfg.attn_sinks else 0.0
            pattern[b, h, i] = weights / (weights.sum() + sink)
        return pattern

    def mlp(self, name, x):
        matrix = self.with_position_rows(f"{name}.W_in")
        pre = self.at(f"{name}.hook_pre", x @ matrix + self.w.get(f"{name}.b_in", 0.0))
        if self.cfg.act_fn == "gelu":
            post = pre * 0.5 * (1 + np.vectorize(math.erf)(pre / math.sqrt(2)))
        else:
            post = np.maximum(pre, 0)
        post = self.at(f"{name}.hook_post", self.topk("mlp_neuron", post))
        return post @ self.w[f"{name}.W_out"] + self.w.get(f"{name}.b_out", 0.0)

    def norm(self, name, x):
        x = self.centred(x)
        scale = self.at(f"{name}.hook_scale", self.scale(x))
        normalized = self.at(f"{name}.hook_normalized", x / scale)
        return normalized * self.w[f"{name}.w"] + self.w.get(f"{name}.b", 0.0)

    def read(self, name, location, x):
        """What a block reads: the stream, and concatenated positions, which have their own norm."""
        out = self.norm(name, x)
        if self.cfg.positions == "concatenated":
            p = self.centred(self.positions)
            p = p / self.scale(p) * self.w[f"{name}.w_pos"] + self.w.get(f"{name}.b_pos", 0.0)
            out = np.concatenate([out, p], -1)
        return self.at(f"{name}.hook_read", self.topk(location, out))

    def centred(self, x):
        return x - x.mean(-1, keepdims=True) if self.cfg.normalization == "layer" else x

    def scale(self, x):
        eps = 2.0**-23 if self.cfg.normalization == "rms" else 1e-5  # in every dtype
        return np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    def relu_of_stream(self, x):
        return np.maximum(x, 0) if self.cfg.resid_relu else x

    def topk(self, location, x):
        if location not in self.cfg.abs_topk:
            return x
        k = int(self.cfg.abs_topk[location] * x.shape[-1])
        kept = np.argsort(-abs(x), axis=-1)[..., :k]
        out = np.zeros_like(x)
        np.put_along_axis(out, kept, np.take_along_axis(x, kept, axis=-1), axis=-1)
        return out

    def with_position_rows(self, name):
        if f"{name}_pos" not in self.w:
            return self.w[name]
        return np.concatenate([self.w[name], self.w[f"{name}_pos"]], axis=-2)

    def at(self, name, value):
        """The value at a hook: what an edit makes of it, if there is one."""
        if name in self.edits:
            value = self.edits[name](value)
        self.cache[name] = value
        return value


def run_by_hand(model, tokens, edits=None):
    """Logits, and the value at each hook, of `NetworkByHand`."""
    network = NetworkByHand(model, edits)
    logits = network.run(tokens.numpy())
    return logits, network.cache


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
    """Along a random direction of all weights, by a central difference of the NumPy logits."""
    model = tiny_model(config, seed, torch.float64)
    tokens = random_tokens(config, length=3, seed=seed)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, p in weights.items():
        direction[name] = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    logits = model(tokens)
    coefficients = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * coefficients).sum().backward()
    slope = 0.0
    for name, p in weights.items():
        if p.grad is not None:
            slope += float((p.grad * direction[name]).sum())

    def value_along(step):
        with torch.no_grad():
            for name, p in weights.items():
                p.add_(direction[name], alpha=step)
            value = float((run_by_hand(model, tokens)[0] * coefficients.numpy()).sum())
            for name, p in weights.items():
                p.sub_(direction[name], alpha=step)
        return value

    # Where AbsTopK or a ReLU changes its choice between the two ends there is no slope: a smaller
    # step.
    errors = []
    for step in (1e-5, 1e-6, 1e-7):
        difference = (value_along(step) - value_along(-step)) / (2 * step)
        errors.append(abs(difference - slope))
    assert min(errors) / (1 + abs(slope)) < 1e-6


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


#: Hook points that act with a flag of `cfg` only.
FLAGGED_HOOKS = [
    "blocks.0.hook_attn_in",
    "blocks.0.hook_q_input",
    "blocks.0.hook_k_input",
    "blocks.0.hook_v_input",
    "blocks.0.hook_mlp_in",
    "blocks.0.attn.hook_result",
]
#: What TransformerLens 4 calls some of them besides.
SECOND_NAMES = [
    "blocks.0.attn.hook_attn_in",
    "blocks.0.attn.hook_q_input",
    "blocks.0.attn.hook_k_input",
    "blocks.0.attn.hook_v_input",
]


def cached_hooks(model):
    return set(model.run_with_cache(random_tokens(model))[1])


def test_hook_names_are_exactly_these():
    model = tiny_model(full_config(n_layers=1))
    assert sorted(model.run_with_cache(random_tokens(model))[1]) == sorted(HOOKS_OF_ONE_LAYER)
    second_names = [] if ON_3 else SECOND_NAMES
    assert sorted(model.hook_dict) == sorted([*HOOKS_OF_ONE_LAYER, *FLAGGED_HOOKS, *second_names])


def test_hooks_of_a_feature_are_there_only_with_it():
    without_features = set(HOOKS_OF_ONE_LAYER) - {"hook_pos", "hook_bigram"}
    assert cached_hooks(tiny_model()) == without_features
    assert cached_hooks(tiny_model(positions="added")) == without_features | {"hook_pos_embed"}


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

    def remember(gradient, hook):
        gradients[hook.name] = gradient

    names = ["blocks.0.ln1.hook_read", "blocks.1.mlp.hook_post"]
    with model.hooks(bwd_hooks=[(name, remember) for name in names]):
        model(random_tokens(model), return_type="loss").backward()
    assert gradients["blocks.0.ln1.hook_read"].shape == (2, 8, 10)
    assert gradients["blocks.1.mlp.hook_post"].shape == (2, 8, 10)
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Without a sink b_K would be another: it moves all scores alike.
    assert unreached == {"pos_embed.W_pos"}


# --- AbsTopK


# Small integers: many ties, and whole rows of zeros.
rows_with_ties = npst.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.integers(-2, 2).map(float),
)


@few
@given(x=rows_with_ties, k=st.integers(1, 12))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_abs_topk_keeps_exactly_k_also_among_equals(x, k, dtype):
    """In bfloat16 by the path of GPUs."""
    k = min(k, x.shape[1])
    leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
    out = abs_topk(leaf, k)
    out.sum().backward()
    kept = leaf.grad  # 1 where a gradient passes, 0 elsewhere
    assert ((kept == 0) | (kept == 1)).all()
    assert kept.sum(-1).eq(k).all()
    torch.testing.assert_close(out.detach(), leaf.detach() * kept, rtol=0, atol=0)
    magnitudes = out.detach().abs().sort(-1, descending=True).values[:, :k]
    largest_first = -np.sort(-abs(x))
    assert magnitudes.tolist() == largest_first[:, :k].tolist()


def distinct_magnitudes(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 20, generator=generator, dtype=torch.float64)


@few
@given(seed=st.integers(0, 10**6), k=st.integers(1, 20))
def test_abs_topk_is_that_of_a_sort_where_magnitudes_differ(seed, k):
    x = distinct_magnitudes(seed)
    expected = torch.zeros_like(x)
    for row, out in zip(x.view(-1, 20), expected.view(-1, 20), strict=True):
        largest_first = sorted(range(20), key=lambda i: -abs(row[i]))
        for i in largest_first[:k]:
            out[i] = row[i]
    assert torch.equal(abs_topk(x, k), expected)


@few
@given(seed=st.integers(0, 10**6), k=st.integers(1, 20))
def test_both_paths_of_abs_topk_keep_the_same_magnitudes(seed, k):
    coarse = distinct_magnitudes(seed).bfloat16()
    by_partition = abs_topk(coarse.float(), k)  # the same numbers: bfloat16 is a part of float32
    by_sorting = abs_topk(coarse, k).float()
    assert torch.equal(by_partition.abs().sort(-1).values, by_sorting.abs().sort(-1).values)


@few
@given(seed=st.integers(0, 10**6))
def test_abs_topk_of_a_strided_tensor(seed):
    strided = distinct_magnitudes(seed).transpose(1, 2)
    assert torch.equal(abs_topk(strided, 2), abs_topk(strided.contiguous(), 2))


# --- padding, partial runs, losses


@few
@given(config=sparse_configs(), seed=st.integers(0, 1000))
def test_padding_changes_nothing_at_real_tokens(config, seed):
    """The first of two rows is two tokens shorter than the second, which fills the context."""
    model = tiny_model(config, seed, torch.float64)
    tokens = random_tokens(config, batch=2, seed=seed)
    assume(not cancels(model, tokens))

    def check(mask, real):
        padded = model(tokens, attention_mask=mask)
        alone = model(tokens[:1, real])
        torch.testing.assert_close(padded[:1, real], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(padded[1], model(tokens)[1], rtol=0, atol=1e-10)

    left = torch.ones_like(tokens)
    left[0, :2] = 0
    check(left, slice(2, None))
    right = torch.ones_like(tokens)
    right[0, -2:] = 0
    check(right, slice(None, -2))
    check(None, slice(None, -2))


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
    assert {name for name, _ in model.named_children()} == {
        "embed",
        "hook_embed",
        "pos_embed",
        "hook_pos",
        "blocks",
        "ln_final",
        "unembed",
        "bigram",
        "hook_bigram",
    }


def test_a_model_without_features_has_these_weights_only():
    minimal = tiny_model(biases=False, tied_unembed=True)
    assert sorted(minimal.state_dict()) == sorted(
        [
            "embed.W_E",
            "blocks.0.ln1.w",
            "blocks.0.ln2.w",
            "blocks.0.attn.W_Q",
            "blocks.0.attn.W_K",
            "blocks.0.attn.W_V",
            "blocks.0.attn.W_O",
            "blocks.0.mlp.W_in",
            "blocks.0.mlp.W_out",
            "ln_final.w",
        ]
    )


def test_is_a_model_of_the_installed_line():
    model = tiny_model(full_config())
    if ON_3:
        assert isinstance(model, transformer_lens.HookedTransformer)
    else:
        from transformer_lens.model_bridge import TransformerBridge

        assert isinstance(model, TransformerBridge)


def test_sizes_and_weights_have_the_names_of_transformer_lens():
    model = tiny_model(full_config())
    sizes = dict(n_layers=2, d_model=6, n_heads=3, d_head=5, d_mlp=10, d_vocab=11, n_ctx=8)
    assert {name: getattr(model.cfg, name) for name in sizes} == sizes
    assert model.W_Q.shape == model.W_K.shape == model.W_V.shape == (2, 3, 6, 5)
    assert model.W_O.shape == (2, 3, 5, 6)
    assert model.W_in.shape == (2, 6, 10)
    assert model.W_out.shape == (2, 10, 6)
    assert model.W_E.shape == (11, 6)
    assert model.W_U.shape == (6, 11)
    assert model.b_Q.shape == (2, 3, 5)


def test_the_repr_counts_nonzero_weights():
    model = tiny_model(full_config())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert f"{nonzero:,} of {total:,} parameters nonzero" in repr(model)


@pytest.mark.parametrize(
    ("name", "shape"), [("b_Q", (1, 3, 5)), ("b_O", (1, 6)), ("b_in", (1, 10)), ("b_U", (11,))]
)
def test_biases_that_a_model_does_not_have_read_as_zeros(name, shape):
    bias = getattr(tiny_model(biases=False), name)
    assert bias.shape == shape
    assert not bias.any()


def test_a_seed_decides_the_weights():
    first = tiny_model(full_config(), seed=0).state_dict()
    again = tiny_model(full_config(), seed=0).state_dict()
    other = tiny_model(full_config(), seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


COPIES = [copy.deepcopy, pickled]
CONFIGS_TO_COPY = [full_config(), full_config(tied_unembed=True, biases=False)]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("config", CONFIGS_TO_COPY, ids=["full", "tied"])
def test_a_copy_computes_the_same(copied, config):
    model = tiny_model(config)
    tokens = random_tokens(model)
    model.run_with_cache(tokens)  # what a run leaves on the modules must not stop a copy
    twin = copied(model)
    assert type(twin) is type(model)
    assert twin.sparse_cfg == config
    assert torch.equal(twin(tokens), model(tokens))
    assert set(twin.run_with_cache(tokens)[1]) == set(model.run_with_cache(tokens)[1])
    assert set(twin.hook_dict) == set(model.hook_dict)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("config", CONFIGS_TO_COPY, ids=["full", "tied"])
def test_a_copy_has_flags_and_weights_of_its_own(copied, config):
    model = tiny_model(config)
    tokens = random_tokens(model)
    logits = model(tokens)
    twin = copied(model)
    twin.set_use_hook_mlp_in(True)
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
    assert {value.dtype for value in (logits, model.b_Q)} == {torch.bfloat16}
    in_float32 = ("hook_scale", "hook_attn_scores", "hook_pattern")  # as in TransformerLens
    for name, value in cache.items():
        assert value.dtype == (torch.float32 if name.endswith(in_float32) else torch.bfloat16), name
    assert model.cfg.dtype == torch.bfloat16


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(DataError, match=r"a sequence of 9 tokens does not fit .* n_ctx = 8"):
        tiny_model()(torch.zeros(1, 9, dtype=torch.long))


# --- text

WORDS = ["<|endoftext|>", "a", "b", "c", "d"]


@pytest.mark.parametrize("special", [{"eos_token": "<end>"}, {"bos_token": "<end>"}])
def test_a_vocabulary_without_an_unknown_token(special):
    words = ["<end>", "1", "2", "+", "="]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    model = tiny_model(tokenizer=tokenizer)
    assert model.to_tokens("1 + 2 =").tolist() == [[0, 1, 3, 2, 4]]
    assert model("1 + 2 =").shape == (1, 5, 11)


def test_text_needs_a_tokenizer_that_fits():
    with pytest.raises(TokenizerError, match=r"no tokenizer.*token ids"):
        tiny_model()("a b")
    with pytest.raises(
        TokenizerError, match="the tokenizer has 12 tokens, more than the model's d_vocab = 11"
    ):
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
