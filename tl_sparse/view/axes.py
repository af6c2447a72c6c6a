"""The style of all figures: panels, colours and markers, logarithmic axes, titles and legends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tl_sparse.parsing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


#: The palette of Okabe and Ito, whose colours colour-blind readers can tell apart. With seven
#: colours and eight markers, a combination repeats only after 56 series.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX*"
LOSS_LABEL = "task loss on held-out pairs\n(nats, between the two answers)"
#: Names of models and tasks are shortened to `LABEL_CHARS`, and wrapped at `LABEL_WIDTH`.
LABEL_CHARS = 100
LABEL_WIDTH = 44
#: The grey of what belongs to no series: lines of reference, and what explains the signs.
GREY = "#555555"
#: The characters of a note that fit into an inch of the figure.
_NOTE_CHARS_PER_INCH = 13


def figure_with_panels(n: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with `n` panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(1, n, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def series_style(number: int) -> dict[str, Any]:
    """The colour and marker of the series with this number."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKS[number % len(MARKS)]}


def as_label(text: str, width: int = LABEL_WIDTH) -> str:
    """A name as the text of a title, legend or tick, in which matplotlib must see no formula.

    Half a surrogate pair, which has no encoding, is shown as its escape code.

    Args:
        text: the name.
        width: the number of characters at which it is wrapped.
    """
    text = printable(text)
    if len(text) > LABEL_CHARS:
        text = text[:LABEL_CHARS] + "…"
    return textwrap.fill(text, width).replace("$", r"\$")


def thousands(value: float, _: float) -> str:
    """A size as a tick label, such as 300 or 3k."""
    if value < 1000:
        return f"{value:g}"
    return f"{value / 1000:g}k"


def percent(share: float, _: float) -> str:
    return f"{100 * share:g}%"


def set_log_x(axes: Axes, unit: float, text: Callable[[float, float], str] = thousands) -> None:
    """Make the x axis logarithmic; if a value, such as 0 edges, is below `unit`, linear there."""
    low, high = axes.dataLim.intervalx
    axes.set_xscale("log")
    if low < unit:
        axes.set_xscale("symlog", linthresh=unit, linscale=0.4)
        axes.set_xlim(-0.4 * unit, 1.3 * max(high, unit))
    _set_log_ticks(axes.xaxis, low, high, unit, text)


def set_log_y(axes: Axes, unit: float) -> None:
    """Make the y axis logarithmic; if a value, such as a loss, is below `unit`, linear there."""
    low, high = axes.dataLim.intervaly
    axes.set_yscale("log")
    if low < unit:
        axes.set_yscale("symlog", linthresh=unit, linscale=0.4)
        axes.set_ylim(-0.4 * unit, 1.3 * max(high, unit))
    _set_log_ticks(axes.yaxis, low, high, unit, thousands)


def _set_log_ticks(
    axis: Axis, low: float, high: float, unit: float, text: Callable[[float, float], str]
) -> None:
    """Set ticks at 0 and from `unit` upwards; the smaller the data's range, the more per decade."""
    from matplotlib.ticker import FixedLocator, NullLocator

    span = high / max(low, unit)
    steps: Iterable[float] = (1,)
    if span < 4:
        steps = (1, 1.2, 1.5, 2, 3, 5, 7)
    elif span < 900:
        steps = (1, 3)
    ticks = [0.0]
    for exponent in range(round(math.log10(unit)), 9):
        ticks += [step * 10.0**exponent for step in steps]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(text)


def reaches_zero(axes: Axes) -> bool:
    """Whether the x axis, which counts nodes or edges, shows a circuit without any."""
    return bool(axes.dataLim.intervalx[0] < 1)


def draw_reference(axes: Axes, value: float, text: str, above: bool = True) -> None:
    """Draw a grey line across the panel, with its name in the right margin.

    Args:
        axes: the panel.
        value: the height of the line.
        text: the name.
        above: whether the name stands above the line, not below it, so that the names of two lines
            that are close do not meet.
    """
    axes.axhline(value, color=GREY, lw=1, ls=(0, (6, 2)))
    axes.annotate(
        text,
        (1, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        va="bottom" if above else "top",
        color=GREY,
        fontsize=9,
    )


def draw_loss_references(axes: Axes, targets: Iterable[float | None]) -> None:
    """Draw the loss of chance and the target losses that are known, with names and values."""
    draw_reference(axes, math.log(2), f"chance\n{math.log(2):.3f}")
    known = {target for target in targets if target is not None and math.isfinite(target)}
    for target in sorted(known):
        draw_reference(axes, target, f"target\n{target:g}", above=False)


def add_legend(figure: Figure, axes: Axes, title: str) -> None:
    """Add a title and a legend above the panels, in as many columns as fit its longest line."""
    handles, labels = axes.get_legend_handles_labels()
    lines = "\n".join(labels).splitlines()
    longest = max(map(len, lines))
    columns = int(12 * figure.get_figwidth() / (6 + longest))
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=max(1, min(4, columns)),
        frameon=False,
        title=title,
        title_fontproperties={"weight": "bold", "size": 11},
    )


def add_notes(figure: Figure, notes: Iterable[str]) -> None:
    """Add sentences below the panels that say what the figure does not show by itself."""
    text = " ".join(notes)
    if not text:
        return
    width = int(_NOTE_CHARS_PER_INCH * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(text, width), fontsize=9, color=GREY)
