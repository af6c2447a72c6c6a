"""The contexts in which a model runs under a circuit: which nodes are held, and at what values."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.errors import ArgumentError
from tl_sparse.evaluation.running import RunContext, full_norm_scales, resampled
from tl_sparse.evaluation.scores import ABLATIONS, Ablation
from tl_sparse.hooks import (
    NodeMasks,
    NodeValues,
    TLModel,
    check_norms_can_be_held,
    holding_norms,
)
from tl_sparse.tasks import TaskData


@checked("ablation")
def holding_circuit(
    circuit: Circuit, model: TLModel, ablation: Ablation = "mean", inverted: bool = False
) -> RunContext:
    """The `RunContext` in which `model` runs under the circuit: all other nodes are held.

    If the circuit has `frozen_norms`, the scales of all norms are those of the full model on the
    same prompts.

    Args:
        ablation: the values at which nodes are held; see `Ablation`.
        inverted: hold the circuit's nodes instead of all others, and cut no edges.

    Raises:
        ConfigError: for an unknown `ablation`.
        CircuitError: if `model` is not the circuit's model.
        UnsupportedError: if the circuit has `frozen_norms`, and the model's cannot be held.
    """
    circuit.check_model(model)
    if circuit.frozen_norms:
        check_norms_can_be_held(model)
    return holding_nodes(circuit, model, ablation, inverted)


@checked("ablation")
def holding_nodes(
    circuit: Circuit,
    model: TLModel,
    ablation: Ablation = "mean",
    inverted: bool = False,
    left: NodeMasks | None = None,
) -> RunContext:
    """The same as `holding_circuit`, for a model that is known to be the circuit's.

    The check reads all weights, which takes too long before each of the many runs of a search.

    Args:
        left: masks of nodes outside the circuit that are left as they are, instead of held.

    Raises:
        ConfigError: for an unknown `ablation`.
        ArgumentError: if `left` is not a mask at each of the circuit's hook points.
    """
    check(ablation in ABLATIONS, "ablation", ablation, f"one of {', '.join(ABLATIONS)}")
    held = circuit.kept if inverted else circuit.dropped
    if left is not None:
        _check_left(left, circuit)
        held = {name: mask & ~left[name].to(mask.device) for name, mask in held.items()}
    cut = () if inverted else circuit.cut_edges(model)
    values_for = held_values(circuit, model, ablation)

    @contextmanager
    def hold(data: TaskData) -> Iterator[None]:
        values = values_for(data)
        with (
            freezing_norms(circuit.frozen_norms, model, data),
            circuit.holding(model, held, values, cut),
        ):
            yield

    return hold


def _check_left(left: NodeMasks, circuit: Circuit) -> None:
    for name, kept in circuit.kept.items():
        mask = left.get(name)
        is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool
        if mask is None or not is_mask or mask.shape != kept.shape:
            raise ArgumentError(
                f"left must have a boolean mask of the shape {list(kept.shape)} at {name}, as "
                "random_subsets makes them"
            )


def held_values(
    circuit: Circuit, model: TLModel, ablation: Ablation
) -> Callable[[TaskData], NodeValues]:
    """A function that returns the values at which nodes are held on given prompts."""
    if ablation == "resample":
        return lambda data: resampled(model, data, circuit.kept)
    values = circuit.means
    if ablation == "zero":
        values = {name: torch.zeros_like(mean) for name, mean in circuit.means.items()}
    return lambda data: values


@checked()
def freezing_norms(frozen: bool, model: TLModel, data: TaskData) -> AbstractContextManager[None]:
    """Within the context, if `frozen`, norms have the scales of the full model on these prompts."""
    if not frozen:
        return nullcontext()
    return holding_norms(model, full_norm_scales(model, data))
