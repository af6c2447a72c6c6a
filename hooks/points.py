"""Attaching functions to the hook points of a TransformerLens model, and taking them off again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.errors import HookNameError

#: A model of TransformerLens: a HookedRootModule such as HookedTransformer in its version 3, a
#: TransformerBridge in version 4. The two share no base class, so the type checker is told nothing.
TLModel = Any
#: What TransformerLens calls at a hook point: `(activation, hook) -> replacement or None`.
HookFn = Callable[[Tensor, Any], Tensor | None]
#: Hook name → a number for each node there, or a mask of the nodes. The shape is that of the
#: activation without batch and position.
NodeValues = Mapping[str, Float[Tensor, " *node"]]
NodeMasks = Mapping[str, Bool[Tensor, " *node"]]


def is_sparse_model(model: TLModel) -> bool:
    """Whether `model` runs the network of this package, and so has its `sparse_cfg`."""
    return hasattr(model, "sparse_cfg")


def check_hook_names(model: TLModel, names: Mapping[str, object] | list[str]) -> None:
    """Raise `HookNameError` naming the nearest hook names of `model` if it lacks one of `names`."""
    existing = model.hook_dict
    for name in names:
        if name not in existing:
            similar = get_close_matches(name, list(existing), n=3) or list(existing)[:3]
            raise HookNameError(
                f"{type(model).__name__} has no hook point {name!r}; near it: {', '.join(similar)}"
            )


@contextmanager
def hooked(model: TLModel, functions: Mapping[str, HookFn]) -> Iterator[None]:
    """Within the context, each function acts at the hook point of its name.

    TransformerLens' own `model.hooks()` does the work, in both of its versions; it removes the
    functions after an exception, too. Names are checked first, so that a wrong one leaves nothing
    attached.
    """
    check_hook_names(model, functions)
    with model.hooks(fwd_hooks=list(functions.items())):
        yield


@contextmanager
def recording(model: TLModel, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, the dictionary gets a copy of the latest activation at each of these hook
    points.
    """
    activations: dict[str, Tensor] = {}

    def record(name: str, activation: Tensor, hook: object) -> None:
        activations[name] = activation.clone()  # a model may overwrite its activations

    with hooked(model, {name: partial(record, name) for name in names}):
        yield activations


@contextmanager
def frozen(model: TLModel) -> Iterator[None]:
    """Within the context, `model` is in eval mode and no parameter gets a gradient; afterwards all
    modes and `requires_grad` flags are as they were.
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
