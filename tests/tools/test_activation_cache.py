"""TransformerLens' ActivationCache on our models: parts sum to what they are parts of."""

import pytest
import torch
from tool_models import dense_model, prompts, sparse_model, stream_model

MODELS = {
    "dense": dense_model,
    "sparse": sparse_model,
    "added positions": lambda: sparse_model(
        positions="added", d_pos=0, normalization="layer", norm_bias=True
    ),
    "no biases": lambda: sparse_model(biases=False, logits_bias=False, positions="none", d_pos=0),
}
EXACT = dict(atol=1e-12, rtol=0)  # in float64
# TransformerLens 3 makes the stack of biases in float32.
WITH_BIASES = dict(atol=1e-6, rtol=0)


@pytest.fixture(params=MODELS)
def run(request):
    model = MODELS[request.param]()
    with torch.no_grad():
        return model, *model.run_with_cache(prompts(model)[0])


def biases(model, name):
    return sum(getattr(block.attn if name == "b_O" else block.mlp, name) for block in model.blocks)


def test_decompose_resid(run):
    model, _, cache = run
    parts, labels = cache.decompose_resid(return_labels=True)
    positions = ["pos_embed"] * (model.sparse_cfg.positions == "added")
    assert labels == ["embed", *positions, "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    torch.testing.assert_close(parts.sum(0), cache["resid_post", 1], **EXACT)
    torch.testing.assert_close(
        cache.decompose_resid(layer=1).sum(0), cache["resid_pre", 1], **EXACT
    )
    torch.testing.assert_close(
        cache.decompose_resid(layer=1, mlp_input=True).sum(0), cache["resid_mid", 1], **EXACT
    )
    assert cache.decompose_resid(mode="attn", incl_embeds=False).shape[0] == 2


def test_layer_norm_applied_to_parts(run):
    _, _, cache = run
    at_block = cache.decompose_resid(layer=1, apply_ln=True).sum(0)
    torch.testing.assert_close(at_block, cache["blocks.1.ln1.hook_normalized"], **EXACT)
    at_mlp = cache.decompose_resid(layer=1, mlp_input=True, apply_ln=True).sum(0)
    torch.testing.assert_close(at_mlp, cache["blocks.1.ln2.hook_normalized"], **EXACT)
    at_end = cache.decompose_resid(apply_ln=True).sum(0)
    torch.testing.assert_close(at_end, cache["ln_final.hook_normalized"], **EXACT)


def test_accumulated_resid(run):
    model, logits, cache = run
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    torch.testing.assert_close(stack[1], cache["resid_mid", 0], **EXACT)
    read = model.unembed(cache.accumulated_resid(apply_ln=True))
    torch.testing.assert_close(read[-1], logits, **EXACT)
    torch.testing.assert_close(
        read[1], model.unembed(model.ln_final(cache["resid_pre", 1])), **EXACT
    )


def test_heads_sum_to_what_attention_writes(run):
    model, _, cache = run
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    for layer in (0, 1):
        total = heads[3 * layer : 3 * layer + 3].sum(0) + model.blocks[layer].attn.b_O
        torch.testing.assert_close(total, cache["attn_out", layer], **EXACT)
    model.set_use_attn_result(True)
    with torch.no_grad():
        hooked = model.run_with_cache(prompts(model)[0])[1]
    model.set_use_attn_result(False)
    torch.testing.assert_close(heads[5], hooked["result", 1][:, :, 2], **EXACT)
    with_rest = cache.stack_head_results(incl_remainder=True)
    torch.testing.assert_close(with_rest.sum(0), cache["resid_post", 1], **EXACT)


def test_neurons_sum_to_what_the_mlp_writes(run):
    model, _, cache = run
    for layer, block in enumerate(model.blocks):
        total = cache.get_neuron_results(layer).sum(-2) + block.mlp.b_out
        torch.testing.assert_close(total, cache["mlp_out", layer], **EXACT)
    neurons, labels = cache.stack_neuron_results(2, return_labels=True)
    assert len(labels) == len(neurons) == 2 * model.cfg.d_mlp
    assert labels[13] == "L1N3"
    torch.testing.assert_close(neurons[13], cache.get_neuron_results(1)[:, :, 3], **EXACT)
    with_rest = cache.stack_neuron_results(2, incl_remainder=True)
    torch.testing.assert_close(with_rest.sum(0), cache["resid_post", 1], **EXACT)


def test_neurons_projected(run):
    """Projecting before the neurons are expanded, as TransformerLens can, is projecting after."""
    model, _, cache = run
    directions = torch.randn(
        model.cfg.d_model, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for options in ({}, {"apply_ln": True}):
        after = cache.stack_neuron_results(2, **options) @ directions
        before = cache.stack_neuron_results(2, project_output_onto=directions, **options)
        torch.testing.assert_close(before, after, **EXACT)


@pytest.mark.parametrize("expand_neurons", [True, False])
def test_full_decomposition(run, expand_neurons):
    _, _, cache = run
    for layer, stream in ((None, cache["resid_post", 1]), (1, cache["resid_pre", 1])):
        parts = cache.get_full_resid_decomposition(layer, expand_neurons=expand_neurons)
        torch.testing.assert_close(parts.sum(0), stream, **WITH_BIASES)


def test_logit_attributions_sum_to_logits(run):
    """… without the logits' biases, which no component of the stream writes."""
    model, logits, cache = run
    constant = model.b_U + model.ln_final.b @ model.W_U
    for parts in (cache.decompose_resid(), cache.stack_head_results(incl_remainder=True)):
        total = cache.logit_attrs(parts, tokens=3).sum(0)
        torch.testing.assert_close(total, logits[..., 3] - constant[3], **EXACT)
        of_difference = cache.logit_attrs(parts, tokens=3, incorrect_tokens=4).sum(0)
        expected = (logits - constant)[..., 3] - (logits - constant)[..., 4]
        torch.testing.assert_close(of_difference, expected, **EXACT)
    by_hand = cache["attn_out", 1]
    if model.sparse_cfg.normalization == "layer":
        by_hand = by_hand - by_hand.mean(-1, keepdim=True)
    by_hand = (
        by_hand
        / cache["ln_final.hook_scale"]
        * model.ln_final.w
        @ model.W_U[:, model.to_single_token("d")]
    )
    position = 3 + (model.sparse_cfg.positions == "added")
    torch.testing.assert_close(
        cache.logit_attrs(cache.decompose_resid(), tokens="d")[position], by_hand, **EXACT
    )


def test_logit_attributions_beside_a_bigram_table_warn():
    model = sparse_model(bigram_table=True)
    with torch.no_grad():
        logits, cache = model.run_with_cache(prompts(model)[0])
    with pytest.warns(UserWarning, match="bigram table"):
        total = cache.logit_attrs(cache.decompose_resid(), tokens=3).sum(0)
    torch.testing.assert_close(total, (logits - cache["hook_bigram"] - model.b_U)[..., 3], **EXACT)


def test_the_batch_dimension_removed(run):
    model, _, cache = run
    with torch.no_grad():
        one = model.run_with_cache(prompts(model)[0][:1])[1].remove_batch_dim()
    torch.testing.assert_close(one.decompose_resid(), cache.decompose_resid()[:, 0], **EXACT)
    torch.testing.assert_close(one.stack_head_results(), cache.stack_head_results()[:, 0], **EXACT)
    torch.testing.assert_close(
        one.stack_neuron_results(2), cache.stack_neuron_results(2)[:, 0], **EXACT
    )
    attributions = one.logit_attrs(one.decompose_resid(), tokens=3, has_batch_dim=False)
    torch.testing.assert_close(
        attributions, cache.logit_attrs(cache.decompose_resid(), tokens=3)[:, 0], **EXACT
    )


def test_heads_of_a_run_already_without_batch(run):
    model, _, cache = run
    for results in (True, False):
        model.set_use_attn_result(results)
        with torch.no_grad():
            one = model.run_with_cache(prompts(model)[0][:1], remove_batch_dim=True)[1]
        model.set_use_attn_result(False)
        torch.testing.assert_close(
            one.stack_head_results(), cache.stack_head_results()[:, 0], **EXACT
        )


def test_stack_activation(run):
    _, _, cache = run
    stack = cache.stack_activation("pattern")
    assert stack.shape == (2, 2, 3, 5, 5)
    torch.testing.assert_close(stack[1], cache["blocks.1.attn.hook_pattern"], **EXACT)


def test_a_slice_of_the_batch(run):
    _, _, cache = run
    one = cache.apply_slice_to_batch_dim(1)
    torch.testing.assert_close(one.stack_head_results(), cache.stack_head_results()[:, 1], **EXACT)
    torch.testing.assert_close(
        one.stack_neuron_results(2), cache.stack_neuron_results(2)[:, 1], **EXACT
    )
    attributions = one.logit_attrs(one.decompose_resid(), tokens=3, has_batch_dim=False)
    torch.testing.assert_close(
        attributions, cache.logit_attrs(cache.decompose_resid(), tokens=3)[:, 1], **EXACT
    )


def test_a_stream_that_is_no_sum_warns():
    model = stream_model()
    with torch.no_grad():
        cache = model.run_with_cache(prompts(model)[0])[1]
    with pytest.warns(UserWarning, match="not a sum"):
        assert (cache.decompose_resid().sum(0) - cache["resid_post", 1]).abs().max() > 0.1
    with pytest.warns(UserWarning, match="not a sum"):
        cache.get_full_resid_decomposition()
    with_rest = cache.stack_head_results(
        incl_remainder=True
    )  # the rest is what is left, so this is right
    torch.testing.assert_close(with_rest.sum(0), cache["resid_post", 1], **EXACT)
