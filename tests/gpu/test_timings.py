"""The script of `make gpu`: what it finds missing, and its timings at toy size."""

import re
import time

import pytest
import torch
from measuring import Measurements
from run import NEEDED, missing_packages
from timings import SIZES, tables

pytestmark = pytest.mark.any_line


def test_missing_packages_are_named():
    assert missing_packages(NEEDED) == []
    assert missing_packages(["pytest", "No_such.package"]) == ["no-such-package"]


def test_every_timing_is_a_row(device):
    text = tables(SIZES["toy"], torch.device(device), seconds=60)
    rows = re.findall(r"^\| (.+?) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", text, re.MULTILINE)
    assert rows == [
        "16 × 64, float32",
        "16 × 64, float32, with backward",
        "16 × 64, bfloat16",
        "16 × 64, bfloat16, with backward",
        "2,048 weights, at least 0 in a row",
        "2,048 weights, at least 4 in a row",
        "bfloat16, against dense",
        "bfloat16, against torch.topk",
        "float32, against dense",
        "float32, against torch.topk",
        "gate step, float32",
        "training step, float32",
        "training step, bfloat16",
        "weight top-k / dense training step, bfloat16",
        "forward, float32",
        "gate step / forward and backward to the embedding",
        "width 32, 1/64 nonzero",
        "width 32, 1/256 nonzero",
    ]
    assert "7.29 times" in text  # what RTop-K is published with


def test_rows_that_cannot_be_measured_say_so(device):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    measured = Measurements(torch.device(device), turns=1, end=time.monotonic() + 60)
    measured.row("a large one", too_large)
    late = Measurements(torch.device(device), turns=1, end=time.monotonic() - 1)
    late.row("a late one", too_large)
    reasons = ["it needs more memory than the GPU has", "no time was left"]
    assert measured.lines == [f"| a large one | not measured: {reasons[0]} | – | – | – |"]
    assert late.lines == [f"| a late one | not measured: {reasons[1]} | – | – | – |"]
