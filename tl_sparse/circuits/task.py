"""The task of a circuit."""

from tl_sparse.arguments import checked
from tl_sparse.circuits.parts import CircuitParts
from tl_sparse.errors import CircuitError
from tl_sparse.parsing import printable
from tl_sparse.tasks import TASKS, Task, as_task


@checked("task")
def circuit_task(circuit: CircuitParts, task: Task | str | None = None) -> Task:
    """The given task or, by default, the circuit's own.

    The circuit's own is the task of its `pairs` or, if it has none, the built-in one of its name.

    Raises:
        CircuitError: if no task is given, and the circuit's own is not known.
        TaskError, DataError: if there is no task of the given name; see `get_task`.
    """
    if circuit.pairs is not None and task in (None, circuit.pairs.name):
        return Task.from_pairs(circuit.pairs)
    if task is not None:
        return as_task(task)
    if circuit.task in TASKS:
        return TASKS[circuit.task]
    name = f"the task {printable(circuit.task)!r} of this circuit" if circuit.task else "its task"
    raise CircuitError(
        f"the circuit has no pairs, and {name} is not built in; give it as the argument task, or "
        "as --task with a file of pairs, *.jsonl"
    )
