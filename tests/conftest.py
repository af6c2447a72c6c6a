"""Fixtures of more than one test file."""

import pytest
from hypothesis import HealthCheck, settings

from micro import micro_circuit, micro_model

# No test depends on the speed of the machine, or on what an earlier run of it has tried.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture
def micro():
    """The model that is worked out on paper (micro.py)."""
    return micro_model()


@pytest.fixture
def circuit(micro):
    """The circuit of the model that is worked out on paper."""
    return micro_circuit(micro)
