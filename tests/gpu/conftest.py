"""The device that these tests run on: $DEVICE, or the GPU if there is one, else the CPU."""

import os

import pytest
import torch

from micro import micro_circuit, micro_model
from tl_sparse import load


@pytest.fixture(scope="session")
def device():
    if "DEVICE" in os.environ:
        return os.environ["DEVICE"]
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def nothing_made_elsewhere():
    """A tensor that is made without a device lands on meta, where every use of it fails.

    So a CPU shows what would fail on a GPU, where a tensor made without a device is on the CPU.
    """
    with torch.device("meta"):
        yield


@pytest.fixture(scope="session")
def micro_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    micro_model().save_pretrained(folder)
    return folder


@pytest.fixture
def micro(micro_folder, device):
    """The model that is worked out on paper, on the device."""
    return load(micro_folder, device)


@pytest.fixture
def circuit(micro_folder):
    """Its circuit, on the CPU, as it is after it was saved."""
    return micro_circuit(load(micro_folder, "cpu"))
