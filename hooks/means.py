"""Mean activations over a token stream."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.errors import DataError
from tl_sparse.hooks.points import TLModel, hooked
from tl_sparse.precision import at_least_float32


class Means:
    """Running means over batch and position of activations `[batch, pos, *node]`."""

    def __init__(self) -> None:
        self._sums: dict[str, Float[Tensor, " *node"]] = {}
        self._counts: dict[str, int] = {}

    def record(
        self, name: str, activation: Float[Tensor, "batch pos *node"], hook: object = None
    ) -> None:
        """Add an activation to the mean recorded under `name`.

        With `name` bound, this method can be attached to a hook point.
        """
        # The sum is float64, because a float32 sum over a corpus loses the digits of a small mean.
        total = activation.detach().sum((0, 1), dtype=torch.float64)
        n_tokens = activation.shape[0] * activation.shape[1]
        self._sums[name] = self._sums.get(name, 0) + total
        self._counts[name] = self._counts.get(name, 0) + n_tokens

    def result(self, dtype: torch.dtype) -> dict[str, Float[Tensor, " *node"]]:
        """Hook name → mean activation."""
        means = {}
        for name, total in self._sums.items():
            means[name] = (total / self._counts[name]).to(dtype)
        return means


@contextmanager
def recording_means(model: TLModel, names: Sequence[str]) -> Iterator[Means]:
    """Within the context, add the activations of every run at the hook points `names` to the means.

    Raises:
        HookNameError: for a hook name that the model does not have.
    """
    means = Means()
    # Means are recorded under the requested name, not under `hook.name`, because the hook points of
    # a TransformerBridge have aliases.
    with hooked(model, {name: partial(means.record, name) for name in names}):
        yield means


@torch.no_grad()
def mean_activations(
    model: TLModel, names: Sequence[str], batches: Iterable[Int[Tensor, "batch pos"]]
) -> dict[str, Float[Tensor, " *node"]]:
    """The mean activation at each hook point over all tokens of `batches`.

    The means are in the model's dtype, or in float32 if that is half precision.

    Raises:
        HookNameError: for a hook name that the model does not have.
        DataError: if there is no batch.
    """
    parameter = next(model.parameters())
    n_batches = 0
    with recording_means(model, names) as means:
        for tokens in batches:
            model(tokens.to(parameter.device), return_type=None)
            n_batches += 1
    if n_batches == 0:
        raise DataError("means need at least one batch of tokens")
    return means.result(at_least_float32(parameter.dtype))
