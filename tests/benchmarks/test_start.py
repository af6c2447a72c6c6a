"""`import tl_sparse` and `tl-sparse --help` take less than a second."""

import subprocess
import sys
import time

import pytest

CODES = {
    "import": "import tl_sparse",
    "help": "from tl_sparse.cli import main; main(['--help'])",
}


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", CODES)
def test_it_starts_within_a_second(name):
    best = min(seconds(CODES[name]) for _ in range(3))
    print(f"{name}: {best:.2f} s")
    assert best < 1
