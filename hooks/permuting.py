"""A model whose weights are permuted: a control in which there is nothing to find."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks.groups import layer_matrices
from tl_sparse.hooks.points import TLModel


@contextmanager
@checked()
def permuted_weights(model: TLModel, seed: int = 0) -> Iterator[None]:
    """A context in which the entries of each weight matrix of the layers are permuted.

    The matrices are those of attention and MLPs: W_Q, W_K, W_V, W_O, W_in, W_out and the gates.
    Each keeps its values, and so the number of its nonzeros and its norm, but at random places. In
    a model that stores them apart, the rows that read positional channels are permuted among
    themselves. Embeddings, the unembedding, the bigram table, biases, norms and attention sinks
    stay as they are.

    This is the control of Adebayo et al. 2018 (arXiv 1810.03292): what a method finds in a model
    without what it learned is due to the method. The fingerprint of the model differs within the
    context, so circuits that are found there belong to the permuted model.

    The weights themselves change, for all threads that use the model. They are restored exactly,
    also after an exception. For a given seed the permutation does not depend on the device.

    Args:
        model: any TransformerLens model.
        seed: the seed of the permutations.

    Raises:
        UnsupportedError: if the model has no weight matrix that is known to belong to a layer.
    """
    matrices = _layer_matrices(model)
    if not matrices:
        raise UnsupportedError(
            f"{type(model).__name__} has no weight matrices of attention or MLPs that are known "
            "here, so none can be permuted"
        )
    generator = torch.Generator().manual_seed(seed)
    originals = [getattr(module, name).detach().clone() for module, name in matrices]
    try:
        for (module, name), original in zip(matrices, originals, strict=True):
            _assign(module, name, _permuted(original, generator))
        yield
    finally:
        for (module, name), original in zip(matrices, originals, strict=True):
            _assign(module, name, original)


def _layer_matrices(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """The module and the name of each weight matrix of the layers, every parameter once.

    They are in the order of their full names, which does not depend on how the model holds them.
    """
    found = {}
    for full_name in layer_matrices(model):
        path, _, name = full_name.rpartition(".")
        found[full_name] = (model.get_submodule(path), name)
    for path, module in model.named_modules():
        for name in _compact_names(module):
            found[f"{path}.{name}"] = (module, name)
    return [found[full_name] for full_name in sorted(found)]


def _compact_names(module: torch.nn.Module) -> Collection[str]:
    """The weights that a module holds compact instead of as parameters.

    Only the layers of models of this package do so.
    """
    names: Collection[str] = vars(module).get("compact", ())
    return names


def _permuted(weight: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(weight.numel(), generator=generator, device=generator.device)
    return weight.flatten()[order.to(weight.device)].view_as(weight)


@torch.no_grad()
def _assign(module: Any, name: str, weight: Tensor) -> None:
    if name in _compact_names(module):
        setattr(module, name, weight)
    else:
        # In place, because optimizers and tied modules refer to the parameter.
        getattr(module, name).copy_(weight)
