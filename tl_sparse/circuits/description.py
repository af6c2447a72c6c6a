"""What a circuit prints as."""

from collections import Counter
from collections.abc import Mapping

from tl_sparse.circuits.nodes import LOCATIONS
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import counted
from tl_sparse.parsing import printable


def described(circuit: CircuitParts) -> str:
    """The task, the model and the size of a circuit, and the task losses that it records."""
    task = printable(circuit.task) or "no task"
    model_name = printable(circuit.model_name) or "a model"
    lines = [f"Circuit({task} in {model_name}: {counted(circuit.n_nodes, 'node')}"]
    n_nodes_at = Counter(node.location for node in circuit.nodes)
    if n_nodes_at:
        counts = [f"{n_nodes_at[name]} {name}" for name in LOCATIONS if n_nodes_at[name]]
        lines.append(", ".join(counts))
    if circuit.edge_set is not None:
        lines.append(f"pruned to {counted(len(circuit.edge_set), 'edge')}")
    losses = recorded_losses(circuit)
    if losses:
        texts = [f"{printable(name)} {loss:.3f}" for name, loss in losses.items()]
        lines.append(f"task loss: {', '.join(texts)}")
    if not circuit.means:
        lines.append("without means: it can be viewed, but not run")
    return "\n  ".join(lines) + ")"


def recorded_losses(circuit: CircuitParts) -> dict[str, float]:
    """The task losses that `prune` or `from_openai` has recorded in `measured`, by name."""
    scores = circuit.measured.get("heldout", circuit.measured.get("openai"))
    losses = {}
    if isinstance(scores, Mapping):
        for name, score in scores.items():
            loss = score.get("loss") if isinstance(score, Mapping) else None
            if isinstance(loss, float):
                losses[name] = loss
    return losses
