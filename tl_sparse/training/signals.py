"""The signals that stop a training run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C and the default signal of `kill`. They stop all processes of a run after the same step.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """A context in which each of `SIGNALS` is only recorded in a list, so that a step can finish.

    A second signal of the same kind has its usual effect. Python handles signals only in the main
    thread, so in any other thread this context records nothing and changes nothing.
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
