"""A GPU without enough memory: refused before anything starts, with what would be needed."""

import dataclasses

import pytest
import torch

import tl_sparse
from helpers import tiny_config
from micro import MICRO_TASK, QUICK_SETTINGS, micro_corpus
from tl_sparse import DataConfig, TrainConfig, memory
from tl_sparse.errors import DeviceMemoryError
from tl_sparse.memory import GIB, check_fits, free_bytes, saved_bytes
from tl_sparse.network import SparseTransformer
from tl_sparse.pruning import prune
from tl_sparse.training import preset, train
from tl_sparse.training.memory import training_bytes
from tl_sparse.training.objective import next_token_loss

pytestmark = pytest.mark.any_line

TRAINING = TrainConfig(
    model=tiny_config(d_vocab=384, n_ctx=32),
    data=DataConfig(stdlib_chars=0, idiom_chars=20_000),
    steps=8,
    batch_size=4,
    min_nonzero=0,
)


@pytest.fixture
def small_gpu(monkeypatch):
    """The CPU seems to be a device with a limited memory, of which 1000 bytes are free."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)


def test_what_is_free_counts_what_torch_keeps_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_bytes(torch.device("cuda:0")) == 130
    assert free_bytes(torch.device("cpu")) is None


def test_the_message_says_how_much_is_needed(monkeypatch):
    parts = {"weights": 3 * GIB, "gradients": GIB // 2}
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * GIB + GIB // 2)
    check_fits("this search", parts, "cuda:0", "prune less")
    monkeypatch.setattr(memory, "free_bytes", lambda device: GIB)
    expected = (
        "this search needs at least 3.50 GiB on cuda:0 (weights 3.00, gradients 0.50), and 1.00 "
        "GiB are free there; prune less"
    )
    with pytest.raises(DeviceMemoryError) as raised:
        check_fits("this search", parts, "cuda:0", "prune less")
    assert str(raised.value) == expected


def test_what_autograd_keeps_is_counted_once():
    layer = torch.nn.Linear(3, 5, bias=False)
    x = torch.ones(4, 3)

    def run():
        y = layer(x).exp()  # keeps x, 12 numbers, and the exponentials, 20 numbers
        return (y.view(20) * y.view(20)).sum()  # keeps views of these

    assert saved_bytes(run, layer) == 4 * (12 + 20)


def test_the_bytes_of_a_training():
    weights = 4 * sum(p.numel() for p in SparseTransformer(TRAINING.model).parameters())
    parts = training_bytes(TRAINING)
    assert parts.keys() == {"weights", "moments of Adam", "activations"}
    assert parts["weights"] == weights
    assert parts["moments of Adam"] == 2 * weights
    in_two = training_bytes(dataclasses.replace(TRAINING, accumulation=2))
    assert in_two["gradients"] == weights
    assert in_two["activations"] < 0.6 * parts["activations"]
    assert training_bytes(TRAINING, n_processes=2)["activations"] == in_two["activations"]
    sharded = training_bytes(TRAINING, n_processes=2, is_sharded=True)
    assert sharded["weights"] == weights // 2
    compiled = training_bytes(dataclasses.replace(TRAINING, compile=True))
    assert compiled == {"weights": weights, "moments of Adam": 2 * weights, "gradients": weights}


def test_the_activations_are_those_that_a_real_step_keeps():
    network = SparseTransformer(TRAINING.model)
    tokens = torch.zeros(TRAINING.batch_size, TRAINING.model.n_ctx, dtype=torch.int64)
    real = saved_bytes(lambda: next_token_loss(network(tokens), tokens), network)
    # Attention on the CPU also keeps the logarithm of each softmax denominator.
    log_totals = 4 * TRAINING.model.n_heads * tokens.numel()
    assert training_bytes(TRAINING)["activations"] == real - log_totals


def test_a_published_size_needs_more_than_most_gpus_have():
    parts = training_bytes(preset("paper-4x"))
    assert parts["activations"] > 80 * GIB
    halved = training_bytes(dataclasses.replace(preset("paper-4x"), precision="bfloat16"))
    assert 0.5 < halved["activations"] / parts["activations"] < 0.6


def test_a_training_that_does_not_fit_leaves_nothing(small_gpu, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(DeviceMemoryError, match="this training needs at least") as raised:
        train(TRAINING, folder, "cpu", progress=False)
    assert "use a smaller batch_size, a larger accumulation, or a smaller model" in str(
        raised.value
    )
    assert not folder.exists()


def test_a_model_that_does_not_fit(small_gpu):
    with pytest.raises(DeviceMemoryError, match="this model needs at least"):
        tl_sparse.create(TRAINING.model, seed=0, device="cpu")
    with pytest.raises(DeviceMemoryError, match="this model needs at least"):
        tl_sparse.load("tiny-python-sparse", "cpu")


def test_a_search_that_does_not_fit(micro, small_gpu):
    before = {name: value.clone() for name, value in micro.state_dict().items()}
    with pytest.raises(DeviceMemoryError, match="a step of this search needs at least"):
        prune(micro, MICRO_TASK, micro_corpus(), QUICK_SETTINGS, progress=False)
    for name, value in micro.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(point.fwd_hooks for point in micro.hook_dict.values())
