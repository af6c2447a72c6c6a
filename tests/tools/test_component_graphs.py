"""Graphs of components run as EAP-IG runs them, against the evaluator of `edge_graph`."""

import random
from dataclasses import replace

import pytest
import torch
import transformers
from edge_graph import TABLE_EDGE, Graph, fork, output_of, with_edge_hooks
from tool_models import dense_model, sparse_model, stream_model

from helpers import ON_3, has_hooks, only_on, random_data, stock_model
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.errors import CircuitError, ConfigError, UnsupportedError
from tl_sparse.evaluation.edge_attribution import edge_scores
from tl_sparse.evaluation.graph_runs import applying_graph
from tl_sparse.evaluation.running import all_next_token_logits
from tl_sparse.tasks.task_data import right_minus_wrong

LENGTH = 5
EXACT = dict(atol=1e-9, rtol=0)  # in float64
MODELS = {
    "dense": dense_model,
    "sparse": sparse_model,
    "bigram": lambda: sparse_model(bigram_table=True, normalization="layer", norm_bias=True),
}


def data_for(model, n_pairs=3, lengths=LENGTH - 1):
    if isinstance(lengths, int):
        lengths = torch.full((2 * n_pairs,), lengths)
    return random_data(model, n_pairs, lengths=lengths)


def random_graph(model, share=0.5, seed=0):
    scores = torch.rand(
        EapGraph.full(model).scores.shape, generator=torch.Generator().manual_seed(seed)
    )
    graph = replace(EapGraph.full(model), scores=scores)
    return graph.top(int(share * graph.n_scored()))


def logits_under(graph, model, data, intervention="patching", batch_size=4):
    return all_next_token_logits(
        model, data, batch_size, applying_graph(graph, model, data, intervention)
    )


def other_rows(data):
    return torch.arange(len(data.prompts)).view(-1, 2).flip(1).flatten()


def named_as_there(name):
    """An edge of EAP-IG as `edge_graph` names it."""

    def place(node):
        layer, _, head = node[1:].partition(".h")
        return int(layer), int(head) if head else None

    source, target = name.split("->")
    writer = ("hook_embed", None)
    if source != "input":
        layer, head = place(source)
        module = f"blocks.{layer}.hook_mlp_out"
        writer = (module if head is None else f"blocks.{layer}.attn.hook_result", head)
    if target == "logits":
        return writer, ("blocks.1.hook_resid_post", None)
    layer, head = place(target.partition("<")[0])
    if head is None:
        return writer, (f"blocks.{layer}.hook_mlp_in", None)
    return writer, (fork(layer, target[-2]), head)


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_edges_one_by_one(make):
    model = make()
    data = data_for(model)
    graph = random_graph(model)
    assert 20 < graph.n_edges < 50
    ours = logits_under(graph, model, data)
    evaluator = Graph(with_edge_hooks(model))
    kept = {named_as_there(name) for name in graph.edges}
    # Positions are the same in both prompts; a bigram table has no edge here.
    kept |= {edge for edge in evaluator.edges if edge[0][0] == "hook_pos_embed"} | {TABLE_EDGE}
    tokens = data.trimmed().tokens
    outputs = evaluator.outputs(tokens[other_rows(data)])
    expected = evaluator.logits(tokens, outputs, kept)[:, -1]
    torch.testing.assert_close(ours, expected, **EXACT)


def bridged(kind):
    """A small model of transformers in TransformerLens 4."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    ends = dict(bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = dict(vocab_size=24, n_embd=8, n_layer=2, n_head=2, n_positions=16)
        plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends))
    else:
        sizes = dict(vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        heads = dict(num_attention_heads=2, num_key_value_heads=1)
        config = transformers.LlamaConfig(**sizes, **heads, **ends, max_position_embeddings=16)
        plain = transformers.LlamaForCausalLM(config)
    return build_bridge_from_module(
        plain.eval(), type(plain).__name__, hf_config=plain.config, device="cpu"
    )


GROUPED = dict(
    n_key_value_heads=1, normalization_type="RMS", gated_mlp=True,
    positional_embedding_type="rotary", rotary_dim=4,
)  # fmt: skip
#: The options of TransformerLens 3.
DENSE = {
    "gpt2": dict(),
    "llama": GROUPED,
    "parallel": dict(parallel_attn_mlp=True),
}


def dense(kind):
    """A dense model of TransformerLens' own, in float32."""
    if ON_3:
        return stock_model(n_layers=2, n_ctx=16, **DENSE[kind])
    return bridged(kind)


KINDS = list(DENSE) if ON_3 else ["gpt2", "llama"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_dense_models(kind):
    model = dense(kind)
    data = data_for(model)
    full = EapGraph.full(model)
    close = dict(atol=1e-4, rtol=0)
    plain = all_next_token_logits(model, data)
    torch.testing.assert_close(logits_under(full, model, data), plain, **close)
    nothing = logits_under(full.top(0), model, data)
    torch.testing.assert_close(nothing, plain[other_rows(data)], **close)
    without_head = full.of_edges(full.in_graph & ~edges_from(full, "a0.h1")[:, None])
    patched = patched_output(model, data, "blocks.0.attn.hook_result", head=1)
    torch.testing.assert_close(logits_under(without_head, model, data), patched, **close)
    assert not has_hooks(model)
    assert not model.cfg.use_split_qkv_input


def edges_from(graph, name):
    is_source = torch.zeros(graph.layout.n_sources, dtype=torch.bool)
    is_source[graph.layout.source_number(name)] = True
    return is_source


def patched_output(model, data, hook_name, head):
    """The logits with the output of one head from the other prompt of the pair."""
    model.set_use_attn_result(True)
    tokens = data.trimmed().tokens
    outputs = model.run_with_cache(tokens)[1][hook_name]

    def put(x, hook):
        x = x.clone()
        x[:, :, head] = outputs[other_rows(data), :, head]
        return x

    logits = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, put)])[:, -1]
    model.set_use_attn_result(False)
    return logits


@torch.no_grad()
def test_some_channels_of_a_source():
    model = sparse_model()
    data = data_for(model)
    full = EapGraph.full(model)
    channels = torch.ones(full.layout.n_sources, model.cfg.d_model, dtype=torch.bool)
    m0 = full.layout.source_number("m0")
    channels[m0, :2] = False
    graph = replace(full, neurons_in_graph=channels)
    tokens = data.trimmed().tokens
    outputs = model.run_with_cache(tokens)[1]["blocks.0.hook_mlp_out"]

    def put(x, hook):
        x = x.clone()
        x[..., :2] = outputs[other_rows(data)][..., :2]
        return x

    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", put)])[:, -1]
    torch.testing.assert_close(logits_under(graph, model, data), expected, **EXACT)


@torch.no_grad()
def test_means_and_zeros():
    model = dense_model()
    data = data_for(model)
    full = EapGraph.full(model)
    graph = full.of_edges(full.in_graph & ~edges_from(full, "m0")[:, None])
    tokens = data.trimmed().tokens
    mean = model.run_with_cache(tokens)[1]["blocks.0.hook_mlp_out"].mean((0, 1))
    for intervention, value in {"mean": mean, "zero": torch.zeros_like(mean)}.items():
        hooks = [("blocks.0.hook_mlp_out", lambda x, hook, value=value: value.expand_as(x))]
        expected = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
        ours = logits_under(graph, model, data, intervention)
        torch.testing.assert_close(ours, expected, **EXACT)
    with pytest.raises(ConfigError, match=r"intervention = 'corrupt' .* one of patching"):
        applying_graph(graph, model, data, "corrupt")


@torch.no_grad()
def test_prompts_of_different_lengths():
    """The shorter prompt's last position stands for those after it."""
    model = sparse_model()
    data = data_for(model, 2, torch.tensor([4, 2, 3, 3]))
    nothing = logits_under(EapGraph.full(model).top(0), model, data)
    tokens = data.tokens[1, :3]
    at_its_end = model(tokens[None])[0, -1]
    torch.testing.assert_close(nothing[0], at_its_end, **EXACT)
    longer = model(data.tokens[:1, :5])[0, 2]
    torch.testing.assert_close(nothing[1], longer, **EXACT)


@torch.no_grad()
def test_batches_change_nothing():
    model = sparse_model()
    data = random_data(model, 5)
    graph = random_graph(model)
    for intervention in ("patching", "mean"):
        one = logits_under(graph, model, data, intervention, batch_size=2)
        all_at_once = logits_under(graph, model, data, intervention, batch_size=100)
        torch.testing.assert_close(one, all_at_once, **EXACT)


def test_models_without_such_edges_are_refused():
    model = stream_model(tokenizer=False)
    data = data_for(model)
    with (
        pytest.warns(UserWarning, match="not a sum"),
        pytest.raises(UnsupportedError, match="stream of this model is not the sum of what its"),
    ):
        applying_graph(EapGraph.full(model), model, data)
    other = stock_model(n_layers=2, d_model=6, n_heads=2)
    with pytest.raises(CircuitError, match="this graph belongs to a model with n_heads = 3"):
        applying_graph(EapGraph.full(model), other, data)


@only_on(4, "a bridge of TransformerLens 4 without hook points for each head")
def test_bridges_without_hook_points_for_heads_are_refused():
    model = stock_model()
    with pytest.raises(UnsupportedError, match="have no hook points of their own, which graphs"):
        applying_graph(EapGraph.full(model), model, data_for(model))


# --- scores


def margins(model, data, hooks):
    logits = model.run_with_hooks(data.trimmed().tokens, fwd_hooks=hooks)[:, -1]
    return right_minus_wrong(logits.gather(1, data.candidates), data.correct)


@pytest.mark.parametrize("make", [dense_model, sparse_model])
def test_scores_are_derivatives_along_edges(make):
    """… by difference quotients of the logit difference."""
    model = make()
    data = data_for(model)
    scored = edge_scores(model, data, "eap", batch_size=2)
    assert not has_hooks(model)
    with_edge_hooks(model)
    cache = model.run_with_cache(data.trimmed().tokens)[1]
    others = other_rows(data)

    def along(name, step):
        writer, reader = named_as_there(name)
        output = output_of(writer, cache)
        change = step * (output[others] - output)

        def add(x, hook):
            x = x.clone()
            x[:, :, ... if reader[1] is None else reader[1]] += change
            return x

        return float(margins(model, data, [(reader[0], add)]).mean())

    names = list(EapGraph.full(model).edges)
    with torch.no_grad():
        for name in random.Random(0).sample(names, 20):
            fall = (along(name, -1e-6) - along(name, 1e-6)) / 2e-6
            score = float(scored.scores[scored.layout.edge_number(name)])
            assert score == pytest.approx(fall, rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(scored.nodes_scores, scored.scores.sum(1))


def gradient_at_the_end(model, data, embedding):
    """The gradient of the logit differences with respect to the last stream, with an embedding."""
    end = {}

    def remember(x, hook):
        end["x"] = x

    hooks = [("hook_embed", lambda x, hook: embedding), ("blocks.1.hook_resid_post", remember)]
    margin = margins(model, data, hooks).sum()
    return torch.autograd.grad(margin, end["x"])[0]


def test_integrated_gradients_are_means_over_embeddings():
    model = sparse_model()
    data = data_for(model)
    scored = edge_scores(model, data, "eap_ig", steps=3)
    tokens = data.trimmed().tokens
    with_edge_hooks(model)
    cache = model.run_with_cache(tokens)[1]
    others = other_rows(data)
    own, other = cache["hook_embed"], cache["hook_embed"][others]
    output = cache["blocks.0.hook_mlp_out"]
    expected = 0
    for share in (0, 1 / 3, 2 / 3):
        embedding = other + share * (own - other)
        gradient = gradient_at_the_end(model, data, embedding)
        expected += float(((output - output[others]) * gradient).sum()) / 3 / len(others)
    score = scored.scores[scored.layout.edge_number("m0->logits")]
    assert float(score) == pytest.approx(expected, rel=1e-5)
    one_step = edge_scores(model, data, "eap_ig", steps=1, batch_size=2)
    assert not torch.allclose(one_step.scores, scored.scores)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_dense_models(kind):
    """They are found in inference mode too, and the model is left as it was."""
    model = dense(kind)
    data = data_for(model)
    with torch.inference_mode():
        scored = edge_scores(model, data, "eap")
    assert scored.scores.abs().max() > 0
    assert (scored.scores != 0).sum() > 0.9 * scored.n_scored()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="steps = 0 is not possible"):
        edge_scores(model, data, steps=0)
    with pytest.raises(ConfigError, match=r"method = 'acdc' .* one of eap, eap_ig"):
        edge_scores(model, data, "acdc")
