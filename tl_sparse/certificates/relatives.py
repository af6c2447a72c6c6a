"""What the family of all circuits of a task says of one of them."""

from dataclasses import dataclass
from pathlib import Path

from tl_sparse.circuits import Circuit
from tl_sparse.errors import CheckpointError, DataError, counted
from tl_sparse.evaluation import Family
from tl_sparse.files import read_json


@dataclass(frozen=True)
class Relatives:
    """The circuit among all circuits of its task.

    Attributes:
        n_rounds: the number of rounds, of which each forbids what the circuits before it shared.
        ending: how the search for the family ended.
        core: the nodes that every circuit needs.
        core_in_circuit: those of them that are in this circuit.
        overlap_within: the mean Jaccard index of two circuits that are found with the same nodes
            allowed.
        overlap_between: that of two circuits of different rounds.
        overlap_by_chance: that of random sets of nodes of their size.
    """

    n_rounds: int
    ending: str
    core: list[str]
    core_in_circuit: list[str]
    overlap_within: float | None
    overlap_between: float | None
    overlap_by_chance: float | None


def relatives_of(circuit: Circuit, path: Path, task: str) -> Relatives:
    """Read family.json.

    Raises:
        CheckpointError: if the file is missing or damaged.
        DataError: if it is the family of another task, or of a model with other nodes.
    """
    try:
        family = Family.from_dict(read_json(path))
    except DataError as error:
        raise CheckpointError(f"{path} is damaged, or not a family: {error}") from error
    if family.task != task:
        raise DataError(f"{path} is the family of the task {family.task!r}, not of {task!r}")
    if family.n_model_nodes and family.n_model_nodes != circuit.n_candidates:
        raise DataError(
            f"{path} is a family of circuits in {family.model!r}, a model of "
            f"{counted(family.n_model_nodes, 'node')}; the circuit's model has "
            f"{circuit.n_candidates:,}"
        )
    names = set(circuit.node_names)
    return Relatives(
        n_rounds=len(family.rounds),
        ending=family.ending,
        core=family.core,
        core_in_circuit=[name for name in family.core if name in names],
        overlap_within=family.overlap_within,
        overlap_between=family.overlap_between,
        overlap_by_chance=family.overlap_by_chance,
    )
