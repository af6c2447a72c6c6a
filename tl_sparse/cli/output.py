"""What the commands print: no character, and no closed pipe, makes a command fail."""

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tl_sparse.parsing import printable

#: The exit status of a command whose reader has gone, such as `head`; shells know it as SIGPIPE.
CLOSED_PIPE = 141


def print_any_character() -> None:
    """Print a character that the terminal's encoding does not have as its escape code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_error(message: object) -> None:
    """Print a message in one line, whatever characters of files and arguments it quotes."""
    line = " ".join(part.strip() for part in str(message).splitlines())
    print(f"tl-sparse: error: {printable(line)}", file=sys.stderr)


@contextmanager
def without_bars() -> Iterator[None]:
    """Within the context, fetching and reading a model shows no progress bar."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # and those of huggingface_hub
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Within the context, a warning is a line without the place in the code that it is for."""
    before = warnings.formatwarning
    warnings.formatwarning = _as_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _as_line(message: Warning | str, *_place: object, **_source: object) -> str:
    line = " ".join(part.strip() for part in str(message).splitlines())
    return f"tl-sparse: warning: {printable(line)}\n"


def flush_output() -> None:
    """Write what is still in the buffers.

    Raises:
        BrokenPipeError: if the reader of a pipe has gone.
        OSError: if the output cannot be written, for example because the disk is full. Nothing more
            is then written there.
    """
    failed = None
    for stream in _streams():
        try:
            stream.flush()
        except OSError as error:
            _discard(stream)
            failed = error
    if failed is not None:
        raise failed


def discard_output() -> None:
    """Write nothing more; otherwise Python would say at its end that it cannot."""
    for stream in _streams():
        _discard(stream)


def _discard(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _streams() -> list[TextIO]:
    """Standard output and standard error, either of which may be closed from the beginning."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
