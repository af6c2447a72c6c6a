"""TransformerLens' ready-made activation patches against interventions by hand, on both lines."""

from itertools import product

import pytest
import torch
from tool_models import dense_model, difference, prompts, stream_model
from transformer_lens import patching
from transformer_lens.utilities import get_act_name

MODELS = {
    "dense": dense_model,
    "sparse": stream_model,
}  # patching is exact also where the stream is no sum
ALL = slice(None)

# patch: (activation, its axes, index → what of the activation [batch, …] is patched)
PATCHES = {
    "resid_pre": ("resid_pre", "lp", lambda p: (ALL, p)),
    "resid_mid": ("resid_mid", "lp", lambda p: (ALL, p)),
    "attn_out": ("attn_out", "lp", lambda p: (ALL, p)),
    "mlp_out": ("mlp_out", "lp", lambda p: (ALL, p)),
    "attn_head_out_by_pos": ("z", "lph", lambda p, h: (ALL, p, h)),
    "attn_head_q_by_pos": ("q", "lph", lambda p, h: (ALL, p, h)),
    "attn_head_k_by_pos": ("k", "lph", lambda p, h: (ALL, p, h)),
    "attn_head_v_by_pos": ("v", "lph", lambda p, h: (ALL, p, h)),
    "attn_head_pattern_by_pos": ("pattern", "lhp", lambda h, p: (ALL, h, p)),
    "attn_head_pattern_dest_src_pos": ("pattern", "lhpp", lambda h, dest, src: (ALL, h, dest, src)),
    "attn_head_out_all_pos": ("z", "lh", lambda h: (ALL, ALL, h)),
    "attn_head_q_all_pos": ("q", "lh", lambda h: (ALL, ALL, h)),
    "attn_head_k_all_pos": ("k", "lh", lambda h: (ALL, ALL, h)),
    "attn_head_v_all_pos": ("v", "lh", lambda h: (ALL, ALL, h)),
    "attn_head_pattern_all_pos": ("pattern", "lh", lambda h: (ALL, h)),
}

# patches that are stacks of those
STACKS = {
    "block_every": ["resid_pre", "attn_out", "mlp_out"],
    "attn_head_all_pos_every": [
        f"attn_head_{part}_all_pos" for part in ("out", "q", "k", "v", "pattern")
    ],
    "attn_head_by_pos_every": [
        f"attn_head_{part}_by_pos" for part in ("out", "q", "k", "v", "pattern")
    ],
}


@pytest.fixture(scope="module", params=MODELS)
def run(request):
    model = MODELS[request.param]()
    clean, corrupt = prompts(model, length=3)
    with torch.no_grad():
        cache = model.run_with_cache(clean)[1]
        return (
            model,
            corrupt,
            cache,
            {patch: by_hand(model, corrupt, cache, patch) for patch in PATCHES},
        )


def by_hand(model, corrupt, clean_cache, patch):
    """The metric after each patch, without TransformerLens' patching."""
    activation, axes, place = PATCHES[patch]
    sizes = {"l": model.cfg.n_layers, "p": corrupt.shape[1], "h": model.cfg.n_heads}
    out = torch.zeros([sizes[axis] for axis in axes])
    for layer, *index in product(*(range(sizes[axis]) for axis in axes)):
        name, where = get_act_name(activation, layer), place(*index)

        def put(x, hook, name=name, where=where):
            x = x.clone()
            x[where] = clean_cache[name][where]
            return x

        out[(layer, *index)] = difference(model.run_with_hooks(corrupt, fwd_hooks=[(name, put)]))
    return out


@pytest.mark.parametrize("patch", PATCHES)
def test_each_patch_is_the_intervention_it_names(run, patch):
    model, corrupt, cache, expected = run
    with torch.no_grad():
        result = getattr(patching, f"get_act_patch_{patch}")(model, corrupt, cache, difference)
    # TransformerLens keeps its results in float32.
    torch.testing.assert_close(result, expected[patch], atol=1e-5, rtol=1e-5)
    assert result.unique().numel() > 1, "no patch did anything"


@pytest.mark.parametrize("stack", STACKS)
def test_stacked_patches(run, stack):
    model, corrupt, cache, expected = run
    with torch.no_grad():
        result = getattr(patching, f"get_act_patch_{stack}")(model, corrupt, cache, difference)
    for row, patch in zip(result, STACKS[stack], strict=True):
        values = expected[patch]
        if patch == "attn_head_pattern_by_pos":
            values = values.transpose(1, 2)  # the stack has the position before the head
        torch.testing.assert_close(row, values, atol=1e-5, rtol=1e-5)


def test_every_ready_made_patch_is_tested():
    names = {
        name.removeprefix("get_act_patch_")
        for name in dir(patching)
        if name.startswith("get_act_patch_")
    }
    assert {name for name in names if "direct_path" not in name} == PATCHES.keys() | STACKS.keys()


def test_patching_the_last_residual_stream_restores_the_clean_logits(run):
    """… but for the bigram table, which reads the corrupt tokens: it is off the residual stream."""
    model, corrupt, cache, _ = run
    last = get_act_name("resid_post", 1)
    patched = model.run_with_hooks(corrupt, fwd_hooks=[(last, lambda x, hook: cache[last])])
    clean_logits = model.unembed(model.ln_final(cache[last]))
    if model.sparse_cfg.bigram_table:
        clean_logits = clean_logits + model.bigram(corrupt)
    torch.testing.assert_close(patched, clean_logits, atol=1e-12, rtol=0)
