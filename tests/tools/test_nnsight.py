"""nnsight on our models, in a process of its own: on import, it gives every object new methods."""

import subprocess
import sys
from pathlib import Path

import pytest
from tool_models import requires

from helpers import script_environment

pytestmark = pytest.mark.any_line

requires("nnsight")

CHECKS = Path(__file__).with_name("checks_of_nnsight.py")


def test_nnsight():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(CHECKS.parents[1]), str(CHECKS)]
    environment = script_environment()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
