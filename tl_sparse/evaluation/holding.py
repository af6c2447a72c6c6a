"""The contexts in which a model runs under a circuit, or without it."""

from contextlib import AbstractContextManager

import torch

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.evaluation.running import RunContext, resampled
from tl_sparse.evaluation.scores import ABLATIONS, Ablation
from tl_sparse.hooks import NodeValues, TLModel
from tl_sparse.tasks import TaskData


@checked("ablation")
def holding_circuit(
    circuit: Circuit, model: TLModel, ablation: Ablation = "mean", inverted: bool = False
) -> RunContext:
    """The `RunContext` in which `model` runs under the circuit: all other nodes are held.

    Args:
        ablation: the values at which nodes are held; see `Ablation`.
        inverted: hold the circuit's nodes instead of all others, and cut no edges.

    Raises:
        ConfigError: for an unknown `ablation`.
        CircuitError: if `model` is not the circuit's model.
    """
    circuit.check_model(model)
    return holding_nodes(circuit, model, ablation, inverted)


@checked("ablation")
def holding_nodes(
    circuit: Circuit, model: TLModel, ablation: Ablation = "mean", inverted: bool = False
) -> RunContext:
    """The same as `holding_circuit`, for a model that is known to be the circuit's.

    The check reads all weights, which takes too long before each of the many runs of a search.
    """
    check(ablation in ABLATIONS, "ablation", ablation, f"one of {', '.join(ABLATIONS)}")
    nodes = circuit.kept if inverted else circuit.dropped
    cut = () if inverted else circuit.cut_edges(model)
    constants: NodeValues | None = None
    if ablation == "mean":
        constants = circuit.means
    elif ablation == "zero":
        constants = {name: torch.zeros_like(mean) for name, mean in circuit.means.items()}

    def hold(data: TaskData) -> AbstractContextManager[None]:
        values = constants
        if values is None:
            values = resampled(model, data, circuit.kept)
        return circuit.holding(model, nodes, values, cut)

    return hold
