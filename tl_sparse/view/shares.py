"""The figure of a model's sparsity by layer."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.circuits import node_hooks, weight_matrices
from tl_sparse.hooks import Means, TLModel, frozen, hooked
from tl_sparse.view.axes import (
    add_legend,
    add_notes,
    as_label,
    figure_with_panels,
    percent,
    series_style,
    set_log_x,
)
from tl_sparse.view.series import check_not_empty

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: (name, layer) → the fraction of entries that are nonzero.
Shares = dict[tuple[str, int], float]


@torch.no_grad()
def sparsity(model: TLModel, corpus: Int[Tensor, "seq pos"]) -> Figure:
    """Draw the fractions of nonzero weights and of nonzero activations, by layer.

    There is one row for each weight matrix, and one for each node location. The title names the
    model and says over how many tokens activations are counted.

    Args:
        model: the model.
        corpus: the tokens over which activations are counted.

    Raises:
        DataError: if `corpus` has no tokens.
        HookNameError: if the hook points of the model do not carry nodes.
    """
    activations = _activation_shares(model, corpus)
    weights = _weight_shares(model)
    n_layers = model.cfg.n_layers
    figure, (weight_axes, activation_axes) = figure_with_panels(2, (8, 4.6))
    _draw_shares(weight_axes, weights, n_layers)
    weight_axes.set_xlabel("weights that are not zero\n(share of each matrix)")
    _draw_shares(activation_axes, activations, n_layers)
    activation_axes.set_xlabel(
        f"activations that are not zero\n(share over {corpus.numel():,} tokens)"
    )
    name = getattr(model.cfg, "model_name", None) or "a model"
    add_legend(figure, activation_axes, f"Sparsity of {as_label(name)}")
    add_notes(
        figure,
        ["Each row is a matrix or a location of nodes.", "Black marks belong to no single layer."],
    )
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
    check_not_empty(corpus)
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
