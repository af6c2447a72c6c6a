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

import torch
from torch import Tensor

from tl_sparse.circuits import fingerprint
from tl_sparse.errors import DataError, SuiteError
from tl_sparse.hooks import TLModel, is_sparse_model
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
    weights = hashlib.sha256()
    weights.update(fingerprint(model).architecture.encode())
    named = model.network.weights() if is_sparse_model(model) else model.named_parameters()
    for parameter, values in named:
        weights.update(parameter.encode())
        weights.update(_bytes(values))
    if model.tokenizer is not None:
        vocabulary = json.dumps(model.tokenizer.get_vocab(), sort_keys=True)
        weights.update(vocabulary.encode())
    corpus = hashlib.sha256(_bytes(tokens))
    return {f"model {name}": weights.hexdigest(), f"corpus of {name}": corpus.hexdigest()}


def _bytes(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


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


def other_contents(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """For an error message: what has other contents now, of all that is in both."""
    changes = []
    for name in before:
        if name in now and before[name] != now[name]:
            changes.append(f"other contents of the {name}")
    return changes


def check_unchanged(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise `SuiteError` if anything was replaced while the suite or search was running."""
    changes = other_contents(expected, found)
    if changes:
        raise SuiteError(
            f"the suite or search began with {'; '.join(changes)}, which must not change while it "
            "runs. Finished work is kept; continue with the former contents, or into another folder"
        )
