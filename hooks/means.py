"""Mean activations over a token stream."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.errors import DataError
from tl_sparse.hooks.points import TLModel, hooked
from tl_sparse.hooks.tokens import check_not_padded, mask_of, tokens_for
from tl_sparse.precision import at_least_float32


class Means:
    """Running means over batch and position of activations `[batch, pos, *node]`.

    Attributes:
        mask: which positions of the next runs count; None means all of them. Padding must not
            count.
    """

    def __init__(self) -> None:
        self.mask: Bool[Tensor, "batch pos"] | None = None
        self._sums: dict[str, Float[Tensor, " *node"]] = {}
        self._counts: dict[str, int] = {}

    def record(
        self, name: str, activation: Float[Tensor, "batch pos *node"], hook: object = None
    ) -> None:
        """Add an activation to the mean recorded under `name`.

        With `name` bound, this method can be attached to a hook point.

        Raises:
            DataError: if the activation does not have the batch and positions of the mask.
        """
        activation = activation.detach().flatten(0, 1)
        if self.mask is not None:
            if len(activation) != self.mask.numel():
                raise DataError(
                    f"the activation at {name} has {len(activation)} positions in all rows "
                    f"together, not those of the mask, {list(self.mask.shape)}"
                )
            activation = activation[self.mask.flatten().to(activation.device)]
        # The sum is float64, because a float32 sum over a corpus loses the digits of a small mean.
        dtype = torch.float64 if activation.device.type != "mps" else torch.float32
        total = activation.sum(0, dtype=dtype)
        self._sums[name] = self._sums.get(name, 0) + total
        self._counts[name] = self._counts.get(name, 0) + len(activation)

    def result(self, dtype: torch.dtype) -> dict[str, Float[Tensor, " *node"]]:
        """Hook name → mean activation.

        Raises:
            DataError: if nothing has been recorded under a name.
        """
        means = {}
        for name, total in self._sums.items():
            if self._counts[name] == 0:
                raise DataError(f"there is no mean at {name}: the masks leave out every position")
            means[name] = (total / self._counts[name]).to(dtype)
        return means


@checked()
@contextmanager
def recording_means(model: TLModel, names: Sequence[str]) -> Iterator[Means]:
    """Within the context, add the activations of every run at the hook points `names` to the means.

    All positions count, padding too, unless `mask` of the yielded `Means` is set before a run.

    Raises:
        HookNameError: for a hook name that the model does not have.
    """
    means = Means()
    # Means are recorded under the requested name, not under `hook.name`, because the hook points of
    # a TransformerBridge have aliases.
    with hooked(model, {name: partial(means.record, name) for name in names}):
        yield means


@checked("batches", "masks")
@torch.inference_mode(False)
@torch.no_grad()
def mean_activations(
    model: TLModel,
    names: Sequence[str],
    batches: Iterable[Int[Tensor, "batch pos"]],
    masks: Iterable[Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"]] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Float[Tensor, " *node"]]:
    """The mean activation at each hook point over all tokens of `batches`.

    It does not depend on how the tokens are divided into batches.

    Args:
        batches: tokens.
        masks: the attention mask of each batch, 1 (or True) for each real token and 0 for padding,
            which does not count and is hidden from the model. None means that all tokens are real.
        dtype: the dtype of the means; None means that of the model,
            or float32 if that is half precision.

    Raises:
        HookNameError: for a hook name that the model does not have.
        DataError: if there is no batch or no real token, if tokens or a mask are malformed, or if
            the tokens look padded and no masks are given.
    """
    parameter = next(model.parameters())
    n_batches = 0
    with recording_means(model, names) as means:
        for tokens, mask in _with_masks(batches, masks):
            tokens = tokens_for(model, tokens).to(parameter.device)
            arguments = {}
            if mask is None:
                check_not_padded(tokens, model)
                means.mask = None
            else:
                means.mask = mask_of(mask, tokens)
                arguments["attention_mask"] = means.mask.long()
            model(tokens, return_type=None, **arguments)
            n_batches += 1
    if n_batches == 0:
        raise DataError("means need at least one batch of tokens")
    return means.result(dtype or at_least_float32(parameter.dtype))


def _with_masks(batches: Any, masks: Any) -> Iterator[tuple[Any, Any | None]]:
    """Each batch with its mask, or with None.

    Raises:
        DataError: if one of them is not iterable, or there are not as many masks as batches.
    """
    for given in (batches, () if masks is None else masks):
        if not isinstance(given, Iterable):
            raise DataError(
                f"means need batches of tokens, and a mask for each, not a {type(given).__name__}"
            )
    if masks is None:
        for tokens in batches:
            yield tokens, None
        return
    for tokens, mask in zip_longest(batches, masks):
        if tokens is None or mask is None:
            raise DataError("means need one mask for each batch of tokens")
        yield tokens, mask
