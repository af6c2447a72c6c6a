"""Models that are larger than their files account for: refused before anything is allocated."""

import pytest
import torch

from helpers import must_not_run, tiny_config
from tl_sparse import load
from tl_sparse.checkpoints.network import Checkpoint, build_network
from tl_sparse.checksums import FILES, checksums_of
from tl_sparse.errors import CheckpointError
from tl_sparse.files import write_json, write_tensors
from tl_sparse.network import SparseTransformer

pytestmark = pytest.mark.any_line


def write_native(folder, tensors, storage, **changes):
    cfg = tiny_config(biases=False, **changes)
    about = {"model_type": "tl_sparse", "format_version": 1, "storage": storage}
    write_tensors(folder / "model.safetensors", tensors)
    values = {**about, **cfg.to_dict(), **changes, FILES: checksums_of(folder)}
    write_json(folder / "config.json", values)


@pytest.mark.parametrize("sizes", [{"d_vocab": 10**8, "d_model": 10**6}, {"d_model": 3 * 10**7}])
@pytest.mark.parametrize("dense_weights", [True, False])
def test_a_few_bytes_are_not_a_huge_model(sizes, dense_weights, tmp_path):
    with torch.device("meta"):
        shapes = SparseTransformer(tiny_config(biases=False, **sizes)).state_dict()
    tensors = {}
    for name, tensor in shapes.items():
        tensors[f"{name}.values"] = torch.zeros(0)
        tensors[f"{name}.positions"] = torch.zeros(0, dtype=torch.int32)
        tensors[f"{name}.shape"] = torch.tensor(tensor.shape)
    write_native(tmp_path, tensors, "compact", **sizes)
    with pytest.raises(CheckpointError, match=r"the model would take .* bytes, more than the"):
        load(tmp_path, device="cpu", dense_weights=dense_weights)


def test_one_tensor_under_many_names_is_not_a_huge_model(tmp_path):
    cfg = tiny_config(biases=False, n_layers=900, d_mlp=5000)
    with torch.device("meta"):
        shapes = SparseTransformer(cfg).state_dict()
    shared = torch.zeros(30_000)
    tensors = {name: shared[: x.numel()].view(x.shape) for name, x in shapes.items()}
    with pytest.raises(CheckpointError, match=r"the model would take .* bytes, more than the"):
        build_network(Checkpoint(cfg, tensors), tmp_path)


def test_twenty_thousand_layers_are_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tl_sparse.checkpoints.network.SparseTransformer", must_not_run("layers are built")
    )
    tensors = {f"blocks.{i}.x": torch.zeros(1) for i in range(20_000)}
    write_native(tmp_path, tensors, "dense", n_layers=20_000)
    with pytest.raises(CheckpointError, match="has 20000 layers, and at most 1000 are read"):
        load(tmp_path, device="cpu")
