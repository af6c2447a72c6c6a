"""The kernels for GPUs: interpreted, compiled, and where they can be neither."""

import os
import platform
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from tl_sparse.hooks import abs_topk, selection
from tl_sparse.kernels import gpu, triton_in_use

pytestmark = pytest.mark.any_line

HERE = Path(__file__).parent
has_wheels = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
needs_triton = pytest.mark.skipif(not has_wheels, reason="Triton exists for Linux alone")


def run_python(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | environment
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_the_kernels_interpreted_on_the_cpu():
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = HERE / "interpreted_triton.py"
    printed = run_python("-m", "pytest", *options, tests, TRITON_INTERPRET="1")
    assert " passed" in printed
    assert "skipped" not in printed


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_gpus():
    """Triton compiles for a GPU that is not there; what it compiles runs on GPUs alone."""
    compiled = run_python(HERE / "compiled_triton.py").splitlines()
    assert len(compiled) == 2 * 3 * 6  # GPUs, sizes of numbers, kernels


# Where it cannot be used


@pytest.fixture
def on_cpu(monkeypatch):
    """Send rows of any length on a CPU to Triton, if it works, and forget after that whether so."""
    monkeypatch.setattr(gpu.TRITON, "why_not", None)
    monkeypatch.setattr(gpu, "_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(gpu, "MIN_COLUMNS", 1)
    monkeypatch.setattr(gpu, "MIN_WEIGHTS", 1)
    gpu._working.cache_clear()
    yield
    gpu._working.cache_clear()


def broken(*arguments):
    raise RuntimeError("no C compiler")


BROKEN = {
    "damaged": (None, "launch"),  # nothing to import
    "no compiler": (types.SimpleNamespace(abs_topk=broken), "no C compiler"),
    "wrong": (
        types.SimpleNamespace(
            abs_topk=lambda x, k: (x, x), times=lambda x, mask: x, zero_all_but=lambda *_: None
        ),
        "gives wrong results",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_triton_that_does_not_work_is_left_aside_with_one_warning(kind, on_cpu, monkeypatch):
    launch, reason = BROKEN[kind]
    monkeypatch.setitem(sys.modules, "tl_sparse.kernels.launch", launch)
    if launch is None:
        monkeypatch.delattr("tl_sparse.kernels.launch", raising=False)
    else:
        monkeypatch.setattr("tl_sparse.kernels.launch", launch, raising=False)
    x = torch.tensor([[3.0, -4.0, 1.0, 0.5], [0.5, 2.0, -3.0, -0.0]], requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            (abs_topk(x, 2) * 3).sum().backward()
        matrix = x.detach().clone()
        selection.zero_all_but(matrix, 3, 1)
    assert x.grad.tolist() == [[6.0, 6.0, 0.0, 0.0], [0.0, 6.0, 6.0, 0.0]]
    assert matrix.tolist() == [[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, -3.0, 0.0]]
    (warning,) = caught
    assert "Triton does not work here, so everything runs in plain torch: " in str(warning.message)
    assert reason in str(warning.message)
    assert triton_in_use("cpu").startswith("none: it does not work here: ")


def test_a_triton_that_is_missing_or_too_old(monkeypatch):
    monkeypatch.delenv("TL_SPARSE_TRITON", raising=False)
    monkeypatch.setattr(gpu, "version", lambda name: "3.2.0+git")
    assert gpu._why_not() == "3.2.0+git is older than 3.3, the oldest that can be used"
    monkeypatch.setattr(gpu, "version", lambda name: "3.10.1")
    assert gpu._why_not() is None
    monkeypatch.setenv("TL_SPARSE_TRITON", "0")
    assert gpu._why_not() == "switched off by TL_SPARSE_TRITON=0"
    monkeypatch.delenv("TL_SPARSE_TRITON")

    def missing(name):
        raise gpu.PackageNotFoundError(name)

    monkeypatch.setattr(gpu, "version", missing)
    assert gpu._why_not() == "not installed"


def test_without_triton_everything_runs_in_plain_torch_and_nothing_is_said(on_cpu, monkeypatch):
    monkeypatch.setattr(gpu.TRITON, "why_not", "not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs_topk(torch.tensor([[1.0, -2.0]]), 1).tolist() == [[0.0, -2.0]]
    assert triton_in_use("cpu") == "none: not installed"


def test_which_tensors_go_to_triton(monkeypatch):
    monkeypatch.setattr(gpu.TRITON, "why_not", None)
    columns = [1023, 1024, 16_384, 16_385]
    chosen = [gpu.selects_rows_by_triton(torch.empty(2, n, device="meta")) for n in columns]
    assert chosen == [False, True, True, False]
    assert not gpu.selects_rows_by_triton(torch.empty(2, 1024))  # on a CPU
    eight_bits = torch.empty(2, 1024, dtype=torch.float8_e5m2, device="meta")
    assert not gpu.selects_rows_by_triton(eight_bits)
    assert triton_in_use("cpu") == "none: there are no kernels for cpu"
