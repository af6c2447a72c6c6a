"""The script of `make gpu`: what it finds missing, and its timings at toy size."""

import re

import pytest
import torch
from run import NEEDED, missing_packages
from timings import SIZES, table

pytestmark = pytest.mark.any_line


def test_missing_packages_are_named():
    assert missing_packages(NEEDED) == []
    assert missing_packages(["pytest", "No_such.package"]) == ["no-such-package"]


def test_every_timing_is_a_row(device):
    text = table(SIZES["toy"], torch.device(device))
    rows = re.findall(r"^\| 128 \| (.+?) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", text, re.MULTILINE)
    assert rows == [
        "training step, float32",
        "training step, bfloat16",
        "weight top-k / dense training step, bfloat16",
        "forward, float32",
        "gate step / forward and backward to the embedding",
        "AbsTopK of the neurons / GELU",
    ]
