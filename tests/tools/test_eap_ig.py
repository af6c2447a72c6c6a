"""EAP-IG's scores and evaluation of circuits on our models, on TransformerLens 3.

The program (github.com/hannamw/EAP-IG) is not on the package index, and CircuitKit, which contains
it, asks for another huggingface_hub than our tests; each is tested where it is installed.
"""

import random
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from edge_graph import Graph as OurGraph
from edge_graph import fork, output_of, with_edge_hooks
from tool_models import dense_model, requires, sparse_model
from torch.overrides import TorchFunctionMode

PROGRAMS = {"EAP-IG": "eap", "CircuitKit": "circuitkit.backends.eap"}
INSTALLED = {name: path for name, path in PROGRAMS.items() if find_spec(path.split(".")[0])}
requires(next(iter(INSTALLED.values()), "eap").split(".")[0], line=3)

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


@pytest.fixture(params=INSTALLED)
def program(request):
    """The modules `attribute`, `evaluate` and `graph` of one of the programs, by name."""
    path = INSTALLED[request.param]
    with OnThisDevice():
        yield {name: import_module(f"{path}.{name}") for name in ("attribute", "evaluate", "graph")}


@pytest.fixture(params=MODELS)
def model(request):
    return with_edge_hooks(MODELS[request.param]().double())  # so that cfg.dtype says it too


def difference(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def mean_metric(logits, clean_logits, lengths, labels):
    """The metric of a batch as the programs call it; they divide by the number of prompts too."""
    return difference(logits).sum()


def metric_of_each(logits, clean_logits, lengths, labels):
    return difference(logits)


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

    names = {name for name, _ in OurGraph(model).n_biases}
    with model.hooks(fwd_hooks=list(hooks), bwd_hooks=[(name, remember) for name in names]):
        difference(model(tokens)).sum().backward()
    return found


def expected_scores(model, method):
    """Edge → (corrupt − clean output of its writer) · (mean of gradients at its reader)."""
    clean, corrupt = model.to_tokens(CLEAN), model.to_tokens(CORRUPT)
    graph = OurGraph(model)
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


def scored(program, model, method):
    graph = program["graph"].Graph.from_model(model)
    data = [(CLEAN, CORRUPT, torch.zeros(len(CLEAN)))]
    program["attribute"].attribute(
        model, graph, data, mean_metric, method, ig_steps=STEPS, quiet=True
    )
    return graph, data


@pytest.mark.parametrize("method", ["EAP", "EAP-IG-inputs", "clean-corrupted"])
def test_scores_are_our_gradients_times_our_changes(program, model, method):
    graph, _ = scored(program, model, method)
    expected = expected_scores(model, method)
    assert len(graph.edges) == 9 + 4 + 9 * 5 + 8 + 9
    for name, edge in graph.edges.items():
        score = expected[ends(name)].item()
        assert float(edge.score) == pytest.approx(score, abs=1e-6, rel=1e-5), name
    assert graph.scores.abs().max() > 0.01


@pytest.mark.parametrize("n_edges", [0, 5, 20, 40, 75])
def test_a_circuit_answers_what_its_edges_compute(program, model, n_edges):
    """… by the evaluator of these tests: without edges the corrupt run, with all the clean one."""
    graph, data = scored(program, model, "EAP-IG-inputs")
    graph.apply_topn(n_edges, absolute=True)
    found = program["evaluate"].evaluate_graph(model, graph, data, metric_of_each, quiet=True)
    kept = {ends(name) for name, edge in graph.edges.items() if edge.in_graph}
    ours = OurGraph(model)
    kept |= {edge for edge in ours.edges if edge[0][0] == "hook_pos_embed"}  # equal in both runs
    with torch.no_grad():
        clean, corrupt = model.to_tokens(CLEAN), model.to_tokens(CORRUPT)
        expected = difference(ours.logits(clean, ours.outputs(corrupt), kept))
        by_end = {0: model(corrupt), 75: model(clean)}
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    if n_edges in by_end:
        torch.testing.assert_close(found, difference(by_end[n_edges]), atol=1e-10, rtol=0)


def test_a_random_graph_opened_again_from_json(program, model, tmp_path):
    graph, data = scored(program, model, "EAP")
    rng = random.Random(0)
    for edge in graph.edges.values():
        edge.in_graph = rng.random() < 0.7
    evaluate = program["evaluate"].evaluate_graph
    found = evaluate(model, graph, data, metric_of_each, quiet=True)
    graph.to_json(str(tmp_path / "graph.json"))
    again = program["graph"].Graph.from_json(str(tmp_path / "graph.json"))
    torch.testing.assert_close(evaluate(model, again, data, metric_of_each, quiet=True), found)
