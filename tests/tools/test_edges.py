"""Exactness at the level of edges, which EAP-IG and its relatives rely on; on both lines.

EAP-IG itself is not on the package index. Its graph: every reader (each head's q, k and v input, each MLP's
input, the logits) reads the sum of what the writers before it (embedding, heads, MLPs) write to the stream.
"""

import random
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from tool_models import ADDITIVE_LOCATIONS, dense_model, prompts, sparse_model, tool_model

from tl_sparse.faces import transformer_lens_line

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


def with_edge_hooks(model):
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    return model


def fork(layer, letter):
    """The hook point of the heads' own q, k or v input; TransformerLens 4 moved it."""
    return f"blocks.{layer}.{'attn.' if transformer_lens_line() == 4 else ''}hook_{letter}_input"


class Graph:
    """A small EAP-style evaluator. Writers and readers are named by (hook point, head or None)."""

    def __init__(self, model):
        self.model, cfg = model, model.cfg
        heads = range(cfg.n_heads)
        self.embed = [("hook_embed", None)] + [("hook_pos_embed", None)] * ("hook_pos_embed" in model.hook_dict)
        self.writers, self.edges = list(self.embed), []
        self.n_biases = {}  # reader: how many attention layers, whose biases b_O it reads, are before it
        for layer in range(cfg.n_layers):
            for letter, head in product("qkv", heads):
                self._add_reader((fork(layer, letter), head), layer)
            self.writers += [(f"blocks.{layer}.attn.hook_result", head) for head in heads]
            self._add_reader((f"blocks.{layer}.hook_mlp_in", None), layer + 1)
            self.writers.append((f"blocks.{layer}.hook_mlp_out", None))
        self._add_reader((f"blocks.{cfg.n_layers - 1}.hook_resid_post", None), cfg.n_layers)
        if model.sparse_cfg.bigram_table:  # an edge of its own, from the tokens to the logits
            self.edges.append((("hook_bigram", None), ("logits", None)))

    def _add_reader(self, reader, n_biases):
        self.edges += [(writer, reader) for writer in self.writers]
        self.n_biases[reader] = n_biases

    def outputs(self, tokens):
        names = {name for name, _ in self.writers} | {"hook_bigram"}
        return self.model.run_with_cache(tokens, names_filter=lambda name: name in names)[1]

    def logits(self, clean, corrupt_outputs, kept):
        """The clean run, in which every edge outside `kept` carries the corrupt run's value."""
        current, hooks = {}, []
        writers_of = {reader: [w for w, r in self.edges if r == reader] for reader in self.n_biases}

        def remember(x, hook):
            current[hook.name] = x

        def value(writer, reader):
            name, head = writer
            x = (current if (writer, reader) in kept else corrupt_outputs)[name]
            return x if head is None else x[:, :, head]

        def replace_input(x, hook, name):
            for reader in (reader for reader in self.n_biases if reader[0] == name):
                bias = sum(block.attn.b_O for block in self.model.blocks[: self.n_biases[reader]])
                total = sum(value(writer, reader) for writer in writers_of[reader]) + bias
                if reader[1] is None:
                    x = total
                else:
                    x = x.clone()
                    x[:, :, reader[1]] = total
            return x

        def replace_table(x, hook):
            return x if (("hook_bigram", None), ("logits", None)) in kept else corrupt_outputs["hook_bigram"]

        hooks += [(name, remember) for name in {name for name, _ in self.writers}]
        hooks += [(name, partial(replace_input, name=name)) for name in {name for name, _ in self.n_biases}]
        if self.model.sparse_cfg.bigram_table:
            hooks.append(("hook_bigram", replace_table))
        return self.model.run_with_hooks(clean, fwd_hooks=hooks)


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
    torch.testing.assert_close(graph.logits(clean, outputs, kept=set(graph.edges)), model(clean), **EXACT)
    assert (model(clean) - model(corrupt)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_same_in_float32(make):
    model = with_edge_hooks(make().float())
    clean, corrupt = prompts(model)
    graph = Graph(model)
    outputs = graph.outputs(corrupt)
    torch.testing.assert_close(graph.logits(clean, outputs, kept=set()), model(corrupt), atol=1e-5, rtol=0)
    torch.testing.assert_close(graph.logits(clean, outputs, kept=set(graph.edges)), model(clean), atol=1e-5, rtol=0)


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
    """The limit of tools that know the stream only: their empty graph is the corrupt run but for the table."""
    model = with_edge_hooks(MODELS["bigram"]())
    clean, corrupt = prompts(model)
    graph = Graph(model)
    table = (("hook_bigram", None), ("logits", None))
    expected = model(corrupt) - model.bigram(corrupt) + model.bigram(clean)
    torch.testing.assert_close(graph.logits(clean, graph.outputs(corrupt), kept={table}), expected, **EXACT)


def test_eap_scores_are_the_derivatives_along_edges():
    """EAP: (corrupt − clean output of the writer) · gradient at the reader's input; by difference quotients."""
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
        with pytest.warns(UserWarning, match=f"{flag}.*not a sum.*(a ReLU|AbsTopK at resid_post_mlp)"):
            getattr(tool_model(**changes), f"set_{flag}")(True)


def test_a_stream_that_is_a_sum_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_edge_hooks(sparse_model(abs_topk=dict.fromkeys(ADDITIVE_LOCATIONS, 0.6), bigram_table=True))
