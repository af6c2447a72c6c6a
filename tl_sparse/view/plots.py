"""Figures of the loss of circuits by size, their size by task, and a model's sparsity by layer."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.circuits import node_hooks, weight_matrices
from tl_sparse.config import check
from tl_sparse.errors import ConfigError, DataError
from tl_sparse.evaluation import SizedScore
from tl_sparse.hooks import Means, TLModel, frozen, hooked
from tl_sparse.outputs import replacing
from tl_sparse.tasks import Score
from tl_sparse.view.axes import (
    add_legend,
    as_label,
    figure_with_panels,
    percent,
    series_style,
    set_log_x,
    set_log_y,
)
from tl_sparse.view.measurements import (
    Drawn,
    SuiteResults,
    WholeScore,
    read_drawn,
    read_results,
    summary,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ENDINGS = (".png", ".svg")
Size = Literal["edges", "nodes"]
Measure = Literal["loss", "accuracy"]
Point = tuple[float, float]
#: (name, layer) → the fraction of entries that are nonzero.
Shares = dict[tuple[str, int], float]


def check_drawing(path: str | Path) -> None:
    """Check that a figure can be written to `path`.

    Raises:
        ConfigError: unless `path` ends in .png or .svg and matplotlib is installed.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        allowed = " or ".join(ENDINGS)
        raise ConfigError(
            f"{path}: figures cannot be written as {ending!r}; the name must end in {allowed}"
        )
    if not find_spec("matplotlib"):
        raise ConfigError("drawing needs matplotlib: pip install 'tl-sparse[plots]'")


def save(figure: Figure, path: str | Path, overwrite: bool = False) -> None:
    """Write a figure as PNG or SVG, depending on the extension of `path`.

    Args:
        figure: the figure.
        path: the file.
        overwrite: whether a file with other contents is replaced.

    Raises:
        ConfigError: for any other extension, or if there is a file with other contents and
            `overwrite` is False.
        CheckpointError: if the file cannot be written.
        DataError: if the figure is too large.
    """
    check_drawing(path)
    from matplotlib import rc_context

    ending = Path(path).suffix[1:].lower()
    # The same figure gives the same file, without the date and with the same identifiers.
    metadata = {"Date": None} if ending == "svg" else {}
    with replacing(path, overwrite) as temporary, rc_context({"svg.hashsalt": "tl_sparse"}):
        try:
            figure.savefig(temporary, format=ending, dpi=200, metadata=metadata)
        except ValueError as error:
            raise DataError(f"{path}: the figure cannot be drawn: {error}") from error


# --- the faithfulness curve


def curve(figures: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """Draw the faithfulness curve: held-out loss in nats, and accuracy, by the size of the circuit.

    The large marker is the circuit itself. The line shows circuits of the highest-ranked nodes.

    Args:
        figures: name to show → the measurements that `full_evaluation` returns and
            `tl-sparse evaluate` writes.

    Raises:
        DataError: if there is nothing to draw, or a value does not have the form of such
            measurements.
    """
    _check_not_empty(figures)
    _check_size(against)
    measured = {name: read_drawn(values, name) for name, values in figures.items()}
    figure, (loss_axes, accuracy_axes) = figure_with_panels(2, (8.2, 3.9))
    _draw_measure(loss_axes, measured, against, "loss", chance=math.log(2))
    _draw_measure(accuracy_axes, measured, against, "accuracy", chance=0.5)
    loss_axes.set_ylabel("held-out task loss (nats)")
    accuracy_axes.set_ylabel("accuracy")
    set_log_y(loss_axes, unit=1e-3)
    accuracy_axes.yaxis.set_major_formatter("{x:.0%}")
    add_legend(figure, loss_axes)
    return figure


def _draw_measure(
    axes: Axes,
    measured: Mapping[str, Drawn],
    against: Size,
    measure: Measure,
    chance: float,
) -> None:
    for number, (name, drawn) in enumerate(measured.items()):
        _draw_curve(axes, as_label(name), drawn, against, measure, series_style(number))
    axes.plot([], [], "x", color="gray", label="random circuits")
    axes.plot([], [], ":", color="gray", label="full model")
    axes.axhline(chance, color="gray", lw=0.8, label="chance")
    axes.set_xlabel(f"{against} of the circuit")
    set_log_x(axes, unit=1)


def _draw_curve(
    axes: Axes,
    label: str,
    drawn: Drawn,
    against: Size,
    measure: Measure,
    style: Mapping[str, Any],
) -> None:
    whole = drawn.evaluation
    axes.axhline(_score(whole.full, measure), color=style["color"], ls=":", lw=1.2)
    x, y = _sizes_and_scores(drawn.random, against, measure)
    axes.plot(x, y, ls="", ms=5, color=style["color"], marker="x")
    x, y = _sizes_and_scores(drawn.ladder, against, measure)
    axes.plot(x, y, ms=3.5, lw=1.2, **style)
    x, y = _sizes_and_scores([whole], against, measure)
    axes.plot(x, y, ls="", ms=9, mec="black", label=label, **style)


# --- sizes by task


def tasks(results: Mapping[str, Any], against: Size = "edges", name: str = "results") -> Figure:
    """Draw the size of each task's node-pruned circuits.

    Each model has a marker at the median over the seeds, and a line from the smallest to the
    largest size. If the size is the number of edges, a dotted line shows each model's geometric
    mean over the tasks that all models solve.

    Args:
        results: the results that `run_suite` returns and `tl-sparse suite` writes.
        name: the name of the results in error messages.

    Raises:
        DataError: if `results` do not have the form of such results, or contain no circuit.
    """
    _check_size(against)
    read = read_results(results, name)
    means: Mapping[str, float] = {}
    if against == "edges":
        means = read.geometric_mean_edges.get("node_pruned", {})
    sizes = _node_pruned_sizes(read, against, name)
    order = _largest_first(sizes)
    _check_not_empty(order, name)
    figure, (axes,) = figure_with_panels(1, (5.5, 1.4 + 0.22 * len(order)))
    for number, (model, size_of) in enumerate(sizes.items()):
        style = series_style(number)
        rows = [order.index(task) for task in size_of]
        low = [size.low for size in size_of.values()]
        high = [size.high for size in size_of.values()]
        axes.hlines(rows, low, high, color=style["color"])
        medians = [size.median for size in size_of.values()]
        axes.plot(medians, rows, ls="", ms=5, clip_on=False, label=as_label(model), **style)
        axes.axvline(means.get(model, math.nan), color=style["color"], ls=":")
    labels = [as_label(task) for task in order]
    axes.set(yticks=range(len(order)), yticklabels=labels, ylim=(-0.5, len(order) - 0.5))
    explanation = "(range over seeds; dotted: geometric mean)"
    axes.set_xlabel(f"{against} of the node-pruned circuit\n{explanation}")
    set_log_x(axes, unit=1)
    add_legend(figure, axes)
    return figure


@dataclass(frozen=True)
class _Range:
    """The median and range of a size over the seeds."""

    low: float
    median: float
    high: float


def _node_pruned_sizes(
    results: SuiteResults, against: Size, name: str
) -> dict[str, dict[str, _Range]]:
    """Model → task → its size; tasks without a circuit are left out."""
    sizes: dict[str, dict[str, _Range]] = {}
    for model, entries in results.models.items():
        sizes[model] = {}
        for task, entry in entries.items():
            if entry.node_pruned:
                place = f"{name}: {task} in {model}"
                low, median, high = (
                    summary(entry.node_pruned, against, key, place)
                    for key in ("min", "median", "max")
                )
                sizes[model][task] = _Range(low, median, high)
    return sizes


def _largest_first(sizes: Mapping[str, Mapping[str, _Range]]) -> list[str]:
    """The tasks in falling order of the largest median size over the models."""
    medians = defaultdict[str, list[float]](list)
    for size_of in sizes.values():
        for task, size in size_of.items():
            medians[task].append(size.median)
    return sorted(medians, key=lambda task: -max(medians[task]))


# --- the frontier


def frontier(sources: Mapping[str, Mapping[str, Any]], against: Size = "edges") -> Figure:
    """Draw the held-out loss in nats of many circuits by their size.

    For a full evaluation, these are the circuit and the circuits of its faithfulness curve, and a
    line shows the least loss up to each size for each model and task. For a suite, these are the
    medians over the seeds of each task's circuits.

    Args:
        sources: any name → the values that `full_evaluation` or `run_suite` returns, and the
            commands `tl-sparse evaluate` and `tl-sparse suite` write.

    Raises:
        DataError: if there is nothing to draw, or a value does not have the form of such values.
    """
    _check_not_empty(sources)
    _check_size(against)
    points = defaultdict[str, list[Point]](list)
    with_line = set()
    for name, source in sources.items():
        if "models" in source:
            for label, of_label in _suite_points(read_results(source, name), against, name):
                points[label] += of_label
        else:
            drawn = read_drawn(source, name, "evaluate or suite")
            label = f"{drawn.model}, {drawn.task}"
            with_line.add(label)
            sizes, losses = _sizes_and_scores([drawn.evaluation, *drawn.ladder], against, "loss")
            points[label] += zip(sizes, losses, strict=True)
    figure, (axes,) = figure_with_panels(1, (5.5, 4.2))
    by_size = {label: sorted(of_label) for label, of_label in points.items() if of_label}
    _check_not_empty(by_size, *sources)
    for number, (label, of_label) in enumerate(by_size.items()):
        style = series_style(number)
        x, y = zip(*of_label, strict=True)
        axes.plot(x, y, ls="", ms=5, alpha=0.8, label=as_label(label), **style)
        if label in with_line:
            best = list(itertools.accumulate(y, min))
            axes.plot(x, best, drawstyle="steps-post", lw=1.2, color=style["color"])
    axes.set(xlabel=f"{against} of the circuit", ylabel="held-out task loss (nats)")
    set_log_x(axes, unit=1)
    set_log_y(axes, unit=1e-3)
    add_legend(figure, axes)
    return figure


def _suite_points(
    results: SuiteResults, against: Size, name: str
) -> Iterator[tuple[str, list[Point]]]:
    """For each model and kind of pruning, a label and the (median size, median loss) points."""
    for model, entries in results.models.items():
        by_kind = {
            "nodes pruned": [entry.node_pruned for entry in entries.values()],
            "edges pruned too": [entry.edge_pruned for entry in entries.values()],
        }
        for words, circuits in by_kind.items():
            points = []
            for summaries in filter(None, circuits):
                size = summary(summaries, against, "median", name)
                loss = summary(summaries, "loss", "median", name)
                points.append((size, loss))
            yield f"{model}, {words}", points


# --- sparsity by layer


@torch.no_grad()
def sparsity(model: TLModel, corpus: Int[Tensor, "seq pos"]) -> Figure:
    """Draw the fractions of nonzero weights and of nonzero activations, by layer.

    There is one row for each weight matrix, and one for each node location.

    Args:
        corpus: the tokens over which activations are counted.

    Raises:
        DataError: if `corpus` has no tokens.
        HookNameError: if the hook points of the model do not carry nodes.
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
    """The nonzero fraction of each matrix; embedding and unembedding count as layer n_layers."""
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
    """The nonzero fraction of the activations at each node location."""
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
    """Draw a row for each name, with a marker for each layer."""
    names: list[str] = []
    layers: list[int] = []
    for name, layer in shares:
        if name not in names:
            names.append(name)
        if layer not in layers:
            layers.append(layer)
    for layer in layers:
        offset = 0.0
        if layer < n_layers:  # keeps the markers of different layers from hiding each other
            offset = 0.5 * ((layer + 0.5) / n_layers - 0.5)
        x = []
        y = []
        for row, name in enumerate(names):
            if (name, layer) in shares:
                x.append(shares[name, layer])
                y.append(row + offset)
        label = _layer_label(layer, n_layers)
        axes.plot(x, y, ls="", ms=5, label=label, **_layer_style(layer, n_layers))
    axes.plot([0.01, 1], [0, 0], alpha=0)  # makes the axis include 1% to 100%
    axes.set(yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    set_log_x(axes, unit=1e-3, text=percent)


def _layer_label(layer: int, n_layers: int) -> str | None:
    """The legend lists every layer of a small model, and the first and last of a larger one."""
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


def _check_size(against: str) -> None:
    check(against in get_args(Size), "against", against, "'edges' or 'nodes'")


def _sizes_and_scores(
    sized_scores: Sequence[SizedScore | WholeScore], against: Size, measure: Measure
) -> tuple[list[float], list[float]]:
    """The sizes and scores of circuits; those whose score is not a finite number are left out."""
    sizes: list[float] = []
    scores: list[float] = []
    for sized in sized_scores:
        score = _score(sized.circuit, measure)
        if math.isfinite(score):
            sizes.append(sized.n_edges if against == "edges" else sized.n_nodes)
            scores.append(score)
    return sizes, scores


def _score(score: Score, measure: Measure) -> float:
    return score.loss if measure == "loss" else score.accuracy
