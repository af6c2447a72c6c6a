"""What TransformerLens offers on our models: flagged hooks, generation, moves, refusals."""

import base64
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparse
from helpers import (
    ON_3,
    full_config,
    random_tokens,
    sparse_configs,
    tiny_config,
    tiny_model,
    word_tokenizer,
)
from tl_sparse.data.tokenizer import load_tokenizer
from tl_sparse.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TokenizerError,
    UnsupportedError,
)
from tl_sparse.faces.choose import wrap
from tl_sparse.network.config import PAPER_TOPK_LOCATIONS, SparseConfig
from tl_sparse.network.transformer import SparseTransformer

few = settings(max_examples=25)
WORDS = ["<|endoftext|>", "a", "b", "c", "d"]
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


#: Flag → the hook points that act with it; TransformerLens 4 has some under a second name.
HOOKS_OF = {
    "use_attn_result": ["attn.hook_result"],
    "use_split_qkv_input": ["hook_q_input", "hook_k_input", "hook_v_input"],
    "use_attn_in": ["hook_attn_in"],
    "use_hook_mlp_in": ["hook_mlp_in"],
}
if not ON_3:
    HOOKS_OF["use_split_qkv_input"] += [f"attn.{name}" for name in HOOKS_OF["use_split_qkv_input"]]
    HOOKS_OF["use_attn_in"] += ["attn.hook_attn_in"]


def additive_model(abs_topk=0.6):
    """Every feature but those that act on the residual stream itself."""
    topk = dict.fromkeys(PAPER_TOPK_LOCATIONS, abs_topk)
    return tiny_model(full_config(resid_relu=False, abs_topk=topk), seed=5, dtype=torch.float64)


# --- optional hook points


@few
@given(config=sparse_configs(), seed=st.integers(0, 1000), flags=st.sets(st.sampled_from(FLAGS)))
def test_flags_change_neither_logits_nor_gradients_nor_other_hooks(config, seed, flags):
    if {"use_split_qkv_input", "use_attn_in"} <= flags:
        flags.remove("use_attn_in")  # TransformerLens allows one of the two
    model = tiny_model(config, seed, torch.float64)
    tokens = random_tokens(config, seed=seed)

    def run():
        logits, cache = model.run_with_cache(tokens)
        weights = [p for p in model.parameters() if p.requires_grad]
        return logits, cache, torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)

    logits, cache, gradients = run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the stream's nonlinearities, tested below
        for flag in flags:
            getattr(model, f"set_{flag}")(True)
    flagged_logits, flagged_cache, flagged_gradients = run()
    torch.testing.assert_close(flagged_logits, logits, rtol=1e-10, atol=1e-10)
    for name in cache:
        if ".ln1." not in name:  # with inputs by head, the norm's hooks have a head dimension
            torch.testing.assert_close(flagged_cache[name], cache[name], rtol=1e-9, atol=1e-9)
    for ours, expected in zip(flagged_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7)
    expected = {
        f"blocks.{layer}.{name}"
        for layer in range(config.n_layers)
        for f in flags
        for name in HOOKS_OF[f]
    }
    assert {name for name in flagged_cache if name not in cache} == expected


def test_results_of_heads_and_the_bias_sum_to_what_attention_writes():
    model = additive_model()
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(random_tokens(model))
    for layer, block in enumerate(model.blocks):
        result, attn_out = (
            cache[f"blocks.{layer}.attn.hook_result"],
            cache[f"blocks.{layer}.hook_attn_out"],
        )
        assert result.shape == (2, 8, 3, 6)
        torch.testing.assert_close(result.sum(2) + block.attn.b_O, attn_out, rtol=0, atol=1e-12)
        kept = attn_out != 0
        assert kept.sum(-1).eq(3).all()  # AbsTopK keeps int(0.6 · 6)
        by_head = torch.einsum(
            "bphd,hdm->bphm", cache[f"blocks.{layer}.attn.hook_z"], block.attn.W_O
        )
        where = kept[:, :, None].expand_as(result)
        torch.testing.assert_close(result[where], by_head[where], rtol=0, atol=1e-12)
        dropped = (-block.attn.b_O / 3).expand_as(result)
        torch.testing.assert_close(result[~where], dropped[~where], rtol=0, atol=1e-12)


def test_a_result_replaced_moves_the_stream_by_just_that():
    model = additive_model()
    model.set_use_attn_result(True)
    tokens = random_tokens(model)
    added = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def add(result, hook):
        result[:, :, 1] += added

    _, plain = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_result", add)]):
        _, edited = model.run_with_cache(tokens)
    moved = edited["blocks.1.hook_resid_mid"] - plain["blocks.1.hook_resid_mid"]
    torch.testing.assert_close(moved, added, rtol=0, atol=1e-12)


@pytest.mark.parametrize("letter", "qkv")
def test_the_input_of_one_head_reaches_that_head_alone(letter):
    model = additive_model(abs_topk=1.0)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    tokens = random_tokens(model)
    other = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def replace(x, hook):
        assert x.shape == (2, 8, 3, 6)
        x[:, :, 1] = other
        return x

    _, plain = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[(f"blocks.0.hook_{letter}_input", replace)]):
        _, edited = model.run_with_cache(tokens)
    block, hooks = model.blocks[0], [f"blocks.0.attn.hook_{name}" for name in "qkv"]
    read = block.ln1(other, plain["hook_pos"])
    weight, bias = (
        torch.cat(
            [
                getattr(block.attn, f"W_{letter.upper()}"),
                getattr(block.attn, f"W_{letter.upper()}_pos"),
            ],
            dim=1,
        )[1],
        getattr(block.attn, f"b_{letter.upper()}")[1],
    )
    expected = {name: plain[name].clone() for name in hooks}
    expected[f"blocks.0.attn.hook_{letter}"][:, :, 1] = read @ weight + bias
    for name in hooks:
        torch.testing.assert_close(edited[name], expected[name], rtol=0, atol=1e-12)


def test_all_of_attention_reads_hook_attn_in_and_the_mlp_reads_hook_mlp_in():
    model = additive_model()
    tokens = random_tokens(model)
    other = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.set_use_attn_in(True)
    model.set_use_hook_mlp_in(True)
    with model.hooks(
        fwd_hooks=[
            ("blocks.1.hook_attn_in", lambda x, hook: other[:, :, None].expand_as(x)),
            ("blocks.1.hook_mlp_in", lambda x, hook: other),
        ]
    ):
        _, cache = model.run_with_cache(tokens)
    block, pos = model.blocks[1], cache["hook_pos"]
    attn_out = block.attn(*[block.ln1(other, pos)] * 3, None)
    torch.testing.assert_close(cache["blocks.1.hook_attn_out"], attn_out, rtol=0, atol=1e-12)
    mlp_out = block.topk_mlp_out(block.mlp(block.ln2(other, pos)))
    torch.testing.assert_close(cache["blocks.1.hook_mlp_out"], mlp_out, rtol=0, atol=1e-12)
    resid_mid = cache["blocks.1.hook_resid_pre"] + attn_out  # the stream itself is not replaced
    torch.testing.assert_close(cache["blocks.1.hook_resid_mid"], resid_mid, rtol=0, atol=1e-12)


def test_flags_are_those_of_cfg_too():
    model = additive_model()
    model.cfg.use_attn_result = True
    assert "blocks.0.attn.hook_result" in model.run_with_cache(random_tokens(model))[1]
    model.cfg.use_attn_result = False
    assert "blocks.0.attn.hook_result" not in model.run_with_cache(random_tokens(model))[1]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(resid_relu=True), "a ReLU"),
        (dict(abs_topk={"resid_pre": 0.5}), "AbsTopK at resid_pre"),
    ],
)
def test_edge_flags_warn_where_the_stream_is_no_sum(changes, what):
    model = tiny_model(**changes)
    with pytest.warns(
        UserWarning, match=rf"use_attn_result: .* not a sum of its components \(it passes {what}\)"
    ):
        model.set_use_attn_result(True)
    with pytest.warns(UserWarning, match=r"use_split_qkv_input: .* patch whole activations"):
        model.set_use_split_qkv_input(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_use_attn_result(False)
        tiny_model().set_use_attn_result(True)


def test_inputs_by_head_warn_of_what_abs_topk_drops_unless_results_are_on():
    model = additive_model()
    with pytest.warns(UserWarning, match=r"what a head writes is attn.hook_result .*, not z @ W_O"):
        model.set_use_split_qkv_input(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)


# --- generation


def talking_model(seed=2, **changes):
    config = full_config(d_vocab=len(WORDS), n_ctx=12, **changes)
    tokenizer = word_tokenizer(WORDS, eos_token=WORDS[0], pad_token=WORDS[0])
    return tiny_model(config, seed=seed, dtype=torch.float64, tokenizer=tokenizer)


def continued(model, tokens, n):
    """Greedy continuation, one whole forward pass a step."""
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize(
    "positions",
    [dict(), dict(positions="added", d_pos=0, seed=4), dict(positions="none", d_pos=0, seed=4)],
)
@pytest.mark.parametrize("cache", [True, False])
def test_generate_continues_as_repeated_forward_passes_do(positions, cache):
    model = talking_model(**positions)
    assert model.sparse_cfg.bigram_table
    tokens = torch.tensor([[0, 1, 2], [0, 3, 3]])
    settings = dict(do_sample=False, verbose=False, use_past_kv_cache=cache)
    expected = continued(model, tokens, 6)
    out = model.generate(tokens, max_new_tokens=6, stop_at_eos=False, **settings)
    assert out.tolist() == expected.tolist()
    assert len(set(expected[:, 3:].flatten().tolist())) > 1
    text = model.generate(
        "a b", max_new_tokens=4, stop_at_eos=False, return_type="tokens", **settings
    )
    assert text.tolist() == continued(model, torch.tensor([[0, 1, 2]]), 4).tolist()
    assert isinstance(model.generate("a b", max_new_tokens=2, **settings), str)


def test_generate_pads_a_batch_on_the_left():
    model = talking_model()
    settings = dict(
        max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    together = model.generate(["a", "b c d"], **settings)
    assert together[0, 2:].tolist() == continued(model, torch.tensor([[0, 1]]), 5)[0].tolist()
    assert together[1].tolist() == continued(model, torch.tensor([[0, 2, 3, 4]]), 5)[0].tolist()


def test_generate_pads_as_it_is_asked_to_begin():
    model = talking_model(seed=4, positions="added", d_pos=0)
    settings = dict(
        max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    together = model.generate(["a", "b c d"], prepend_bos=False, **settings)
    assert together[0, 2:].tolist() == continued(model, torch.tensor([[1]]), 5)[0].tolist()
    assert together[1].tolist() == continued(model, torch.tensor([[2, 3, 4]]), 5)[0].tolist()
    assert model.cfg.default_prepend_bos is True


def test_an_unfinished_stream_leaves_the_model_alone():
    model = talking_model()
    stream = model.generate_stream(
        "a b", max_new_tokens=6, max_tokens_per_yield=1, stop_at_eos=False, verbose=False
    )
    next(stream)
    tokens = torch.tensor([[1, 2, 3]])
    resid = model(tokens, stop_at_layer=0)
    torch.testing.assert_close(
        model(resid, start_at_layer=0, tokens=tokens), model(tokens), rtol=0, atol=1e-12
    )


def test_generate_samples_by_the_seed_and_stops_at_the_end_of_text():
    model = talking_model()
    settings = dict(max_new_tokens=8, verbose=False, return_type="tokens", stop_at_eos=False)
    outs = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        outs.append(model.generate("a b", do_sample=True, temperature=2.0, **settings).tolist())
    assert outs[0] == outs[1]
    assert len({str(out) for out in outs}) > 1
    with torch.no_grad():
        model.unembed.b_U[0] = 1e3  # the end-of-text token always wins
    stopped = model.generate(
        "a b", max_new_tokens=8, verbose=False, return_type="tokens", do_sample=False
    )
    assert stopped.tolist() == [[0, 1, 2, 0]]


def test_generate_stream_yields_what_generate_gives():
    model = talking_model()
    settings = dict(
        max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    whole = model.generate("a b", **settings)
    pieces = list(model.generate_stream("a b", max_tokens_per_yield=4, **settings))
    assert torch.cat(pieces, dim=1).tolist() == whole.tolist()
    assert len(pieces) > 1


def test_generating_past_the_context_is_refused_and_leaves_the_model_as_it_was():
    model = talking_model()
    before = model("a b")
    with pytest.raises(
        DataError, match=r"13 tokens does not fit the model's context of n_ctx = 12"
    ):
        model.generate("a b", max_new_tokens=20, stop_at_eos=False, do_sample=False, verbose=False)
    assert torch.equal(model("a b"), before)
    assert not model.embed._forward_pre_hooks


def test_the_first_residual_stream_resumes():
    model = talking_model(positions="added", d_pos=0)
    tokens = model.to_tokens(["a", "b c d"], padding_side="left")
    model.tokenizer.padding_side = "left"
    resid, given, _, mask = model.input_to_embed(["a", "b c d"])
    assert torch.equal(given, tokens)
    logits = model(resid, start_at_layer=0, tokens=tokens, attention_mask=mask)
    torch.testing.assert_close(logits, model(tokens, attention_mask=mask), rtol=0, atol=1e-12)


# --- text


def byte_vocabulary(folder, kind):
    """259 tokens, the 256 bytes, `de`, ` x` and `<|endoftext|>`, as one of two kinds of file."""
    tokens = [bytes([i]) for i in range(256)] + [b"de", b" x"]
    path = folder / "vocabulary.tiktoken"
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    )
    if kind == "tiktoken":
        return path
    load_tokenizer(path).save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["tokenizer.json", "tiktoken"])
def test_text_and_tokens(kind, tmp_path):
    tiny_model(full_config(d_vocab=260, n_ctx=16)).save_pretrained(tmp_path / "model")
    model = tl_sparse.load(
        tmp_path / "model", device="cpu", tokenizer=byte_vocabulary(tmp_path, kind)
    )
    ids = [256, ord("f"), 257]  # de f ␣x
    assert model.to_tokens("def x").tolist() == [[258, *ids]]
    assert model.to_tokens("def x", prepend_bos=False).tolist() == [ids]
    assert model.to_tokens(["def x", "f"], padding_side="right").tolist() == [
        [258, *ids],
        [258, 102, 258, 258],
    ]
    assert model.to_tokens(["def x", "f"], padding_side="left").tolist() == [
        [258, *ids],
        [258, 258, 258, 102],
    ]
    assert model.to_string(torch.tensor(ids)) == "def x"
    assert model.to_str_tokens("def x") == ["<|endoftext|>", "de", "f", " x"]
    assert model.to_single_token(" x") == 257
    assert model.to_single_str_token(257) == " x"
    assert (
        model.to_string(model.to_tokens("é → 'x'", prepend_bos=False)[0]) == "é → 'x'"
    )  # bytes, whatever they are
    text = model("def x", prepend_bos=False)
    assert torch.equal(text, model(torch.tensor([ids])))
    for side in ("left", "right"):
        together = model(["def x", "f"], padding_side=side)
        alone = model("f")[0]
        ours = together[1, -2:] if side == "left" else together[1, :2]
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


# --- moves, modes, compilation


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.double(),
        lambda m: m.to(torch.float64),
        lambda m: m.to("cpu", torch.float64),
        lambda m: m.to(dtype=torch.float64),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
    ],
)
@pytest.mark.parametrize("normalization", ["rms", "layer"])
def test_cfg_follows_every_cast(move, normalization):
    model = tiny_model(full_config(normalization=normalization, norm_bias=False, biases=False))
    moved = move(model)
    weight = moved.blocks[0].attn.W_Q
    assert weight.dtype != torch.float32
    assert (
        {p.dtype for p in moved.parameters()}
        == {moved.b_Q.dtype}
        == {weight.dtype}
        == {moved.cfg.dtype}
    )
    assert moved.cfg.eps == (2.0**-23 if normalization == "rms" else 1e-5)
    assert moved(random_tokens(moved)).dtype == weight.dtype


def test_cfg_follows_a_move():
    model = tiny_model(full_config()).to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert str(model.cfg.device) == "meta"


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(full_config(), marks=pytest.mark.slow),
        full_config(positions="none", d_pos=0, attn_sinks=False),
    ],
)
def test_compiles(config):
    model = tiny_model(config)
    tokens = random_tokens(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    loss = model(tokens, return_type="loss")
    expected = torch.autograd.grad(loss, model.blocks[0].mlp.W_in)[0]
    ours = torch.autograd.grad(compiled(tokens, return_type="loss"), model.blocks[0].mlp.W_in)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["hook_embed", "ln_final", "hook_bigram", "blocks.0.attn.hook_pattern"]
)
def test_a_module_put_in_the_place_of_another_runs(name):
    """As SAELens puts an SAE in the place of a hook point."""
    model = tiny_model(full_config(resid_relu=False, abs_topk={}), dtype=torch.float64)
    tokens = random_tokens(model)
    expected = model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (f"{name}.hook_normalized" if name == "ln_final" else name, lambda x, hook: x * 0)
        ],
    )

    class Nothing(torch.nn.Module):
        def __init__(self, replaced):
            super().__init__()
            self.replaced = replaced

        def forward(self, x):
            if name == "ln_final":
                return x * 0 * self.replaced.w + self.replaced.b
            return x * 0

    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    replaced = getattr(owner, leaf)
    setattr(owner, leaf, Nothing(replaced))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)
    setattr(owner, leaf, replaced)
    assert not torch.allclose(model(tokens), expected)


def test_run_with_cache_stops_before_a_layer():
    model = tiny_model(full_config(resid_relu=False, abs_topk={}))
    tokens = random_tokens(model)
    for stop in (0, 1, -1):
        resid, cache = model.run_with_cache(tokens, stop_at_layer=stop)
        torch.testing.assert_close(resid, model(tokens, stop_at_layer=stop), rtol=1e-4, atol=1e-5)
        layers = stop % 2
        assert ("blocks.0.hook_resid_post" in cache) == (layers == 1)
        assert not any(name.startswith(("blocks.1", "ln_final", "hook_bigram")) for name in cache)
    assert model.run_with_cache(tokens)[0].shape == (2, 8, 11)  # nothing stays behind


def test_the_device_is_that_of_the_weights():
    model = tiny_model()
    assert model.device == torch.device("cpu")
    assert model.to("meta").device == torch.device("meta")


@pytest.mark.parametrize("attn_sinks", [True, False])
def test_a_hook_may_write_into_z(attn_sinks):
    model = tiny_model(full_config(attn_sinks=attn_sinks), dtype=torch.float64)
    tokens, gradients = random_tokens(model), []

    def in_place(z, hook):
        z[:, :, 0] = 0.0
        return z

    def out_of_place(z, hook):
        return torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, 1:]], dim=2)

    for hook in (in_place, out_of_place):
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", hook)]):
            loss = model(tokens, return_type="loss")
        gradients.append(
            torch.autograd.grad(loss, [model.blocks[0].attn.W_V, model.blocks[0].attn.W_O])
        )
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_need_explicit_attention():
    model = tiny_model(full_config(), dtype=torch.float64)
    tokens = random_tokens(model)
    with model.hooks(
        fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", lambda x, hook: x) for layer in (0, 1)]
    ):
        loss = model(tokens, return_type="loss")
    (first,) = torch.autograd.grad(loss, model.blocks[0].mlp.W_in, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), model.blocks[0].mlp.W_in)
    assert second.abs().sum() > 0
    seen = []
    handle = model.blocks[0].attn.hook_pattern.register_forward_hook(
        lambda module, args, out: seen.append(out.shape)
    )
    model(tokens)  # torch's own hooks see the pattern too
    handle.remove()
    assert seen == [(2, 3, 8, 8)]


def test_backward_hooks_and_gradients_at_a_cached_run():
    model = tiny_model(full_config(), dtype=torch.float64)
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    gradient = cache["blocks.0.hook_resid_post_grad"]
    resid = model(tokens, stop_at_layer=1).detach().requires_grad_()
    model(resid, start_at_layer=1, tokens=tokens, return_type="loss").backward()
    torch.testing.assert_close(gradient, resid.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, t: m(t.float()),
            r"tokens must be integers \[batch, pos\], not torch.float32 of \[2, 8\]",
        ),
        (lambda m, t: m(t > 3), r"tokens must be integers \[batch, pos\], not torch.bool"),
        (
            lambda m, t: m(t[None]),
            r"tokens must be integers \[batch, pos\], not torch.int64 of \[1, 2, 8\]",
        ),
        (lambda m, t: m([[1, 2], [3]]), r"tokens must be .* rows of equal length"),
        (lambda m, t: m([["a"], ["b"]]), r"tokens must be numbers \[batch, pos\]"),
        (lambda m, t: m(["a", 1]), r"tokens must be numbers \[batch, pos\]"),
        (lambda m, t: m(t.double().numpy()), "tokens must be integers .* not torch.float64"),
        (lambda m, t: m([[True, False]]), "tokens must be integers .* not torch.bool"),
        (lambda m, t: m(torch.tensor(3)), r"not torch.int64 of \[\]"),
        (lambda m, t: m(t[:0]), r"tokens must not be empty, as those of shape \[0, 8\]"),
        (lambda m, t: m(t[:, :0]), r"tokens must not be empty, as those of shape \[2, 0\]"),
        (lambda m, t: m([[-1]]), r"token ids must be in \[0, 11\)"),
        (lambda m, t: m([[2**70]]), "tokens must be"),
        (lambda m, t: m(np.array([[2**63]], np.uint64)), r"token ids must be in \[0, 11\)"),
        (lambda m, t: m(b"ab"), "text, a list of texts, or token ids, not bytes"),
        (lambda m, t: m({"a": 1}), "text, a list of texts, or token ids, not dict"),
        (lambda m, t: m.generate(None), "text, a list of texts, or token ids, not NoneType"),
        (lambda m, t: m.network(t.float()), "tokens must be integers"),
        (lambda m, t: m.network(None), "tokens must be numbers"),
        (lambda m, t: m(t, padding_side="up"), "padding_side = 'up' is not possible"),
        (lambda m, t: m(t, attention_mask="all"), "attention_mask must be numbers"),
        (lambda m, t: m(t, position_ids=t.float()), "position_ids must be integers"),
        (lambda m, t: m(t, stop_at_layer=3), r"stop_at_layer = 3 .* integer in \[-2, 2\]"),
        (lambda m, t: m(t, stop_at_layer="1"), "stop_at_layer = '1' is not possible"),
        (
            lambda m, t: m(torch.zeros(2, 8, 6), start_at_layer=1.0, tokens=t),
            "start_at_layer = 1.0 is not possible",
        ),
        (
            lambda m, t: m(torch.zeros(2, 8, 6).double(), start_at_layer=1, tokens=t),
            "the residual stream must be torch.float32, as the model, not torch.float64",
        ),
        (lambda m, t: m(None), "text, a list of texts, or token ids, not NoneType"),
        (lambda m, t: m([]), "text, a list of texts, or token ids, not list"),
        (
            lambda m, t: m(t, attention_mask=torch.ones(8)),
            r"attention_mask must have the tokens' shape, \[2, 8\]",
        ),
        (
            lambda m, t: m(t, position_ids=torch.arange(8)),
            r"position_ids must have the tokens' shape, \[2, 8\]",
        ),
        (
            lambda m, t: m(t, position_ids=torch.full((2, 8), 8)),
            r"position_ids must be in \[0, 8\), the model's",
        ),
        (
            lambda m, t: m(torch.zeros(2, 8, 7), start_at_layer=1, tokens=t),
            r"must have shape \[2, 8, 6\] .* not \[2, 8, 7\]",
        ),
        (
            lambda m, t: m(torch.zeros(2, 7, 6), start_at_layer=1, tokens=t),
            r"must have shape \[2, 8, 6\] .* not \[2, 7, 6\]",
        ),
    ],
)
def test_inputs_of_a_wrong_kind(call, message):
    model = tiny_model(full_config())
    with pytest.raises(DataError, match=message):
        call(model, random_tokens(model))


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_tokens_may_be_any_integers_in_any_kind_of_array(dtype):
    model = tiny_model(full_config())
    tokens = random_tokens(model)
    expected = model(tokens)
    array = tokens.numpy().astype(dtype)
    for kind in (array, array.tolist(), list(array), torch.from_numpy(array)):
        assert torch.equal(model(kind), expected)
        assert torch.equal(model.network(kind), expected)
        assert torch.equal(model(model.embed(tokens), start_at_layer=0, tokens=kind), expected)
        cached, _ = model.run_with_cache(kind)  # with explicit attention
        torch.testing.assert_close(cached, expected)
    assert torch.equal(model(array[0]), expected[:1])
    mask = np.ones((2, 8), dtype)
    positions = np.arange(8, dtype=dtype)[None].repeat(2, axis=0)
    assert torch.equal(model(array, attention_mask=mask, position_ids=positions), expected)
    assert torch.equal(model(array, attention_mask=mask.tolist()), expected)


def test_generate_continues_tokens_in_any_kind_of_array():
    model = talking_model()
    options = dict(max_new_tokens=2, do_sample=False, verbose=False, stop_at_eos=False)
    expected = model.generate(torch.tensor([[1, 2]]), **options)
    for kind in ([[1, 2]], np.array([[1, 2]], np.uint16), torch.tensor([1, 2]).int()):
        assert torch.equal(model.generate(kind, **options), expected)


@pytest.mark.parametrize("start", [None, 0, 1, 2])
def test_logits_at_one_position_whichever_blocks_run(start):
    model = tiny_model(full_config())
    tokens = random_tokens(model)
    rows = torch.arange(2)
    last = torch.tensor([3, 6])
    resid = None
    if start is not None:
        resid = model(tokens, stop_at_layer=start)
    logits = model.network(tokens, resid=resid, start_at_layer=start, last=last)
    torch.testing.assert_close(logits, model(tokens)[rows, last][:, None])
    for stop in (0, 1, 2):
        stopped = model.network(tokens, stop_at_layer=stop, last=last)
        expected = model(tokens, stop_at_layer=stop)[rows, last][:, None]
        torch.testing.assert_close(stopped, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wrap(None), "network = None is not possible; it must be a SparseTransformer"),
        (lambda: SparseTransformer({}), "cfg = {} is not possible; it must be a SparseConfig"),
        (lambda: tl_sparse.create({}, 0), "config = {} is not possible"),
        (lambda: tl_sparse.create(tiny_config(), True), "seed = True is not possible"),
        (lambda: tl_sparse.create(tiny_config(), 0, dtype="int8"), "dtype = 'int8'"),
        (lambda: tl_sparse.create(tiny_config(), 0, device=object()), "device = <object"),
        (lambda: SparseConfig.from_dict(None), "values = None is not possible"),
        (lambda: SparseConfig.from_dict([("n_layers", 1)]), "it must be a mapping"),
        (lambda: tiny_config().topk("attn_q_"), "location = 'attn_q_' is not possible"),
        (lambda: tl_sparse.load("tiny-python-sparse", dense_weights="no"), "dense_weights = 'no'"),
        (lambda: tl_sparse.load("tiny-python-sparse", kernels=["dense"]), "kernels = "),
    ],
)
def test_arguments_of_a_wrong_type(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("source", [None, 3, b"tiny-python-sparse", ["a"], object(), ""])
def test_sources_of_a_wrong_type(source):
    with pytest.raises(CheckpointError, match="is not a folder"):
        tl_sparse.load(source)


def test_a_partial_run_does_not_invent_padding():
    tokenizer = word_tokenizer(WORDS, eos_token=WORDS[0], bos_token=WORDS[4], pad_token=WORDS[0])
    tokenizer.padding_side = "left"
    model = tiny_model(tokenizer=tokenizer)
    tokens = torch.tensor([[4, 1, 2]])
    resid = model(tokens, stop_at_layer=0)
    with pytest.raises(DataError, match=r"start_at_layer needs tokens=….* padding on the left"):
        model(resid, start_at_layer=0)
    torch.testing.assert_close(model(resid, start_at_layer=0, tokens=tokens), model(tokens))


def test_special_tokens_are_completed_on_a_copy():
    plain = word_tokenizer(
        ["?", "a", "<|endoftext|>"]
    )  # known to the vocabulary, but not as a special token
    model = tiny_model(tokenizer=plain)
    assert model.to_tokens("a").tolist() == [[2, 1]]
    assert (plain.eos_token, plain.pad_token) == (None, None)
    with pytest.raises(
        TokenizerError, match=r"no end-of-text token: neither eos_token nor '<\|endoftext\|>'"
    ):
        tiny_model(tokenizer=word_tokenizer(["?", "a"]))
    bare = tiny_model()
    with pytest.raises(TokenizerError, match="set_tokenizer gives it one"):
        bare.to_tokens("a")
    bare.set_tokenizer(plain)
    assert bare.to_tokens(["a", "a a"]).shape == (2, 3)
    with pytest.raises(TokenizerError, match="a tokenizer from transformers is needed, not int"):
        bare.set_tokenizer(3)


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(DataError, match=r"token ids must be in \[0, 11\)"):
        tiny_model()(torch.tensor([[3, 11]]))


def test_from_pretrained_is_load(tmp_path):
    model = talking_model()
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(str(tmp_path / "model"), device="cpu", dtype="float32")
    assert type(again) is type(model)
    assert again.cfg.dtype == torch.float32
    assert type(
        type(model).from_pretrained_no_processing(tmp_path / "model", fold_ln=False)
    ) is type(model)
    with pytest.raises(UnsupportedError, match="must stay as they are"):
        type(model).from_pretrained(tmp_path / "model", fold_ln=True)
    torch.testing.assert_close(again("a b"), model("a b").float(), rtol=1e-4, atol=1e-4)


# --- what cannot be right


def test_weights_cannot_be_folded():
    model = tiny_model(full_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if ON_3:
        calls = [
            model.process_weights_,
            lambda: model.fold_layer_norm(model.state_dict()),
            lambda: model.center_writing_weights(model.state_dict()),
            lambda: model.center_unembed(model.state_dict()),
            lambda: model.fold_value_biases(model.state_dict()),
            lambda: model.refactor_factored_attn_matrices(model.state_dict()),
            lambda: model.load_and_process_state_dict(model.state_dict()),
        ]
    else:
        calls = [model.process_weights, model.enable_compatibility_mode]
        model.enable_compatibility_mode(no_processing=True)
    for call in calls:
        with pytest.raises(
            UnsupportedError, match=r"weights of this model must stay as they are: .* as loaded"
        ):
            call()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_directions_of_tokens_warn_of_a_bigram_table():
    tokens = torch.tensor([1, 2])
    model = tiny_model(bigram_table=True)
    with pytest.warns(
        UserWarning, match=r"from its bigram table \(hook_bigram\).* leave that part out"
    ):
        directions = model.tokens_to_residual_directions(tokens)
    assert torch.equal(directions, model.W_U.T[tokens] * model.ln_final.w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model().tokens_to_residual_directions(tokens)
