"""Exactness at the level of edges, which EAP-IG and its relatives rely on; on both lines."""

import random
import warnings
from functools import partial

import pytest
import torch
from edge_graph import TABLE_EDGE, Graph, with_edge_hooks
from tool_models import ADDITIVE_LOCATIONS, dense_model, prompts, sparse_model, tool_model

MODELS = {
    "dense": dense_model,
    "sparse": sparse_model,
    "bigram": lambda: sparse_model(bigram_table=True, normalization="layer", norm_bias=True),
    "added positions": lambda: sparse_model(positions="added", d_pos=0),
}
EXACT = dict(atol=1e-10, rtol=0)  # in float64


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return with_edge_hooks(MODELS[request.param]())


@torch.no_grad()
def test_attn_out_is_the_sum_of_the_heads_results(model):
    cache = model.run_with_cache(prompts(model)[0])[1]
    for layer, block in enumerate(model.blocks):
        total = cache["result", layer].sum(2) + block.attn.b_O
        torch.testing.assert_close(total, cache["attn_out", layer], **EXACT)


def test_a_dropped_coordinate_of_attn_out_is_zero_and_no_heads_doing():
    """The definition: result_h = r_h·m − b_O·(1−m)/H, with m the coordinates that AbsTopK keeps."""
    model = with_edge_hooks(sparse_model())
    clean, _ = prompts(model)
    cache = model.run_with_cache(clean)[1]
    attn, heads = model.blocks[0].attn, model.cfg.n_heads
    raw = torch.einsum("bphd,hdm->bphm", cache["z", 0], attn.W_O)
    out = raw.sum(2) + attn.b_O
    k = 3  # 0.6 of 6, rounded down
    threshold = out.abs().sort(dim=-1, descending=True).values[..., k - 1 : k]
    kept = (out.abs() >= threshold).unsqueeze(2)
    torch.testing.assert_close(cache["result", 0], torch.where(kept, raw, -attn.b_O / heads))
    assert (cache["attn_out", 0] == 0).sum(-1).eq(model.cfg.d_model - k).all()


@torch.no_grad()
def test_flags_change_nothing_but_the_hooks(model):
    clean, _ = prompts(model)
    with_flags = model(clean)
    model.set_use_attn_result(False)
    model.set_use_split_qkv_input(False)
    model.set_use_hook_mlp_in(False)
    without = model(clean)
    with_edge_hooks(model)
    torch.testing.assert_close(with_flags, without, **EXACT)


@torch.no_grad()
def test_no_edges_is_the_corrupt_run_all_edges_the_clean_one(model):
    clean, corrupt = prompts(model)
    graph = Graph(model)
    outputs = graph.outputs(corrupt)
    torch.testing.assert_close(graph.logits(clean, outputs, kept=set()), model(corrupt), **EXACT)
    torch.testing.assert_close(
        graph.logits(clean, outputs, kept=set(graph.edges)), model(clean), **EXACT
    )
    assert (model(clean) - model(corrupt)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_same_in_float32(make):
    model = with_edge_hooks(make().float())
    clean, corrupt = prompts(model)
    graph = Graph(model)
    outputs = graph.outputs(corrupt)
    torch.testing.assert_close(
        graph.logits(clean, outputs, kept=set()), model(corrupt), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        graph.logits(clean, outputs, kept=set(graph.edges)), model(clean), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_cutting_all_edges_of_a_writer_patches_its_output(model):
    clean, corrupt = prompts(model)
    graph = Graph(model)
    outputs = graph.outputs(corrupt)
    for writer in graph.writers:
        name, head = writer

        def put_corrupt(x, hook, head=head):
            where = ... if head is None else (slice(None), slice(None), head)
            x = x.clone()
            x[where] = outputs[hook.name][where]
            return x

        patched = model.run_with_hooks(clean, fwd_hooks=[(name, put_corrupt)])
        cut = graph.logits(clean, outputs, kept={edge for edge in graph.edges if edge[0] != writer})
        torch.testing.assert_close(cut, patched, **EXACT)


@torch.no_grad()
def test_a_bigram_table_left_out_of_the_graph_still_reads_the_clean_tokens():
    """The limit of tools that know the stream only: the table reads the clean tokens."""
    model = with_edge_hooks(MODELS["bigram"]())
    clean, corrupt = prompts(model)
    graph = Graph(model)
    expected = model(corrupt) - model.bigram(corrupt) + model.bigram(clean)
    torch.testing.assert_close(
        graph.logits(clean, graph.outputs(corrupt), kept={TABLE_EDGE}), expected, **EXACT
    )


def test_eap_scores_are_the_derivatives_along_edges():
    """EAP: (corrupt − clean output of the writer) · the gradient at the reader's input."""
    model = with_edge_hooks(sparse_model())
    clean, corrupt = prompts(model, batch=1)
    graph = Graph(model)
    with torch.no_grad():
        good, bad = graph.outputs(clean), graph.outputs(corrupt)
    readers = sorted({name for name, _ in graph.n_biases})
    gradients = {}

    def remember(gradient, hook, name):
        gradients[name] = gradient.clone()

    def metric(logits):
        return logits[0, -1, 3] - logits[0, -1, 4]

    with model.hooks(bwd_hooks=[(name, partial(remember, name=name)) for name in readers]):
        metric(model(clean)).backward()

    def along(change, reader, step):
        """The metric with `step · change` added to the reader's input."""

        def add(x, hook):
            x = x.clone()
            x[:, :, ... if reader[1] is None else reader[1]] += step * change
            return x

        return metric(model.run_with_hooks(clean, fwd_hooks=[(reader[0], add)]))

    for (name, head), reader in random.Random(0).sample(graph.edges, 30):
        change = bad[name] - good[name]
        change = change if head is None else change[:, :, head]
        gradient = gradients[reader[0]]
        gradient = gradient if reader[1] is None else gradient[:, :, reader[1]]
        with torch.no_grad():
            slope = (along(change, reader, 1e-6) - along(change, reader, -1e-6)) / 2e-6
        torch.testing.assert_close((gradient * change).sum(), slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("flag", ["use_attn_result", "use_split_qkv_input"])
def test_a_stream_that_is_no_sum_warns(flag):
    for changes in (dict(resid_relu=True), dict(abs_topk={"resid_post_mlp": 0.5})):
        with pytest.warns(
            UserWarning, match=f"{flag}.*not a sum.*(a ReLU|AbsTopK at resid_post_mlp)"
        ):
            getattr(tool_model(**changes), f"set_{flag}")(True)


def test_a_stream_that_is_a_sum_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_edge_hooks(
            sparse_model(abs_topk=dict.fromkeys(ADDITIVE_LOCATIONS, 0.6), bigram_table=True)
        )
