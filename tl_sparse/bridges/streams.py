"""The residual stream of a model at all sites, and models that continue from a given stream.

Both work by hook points, on any TransformerLens model of either version whose blocks are an
attention and then an MLP.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.bridges.sites import site_names
from tl_sparse.errors import UnsupportedError
from tl_sparse.faces import transformer_lens_line
from tl_sparse.hooks import HookFn, TLModel, hooked, is_sparse_model

#: The stream at every site, [batch, pos, d_model] each.
StreamOfSites = list[Float[Tensor, "batch pos d_model"]]


@dataclass(frozen=True, eq=False)
class Streams:
    """A run of a model.

    Attributes:
        logits: the logits.
        written: the stream at every site, as the blocks before it have written it.
        read: the stream as the rest of the model reads it. It differs from `written` only in models
            with AbsTopK on the stream itself.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    written: StreamOfSites
    read: StreamOfSites


def check_has_sites(model: TLModel) -> None:
    """Check that a model has a residual stream between attention and MLP.

    Raises:
        UnsupportedError: if it does not, because both read the same stream (as in GPT-NeoX).
    """
    missing = [name for name in site_names(model.cfg.n_layers) if name not in model.hook_dict]
    if missing:
        raise UnsupportedError(
            f"the model has no {missing[0]}: bridges need blocks in which the MLP reads the stream "
            "after the attention, and in this one both read the same stream"
        )


def run_with_streams(model: TLModel, tokens: Int[Tensor, "batch pos"]) -> Streams:
    """Run a model and keep the stream at every site, with its graph where gradients are on."""
    n_layers = model.cfg.n_layers
    names = site_names(n_layers)
    filters = _stream_filters(model)
    if filters:
        names += [f"blocks.{layer}.hook_resid_pre" for layer in range(1, n_layers)]
        for layer in range(n_layers):
            names += [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
        names += [name for name in ("hook_embed", "hook_pos_embed") if name in model.hook_dict]
    activations: dict[str, Tensor] = {}

    def keep(name: str, activation: Tensor, hook: Any) -> None:
        activations[name] = activation

    with hooked(model, {name: partial(keep, name) for name in names}):
        logits = model(tokens)
    read = [activations[name] for name in site_names(n_layers)]
    if not filters:
        return Streams(logits, read, read)
    for layer in range(1, n_layers):
        read[2 * layer] = activations[f"blocks.{layer}.hook_resid_pre"]
    return Streams(logits, _written(model, activations), read)


def _stream_filters(model: TLModel) -> list[str]:
    """The locations on the stream itself at which a model has AbsTopK."""
    if not is_sparse_model(model):
        return []
    return [location for location in model.sparse_cfg.abs_topk if location.startswith("resid")]


def _written(model: TLModel, activations: Mapping[str, Tensor]) -> StreamOfSites:
    """The stream at every site before the AbsTopK on the stream."""
    written = [activations["hook_embed"]]
    if "hook_pos_embed" in activations:
        written[0] = written[0] + activations["hook_pos_embed"]
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}"
        added = {"pre": "hook_attn_out", "mid": "hook_mlp_out"}
        for before, out in added.items():
            stream = activations[f"{block}.hook_resid_{before}"] + activations[f"{block}.{out}"]
            written.append(stream.relu() if model.sparse_cfg.resid_relu else stream)
    return written


def continued(
    model: TLModel,
    tokens: Int[Tensor, "batch pos"],
    site: int,
    stream: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of a model that goes on from `stream` at a site, without AbsTopK on the stream.

    Blocks before the site are not computed. The block in whose middle it is, and in models from
    outside this package the last block if the site is behind it, are computed whole.

    Args:
        model: any TransformerLens model.
        tokens: the tokens, for which a bigram table needs them.
        site: the number of the site.
        stream: what replaces the residual stream there. Gradients flow to it.
    """
    n_layers = model.cfg.n_layers
    layer, is_mid = divmod(site, 2)
    # TransformerLens 4's own models cannot start behind their last block.
    is_behind = layer == n_layers and not is_sparse_model(model)
    if is_mid or is_behind:
        with changing_stream(model, site, lambda _: stream):
            # What enters the block does not matter, since the stream is replaced later.
            return _from_layer(model, tokens, layer - is_behind, torch.zeros_like(stream))
    functions: dict[str, HookFn] = {}
    if layer < n_layers and _stream_filters(model):
        functions[f"blocks.{layer}.hook_resid_pre"] = lambda _, hook: stream
    with hooked(model, functions):
        return _from_layer(model, tokens, layer, stream)


def _from_layer(model: TLModel, tokens: Tensor, layer: int, stream: Tensor) -> Tensor:
    logits: Tensor
    if is_sparse_model(model):
        logits = model(stream, start_at_layer=layer, tokens=tokens)
    else:
        logits = model(stream, start_at_layer=layer)
    return logits


@contextmanager
def changing_stream(
    model: TLModel, site: int, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within the context, the residual stream at a site is what `change` makes of it.

    In TransformerLens 4's own models, the hook point `hook_resid_mid` is on the way to the MLP
    only, and the stream that the MLP adds to passes it by. The difference is then added after the
    block.

    Args:
        model: any TransformerLens model.
        site: the number of the site.
        change: the function of the stream `[batch, pos, d_model]`.
    """
    name = site_names(model.cfg.n_layers)[site]
    is_mid = site % 2 == 1
    if transformer_lens_line() == 3 or is_sparse_model(model) or not is_mid:
        with hooked(model, {name: lambda activation, hook: change(activation)}):
            yield
        return
    differences: list[Tensor] = []

    def replace(activation: Tensor, hook: Any) -> Tensor:
        changed = change(activation)
        differences[:] = [changed - activation]
        return changed

    def correct(activation: Tensor, hook: Any) -> Tensor:
        return activation + differences.pop()

    after = name.replace("resid_mid", "resid_post")
    with hooked(model, {name: replace, after: correct}):
        yield


def rms(stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
    """The root mean square of a stream at each position."""
    return stream.square().mean(-1, keepdim=True).sqrt()
