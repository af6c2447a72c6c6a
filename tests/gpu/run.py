"""`make gpu`: the tests of this folder and the timings on one device, in at most ten minutes.

It needs no network, only this repository and a Python that has torch. What else is missing there is
taken from the wheels in the folder wheels/ (see wheels.txt), without changing that Python.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
WHEELS = REPOSITORY / "wheels"
INSTALLED = WHEELS / "installed"
PACKAGE = WHEELS / "package"
RESULTS = REPOSITORY / "examples" / "results" / "gpu.md"
SECONDS = 600
#: How much earlier no more rows of the tables are begun.
SECONDS_OF_A_ROW = 40
#: What this script, the package and its tests import; what these need in turn is found by itself.
NEEDED = ["torch", "transformer-lens", "transformers", "datasets", "lazy-loader", "accelerate"]
NEEDED += ["pytest", "hypothesis", "setuptools"]


def install(folder: Path, *what: str) -> None:
    """Install without network and dependencies into a folder of its own."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-index"]
    pip += ["--no-deps", "--no-build-isolation", "--target", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(INSTALLED)}
    subprocess.run([*pip, *what], check=True, env=environment)


def install_wheels() -> None:
    """Install the wheels, unless that was done before."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels and not INSTALLED.exists():
        install(INSTALLED, *wheels)


def install_package() -> None:
    """Install this package as it is now: in the repository its folders lie elsewhere."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    install(PACKAGE, str(REPOSITORY))


def missing_packages(needed: list[str]) -> list[str]:
    """The packages among `needed`, and among what these need in turn, that are not installed."""
    from packaging.requirements import Requirement

    missing = []
    found = set()
    waiting = list(needed)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = requires(name) or []
        except PackageNotFoundError:
            missing.append(name)
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return sorted(missing)


def check_machine(device: str) -> str | None:
    """What is missing on this machine, or None."""
    missing = missing_packages(NEEDED)
    if missing:
        return (
            f"{sys.executable} lacks {', '.join(missing)}: put wheels of them for Python "
            f"{sys.version_info.major}.{sys.version_info.minor} into {WHEELS}; "
            "`make gpu-wheels` downloads them on a machine with network"
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return (
            "torch finds no GPU here; `make gpu DEVICE=cpu` runs the same on the CPU, at toy size"
        )
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    end = time.monotonic() + SECONDS
    install_wheels()
    sys.path.insert(0, str(INSTALLED))
    if importlib.util.find_spec("packaging") is None:
        sys.exit(f"{sys.executable} lacks packaging, which every machine with torch has")
    problem = check_machine(args.device)
    if problem is not None:
        sys.exit(problem)
    install_package()

    environment = os.environ | {
        "DEVICE": args.device,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(INSTALLED), str(HERE.parent)]),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    timings = [sys.executable, str(HERE / "timings.py"), "--device", args.device]
    if args.device == "cuda":
        timings += ["--out", str(RESULTS)]
    else:
        timings += ["--size", "toy", "--out", os.devnull]
    failed = False
    # Not from the repository's root, where `-m` would find the package without its hooks.
    for command in (tests, timings):
        left = end - time.monotonic()
        if command is timings:
            command = [*timings, "--seconds", str(left - SECONDS_OF_A_ROW)]
        done = subprocess.run(command, check=False, env=environment, cwd=HERE.parent, timeout=left)
        failed = failed or done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
