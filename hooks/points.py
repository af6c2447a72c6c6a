"""Attaching functions to the hook points of a TransformerLens model, and taking them off again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.errors import HookNameError

#: A model of TransformerLens: HookedTransformer or another HookedRootModule of its line 3,
#: TransformerBridge of line 4. The classes of the two lines share no base, so a type checker cannot
#: be told more.
TLModel = Any
#: What TransformerLens calls at a hook point: `(activation, hook) -> replacement or None`.
HookFn = Callable[[Tensor, Any], Tensor | None]
#: Hook name → a number, or whether something holds, for each node there: as an activation without
#: batch and position.
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
            near = get_close_matches(name, list(existing), n=3) or list(existing)[:3]
            raise HookNameError(
                f"{type(model).__name__} has no hook point {name!r}; near it: {', '.join(near)}"
            )


@contextmanager
def hooked(model: TLModel, functions: Mapping[str, HookFn]) -> Iterator[None]:
    """Within the context, each function acts at the hook point of its name, on either
    TransformerLens line.

    TransformerLens' own `model.hooks()` does the work; it takes the functions off again after an
    exception too. Names are checked first, so that a wrong one leaves nothing attached.
    """
    check_hook_names(model, functions)
    with model.hooks(fwd_hooks=list(functions.items())):
        yield


@contextmanager
def recording(model: TLModel, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, a copy of the last activation at each of these hook points is put into
    the dictionary.
    """
    found: dict[str, Tensor] = {}

    def record(name: str, activation: Tensor, hook: object) -> None:
        found[name] = activation.clone()  # models work in place

    with hooked(model, {name: partial(record, name) for name in names}):
        yield found


@contextmanager
def frozen(model: TLModel) -> Iterator[None]:
    """Within the context, eval mode and no gradients to parameters; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
