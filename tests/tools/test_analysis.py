"""TransformerLens' `tools.analysis` on our models: what it computes is what it says, or it refuses
and says why.

TransformerLens 3.8 has direct logit attribution and its own direct path patching; `line_4` marks
the others.
"""

import random

import pytest
import torch
from edge_graph import Graph, with_edge_hooks
from tool_models import dense_model, difference, prompts, sparse_model, stream_model
from transformer_lens.tools import analysis

from helpers import ON_3, only_on
from tl_sparse.errors import UnsupportedError

line_4 = only_on(4, reason="TransformerLens 3.8 does not have it")
line_3 = only_on(3, reason="TransformerLens 4 does it otherwise")

MODELS = {
    "dense": dense_model,
    "sparse": sparse_model,
    "layer norm": lambda: sparse_model(
        normalization="layer", norm_bias=True, positions="added", d_pos=0
    ),
}
EXACT = dict(atol=1e-10, rtol=0)  # in float64


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def pair(model):
    return prompts(model, batch=1)


# --- attribution patching


def changed(model, name, where, change):
    """A context in which `change` is added at one place of an activation."""

    def add(x, hook):
        x = x.clone()
        x[where] += change
        return x

    return model.hooks(fwd_hooks=[(name, add)])


def slope(model, tokens, name, where, change, step=1e-6):
    """The metric's derivative along a change of an activation, by a difference quotient."""
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            with changed(model, name, where, sign * step * change):
                values.append(difference(model(tokens)))
    return ((values[0] - values[1]) / (2 * step)).item()


def place(node):
    return (0, node.position) if node.head is None else (0, node.position, node.head)


@line_4
def test_node_scores_are_derivatives_on_the_corrupt_run_towards_the_clean_one(model, pair):
    clean, corrupt = pair
    scores = analysis.attribution_patch(model, clean, corrupt, difference).node_scores
    n_nodes = 5 * (1 + 2 * (3 + 1))
    assert len(scores) == n_nodes
    good, bad = (model.run_with_cache(tokens)[1] for tokens in pair)
    for node, score in scores.items():
        change = (good[node.hook_name] - bad[node.hook_name])[place(node)].detach()
        expected = slope(model, corrupt, node.hook_name, place(node), change)
        assert score == pytest.approx(expected, abs=1e-6, rel=1e-5), node


@line_4
def test_edge_scores_are_derivatives_and_sum_to_node_scores(model, pair):
    clean, corrupt = pair
    by_node = analysis.attribution_patch(model, clean, corrupt, difference).node_scores
    config = analysis.EdgeAttributionConfig(granularity="edge")
    result = analysis.attribution_patch(model, clean, corrupt, difference, config)
    # At each position: 9 head inputs × 1 writer, an MLP × 4, 9 head inputs × 5, an MLP × 8, the
    # logits × 9.
    assert len(result.edge_scores) == 5 * (9 + 4 + 45 + 8 + 9)
    with_edge_hooks(model)
    good, bad = (model.run_with_cache(tokens)[1] for tokens in pair)

    def written(writer):
        """A writer's hook point, and its output's change from the corrupt to the clean run."""
        name = writer.hook_name.replace("hook_z", "hook_result")
        return name, (good[name] - bad[name])[place(writer)].detach()

    for (writer, reader), score in random.Random(0).sample(list(result.edge_scores.items()), 40):
        expected = slope(model, corrupt, reader.hook_name, place(reader), written(writer)[1])
        assert score == pytest.approx(expected, abs=1e-6, rel=1e-5), (writer, reader)
    for writer, score in result.node_scores.items():
        name, change = written(writer)
        assert score == pytest.approx(
            slope(model, corrupt, name, place(writer), change), abs=1e-6, rel=1e-5
        ), writer
        # A head's node score is taken at z; what it writes is linear in z but for AbsTopK on
        # attn_out.
        if writer.head is None or not model.sparse_cfg.abs_topk:
            assert score == pytest.approx(by_node[writer], abs=1e-10)


@line_4
def test_edge_attribution_leaves_the_flags_as_they_were(model, pair):
    config = analysis.EdgeAttributionConfig(granularity="edge")
    model.set_use_attn_in(True)
    analysis.attribution_patch(model, *pair, difference, config)
    flags = [
        getattr(model.cfg, f"use_{name}")
        for name in ("attn_result", "split_qkv_input", "hook_mlp_in", "attn_in")
    ]
    assert flags == [False, False, False, True]


def as_in_graph(edge):
    """An edge of TransformerLens' as `Graph` names it."""
    writer, reader = edge
    name = writer.hook_name.replace("hook_z", "hook_result")
    return (name, writer.head), (reader.hook_name, reader.head)


@line_4
def test_faithfulness_is_exact(model, pair):
    """The empty circuit recovers nothing, the full one all, others what the evaluator says."""
    clean, corrupt = pair
    config = analysis.EdgeAttributionConfig(granularity="edge")
    scores = analysis.attribution_patch(model, clean, corrupt, difference, config).edge_scores
    edges = list(scores)

    def recovered(circuit):
        return analysis.faithfulness(model, clean, corrupt, difference, circuit).recovered

    assert recovered([]) == pytest.approx(0, abs=1e-10)
    assert recovered(edges) == pytest.approx(1, abs=1e-10)

    # Whole edges, at all positions, as the evaluator has them.
    graph = Graph(with_edge_hooks(model))
    outputs = graph.outputs(corrupt)
    with torch.no_grad():
        ends = [difference(model(tokens)).item() for tokens in (corrupt, clean)]
        for seed in range(3):
            kept = set()
            for edge in graph.edges:
                is_position = edge[0][0] == "hook_pos_embed"  # equal in both runs
                if is_position or random.Random(f"{seed} {edge}").random() < 0.5:
                    kept.add(edge)
            metric = difference(graph.logits(clean, outputs, kept)).item()
            expected = (metric - ends[0]) / (ends[1] - ends[0])
            circuit = [edge for edge in edges if as_in_graph(edge) in kept]
            assert recovered(circuit) == pytest.approx(expected, abs=1e-9)


@line_4
def test_faithfulness_beside_a_bigram_table_needs_the_same_last_token():
    """The table reads the clean tokens; it changes nothing if the last one is in common."""
    model = sparse_model(bigram_table=True)
    clean, corrupt = prompts(model, batch=1)
    assert analysis.faithfulness(model, clean, corrupt, difference, []).recovered != pytest.approx(
        0, abs=0.01
    )
    corrupt[:, -1] = clean[:, -1]
    assert analysis.faithfulness(model, clean, corrupt, difference, []).recovered == pytest.approx(
        0, abs=1e-10
    )


@line_4
def test_edge_tools_warn_where_the_stream_is_no_sum():
    model = stream_model()
    config = analysis.EdgeAttributionConfig(granularity="edge")
    with pytest.warns(UserWarning, match="not a sum"):
        analysis.attribution_patch(model, *prompts(model, batch=1), difference, config)


# --- direct path patching


@line_4
@pytest.mark.parametrize("component", "qkv")
def test_direct_path_patching_is_exact_without_abs_topk_on_attn_out(component):
    locations = dict.fromkeys(
        ("attn_in", "attn_q", "attn_k", "attn_v", "mlp_in", "mlp_neuron", "mlp_out"), 0.6
    )
    model = sparse_model(abs_topk=locations)
    results, expected = direct_paths(model, component)
    torch.testing.assert_close(results, expected, atol=1e-5, rtol=0)
    assert expected.unique().numel() > 1


@line_4
def test_direct_path_patching_past_abs_topk_on_attn_out_warns():
    with pytest.warns(UserWarning, match=r"not z @ W_O; direct path patching"):
        results, expected = direct_paths(sparse_model(), "v")
    assert (results - expected).abs().max() > 1e-4, "exact after all: then it need not warn"


def direct_paths(model, component):
    """From head 1 of the first block to each head of the second: the tool's and our answer."""
    clean, corrupt = prompts(model)
    with torch.no_grad():
        caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupt)]
        results = analysis.get_act_patch_direct_path(
            model,
            corrupt,
            *caches,
            difference,
            src_layer=0,
            src_head=1,
            component=component,
            verbose=False,
        )
        graph = Graph(with_edge_hooks(model))
        outputs = graph.outputs(clean)
        expected = torch.zeros(2, 3)
        for head in range(3):
            cut = (
                ("blocks.0.attn.hook_result", 1),
                (f"blocks.1.attn.hook_{component}_input", head),
            )
            assert cut in graph.edges
            expected[1, head] = difference(
                graph.logits(corrupt, outputs, kept=set(graph.edges) - {cut})
            )
    return results, expected


@line_3
def test_direct_path_patching_of_transformer_lens_3_warns_that_it_approximates():
    """It freezes the norm's scale and leaves out its weight, and here also AbsTopK."""
    model = sparse_model()
    clean, corrupt = prompts(model)
    caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupt)]
    with (
        pytest.warns(UserWarning, match="may be inaccurate with unfolded LayerNorm"),
        torch.no_grad(),
    ):
        results = analysis.get_act_patch_direct_path(
            model, corrupt, *caches, difference, 0, 1, verbose=False
        )
    change = (caches[0]["z", 0] - caches[1]["z", 0])[:, :, 1] @ model.blocks[0].attn.W_O[1]
    change = change / caches[1]["blocks.1.ln1.hook_scale"] @ model.blocks[1].attn.W_Q[2]
    with (
        torch.no_grad(),
        changed(model, "blocks.1.attn.hook_q", (slice(None), slice(None), 2), change),
    ):
        expected = difference(model(corrupt)).item()
    assert results[1, 2].item() == pytest.approx(expected, abs=1e-5)


# --- reading logits off the stream


def attributed(model, tokens, unit):
    if not ON_3:  # TransformerLens 4 asks for it; the weights stay as they are
        model.enable_compatibility_mode(no_processing=True)
    return analysis.direct_logit_attribution(model, tokens, 3, 4, unit=unit)


@pytest.mark.parametrize("unit", ["component", "head"])
def test_direct_logit_attribution_sums_to_the_logits(model, pair, unit):
    logits = model(pair[0])[0, -1] - model.b_U - model.ln_final.b @ model.W_U
    result = attributed(model, pair[0], unit)
    torch.testing.assert_close(result.attribution.sum(0)[0], logits[3] - logits[4], **EXACT)
    assert result.labels[-1] == ("remainder" if unit == "head" else "1_mlp_out")


def test_direct_logit_attribution_by_layer_ends_at_the_logits(model, pair):
    logits = model(pair[0])[0, -1] - model.b_U - model.ln_final.b @ model.W_U
    result = attributed(model, pair[0], "layer")
    assert result.labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    torch.testing.assert_close(result.attribution[-1, 0], logits[3] - logits[4], **EXACT)


def test_direct_logit_attribution_beside_a_bigram_table():
    """TransformerLens 4 refuses to run the model; of a cache, a warning says what is left out."""
    model = sparse_model(bigram_table=True)
    tokens, _ = prompts(model, batch=1)
    logits, cache = model.run_with_cache(tokens)
    if not ON_3:
        with pytest.raises(UnsupportedError, match="bigram table"):
            attributed(model, tokens, "component")
    with pytest.warns(UserWarning, match="bigram table"):
        result = analysis.direct_logit_attribution(model, answer_tokens=3, cache=cache)
    expected = (logits - cache["hook_bigram"] - model.b_U)[0, -1, 3]
    torch.testing.assert_close(result.attribution.sum(0)[0], expected, **EXACT)


@line_4
def test_logit_lens(model, pair):
    result = analysis.logit_lens(model, pair[0], incl_mid=True, positions=None)
    assert result.labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    logits, cache = model.run_with_cache(pair[0])
    torch.testing.assert_close(result.values[-1], logits, **EXACT)
    torch.testing.assert_close(
        result.values[1], model.unembed(model.ln_final(cache["resid_mid", 0])), **EXACT
    )
    of_cache = cache.logit_lens(targets="d", positions=None)
    torch.testing.assert_close(
        of_cache.values[-1, ..., 0], logits[..., model.to_single_token("d")], **EXACT
    )
    rank = (logits[0, -1] > logits[0, -1, model.to_single_token("d")]).sum()
    assert of_cache.rank_trajectory("d")[-1, 0, -1] == rank


@line_4
def test_logit_readout_of_any_vector(model):
    vectors = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = model.unembed(model.ln_final(vectors[None]))[0]
    torch.testing.assert_close(analysis.logit_readout(model, vectors).values, expected, **EXACT)


@line_4
def test_lenses_refuse_a_bigram_table():
    model = sparse_model(bigram_table=True)
    tokens, _ = prompts(model, batch=1)
    _, cache = model.run_with_cache(tokens)
    for read in (
        lambda: analysis.logit_lens(model, tokens),
        cache.logit_lens,
        lambda: analysis.logit_readout(model, cache["resid_post", 0]),
        lambda: analysis.JacobianLens.fit(model, ["a b c d"], corpus="test"),
    ):
        with pytest.raises(UnsupportedError, match=r"bigram table.*add cache\['hook_bigram'\]"):
            read()


def test_the_jacobian_lens_refuses():
    """It reads and patches components of TransformerLens' own classes, by their names."""
    error, message = TypeError, "supports TransformerBridge only"
    if not ON_3:
        error, message = ValueError, "missing.*blocks"
    with pytest.raises(error, match=message):
        analysis.JacobianLens.fit(sparse_model(), ["a b c d"], corpus="test")


# --- subspaces, weights, probes


@line_4
def test_interchange_interventions(model):
    base, source = prompts(model, batch=4)
    positions = torch.tensor([4, 3, 2, 1])
    hook = "blocks.0.hook_resid_post"

    def last(tokens):
        return model(tokens)[:, -1]

    found = analysis.collect_activations(model, hook, source, last, positions=positions)
    expected = model.run_with_cache(source)[1][hook][range(4), positions]
    torch.testing.assert_close(found, expected, **EXACT)
    basis = analysis.random_basis(model.cfg.d_model, rank=2, seed=0).double()
    intervention = analysis.SubspaceInterchange(basis)
    logits = analysis.intervened_logits(
        model, hook, intervention, base, found, last, positions=positions
    )

    def by_hand(x, hook):
        x = x.clone()
        old = x[range(4), positions]
        x[range(4), positions] = old + (found - old) @ basis @ basis.T
        return x

    expected = model.run_with_hooks(base, fwd_hooks=[(hook, by_hand)])[:, -1]
    torch.testing.assert_close(logits, expected, **EXACT)


@line_4
def test_distributed_alignment_search(model):
    """It learns directions that carry the source's prediction, and leaves the model alone."""
    base, source = prompts(model, batch=16)
    source[:, -1] = base[:, -1]
    last_position = torch.full((16,), 4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def last(tokens):
        return model(tokens)[:, -1]

    result = analysis.fit_das(
        model,
        "blocks.1.hook_resid_post",
        base,
        source,
        last(source).argmax(-1),
        last,
        rank=2,
        epochs=30,
        lr=0.1,
        base_positions=last_position,
        source_positions=last_position,
    )
    assert result.losses[-1] < result.losses[0] - 0.05
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@line_4
def test_reinitialized_refuses_and_names_the_weights(model):
    with pytest.raises(ValueError, match=r"cannot reset embed\.W_E"):
        analysis.reinitialized(model, seed=0)


@line_4
@pytest.mark.parametrize("role", "QKV")
def test_subspaces_of_heads(model, role):
    """What a head writes, read by another: ‖B_Wᵀ B_R‖² of orthonormal bases of the two."""
    affinity = analysis.attention_head_subspace_affinity(model, target_role=role, rank=5)
    out = torch.linalg.qr(model.blocks[0].attn.W_O[1].T)[0]
    into = torch.linalg.qr(getattr(model.blocks[1].attn, f"W_{role}")[2])[0]
    expected = (out.T @ into).pow(2).sum()
    torch.testing.assert_close(affinity.scores[0, 1, 1, 2], expected, **EXACT)


@line_4
def test_sparse_probes_find_the_neuron():
    """Labels that one neuron decides: the probe of one feature finds it and is right."""
    model = sparse_model(dtype=torch.float32)
    tokens, _ = prompts(model, batch=100, length=8)
    with torch.no_grad():
        neurons = model.run_with_cache(tokens)[1]["post", 0].flatten(0, 1)
    neuron = int(neurons.std(0).argmax())
    result = analysis.fit_sparse_probe(neurons, neurons[:, neuron] > neurons[:, neuron].mean(), k=1)
    assert result.selected_features.tolist() == [neuron]
    assert result.metrics.accuracy > 0.95
