"""Figures: the loss of circuits by size, the size of circuits by task, the sparsity of a model by
layer.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.circuits import node_hooks, weight_matrices
from tl_sparse.errors import ConfigError, DataError
from tl_sparse.files import replacing
from tl_sparse.hooks import Means, TLModel, frozen, hooked
from tl_sparse.view.axes import (
    add_legend,
    figure_with_panels,
    percent,
    series_style,
    set_log_x,
    set_log_y,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ENDINGS = (".png", ".svg")
Size = Literal["edges", "nodes"]
Measure = Literal["loss", "accuracy"]
Point = tuple[float, float]
#: (name, layer) → the share of entries that are not zero.
Shares = dict[tuple[str, int], float]


def check_drawing(path: str | Path) -> None:
    """Check that a figure can be written to `path`.

    Raises:
        ConfigError: unless `path` ends in .png or .svg and matplotlib is installed.
    """
    ending = Path(path).suffix
    if ending not in ENDINGS:
        allowed = " or ".join(ENDINGS)
        raise ConfigError(f"{path}: nothing is drawn as {ending!r}; pictures end in {allowed}")
    if not find_spec("matplotlib"):
        raise ConfigError("drawing needs matplotlib: pip install 'tl-sparse[plots]'")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the ending of `path`.

    Raises:
        ConfigError: for another ending.
        CheckpointError: if the file cannot be written.
    """
    check_drawing(path)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=200)


# --- the faithfulness curve


def curve(figures: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """The faithfulness curve: held-out loss in nats, and accuracy, by the size of the circuit.

    The circuit itself is the large mark; the line beside it is of the nodes ranked highest.

    Args:
        figures: what `full_evaluation` gives and `tl-sparse evaluate` writes, by the names to show.

    Raises:
        DataError: if there is nothing to draw, or something is not such figures.
    """
    _check_not_empty(figures)
    figure, (loss_axes, accuracy_axes) = figure_with_panels(2, (8.2, 3.9))
    _draw_measure(loss_axes, figures, against, "loss", chance=math.log(2))
    _draw_measure(accuracy_axes, figures, against, "accuracy", chance=0.5)
    loss_axes.set_ylabel("held-out task loss (nats)")
    accuracy_axes.set_ylabel("accuracy")
    set_log_y(loss_axes, unit=1e-3)
    accuracy_axes.yaxis.set_major_formatter("{x:.0%}")
    add_legend(figure, loss_axes)
    return figure


def _draw_measure(
    axes: Axes,
    figures: Mapping[str, Mapping[str, Any]],
    against: Size,
    measure: Measure,
    chance: float,
) -> None:
    for number, (name, evaluated) in enumerate(figures.items()):
        with _reading(name, "evaluate"):
            _draw_curve(axes, name, evaluated, against, measure, series_style(number))
    axes.plot([], [], "x", color="gray", label="random circuits")
    axes.plot([], [], ":", color="gray", label="full model")
    axes.axhline(chance, color="gray", lw=0.8, label="chance")
    axes.set_xlabel(f"{against} of the circuit")
    set_log_x(axes, unit=1)


def _draw_curve(
    axes: Axes,
    name: str,
    evaluated: Mapping[str, Any],
    against: Size,
    measure: Measure,
    style: Mapping[str, Any],
) -> None:
    whole = evaluated["evaluation"]
    axes.axhline(whole["full"][measure], color=style["color"], ls=":", lw=1.2)
    x, y = _sizes_and_scores(evaluated["random"], against, measure)
    axes.plot(x, y, ls="", ms=5, color=style["color"], marker="x")
    x, y = _sizes_and_scores(evaluated["ladder"], against, measure)
    axes.plot(x, y, ms=3.5, lw=1.2, **style)
    x, y = _sizes_and_scores([whole], against, measure)
    axes.plot(x, y, ls="", ms=9, mec="black", label=name, **style)


# --- sizes by task


def tasks(results: Mapping[str, Any], against: Size = "edges", name: str = "results") -> Figure:
    """The size of each task's node-pruned circuits: a mark for each model, a line over the seeds.

    The dotted line, of edges, is the geometric mean over the tasks that all models solve.

    Args:
        results: what `run_suite` returns and `tl-sparse suite` writes.
        name: what an error calls the results.

    Raises:
        DataError: if `results` are not such results, or have no circuit.
    """
    with _reading(name, "suite"):
        means: Mapping[str, float] = {}
        if against == "edges":
            means = results["geometric_mean_edges"]["node_pruned"]
        sizes = _node_pruned_sizes(results["models"], against)
        order = _largest_first(sizes)
        _check_not_empty(order, name)
        figure, (axes,) = figure_with_panels(1, (5.5, 1.4 + 0.22 * len(order)))
        for number, (model, size_of) in enumerate(sizes.items()):
            style = series_style(number)
            rows = [order.index(task) for task in size_of]
            low = _each(size_of, "min")
            high = _each(size_of, "max")
            axes.hlines(rows, low, high, color=style["color"])
            medians = _each(size_of, "median")
            axes.plot(medians, rows, ls="", ms=5, clip_on=False, label=model, **style)
            axes.axvline(means.get(model, math.nan), color=style["color"], ls=":")
    axes.set(yticks=range(len(order)), yticklabels=order, ylim=(-0.5, len(order) - 0.5))
    explanation = "(range over seeds; dotted: geometric mean)"
    axes.set_xlabel(f"{against} of the node-pruned circuit\n{explanation}")
    set_log_x(axes, unit=1)
    add_legend(figure, axes)
    return figure


def _node_pruned_sizes(
    models: Mapping[str, Any], against: Size
) -> dict[str, dict[str, Mapping[str, float]]]:
    """Model → task → the median and range of the size; without tasks that have no circuit."""
    sizes: dict[str, dict[str, Mapping[str, float]]] = {}
    for model, entries in models.items():
        sizes[model] = {}
        for task, entry in entries.items():
            if entry["node_pruned"]:
                sizes[model][task] = entry["node_pruned"][against]
    return sizes


def _largest_first(sizes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The tasks, by the largest of the models' median sizes."""
    medians = defaultdict[str, list[float]](list)
    for size_of in sizes.values():
        for task, size in size_of.items():
            medians[task].append(size["median"])
    return sorted(medians, key=lambda task: -max(medians[task]))


def _each(size_of: Mapping[str, Mapping[str, float]], statistic: str) -> list[float]:
    return [size[statistic] for size in size_of.values()]


# --- the frontier


def frontier(sources: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """Held-out loss in nats by size, of many circuits.

    Of a full evaluation, the circuit and those of its faithfulness curve are drawn, with a line
    along the best of each task and model; of a suite, the medians over the seeds of each task's
    circuits.

    Args:
        sources: what `full_evaluation` or `run_suite` give and their commands write, by any names.

    Raises:
        DataError: as for `curve`.
    """
    _check_not_empty(sources)
    points = defaultdict[str, list[Point]](list)
    with_line = set()
    for name, source in sources.items():
        with _reading(name, "evaluate or suite"):
            if "models" in source:
                for label, of_label in _suite_points(source["models"], against):
                    points[label] += of_label
            else:
                label = f"{source['model']}, {source['task']}"
                with_line.add(label)
                sized_scores = [source["evaluation"], *source["ladder"]]
                sizes, losses = _sizes_and_scores(sized_scores, against, "loss")
                points[label] += zip(sizes, losses, strict=True)
    figure, (axes,) = figure_with_panels(1, (5.5, 4.2))
    by_size = {label: sorted(of_label) for label, of_label in points.items() if of_label}
    _check_not_empty(by_size, *sources)
    for number, (label, of_label) in enumerate(by_size.items()):
        style = series_style(number)
        x, y = zip(*of_label, strict=True)
        axes.plot(x, y, ls="", ms=5, alpha=0.8, label=label, **style)
        if label in with_line:
            best = list(itertools.accumulate(y, min))
            axes.plot(x, best, drawstyle="steps-post", lw=1.2, color=style["color"])
    axes.set(xlabel=f"{against} of the circuit", ylabel="held-out task loss (nats)")
    set_log_x(axes, unit=1)
    set_log_y(axes, unit=1e-3)
    add_legend(figure, axes)
    return figure


def _suite_points(models: Mapping[str, Any], against: Size) -> Iterator[tuple[str, list[Point]]]:
    """Label, median sizes and losses, for each model and way of pruning."""
    for model, entries in models.items():
        for pruning, words in (
            ("node_pruned", "nodes pruned"),
            ("edge_pruned", "edges pruned too"),
        ):
            points = []
            for entry in entries.values():
                pruned = entry[pruning]
                if pruned:
                    points.append((pruned[against]["median"], pruned["loss"]["median"]))
            yield f"{model}, {words}", points


# --- sparsity by layer


@torch.no_grad()
def sparsity(model: TLModel, corpus: Int[Tensor, "seq pos"]) -> Figure:
    """The shares of nonzero weights of each matrix and of nonzero activations at each node
    location, by layer.

    Args:
        corpus: the tokens over which activations are counted.

    Raises:
        DataError: if there are no tokens.
        HookNameError: if the model has no nodes.
    """
    activations = _activation_shares(model, corpus)
    weights = _weight_shares(model)
    n_layers = model.cfg.n_layers
    figure, (weight_axes, activation_axes) = figure_with_panels(2, (8.2, 4.2))
    _draw_shares(weight_axes, weights, n_layers)
    weight_axes.set_xlabel("nonzero weights")
    _draw_shares(activation_axes, activations, n_layers)
    activation_axes.set_xlabel("nonzero activations")
    add_legend(figure, activation_axes)
    return figure


def _weight_shares(model: TLModel) -> Shares:
    """The nonzero share of each matrix; embedding and unembedding stand at layer n_layers."""
    n_layers = model.cfg.n_layers
    nonzero = defaultdict[tuple[str, int], list[Tensor]](list)
    for layer in range(n_layers):
        for source, target, matrix in weight_matrices(model, layer):
            nonzero[f"{source} → {target}", layer].append(matrix.flatten() != 0)
    nonzero["embedding", n_layers].append(model.embed.W_E.flatten() != 0)
    nonzero["unembedding", n_layers].append(model.unembed.W_U.flatten() != 0)
    shares = {}
    for place, parts in nonzero.items():
        shares[place] = float(torch.cat(parts).float().mean())
    return shares


def _activation_shares(model: TLModel, corpus: Int[Tensor, "seq pos"]) -> Shares:
    """The nonzero share of the activations at each node location."""
    hooks = node_hooks(model)
    _check_not_empty(corpus)
    means = Means()

    def record(name: str, activation: Tensor, hook: object) -> None:
        means.record(name, activation != 0)

    recorders = {name: partial(record, name) for name in hooks.values()}
    with frozen(model), hooked(model, recorders):
        for rows in corpus.split(16):
            model(rows.long().to(model.embed.W_E.device), return_type=None)
    shares = means.result(torch.float32)
    by_location = {}
    for (layer, location), name in hooks.items():
        by_location[location, layer] = float(shares[name].mean())
    return by_location


def _draw_shares(axes: Axes, shares: Shares, n_layers: int) -> None:
    """A row for each name, with a mark for each layer."""
    names: list[str] = []
    layers: list[int] = []
    for name, layer in shares:
        if name not in names:
            names.append(name)
        if layer not in layers:
            layers.append(layer)
    for layer in layers:
        offset = 0.0
        if layer < n_layers:  # marks of different layers do not hide each other
            offset = 0.5 * ((layer + 0.5) / n_layers - 0.5)
        x = []
        y = []
        for row, name in enumerate(names):
            if (name, layer) in shares:
                x.append(shares[name, layer])
                y.append(row + offset)
        label = _layer_label(layer, n_layers)
        axes.plot(x, y, ls="", ms=5, label=label, **_layer_style(layer, n_layers))
    axes.plot([0.01, 1], [0, 0], alpha=0)  # keeps shares from 1% to 100% in sight
    axes.set(yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    set_log_x(axes, unit=1e-3, text=percent)


def _layer_label(layer: int, n_layers: int) -> str | None:
    """The legend has every layer of a small model, and the first and last of others."""
    is_block = layer < n_layers
    if layer in (0, n_layers - 1) or (n_layers <= 6 and is_block):
        return f"layer {layer}"
    return None


def _layer_style(layer: int, n_layers: int) -> dict[str, Any]:
    from matplotlib import colormaps

    style = series_style(layer)
    style["color"] = "black"
    if layer < n_layers:
        style["color"] = colormaps["viridis"](0.9 * layer / n_layers)
    return style


# --- reading what to draw


def _check_not_empty(values: Sized, *names: str) -> None:
    if len(values):
        return
    where = f" in {', '.join(names)}" if names else ""
    raise DataError(f"there is nothing to draw{where}")


@contextmanager
def _reading(name: str, command: str) -> Iterator[None]:
    """Raise `DataError` if an entry of what is drawn is missing or malformed."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{name} is not what `tl-sparse {command}` writes; missing or malformed: {error}"
        ) from error


def _sizes_and_scores(
    sized_scores: Sequence[Mapping[str, Any]], against: Size, measure: Measure
) -> tuple[list[float], list[float]]:
    key = {"edges": "n_edges", "nodes": "n_nodes"}[against]
    sizes = [sized[key] for sized in sized_scores]
    scores = [sized["circuit"][measure] for sized in sized_scores]
    return sizes, scores
