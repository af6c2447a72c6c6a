"""What the measurements of a circuit are compared with: no nodes, and random circuits."""

from dataclasses import replace

import torch

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.errors import CircuitError
from tl_sparse.hooks import TLModel


@checked()
def check_measurable(circuit: Circuit, model: TLModel) -> None:
    """Check that a model can run under the circuit, and that the circuit has nodes.

    Raises:
        CircuitError: if `model` is not the circuit's model, or the circuit has no means or no
            nodes.
    """
    circuit.check_model(model)
    circuit.check_means()
    if circuit.n_nodes == 0:
        raise CircuitError("this circuit has no nodes, so there is nothing to measure")


@checked()
def random_circuits_like(circuit: Circuit, n_circuits: int, seed: int = 0) -> list[Circuit]:
    """Circuits of random nodes, as many at each hook point as `circuit` has there.

    All nonzero weights between their nodes are edges, whether or not edges of `circuit` are cut.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(n_circuits):
        kept = {}
        for name, mask in circuit.kept.items():
            order = torch.randperm(mask.numel(), generator=generator)
            kept[name] = mask.flatten()[order].view_as(mask)
        drawn.append(replace(circuit, kept=kept, edge_set=None, measured={}, scores={}, labels={}))
    return drawn


@checked()
def without_nodes(circuit: Circuit) -> Circuit:
    """The circuit of no nodes, which holds every node of the model."""
    nothing_kept = {name: torch.zeros_like(mask) for name, mask in circuit.kept.items()}
    return replace(circuit, kept=nothing_kept, edge_set=None, measured={}, scores={}, labels={})
