"""The scores of edges as auto-circuit has them (UFO-101/auto-circuit): its prune scores.

They are a tensor for each module that reads the stream, one entry for each component before it:
`[head, source]` at `blocks.i.hook_q_input` and its like, `[source]` at `blocks.i.hook_mlp_in` and
at the last `hook_resid_post`. Sources are in the order of `ComponentLayout`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits.component_layout import ComponentLayout
from tl_sparse.circuits.eap_graph import EapGraph
from tl_sparse.errors import CircuitError, UnsupportedError
from tl_sparse.files import read_state_dict, write_torch
from tl_sparse.hooks import TLModel


@dataclass(frozen=True)
class _Module:
    """A module of auto-circuit that reads the stream.

    Attributes:
        name: its name, as in TransformerLens 1 to 3.
        n_sources: how many sources it reads: the first ones.
        targets: its inputs, one for each head of a layer; a number where there is only one.
    """

    name: str
    n_sources: int
    targets: slice | int


def _modules(layout: ComponentLayout) -> Iterator[_Module]:
    for layer in range(layout.n_layers):
        for letter in "qkv":
            name = f"blocks.{layer}.hook_{letter}_input"
            inputs = layout.head_inputs(layer, letter)
            yield _Module(name, layout.n_before_heads(layer), inputs)
        mlp_input = layout.mlp_input(layer)
        yield _Module(f"blocks.{layer}.hook_mlp_in", layout.n_before_mlp(layer), mlp_input)
    last = f"blocks.{layout.n_layers - 1}.hook_resid_post"
    yield _Module(last, layout.n_sources, layout.logits)


@checked()
def to_prune_scores(
    graph: EapGraph, path: str | Path | None = None, overwrite: bool = False
) -> dict[str, Float[Tensor, "*head source"]]:
    """The scores of a graph's edges as auto-circuit's prune scores.

    Args:
        path: a file to write them to with `torch.save`; by default none.
        overwrite: whether a file with other contents is replaced.

    Raises:
        ConfigError: if there is a file with other contents, and `overwrite` is False.
        CheckpointError: if the file cannot be written.
    """
    scores = {}
    for module in _modules(graph.layout):
        scores[module.name] = (
            graph.scores[: module.n_sources, module.targets].movedim(0, -1).clone()
        )
    if path is not None:
        write_torch(Path(path), scores, overwrite)
    return scores


@checked()
def from_prune_scores(
    source: str | Path | Mapping[str, Float[Tensor, "*pos_head source"]], model: TLModel
) -> EapGraph:
    """The graph with all edges of a model, with the scores that auto-circuit gave them.

    Scores of an edge at single positions are added up, as effects to first order add up.

    Args:
        source: the prune scores, or a `torch.save` file of them, of a model with `factorized=True`
            and `separate_qkv=True`; no code in the file is run.
        model: the model to which they belong.

    Raises:
        CheckpointError: if the file is missing, damaged, or has anything else than named tensors.
        CircuitError: if there are no scores for a module, or for one that does not exist, of
            another shape, or not finite.
        UnsupportedError: if the queries, keys and values of a head have scores together, or the
            model has no MLPs.
    """
    if isinstance(source, Mapping):
        return _graph(source, model)
    path = Path(source)
    values = read_state_dict(path)
    try:
        return _graph(values, model)
    except CircuitError as error:
        raise CircuitError(f"{path}: {error}") from error


def _graph(values: Mapping[str, Tensor], model: TLModel) -> EapGraph:
    graph = EapGraph.full(model)
    modules = {module.name: module for module in _modules(graph.layout)}
    for name in values:
        if name.endswith("hook_attn_in"):
            raise UnsupportedError(
                f"{name} has one score for the query, key and value inputs of a head, which are "
                "three edges; make the patchable model with separate_qkv=True"
            )
        if name not in modules:
            raise CircuitError(f"the model has no module {name[:60]!r} that reads the stream")
    scores = torch.zeros_like(graph.scores)
    for name, module in modules.items():
        if name not in values:
            raise CircuitError(f"there are no scores at {name}")
        scores[: module.n_sources, module.targets] = _of_module(module, values[name])
    return replace(graph, scores=scores)


def _of_module(module: _Module, values: Tensor) -> Float[Tensor, "source *head"]:
    """The scores of one module, summed over positions where it has them."""
    shape = [module.n_sources]
    if isinstance(module.targets, slice):
        shape = [module.targets.stop - module.targets.start, module.n_sources]
    if not values.is_floating_point() or list(values.shape[-len(shape) :]) != shape:
        raise CircuitError(
            f"the scores at {module.name} must be a float tensor of {shape}, perhaps after an axis "
            f"of positions, not {values.dtype} of {list(values.shape)}"
        )
    if values.ndim > len(shape) + 1:
        raise CircuitError(f"the scores at {module.name} have {values.ndim} axes")
    values = values.detach().float().cpu()
    if values.ndim == len(shape) + 1:
        values = values.sum(0)
    return values.movedim(-1, 0)
