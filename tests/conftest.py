"""Fixtures of more than one test file."""

import pytest

from micro import micro_circuit, micro_model


@pytest.fixture
def micro():
    """The model that is worked out on paper (micro.py)."""
    return micro_model()


@pytest.fixture
def circuit(micro):
    """The circuit of the model that is worked out on paper."""
    return micro_circuit(micro)
