"""The signals that stop a run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: What stops a run, in all of its processes after the same step: Ctrl-C, and a polite `kill`.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """Within the context, each of `SIGNALS` is only noted in the list, so that a step can end.

    A second one of the same kind does what it would have done outside. Python handles signals in
    the main thread alone; in another thread nothing is noted, and nothing changes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, handlers[signal.Signals(number)])

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
