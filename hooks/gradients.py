"""Gradients through a model, whatever mode the caller is in."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks.points import TLModel


@checked()
@contextmanager
def differentiating(model: TLModel) -> Iterator[None]:
    """Within the context, gradients flow through the activations of `model`.

    This also holds after `torch.set_grad_enabled(False)`, with which many notebooks begin, and
    within `torch.no_grad` and `torch.inference_mode`.

    Raises:
        UnsupportedError: if a weight of the model was made in `torch.inference_mode`, since no
            gradient can flow through a product with it.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UnsupportedError(
                f"{name} was made in torch.inference_mode, so gradients cannot flow through this "
                "model; load the model outside of it"
            )
    with torch.inference_mode(False), torch.enable_grad():
        yield


@checked()
def without_inference(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values, of which those made in `torch.inference_mode` are copied to be ordinary tensors.

    To be called outside of that mode, for example within `differentiating`.
    """
    ordinary = {}
    for name, value in values.items():
        ordinary[name] = value.clone() if value.is_inference() else value
    return ordinary
