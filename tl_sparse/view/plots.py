"""Pictures: how good a circuit is at each size, how large circuits are by task, how sparse a model
is by layer.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.circuits import node_hooks, weight_matrices
from tl_sparse.errors import ConfigError, DataError
from tl_sparse.files import replacing
from tl_sparse.hooks import Means, TLModel, frozen, hooked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: Okabe and Ito's colours, which the colour-blind can tell apart; the marks differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX*"
ENDINGS = (".png", ".svg")
Size = Literal["edges", "nodes"]
T = TypeVar("T", bound=Sized)


def check_drawing(path: str | Path) -> None:
    """Raise `ConfigError` unless `path` ends in .png or .svg and matplotlib is installed."""
    if Path(path).suffix not in ENDINGS:
        raise ConfigError(
            f"{path}: nothing is drawn as {Path(path).suffix!r}; pictures end in {' or '.join(ENDINGS)}"
        )
    if not find_spec("matplotlib"):
        raise ConfigError("drawing needs matplotlib: pip install 'tl-sparse[plots]'")


def save(figure: Figure, path: str | Path) -> None:
    """Write a picture, PNG or SVG by the file's ending; `ConfigError` for others, `CheckpointError`
    if it cannot be.
    """
    check_drawing(path)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=200)


def curve(figures: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """The faithfulness curve: held-out loss in nats, and accuracy, by the size of the circuit,
    which is itself the large mark beside a line through the nodes ranked highest.

    Args:
        figures: what `full_evaluation` gives and `tl-sparse evaluate` writes, by the names to be
            shown.

    Raises:
        DataError: if there is nothing to draw, or something is not such figures.
    """
    figure, panels = _panels(2, (8.2, 3.9))
    for axes, what in zip(panels, ("loss", "accuracy"), strict=True):
        for i, (name, found) in enumerate(_some(figures).items()):
            with _reading(name, "evaluate"):
                whole, style = found["evaluation"], _style(i)
                axes.axhline(whole["full"][what], color=style["color"], ls=":", lw=1.2)
                axes.plot(
                    *_points(found["random"], against, what), ls="", ms=5, **style | {"marker": "x"}
                )
                axes.plot(*_points(found["ladder"], against, what), ms=3.5, lw=1.2, **style)
                axes.plot(
                    *_points([whole], against, what), ls="", ms=9, mec="black", label=name, **style
                )
        axes.plot([], [], "x", color="gray", label="random circuits")
        axes.plot([], [], ":", color="gray", label="full model")
        axes.axhline(math.log(2) if what == "loss" else 0.5, color="gray", lw=0.8, label="chance")
        axes.set_xlabel(f"{against} of the circuit")
        _logarithmic(axes, "x", 1)
    panels[0].set_ylabel("held-out task loss (nats)")
    panels[1].set_ylabel("accuracy")
    _logarithmic(panels[0], "y", 1e-3)
    panels[1].yaxis.set_major_formatter("{x:.0%}")
    _legend(figure, panels[0])
    return figure


def tasks(results: Mapping[str, Any], against: Size = "edges", name: str = "results") -> Figure:
    """The size of each task's node-pruned circuits: one mark a model, a line over the seeds;
    dotted, of edges, the geometric mean over the tasks that all models solve.

    `results` are what `run_suite` returns; `DataError`, which calls them by `name`, if not, or if
    there is no circuit.
    """
    with _reading(name, "suite"):
        means = results["geometric_mean_edges"]["node_pruned"] if against == "edges" else {}
        sizes = {
            model: {
                task: entry["node_pruned"][against]
                for task, entry in of.items()
                if entry["node_pruned"]
            }
            for model, of in results["models"].items()
        }
        shown = {task for of in sizes.values() for task in of}
        order = sorted(
            shown, key=lambda task: -max(of[task]["median"] for of in sizes.values() if task in of)
        )
        figure, (axes,) = _panels(1, (5.5, 1.4 + 0.22 * len(_some(order, name))))
        for i, (model, of) in enumerate(sizes.items()):
            style, rows = _style(i), [order.index(task) for task in of]
            middle, low, high = (
                [size[x] for size in of.values()] for x in ("median", "min", "max")
            )
            axes.hlines(rows, low, high, color=style["color"])
            axes.plot(middle, rows, ls="", ms=5, clip_on=False, label=model, **style)
            axes.axvline(means.get(model, math.nan), color=style["color"], ls=":")
    axes.set(yticks=range(len(order)), yticklabels=order, ylim=(-0.5, len(order) - 0.5))
    axes.set_xlabel(
        f"{against} of the node-pruned circuit\n(range over seeds; dotted: geometric mean)"
    )
    _logarithmic(axes, "x", 1)
    _legend(figure, axes)
    return figure


def frontier(sources: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """Held-out loss in nats by size: of all circuits in some figures, those of their curves
    included, with a line along the best of each task and model; of a suite, of each task's
    circuits, medians over the seeds.

    Args:
        sources: what `full_evaluation` or `run_suite` give and their commands write, each by some
            name.

    Raises:
        DataError: as for `curve`.
    """
    groups = defaultdict[str, list[tuple[float, float]]](list)
    lines = set()
    for name, found in _some(sources).items():
        with _reading(name, "evaluate or suite"):
            if "models" in found:
                kinds = (("node_pruned", "nodes pruned"), ("edge_pruned", "edges pruned too"))
                for (model, of), (kind, words) in itertools.product(found["models"].items(), kinds):
                    pruned = [entry[kind] for entry in of.values() if entry[kind]]
                    groups[f"{model}, {words}"] += [
                        (p[against]["median"], p["loss"]["median"]) for p in pruned
                    ]
            else:
                lines.add(group := f"{found['model']}, {found['task']}")
                sized_scores = [found["evaluation"], *found["ladder"]]
                groups[group] += zip(*_points(sized_scores, against, "loss"), strict=True)
    figure, (axes,) = _panels(1, (5.5, 4.2))
    shown = {group: sorted(points) for group, points in groups.items() if points}
    for i, (group, points) in enumerate(_some(shown, *sources).items()):
        style, best = _style(i), list(itertools.accumulate((y for _, y in points), min))
        axes.plot(*zip(*points, strict=True), ls="", ms=5, alpha=0.8, label=group, **style)
        if group in lines:
            axes.plot(
                [x for x, _ in points], best, drawstyle="steps-post", lw=1.2, color=style["color"]
            )
    axes.set(xlabel=f"{against} of the circuit", ylabel="held-out task loss (nats)")
    _logarithmic(axes, "x", 1)
    _logarithmic(axes, "y", 1e-3)
    _legend(figure, axes)
    return figure


@torch.no_grad()
def sparsity(model: TLModel, corpus: Int[Tensor, "seq pos"]) -> Figure:
    """The share of nonzero weights of each matrix, and of nonzero activations at each node location
    over the tokens of `corpus`, by layer. `DataError` if there are no tokens, `HookNameError` if
    the model has no nodes.
    """
    matrices, hooks, means = (
        defaultdict[tuple[str, int], list[Tensor]](list),
        node_hooks(model),
        Means(),
    )
    for layer in range(n_layers := model.cfg.n_layers):
        for source, target, matrix in weight_matrices(model, layer):
            matrices[f"{source} → {target}", layer].append(matrix.flatten() != 0)
    for name, matrix in (("embedding", model.embed.W_E), ("unembedding", model.unembed.W_U)):
        matrices[name, n_layers].append(matrix.flatten() != 0)

    def record(name: str, activation: Tensor, hook: object) -> None:
        means.record(name, activation != 0)

    with frozen(model), hooked(model, {name: partial(record, name) for name in hooks.values()}):
        for rows in _some(corpus).split(16):
            model(rows.long().to(model.embed.W_E.device), return_type=None)
    shares = means.result(torch.float32)
    weights = {place: float(torch.cat(found).float().mean()) for place, found in matrices.items()}
    activations = {
        (location, layer): float(shares[name].mean()) for (layer, location), name in hooks.items()
    }
    figure, panels = _panels(2, (8.2, 4.2))
    from matplotlib import colormaps

    for axes, found, what in zip(
        panels, (weights, activations), ("weights", "activations"), strict=True
    ):
        names = list(dict.fromkeys(name for name, _ in found))
        for layer in dict.fromkeys(layer for _, layer in found):
            inside = layer < n_layers
            offset = (
                0.5 * ((layer + 0.5) / n_layers - 0.5) * inside
            )  # the layers of a row do not hide each other
            label = (
                f"layer {layer}"
                if layer in (0, n_layers - 1) or (n_layers <= 6 and inside)
                else None
            )
            rows = [i for i, name in enumerate(names) if (name, layer) in found]
            style = _style(layer) | {
                "color": colormaps["viridis"](0.9 * layer / n_layers) if inside else "black"
            }
            x, y = [found[names[i], layer] for i in rows], [i + offset for i in rows]
            axes.plot(x, y, ls="", ms=5, label=label, **style)
        axes.plot([0.01, 1], [0, 0], alpha=0)  # what is always in sight
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel=f"nonzero {what}")
        axes.invert_yaxis()
        _logarithmic(axes, "x", 1e-3, lambda share, _: f"{100 * share:g}%")
    _legend(figure, panels[1])
    return figure


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKS[i % len(MARKS)]}


def _points(
    sized_scores: Sequence[Any], against: Size, what: str
) -> tuple[list[float], list[float]]:
    return [sized[f"n_{against}"] for sized in sized_scores], [
        sized["circuit"][what] for sized in sized_scores
    ]


def _some(found: T, *names: str) -> T:
    if not len(found):
        raise DataError(f"there is nothing to draw{' in ' * bool(names)}{', '.join(names)}")
    return found


@contextmanager
def _reading(name: str, command: str) -> Iterator[None]:
    """Raise `DataError` for what is not there, or is something else."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{name} is not what `tl-sparse {command}` writes; missing or malformed: {error}"
        ) from error


def _panels(n: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(1, n, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _short(value: float, _: int) -> str:
    return f"{value:g}" if value < 1000 else f"{value / 1000:g}k"


def _logarithmic(
    axes: Axes, which: str, unit: float, text: Callable[[float, int], str] = _short
) -> None:
    """A logarithmic axis; linear below `unit` if something is there: zero edges, a loss of nearly
    zero.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    axis, (low, high) = getattr(axes, f"{which}axis"), getattr(axes.dataLim, f"interval{which}")
    getattr(axes, f"set_{which}scale")("log")
    if low < unit:
        getattr(axes, f"set_{which}scale")("symlog", linthresh=unit)
        getattr(axes, f"set_{which}lim")(-0.15 * unit, 1.3 * max(high, unit))
    span = high / max(low, unit)
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if span < 4 else (1, 3) if span < 900 else (1,)
    axis.set_major_locator(
        FixedLocator([0, *(m * 10.0**e for e in range(round(math.log10(unit)), 9) for m in steps)])
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(text)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, texts = axes.get_legend_handles_labels()
    columns = min(5, int(9 * figure.get_figwidth() / (6 + max(map(len, texts)))))
    figure.legend(handles, texts, loc="outside upper center", ncols=max(1, columns), frameon=False)
