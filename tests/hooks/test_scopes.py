"""Contexts act on the calls of the thread that opened them, whatever else happens meanwhile."""

import asyncio
import dataclasses
import sys
import threading
from contextlib import ExitStack

import pytest
import torch

from helpers import circuit_means, has_hooks, random_masks, random_tokens, stock_model, tiny_model
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import HookNameError
from tl_sparse.hooks.points import frozen, hooked

N_THREADS = 4


def random_circuit(model, seed, edges):
    means = circuit_means(model, random_tokens(model, seed=5))
    generator = torch.Generator().manual_seed(seed)
    kept = random_masks(means, 0.5, generator)
    circuit = Circuit(kept, means, fingerprint(model), "m", "t")
    if not edges:
        return circuit
    every_second = circuit.edges(model)[::2]
    return dataclasses.replace(circuit, edge_set=frozenset(edge.ends for edge in every_second))


@torch.no_grad()
def logits(model):
    return model(random_tokens(model))


@pytest.fixture
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def run_in_threads(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("edges", [False, True], ids=["nodes", "edges"])
@pytest.mark.parametrize("runs_per_thread", [15, pytest.param(250, marks=pytest.mark.slow)])
def test_each_thread_runs_the_model_under_its_own_circuit(edges, runs_per_thread, switching_often):
    model = tiny_model(n_layers=2, attn_sinks=True)
    plain = logits(model)
    circuits = [random_circuit(model, seed, edges) for seed in range(N_THREADS)]
    expected = []
    for circuit in circuits:
        with circuit.applied(model):
            expected.append(logits(model))
    wrong = []

    def work(i):
        for _ in range(runs_per_thread):
            with circuits[i].applied(model):
                under = logits(model)
            if not torch.equal(under, expected[i]):
                wrong.append(i)
            if not torch.allclose(logits(model), plain, atol=1e-6):
                wrong.append("plain")

    run_in_threads(*[lambda i=i: work(i) for i in range(N_THREADS)])
    assert wrong == []
    assert not has_hooks(model)
    assert torch.equal(logits(model), plain)


def test_asyncio_tasks_do_not_see_each_others_circuits():
    model = tiny_model(n_layers=2)
    circuits = [random_circuit(model, seed, edges=True) for seed in range(2)]
    expected = []
    for circuit in circuits:
        with circuit.applied(model):
            expected.append(logits(model))

    async def task(i):
        with circuits[i].applied(model):
            await asyncio.sleep(0)  # the other task enters its context
            under = logits(model)
            await asyncio.sleep(0)
        assert torch.equal(under, expected[i])

    async def both():
        await asyncio.gather(task(0), task(1))

    asyncio.run(both())
    assert not has_hooks(model)


@pytest.mark.parametrize("edges", [False, True], ids=["nodes", "edges"])
def test_contexts_may_end_in_another_order_than_they_began(edges):
    model = tiny_model(n_layers=2)
    plain = logits(model)
    first, second = (random_circuit(model, seed, edges) for seed in range(2))
    with second.applied(model):
        under_second = logits(model)
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(first.applied(model))
    inner.enter_context(second.applied(model))
    outer.close()
    assert torch.equal(logits(model), under_second)
    inner.close()
    assert torch.equal(logits(model), plain)
    assert not has_hooks(model)


def test_a_generator_that_is_closed_by_another_thread_leaves_nothing_behind():
    model = tiny_model(n_layers=2)
    plain = logits(model)
    circuit = random_circuit(model, 0, edges=True)

    def under_the_circuit():
        with circuit.applied(model):
            yield logits(model)

    generator = under_the_circuit()
    next(generator)
    run_in_threads(generator.close)
    assert torch.equal(logits(model), plain)
    assert not has_hooks(model)


def test_hooks_of_others_do_not_end_ours_nor_do_ours_end_theirs():
    name = "blocks.0.hook_resid_post"
    seen = []
    note = {name: lambda activation, hook: seen.append("ours")}
    theirs = [(name, lambda activation, hook: seen.append("theirs"))]
    for model in (tiny_model(), stock_model()):
        seen.clear()
        with hooked(model, note):
            model.run_with_hooks(random_tokens(model), fwd_hooks=theirs)
            model.reset_hooks()
            logits(model)
        assert seen == ["ours", "theirs", "ours"]
        seen.clear()
        with model.hooks(fwd_hooks=theirs):
            with hooked(model, note):
                logits(model)
            logits(model)
        assert seen == ["theirs", "ours", "theirs"]
        assert not has_hooks(model)


def test_a_hook_point_that_never_runs_is_refused():
    for model in (tiny_model(), stock_model()):
        name = "blocks.0.hook_mlp_in"
        with (
            pytest.raises(HookNameError, match="use_hook_mlp_in is False"),
            hooked(model, {"blocks.0.hook_resid_post": print, name: print}),
        ):
            pytest.fail("the context opened")
        assert not has_hooks(model)


@pytest.mark.parametrize("edges", [False, True], ids=["nodes", "edges"])
def test_compiled_models_run_under_the_circuit(edges):
    model = tiny_model(n_layers=1)
    circuit = random_circuit(model, 0, edges)
    compiled = torch.compile(model, backend="eager")

    @torch.compile(backend="eager")
    def function(tokens):
        return model(tokens)

    tokens = random_tokens(model)
    with torch.no_grad():
        plain = compiled(tokens)
        function(tokens)
        with circuit.applied(model):
            under = model(tokens)
            assert torch.equal(function(tokens), under)
        with circuit.applied(compiled):
            assert torch.equal(compiled(tokens), under)
        assert not torch.allclose(under, plain, atol=1e-3)
        torch.testing.assert_close(compiled(tokens), plain)
        torch.testing.assert_close(function(tokens), plain)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_model_is_frozen_until_the_last_thread_is_done():
    model = tiny_model()
    model.train()
    model.embed.W_E.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    first, second = frozen(model), frozen(model)
    with first:
        run_in_threads(second.__enter__)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    second.__exit__(None, None, None)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(module.training for module in model.modules())
