"""The memory that it takes to load a model 2048 wide, with 1 % of its weights nonzero."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formats import write_circuitgpt, write_openai
from helpers import script_environment
from tl_sparse.checkpoints.loading import create
from tl_sparse.network.config import SparseConfig, paper_topk

pytestmark = pytest.mark.any_line

CONFIG = SparseConfig(
    8,
    2048,
    128,
    16,
    8192,
    2048,
    256,
    abs_topk=paper_topk(0.25),
    attn_sinks=True,
    bigram_table=True,
    logits_bias=True,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model in every format; 1.7 GB each where zeros are stored."""
    root = tmp_path_factory.mktemp("large")
    model = create(CONFIG, 0, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter is not model.bigram.W_bigram:
                kept = torch.randint(
                    parameter.numel(), (parameter.numel() // 100,), generator=generator
                )
                values = parameter.flatten()[kept]
                parameter.zero_().view(-1)[kept] = values
    yield (
        {
            "openai": write_openai(root / "openai", model),
            "circuitgpt": write_circuitgpt(root / "circuitgpt", model),
        }
        | {name: saved(root / name, model, name == "dense") for name in ("dense", "compact")}
    )
    for file in root.glob("*/*"):
        file.unlink()


def saved(folder, model, dense):
    model.save_pretrained(folder, dense)
    return folder


def weights_bytes(folder):
    return max(path.stat().st_size for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_loading_takes_little_more_than_the_model(folders, dtype):
    for name, folder in folders.items():
        command = [sys.executable, __file__, str(folder), *([dtype] if dtype else [])]
        result = json.loads(
            subprocess.run(
                command, check=True, capture_output=True, text=True, env=script_environment()
            ).stdout
        )
        size = weights_bytes(folder)
        print(
            f"{name} {dtype}: file {size:,}, model {result['model']:,}, "
            f"beyond {result['beyond'] / size:.2f} files"
        )
        assert result["beyond"] <= 1.2 * size


@pytest.mark.slow
def test_one_percent_takes_a_twentieth(folders):
    compact, dense = [weights_bytes(folders[name]) for name in ("compact", "dense")]
    assert compact <= dense / 20
    print(f"compact / dense: {compact / dense:.4f}")


def most_resident():
    """The most memory this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts in ru_maxrss what the parent of a process had
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(folder, dtype=None):
    import tempfile

    import tl_sparse

    with tempfile.TemporaryDirectory() as small:  # so that everything is imported
        create(SparseConfig(1, 8, 2, 4, 8, 8, 8), 0, device="cpu").save_pretrained(small)
        tl_sparse.load(small, device="cpu")
    before = most_resident()
    model = tl_sparse.load(folder, device="cpu", dtype=dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"model": size, "beyond": most_resident() - before - size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
