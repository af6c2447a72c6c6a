"""Pruning in whatever mode torch and the model are: no gradients, inference, flags of hooks."""

import contextlib
import dataclasses

import pytest
import torch

from helpers import (
    ON_3,
    full_config,
    has_hooks,
    random_circuit,
    random_data,
    stock_model,
    tiny_model,
)
from micro import (
    MICRO_TASK,
    NODES,
    QUICK_SETTINGS,
    micro_circuit,
    micro_corpus,
    micro_data,
    micro_model,
)
from tl_sparse.circuits.attribution import attribution_graph
from tl_sparse.circuits.reads import shared_reads
from tl_sparse.errors import UnsupportedError
from tl_sparse.evaluation.judge import evaluate, score
from tl_sparse.pruning import gates as gates_module
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.means import corpus_means
from tl_sparse.pruning.pruner import prune, prune_edges

CONFIG = PruneConfig(**QUICK_SETTINGS)


@contextlib.contextmanager
def grad_disabled():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


MODES = [grad_disabled, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("ablation", ["mean", "resample"])
@pytest.mark.parametrize("mode", MODES)
def test_pruning_without_gradients_finds_the_same(micro, mode, ablation):
    config = dataclasses.replace(CONFIG, ablation=ablation)
    expected, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    with mode():
        circuit, _ = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
        assert not torch.is_grad_enabled()
        means = corpus_means(micro, micro_corpus())
        with_means, _ = prune(micro, MICRO_TASK, None, config, progress=False, means=means)
        fewer, _ = prune_edges(circuit, micro, MICRO_TASK, config, progress=False)
        assert len(fewer.edges(micro)) == 2
        evaluate(circuit, micro, micro_data(micro))
        graph = attribution_graph(circuit, micro, MICRO_TASK)
        if mode is torch.inference_mode:
            assert torch.is_inference_mode_enabled()
    assert circuit.nodes == with_means.nodes == expected.nodes
    assert list(map(str, circuit.nodes)) == NODES
    assert graph["links"]
    assert not any(mean.is_inference() for mean in circuit.means.values())
    assert all(parameter.requires_grad for parameter in micro.parameters())
    assert all(parameter.grad is None for parameter in micro.parameters())


def test_circuits_made_in_inference_mode_can_be_attributed(micro):
    with torch.inference_mode():
        circuit = micro_circuit(micro)
        circuit = dataclasses.replace(
            circuit,
            kept={name: mask.clone() for name, mask in circuit.kept.items()},
            means={name: mean.clone() for name, mean in circuit.means.items()},
        )
    assert any(mean.is_inference() for mean in circuit.means.values())
    assert attribution_graph(circuit, micro, MICRO_TASK)["links"]


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = micro_model()
    with pytest.raises(UnsupportedError, match=r"embed.W_E was made in torch.inference_mode"):
        prune(model, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
    assert score(model, micro_data(model)).accuracy == 1


@pytest.mark.parametrize("mode", MODES)
def test_modes_flags_and_gradients_come_back_after_an_exception(micro, mode, monkeypatch):
    micro.train()
    micro.blocks[0].attn.W_V.requires_grad_(False)
    micro.embed.W_E.grad = torch.ones_like(micro.embed.W_E)

    def fail(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(gates_module, "objective_loss", fail)
    with mode():
        with pytest.raises(ZeroDivisionError):
            prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
        assert not torch.is_grad_enabled()
    assert micro.training
    fixed = [name for name, p in micro.named_parameters() if not p.requires_grad]
    assert fixed == ["blocks.0.attn.W_V"]
    with_gradients = [name for name, p in micro.named_parameters() if p.grad is not None]
    assert with_gradients == ["embed.W_E"]
    assert bool((micro.embed.W_E.grad == 1).all())
    assert not has_hooks(micro)


# TransformerLens' flags for optional hook points

FLAGS = ["use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in"]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_pruning_with_a_flag_finds_the_same(micro, flag, ablation):
    config = dataclasses.replace(CONFIG, ablation=ablation)
    expected, expected_scores = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    getattr(micro, f"set_{flag}")(True)
    circuit, scores = prune(micro, MICRO_TASK, micro_corpus(), config, progress=False)
    assert circuit.nodes == expected.nodes
    assert scores.resample.loss == pytest.approx(expected_scores.resample.loss, rel=1e-5)
    for name, mean in expected.means.items():
        torch.testing.assert_close(circuit.means[name], mean)
    assert getattr(micro.cfg, flag)
    fewer, _ = prune_edges(circuit, micro, MICRO_TASK, config, progress=False)
    assert len(fewer.edges(micro)) == 2
    assert len(attribution_graph(circuit, micro, MICRO_TASK)["links"]) == len(
        attribution_graph(circuit, micro_model(), MICRO_TASK)["links"]
    )
    assert getattr(micro.cfg, flag)


@pytest.mark.parametrize("flag", FLAGS)
def test_evaluation_with_a_flag_gives_the_same_numbers(flag):
    model = tiny_model(full_config(resid_relu=False, abs_topk={}), dtype=torch.float64)
    circuit, data = random_circuit(model), random_data(model)
    expected = evaluate(circuit, model, data)
    getattr(model, f"set_{flag}")(True)
    found = evaluate(circuit, model, data)
    for how in ("full", "circuit", "ablated", "zero", "resample"):
        assert getattr(found, how).loss == pytest.approx(getattr(expected, how).loss, rel=1e-6)


def stock_model_with_flags():
    """On TransformerLens 4, its own small models do not support all flags; GPT-2's do."""
    if ON_3:
        return stock_model(d_vocab=36)
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=36, n_embd=8, n_layer=1, n_head=2, n_positions=10)
    network = transformers.GPT2LMHeadModel(config).eval()
    return build_bridge_from_module(
        network, "GPT2LMHeadModel", hf_config=network.config, device="cpu"
    )


@pytest.mark.parametrize("flag", FLAGS)
def test_a_stock_model_with_a_flag_gives_the_same_means_and_scores(flag):
    model = stock_model_with_flags()
    corpus = micro_corpus()
    means = corpus_means(model, corpus)
    circuit = random_circuit(model)
    data = random_data(model)
    expected = evaluate(circuit, model, data)
    getattr(model, f"set_{flag}")(True)
    for name, mean in corpus_means(model, corpus).items():
        torch.testing.assert_close(mean, means[name])
    found = evaluate(circuit, model, data)
    for how in ("full", "circuit", "ablated", "zero", "resample"):
        assert getattr(found, how).loss == pytest.approx(getattr(expected, how).loss, rel=1e-6)
    assert getattr(model.cfg, flag)


def test_functions_that_would_not_run_are_refused(micro):
    micro.set_use_split_qkv_input(True)
    of_the_user = micro.hooks(fwd_hooks=[("blocks.0.hook_q_input", lambda x, hook: x * 0)])
    message = r"attached to blocks.0.*hook_q_input"
    with of_the_user, pytest.raises(UnsupportedError, match=message):
        prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
    with shared_reads(micro):
        assert not micro.cfg.use_split_qkv_input
    assert micro.cfg.use_split_qkv_input
