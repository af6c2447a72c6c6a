"""Attaching functions to the hook points of a TransformerLens model, and removing them again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.errors import HookNameError

#: A TransformerLens model: a HookedRootModule such as HookedTransformer on version 3, or a
#: TransformerBridge on version 4. The two share no base class, so this type accepts anything.
TLModel = Any
#: A function at a hook point, as TransformerLens calls it: `(activation, hook)`. It returns the
#: replacement of the activation, or None.
HookFn = Callable[[Tensor, Any], Tensor | None]
#: Hook name → one number (or, in `NodeMasks`, one boolean) for each node at that hook point, with
#: the shape of the activation without batch and position.
NodeValues = Mapping[str, Float[Tensor, " *node"]]
NodeMasks = Mapping[str, Bool[Tensor, " *node"]]


def is_sparse_model(model: TLModel) -> bool:
    """Whether `model` runs the network of this package, and therefore has a `sparse_cfg`."""
    return hasattr(model, "sparse_cfg")


def check_hook_names(model: TLModel, names: Mapping[str, object] | list[str]) -> None:
    """Check that `model` has a hook point for each of `names`.

    Raises:
        HookNameError: for the first name that the model does not have; the message lists the
            nearest hook names.
    """
    existing = model.hook_dict
    for name in names:
        if name not in existing:
            similar = get_close_matches(name, list(existing), n=3) or list(existing)[:3]
            raise HookNameError(
                f"{type(model).__name__} has no hook point {name!r}; near it: {', '.join(similar)}"
            )


@contextmanager
def hooked(model: TLModel, functions: Mapping[str, HookFn]) -> Iterator[None]:
    """Within the context, each function is attached to the hook point that it is listed under.

    This uses `model.hooks()`, which both versions of TransformerLens have and which also removes
    the functions after an exception. Names are checked first, so that a wrong name leaves no
    function attached.
    """
    check_hook_names(model, functions)
    with model.hooks(fwd_hooks=list(functions.items())):
        yield


@contextmanager
def recording(model: TLModel, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, record a copy of the latest activation at each of these hook points.

    The context yields the dictionary of hook name → activation.
    """
    activations: dict[str, Tensor] = {}

    def record(name: str, activation: Tensor, hook: object) -> None:
        activations[name] = activation.clone()  # a model may overwrite its activations

    with hooked(model, {name: partial(record, name) for name in names}):
        yield activations


@contextmanager
def frozen(model: TLModel) -> Iterator[None]:
    """Within the context, `model` is in eval mode and no parameter gets a gradient.

    Afterwards, all training modes and `requires_grad` flags are restored.
    """
    was_training = {module: module.training for module in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for module, mode in was_training.items():
            module.training = mode
