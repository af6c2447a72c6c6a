"""What circuits belong to: the contents of a model, its corpus and a task, beyond their names.

A folder can hold another model tomorrow, and a file other pairs, under the same name. Each content
is therefore compared by a hash. A circuit accepts its model up to rounding, but results of one
suite or search must be of exactly the same weights.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tl_sparse.circuits import hash_of_model, hash_of_tensor
from tl_sparse.errors import DataError, SuiteError
from tl_sparse.hooks import TLModel
from tl_sparse.resuming import other_contents
from tl_sparse.tasks import TASKS, get_task

#: The pairs of a built-in task that its hash covers. They tell apart different versions of it.
N_PAIRS = 64


def content_of_model(name: str, model: TLModel, tokens: Tensor) -> dict[str, str]:
    """The hashes of a model, with its tokenizer, and of the tokens over which means are taken.

    Args:
        name: what the suite or search calls the model.
        model: the model.
        tokens: the tokens [seq, pos] of its corpus.
    """
    return {
        f"model {name}": hash_of_model(model),
        f"corpus of {name}": hash_of_tensor(tokens),
    }


def content_of_task(source: str) -> dict[str, str]:
    """The hash of a task: of its file or, for a built-in task, of pairs that it draws.

    Args:
        source: the name of the task, or its file.

    Raises:
        DataError: if the file cannot be read.
    """
    task = get_task(source)
    if source in TASKS:
        rng = random.Random(0)
        pairs = [task.pair(rng) for _ in range(N_PAIRS)]
        data = json.dumps(pairs).encode()
    else:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    return {f"task {task.name}": hashlib.sha256(data).hexdigest()}


def check_unchanged(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise `SuiteError` if anything was replaced while the suite or search was running."""
    changes = other_contents(expected, found)
    if changes:
        raise SuiteError(
            f"the suite or search began with {'; '.join(changes)}, which must not change while it "
            "runs. Finished work is kept; continue with the former contents, or into another folder"
        )
