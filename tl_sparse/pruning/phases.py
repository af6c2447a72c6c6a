"""The progress bars of a pruning: one for each phase, which ends by saying what it reached."""

from typing import Any

from tqdm.auto import tqdm

from tl_sparse.errors import counted

#: The phases are named in a column of this width.
_WIDTH = len("means over the corpus")


def phase(name: str, shown: bool, total: int | None = None, unit: str = "circuit") -> Any:
    """A progress bar for one phase, which is a context and has the methods of tqdm."""
    return tqdm(total=total, desc=name.ljust(_WIDTH), disable=not shown, unit=f" {unit}s")


def say_reached(bar: Any, n_nodes: int, loss: float, pairs: str) -> None:
    """Show the size and the task loss of the circuit that a phase has reached."""
    bar.set_postfix_str(f"{counted(n_nodes, 'node')}, task loss {loss:.3f} on {pairs} pairs")
