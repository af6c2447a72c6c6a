"""Loading, running, training, pruning and evaluation on one device: `make gpu`, and on any CPU."""

import dataclasses

import pytest
import torch

import tl_sparse
from formats import write_circuitgpt, write_openai, write_sparse_pretrain
from helpers import full_config, node_means, random_tokens, tiny_config, tiny_model
from micro import EDGES, LOSS, MICRO_TASK, NODES, QUICK_SETTINGS, micro_corpus, triples
from tl_sparse import Circuit, DataConfig, PruneConfig, TrainConfig
from tl_sparse.circuits import attribution_graph
from tl_sparse.evaluation import evaluate, faithfulness_curve, full_evaluation, task_loss
from tl_sparse.hooks import NodeGates, WeightSparsity, abs_topk, frozen, weight_groups
from tl_sparse.hooks.selection import zero_all_but
from tl_sparse.kernels import triton_in_use
from tl_sparse.pruning import corpus_means, prune, prune_edges, task_splits
from tl_sparse.training import evaluate_loss, train
from tl_sparse.training.trainer import Trainer

pytestmark = pytest.mark.any_line

CONFIG = PruneConfig(**QUICK_SETTINGS)
TRAINING = TrainConfig(
    model=tiny_config(d_vocab=384, n_ctx=32, abs_topk={"mlp_neuron": 0.5}, bigram_table=True),
    data=DataConfig(stdlib_chars=0, idiom_chars=20_000),
    steps=8,
    batch_size=4,
    lr=1e-2,
    l0_fraction=0.25,
    min_nonzero=0,
    checkpoint_steps=3,
)
ARCHITECTURES = {
    "full": full_config(),
    "rms": tiny_config(n_layers=2, abs_topk={"attn_in": 0.5, "mlp_neuron": 0.5}, attn_sinks=True),
    "tied": tiny_config(tied_unembed=True, positions="added", sinusoidal=True),
}


def close(ours, expected, tolerance=1e-4):
    torch.testing.assert_close(ours.detach().cpu(), expected.detach().cpu(), rtol=0, atol=tolerance)


@pytest.fixture(params=ARCHITECTURES)
def pair(request, device, tmp_path):
    """One model twice: on the CPU and on the device."""
    model = tiny_model(ARCHITECTURES[request.param], dtype=torch.float64)
    model.save_pretrained(tmp_path / "model")
    return model, tl_sparse.load(tmp_path / "model", device)


# --- running a model


def test_logits_activations_and_gradients_are_those_of_the_cpu(pair, device):
    on_cpu, model = pair
    tokens = random_tokens(model, batch=3)
    expected, expected_cache = on_cpu.run_with_cache(tokens)
    tokens = tokens.to(device)
    with torch.device("meta"):
        logits, cache = model.run_with_cache(tokens)
        model(tokens, return_type="loss").backward()
    assert logits.device.type == torch.device(device).type
    close(logits, expected, 1e-9)
    for name, value in expected_cache.items():
        close(cache[name], value, 1e-9)
    on_cpu(tokens.cpu(), return_type="loss").backward()
    ours = dict(model.named_parameters())
    for name, parameter in on_cpu.named_parameters():
        if parameter.grad is not None:
            close(ours[name].grad, parameter.grad, 1e-9)


def test_partial_runs_and_padding(pair, device, nothing_made_elsewhere):
    on_cpu, model = pair
    with torch.device("cpu"):
        tokens = random_tokens(model, batch=2)
        mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    expected = on_cpu(tokens, attention_mask=mask)
    tokens, mask = tokens.to(device), mask.to(device)
    close(model(tokens, attention_mask=mask), expected, 1e-9)
    resid = model(tokens, stop_at_layer=0)
    given = tokens if model.sparse_cfg.bigram_table else None
    close(model(resid, start_at_layer=0, tokens=given), model(tokens), 1e-9)


def test_generation_is_that_of_the_cpu(micro_folder, micro, device):
    prompt = micro_corpus()[:1, :4]
    options = dict(max_new_tokens=3, do_sample=False, verbose=False, return_type="tokens")
    options["stop_at_eos"] = False
    expected = tl_sparse.load(micro_folder, "cpu").generate(prompt, **options)
    assert micro.generate(prompt.to(device), **options).tolist() == expected.tolist()


@pytest.mark.parametrize("write", [write_openai, write_circuitgpt, write_sparse_pretrain])
def test_other_formats_are_loaded_to_the_device(write, device, tmp_path):
    on_cpu = tiny_model(tiny_config(n_heads=2, d_head=3, d_mlp=24))
    model = tl_sparse.load(write(tmp_path / "model", on_cpu), device)
    tokens = random_tokens(model)
    assert {p.device.type for p in model.parameters()} == {torch.device(device).type}
    close(model(tokens.to(device)), on_cpu(tokens))


def test_weights_that_are_kept_compact(pair, device, tmp_path):
    on_cpu, _ = pair
    model = tl_sparse.load(tmp_path / "model", device, dense_weights=False)
    tokens = random_tokens(model, batch=4)
    with torch.no_grad():
        close(model(tokens.to(device)), on_cpu(tokens), 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_has_its_loss_in_either_dtype(dtype, device):
    model = tl_sparse.load("tiny-python-sparse", device, dtype=dtype)
    rows = tl_sparse.load_corpus("tiny-python-sparse", model.tokenizer, model.cfg.n_ctx)[:16]
    expected = evaluate_loss(tl_sparse.load("tiny-python-sparse", "cpu"), rows, 16)
    tolerance = 1e-3 if dtype == "float32" else 0.05
    assert evaluate_loss(model, rows, 16) == pytest.approx(expected, abs=tolerance)


# --- sparsity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_abs_topk_is_that_of_the_cpu(dtype, device):
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x * 8).round().to(dtype)  # with ties
    with torch.device("meta"):
        ours = abs_topk(x.to(device), 7)
    assert ours.count_nonzero(-1).le(7).all()
    sizes = abs_topk(x, 7).abs().sort(-1).values
    assert torch.equal(ours.abs().sort(-1).values.cpu(), sizes)  # whichever of a tie is kept


def value_and_gradient(function, x):
    x = x.detach().requires_grad_()
    out = function(x)
    incoming = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    (gradient,) = torch.autograd.grad(out, x, incoming.to(x))
    return out.detach().cpu(), gradient.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_abs_topk_of_many_columns_is_that_of_the_cpu(dtype, device):
    """Of so many columns as Triton selects from; float16 has ties."""
    x = torch.randn(20, 1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, gradient = value_and_gradient(lambda x: abs_topk(x, 300), x.to(device))
    expected = value_and_gradient(lambda x: abs_topk(x, 300), x)
    if dtype == torch.float16:  # whichever of a tie is kept
        assert torch.equal(out.abs().sort(-1).values, expected[0].abs().sort(-1).values)
        assert torch.equal(gradient != 0, out != 0)
    else:
        assert torch.equal(out, expected[0])
        assert torch.equal(gradient, expected[1])


@pytest.mark.slow
def test_compiled_abs_topk_is_that_of_the_cpu(device):
    x = torch.randn(20, 1500, generator=torch.Generator().manual_seed(0))
    expected = value_and_gradient(lambda x: abs_topk(x * 2, 300) + 1, x)
    backend = "inductor" if torch.device(device).type == "cuda" else "aot_eager"
    torch.compiler.reset()
    compiled = torch.compile(lambda x: abs_topk(x * 2, 300) + 1, backend=backend)
    out, gradient = value_and_gradient(compiled, x.to(device))
    close(out, expected[0], 1e-6)
    close(gradient, expected[1], 1e-6)


def test_the_kernels_of_a_gpu_work(device):
    in_use = triton_in_use(device)
    is_on_gpu = torch.device(device).type == "cuda"
    assert in_use[0].isdigit() if is_on_gpu else in_use.startswith("none: there are no kernels")


@pytest.mark.parametrize("minimum", [0, 3])
def test_weight_topk_of_a_large_matrix_is_that_of_the_cpu(minimum, device):
    """As large as those in which Triton selects, with ties over the whole matrix."""
    x = torch.randn(1000, 300, generator=torch.Generator().manual_seed(0))
    x = (x * 50).round() / 50
    ours = x.to(device)
    zero_all_but(ours, 20_000, minimum)
    zero_all_but(x, 20_000, minimum)
    assert torch.equal(ours.cpu(), x)
    assert int(x.count_nonzero()) == 20_000


def test_weight_topk_is_that_of_the_cpu(pair):
    models = pair
    for model in models:
        for group in weight_groups(model):
            group.project(0.25, min_nonzero=2)
    ours, expected = models[1].state_dict(), models[0].state_dict()
    for name, weight in expected.items():
        assert torch.equal(ours[name].cpu(), weight), name


def test_a_sparse_optimizer_step(pair, device):
    _, model = pair
    tokens = random_tokens(model).to(device)
    sparsity = WeightSparsity(model, fraction=0.25, min_nonzero=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.device("meta"), sparsity.attached(optimizer):
        model(tokens, return_type="loss").backward()
        optimizer.step()
    entries = [sum(p.numel() for p in group.parameters) for group in weight_groups(model)]
    assert sparsity.l0() == sum(int(0.25 * n) for n in entries)


# --- training


def test_a_training_that_is_resumed_is_the_one_that_was_not_interrupted(
    device, tmp_path, monkeypatch
):
    expected, record = train(TRAINING, tmp_path / "whole", device, progress=False)
    assert {p.device.type for p in expected.parameters()} == {torch.device(device).type}
    real = Trainer.step

    def interrupted(trainer, tokens):
        if trainer.steps_done == 5:
            raise KeyError("interrupted")
        return real(trainer, tokens)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyError):
        train(TRAINING, tmp_path / "run", device, progress=False)
    monkeypatch.setattr(Trainer, "step", real)
    resumed, again = train(TRAINING, tmp_path / "run", device, progress=False, resume=True)
    assert again["training_loss"] == record["training_loss"]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_steps_make_nothing_elsewhere(precision, device):
    config = dataclasses.replace(TRAINING, precision=precision)
    model = tl_sparse.create(config.model, seed=0, device=device).train()
    trainer = Trainer(model, config)
    tokens = random_tokens(model, batch=4).to(device)
    with torch.device("meta"):
        losses = [float(trainer.step(tokens)) for _ in range(8)]
    assert losses[-1] < losses[0]


# --- circuits


def test_gates(micro, device):
    means = corpus_means(micro, micro_corpus())
    gates = NodeGates(means, init_bias=0.5, init_scale=0.0, seed=0)
    data = task_splits(micro, MICRO_TASK, CONFIG)[0].trimmed()
    with torch.device("meta"), frozen(micro), gates.attached(micro):
        loss = task_loss(micro, data)
        loss.backward()
    assert gates.tau.grad.device.type == torch.device(device).type
    assert float(loss.detach()) == pytest.approx(LOSS, abs=1e-5)


def test_pruning_finds_the_circuit_on_paper(micro, tmp_path):
    found, evaluation = prune(micro, MICRO_TASK, micro_corpus(), CONFIG, progress=False)
    assert [str(node) for node in found.nodes] == NODES
    assert evaluation.circuit.loss == pytest.approx(LOSS, abs=1e-4)
    assert faithfulness_curve(found, micro, task_splits(micro, MICRO_TASK, CONFIG)[2])
    with_edges, _ = prune_edges(found, micro, MICRO_TASK, CONFIG, progress=False)
    assert triples(with_edges.edges(micro)) == EDGES
    with_edges.save(tmp_path / "circuit")
    assert triples(Circuit.load(tmp_path / "circuit").edges(micro)) == EDGES


def test_a_circuit_from_the_cpu_acts_on_the_device(micro_folder, micro, circuit, device):
    data = task_splits(micro, MICRO_TASK, CONFIG)[2]
    on_cpu = tl_sparse.load(micro_folder, "cpu")
    tokens = data.tokens
    for context in (Circuit.applied, Circuit.ablated):
        with context(circuit, on_cpu):
            expected = on_cpu(tokens.cpu())
        with torch.device("meta"), context(circuit, micro):
            logits = micro(tokens)
        close(logits, expected)


def test_evaluation(micro, circuit, device):
    heldout = task_splits(micro, MICRO_TASK, CONFIG)[2]
    evaluation = evaluate(circuit, micro, heldout)
    measured = full_evaluation(circuit, micro, heldout)
    assert evaluation.circuit.loss == pytest.approx(LOSS, abs=1e-4)
    assert measured["evaluation"]["circuit"]["loss"] == pytest.approx(LOSS, abs=1e-4)


def test_what_is_made_of_a_circuit(micro, circuit, tmp_path):
    page = circuit.view(micro, MICRO_TASK, micro_corpus())
    assert "0.attn_v h0.0" in page.html
    assert attribution_graph(circuit, micro, MICRO_TASK)["nodes"]
    circuit.save_edge_list(tmp_path / "edges.json", micro)
    again = Circuit.from_edge_list(
        tmp_path / "edges.json", micro, node_means(micro, micro_corpus())
    )
    assert [str(node) for node in again.nodes] == NODES
