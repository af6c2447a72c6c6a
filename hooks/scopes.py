"""The extent of a context that changes how models run: the calls of the thread that opened it.

Several threads may share a model, each under a circuit of its own. What a context attaches to the
model is seen by all of them, so it must act only where the context is open.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class Scope:
    """One context that is open in one thread, or in one asyncio task."""

    def is_open_here(self) -> bool:
        """Whether the code that calls this runs within the context, in the same thread or task."""
        return self in _open_scopes.get()


_open_scopes: ContextVar[frozenset[Scope]] = ContextVar("open_scopes", default=frozenset())


@contextmanager
def new_scope() -> Iterator[Scope]:
    """Open a scope. Scopes may be left in another order than they were entered."""
    scope = Scope()
    _open_scopes.set(_open_scopes.get() | {scope})
    try:
        with _uncompiled:
            yield scope
    finally:
        # A token of the context variable would not do: it demands that scopes are left in order,
        # and in the thread that entered them, which a generator that is closed late does not.
        _open_scopes.set(_open_scopes.get() - {scope})


class _Uncompiled:
    """A context in which compiled functions run as plain Python code.

    Compiled code contains the model as it was when it was compiled, so nothing that is attached
    later acts on it. The setting belongs to the whole process, and ends with the last context.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_open = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._n_open == 0:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._n_open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_open -= 1
            if self._n_open == 0:
                self._stance.__exit__(None, None, None)


_uncompiled = _Uncompiled()
