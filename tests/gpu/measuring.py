"""Times and memory of two functions that take turns, within a limit of time and of memory."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from tl_sparse.kernels.gpu import TRITON

#: The most seconds that the two functions of one row take, once both have been warmed up.
SECONDS_PER_ROW = 8.0


@dataclass(frozen=True)
class Row:
    """One row of a table; milliseconds, and bytes (0 where they are not counted)."""

    what: str
    ours_ms: float
    other_ms: float
    ours_bytes: int
    other_bytes: int

    def __str__(self) -> str:
        memory = "–"
        if self.other_bytes:
            ratio = self.ours_bytes / self.other_bytes
            both = f"{self.ours_bytes / 2**30:.2f} / {self.other_bytes / 2**30:.2f}"
            memory = f"{both} = {ratio:.2f}"
        return (
            f"| {self.what} | {self.ours_ms:.3f} | {self.other_ms:.3f} "
            f"| {self.ours_ms / self.other_ms:.2f} | {memory} |"
        )


@dataclass
class Measurements:
    """The rows that were measured on a device until a point in time.

    Attributes:
        device: the device.
        turns: how often two functions take turns.
        end: when no more rows are begun, in the seconds of `time.monotonic`.
        lines: the rows in Markdown, with headings.
    """

    device: torch.device
    turns: int
    end: float
    lines: list[str] = field(default_factory=list)

    def heading(self, title: str, ours: str, other: str) -> None:
        """Begin a table that compares two things."""
        self.lines += ["", f"## {title}", ""]
        self.lines += [f"| what | {ours}, ms | {other}, ms | ratio | memory, GiB |"]
        self.lines += ["| --- | --- | --- | --- | --- |"]

    def row(self, what: str, make: Callable[[], tuple[Callable[[], object], ...]]) -> None:
        """Measure one row, if there is time.

        Args:
            what: what is measured.
            make: returns the function and the one that it is compared with. What it makes is gone
                before the next row.
        """
        if time.monotonic() > self.end:
            self._leave_out(what, "no time was left")
            return
        try:
            measured = str(self._compared(what, *make()))
        except torch.OutOfMemoryError:
            self._leave_out(what, "it needs more memory than the GPU has")
        else:
            self.lines.append(measured)
            print(measured, flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _leave_out(self, what: str, reason: str) -> None:
        self.lines.append(f"| {what} | not measured: {reason} | – | – | – |")

    def _compared(self, what: str, ours: Callable[[], object], other: Callable[[], object]) -> Row:
        for run in (ours, other):  # the first call warms up
            run()
        ours_ms = []
        other_ms = []
        start = time.monotonic()
        while len(ours_ms) < self.turns and time.monotonic() - start < SECONDS_PER_ROW:
            ours_ms.append(milliseconds(ours, self.device))
            other_ms.append(milliseconds(other, self.device))
        return Row(
            what,
            ours_ms=statistics.median(ours_ms),
            other_ms=statistics.median(other_ms),
            ours_bytes=added_bytes(ours, self.device),
            other_bytes=added_bytes(other, self.device),
        )


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last)


def added_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call takes beyond what is in use before it."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _without_triton() -> Iterator[None]:
    why_not = TRITON.why_not
    TRITON.why_not = "switched off to compare with it"
    try:
        yield
    finally:
        TRITON.why_not = why_not


def in_plain_torch(run: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """The same function, in which AbsTopK and the weight top-k are those of plain torch."""

    def run_without() -> object:
        with _without_triton():
            return run(*arguments)

    return run_without


def both_ways(
    run: Callable[..., object], *arguments: object
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A function with our kernels, and the same in plain torch."""
    return partial(run, *arguments), in_plain_torch(run, *arguments)
