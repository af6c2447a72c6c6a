"""What each process of `accelerate launch` runs for test_multiprocess.

Writes to `seen-RANK.json` in the folder that it is given: of each run, a hash of all weights, their
number and the loss after each step, the rows of each step, and how the run ended.
"""

import dataclasses
import functools
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from test_multiprocess import NONZEROS, SHORT

from tl_sparse.errors import TLSparseError
from tl_sparse.training import train
from tl_sparse.training.trainer import Trainer

RANK = int(os.environ["RANK"])
real_step = Trainer.step
real_backward = Trainer._backward


def nothing_special(n_done):
    pass


def run(config, out=None, resume=False, before_step=nothing_special, factor_of=None):
    """Train, and return what was seen.

    `before_step` is called with the number of finished steps; `factor_of`, with the same, gives a
    factor of the loss.
    """
    hashes = []
    rows = []

    def recording_step(trainer, tokens):
        before_step(trainer.sparsity.steps)
        loss = real_step(trainer, tokens)
        hashes.append((hash_of_weights(trainer.model), trainer.sparsity.l0(), float(loss)))
        rows.append(tokens.tolist())
        return loss

    def scaled_backward(trainer, tokens):
        loss = real_backward(trainer, tokens)
        return loss if factor_of is None else loss * factor_of(trainer.sparsity.steps)

    Trainer.step = recording_step
    Trainer._backward = scaled_backward
    seen = {"hashes": hashes, "rows": rows, "error": None}
    try:
        _, seen["record"] = train(config, out, "cpu", progress=False, resume=resume)
    except TLSparseError as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    return seen


def hash_of_weights(model):
    weights = [tensor.detach().numpy().tobytes() for tensor in model.state_dict().values()]
    return hashlib.sha256(b"".join(weights)).hexdigest()


def terminate_the_second(n_done):
    if n_done == 7 and RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def nan_in_the_second(n_done):
    return float("nan") if n_done == 6 and RANK == 1 else 1.0


def main(folder):
    # This backend is quick, and needs no C++ compiler.
    torch.compile = functools.partial(torch.compile, backend="eager")
    odd = dataclasses.replace(SHORT, batch_size=5)
    compiled = dataclasses.replace(SHORT, accumulation=2, compile=True)
    seen = {
        "whole": run(SHORT, folder / "whole"),
        "nonzeros": run(NONZEROS, folder / "nonzeros"),
        "stopped": run(SHORT, folder / "stopped", before_step=terminate_the_second),
        "resumed": run(SHORT, folder / "stopped", resume=True),
        "nan": run(SHORT, folder / "nan", factor_of=nan_in_the_second),
        "odd": run(odd, folder / "odd"),
        "compiled": run(compiled),
        "command": run(SHORT, folder / "command", resume=True),
    }
    (folder / f"seen-{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
