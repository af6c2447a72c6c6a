"""EAP-IG's scores of edges on our models, on TransformerLens 3.

The program (github.com/hannamw/EAP-IG) is not on the package index; it is tested where it can be
imported.
"""

from functools import partial
from importlib import import_module

import pytest
import torch
from edge_graph import Graph, fork, output_of, with_edge_hooks
from tool_models import dense_model, requires, sparse_model
from torch.overrides import TorchFunctionMode

requires("eap", line=3)

MODELS = {"dense": dense_model, "sparse": sparse_model}
CLEAN = ["a b c d", "e f g h", "i a b c"]
CORRUPT = ["b b c e", "e g g a", "h a d c"]
STEPS = 3


class OnThisDevice(TorchFunctionMode):
    """Makes the tensors on the CPU that EAP-IG makes on "cuda", whatever the model's device is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda" and not torch.cuda.is_available():
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture
def eap():
    """The modules `attribute` and `graph` of the program, by name."""
    with OnThisDevice():
        yield {name: import_module(f"eap.{name}") for name in ("attribute", "graph")}


@pytest.fixture(params=MODELS)
def model(request):
    return with_edge_hooks(MODELS[request.param]().double())  # so that cfg.dtype says it too


def difference(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def summed_metric(logits, clean_logits, lengths, labels):
    """The metric of a batch as the program calls it; it divides by the number of prompts too."""
    return difference(logits).sum()


def ends(name):
    """An edge of EAP-IG, a0.h1->a1.h0<q>, as the evaluator of these tests names it."""
    source, target = name.split("->")
    if source == "input":
        writer = ("hook_embed", None)
    elif source.startswith("m"):
        writer = (f"blocks.{source[1:]}.hook_mlp_out", None)
    else:
        layer, head = source[1:].split(".h")
        writer = (f"blocks.{layer}.attn.hook_result", int(head))
    if target == "logits":
        reader = ("blocks.1.hook_resid_post", None)
    elif target.startswith("m"):
        reader = (f"blocks.{target[1:]}.hook_mlp_in", None)
    else:
        layer, head = target[1:].split(".h")
        reader = (fork(layer, head[-2]), int(head[:-3]))
    return writer, reader


def gradients(model, tokens, hooks=()):
    """Reader's hook point → the gradient of the summed metric there."""
    found = {}

    def remember(gradient, hook):
        found[hook.name] = gradient.clone()

    names = {name for name, _ in Graph(model).n_biases}
    with model.hooks(fwd_hooks=list(hooks), bwd_hooks=[(name, remember) for name in names]):
        difference(model(tokens)).sum().backward()
    return found


def expected_scores(model, method):
    """Edge → (corrupt − clean output of its writer) · (mean of gradients at its reader)."""
    clean, corrupt = model.to_tokens(CLEAN), model.to_tokens(CORRUPT)
    graph = Graph(model)
    with torch.no_grad():
        good, bad = graph.outputs(clean), graph.outputs(corrupt)

    def between(x, hook, step):
        way = good["hook_embed"] - bad["hook_embed"]
        return (bad["hook_embed"] + step / STEPS * way).requires_grad_()

    if method == "EAP":
        found = [gradients(model, clean)]
    elif method == "clean-corrupted":
        found = [gradients(model, clean), gradients(model, corrupt)]
    else:
        found = []
        for step in range(STEPS):
            hooks = [("hook_embed", partial(between, step=step))]
            found.append(gradients(model, clean, hooks))
    scores = {}
    for writer, reader in graph.edges:
        change = output_of(writer, bad) - output_of(writer, good)
        of_runs = [(output_of(reader, gradient) * change).sum() for gradient in found]
        scores[writer, reader] = sum(of_runs) / len(of_runs) / len(CLEAN)
    return scores


@pytest.mark.parametrize("method", ["EAP", "EAP-IG-inputs", "clean-corrupted"])
def test_scores_are_our_gradients_times_our_changes(eap, model, method):
    graph = eap["graph"].Graph.from_model(model)
    data = [(CLEAN, CORRUPT, torch.zeros(len(CLEAN)))]
    attribute = eap["attribute"].attribute
    attribute(model, graph, data, summed_metric, method, ig_steps=STEPS, quiet=True)
    expected = expected_scores(model, method)
    assert len(graph.edges) == 9 + 4 + 9 * 5 + 8 + 9
    for name, edge in graph.edges.items():
        score = expected[ends(name)].item()
        assert float(edge.score) == pytest.approx(score, abs=1e-6, rel=1e-5), name
    assert graph.scores.abs().max() > 0.01
