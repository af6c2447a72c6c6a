"""`python -m tl_sparse` with the given arguments; before step 7 the main process waits.

It waits for the removal of the file `waiting`, which it makes in the folder of the run.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from tl_sparse.training.trainer import Trainer

real_step = Trainer.step


def waiting_step(trainer, tokens):
    if trainer.sparsity.steps == 7 and os.environ["RANK"] == "0":
        waiting = Path(sys.argv[sys.argv.index("--out") + 1]) / "waiting"
        waiting.touch()
        while waiting.exists():
            time.sleep(0.01)
    return real_step(trainer, tokens)


if __name__ == "__main__":
    Trainer.step = waiting_step
    runpy.run_module("tl_sparse", run_name="__main__")
