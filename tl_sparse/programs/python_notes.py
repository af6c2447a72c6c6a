"""What the Python source of a circuit says about the prompts of its task."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tl_sparse.circuits import Circuit, circuit_task
from tl_sparse.errors import TLSparseError
from tl_sparse.hooks import TLModel
from tl_sparse.programs.channels import Channels
from tl_sparse.programs.compiled import CompiledCircuit
from tl_sparse.programs.stream import Read
from tl_sparse.tasks import TaskData, make_task_data, telling_tokens

#: The pairs of prompts that are looked at.
N_PAIRS = 64


@dataclass(frozen=True)
class PromptNotes:
    """What is known of a circuit on prompts of its task; empty without prompts.

    Attributes:
        telling_tokens: the tokens that stand in one prompt of a pair and not in the other, the most
            frequent ones first.
        zeros: node → the share of the positions at which AbsTopK, or the nonlinearity before it,
            makes it 0. Only nodes that compete in AbsTopK are there.
    """

    telling_tokens: list[int] = field(default_factory=list)
    zeros: dict[str, float] = field(default_factory=dict)


def prompt_notes(circuit: Circuit, model: TLModel, compiled: CompiledCircuit) -> PromptNotes:
    """Notes on prompts of the circuit's task, if that is known and fits the model."""
    if model.tokenizer is None:
        return PromptNotes()
    try:
        task = circuit_task(circuit)
        n_pairs = N_PAIRS if task.split is None else min(N_PAIRS, len(task.split.heldout))
        data = make_task_data(task, model.tokenizer, n_pairs, seed=0)
        data.check_context(compiled.n_ctx)
    except TLSparseError:  # of a task that is not known here, or has fewer prompts
        return PromptNotes()
    return PromptNotes(telling_tokens(data), _zeros(data, compiled))


def _zeros(data: TaskData, compiled: CompiledCircuit) -> dict[str, float]:
    is_prompt = torch.arange(data.tokens.shape[1]) <= data.last[:, None]
    zeros: dict[str, float] = {}

    def measuring(part: Channels | Read) -> Callable[[Any, Any, Tensor], None]:
        def measure(_module: Any, _inputs: Any, output: Tensor) -> None:
            shares = (output[is_prompt] == 0).double().mean(0)
            zeros.update(zip(part.nodes, shares.tolist(), strict=True))

        return measure

    with ExitStack() as hooks:
        for part in compiled.modules():
            if isinstance(part, Channels | Read) and part.k is not None:
                handle = part.register_forward_hook(measuring(part))
                hooks.callback(handle.remove)
        compiled(data.tokens)
    return zeros
