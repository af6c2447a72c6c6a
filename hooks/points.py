"""Attaching functions to the hook points of a TransformerLens model, and removing them again."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.arguments import Kind, checked
from tl_sparse.errors import HookNameError
from tl_sparse.hooks.overwriting import mark_overwriting
from tl_sparse.hooks.scopes import Scope, new_scope
from tl_sparse.hooks.whole_sequence import mark_positions_alike


def _has_hook_points(model: object) -> bool:
    # On TransformerLens 4, this is a property that takes time, so the class is asked first.
    return hasattr(type(model), "hook_dict") or hasattr(model, "hook_dict")


#: A TransformerLens model: a HookedRootModule such as HookedTransformer on version 3, or a
#: TransformerBridge on version 4. The two share no base class, so this type accepts anything.
TLModel = Annotated[
    Any, Kind("a TransformerLens model", _has_hook_points, "tl_sparse.load(…) opens one")
]
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


@checked()
@contextmanager
def hooked(
    model: TLModel,
    functions: Mapping[str, HookFn],
    *,
    positions_alike: bool = False,
    overwriting: Collection[str] = (),
) -> Iterator[None]:
    """Within the context, each function is attached to the hook point that it is listed under.

    With `positions_alike`, the caller promises that the functions do the same at every position and
    record nothing. They then do not keep `score` from computing the last positions alone; see
    `treats_positions_alike`.

    At the hook points `overwriting`, the caller promises that the function returns the same values
    whatever the activation is. A model of this package then does not compute what attention or an
    MLP adds to the residual stream, if nothing else acts there.

    The functions act on the calls of the model that the thread (or asyncio task) of this context
    makes, and on no others. A `torch.compile`d model runs uncompiled within the context, because
    compiled code would ignore the functions. `model.reset_hooks()` does not remove them.

    Raises:
        HookNameError: for a name that the model does not have, a hook point that never runs under
            the model's present settings, or a name in `overwriting` without a function; no function
            is then attached.
    """
    check_hook_names(model, functions)
    for name in overwriting:
        if name not in functions:
            raise HookNameError(f"overwriting: {name!r} has no function; it must be in `functions`")
    with new_scope() as scope:
        attached: list[_Attached] = []
        try:
            _attach(model, functions, scope, attached)
            overwritten = [model.hook_dict[name] for name in overwriting]
            for one in attached:
                if positions_alike:
                    mark_positions_alike(one.hook_point, one.handle)
                if one.hook_point in overwritten:
                    mark_overwriting(one.hook_point, one.handle, scope)
            yield
        finally:
            _detach(attached)


@dataclass(frozen=True)
class _Attached:
    """A function at a hook point, and TransformerLens' handle of it."""

    hook_point: Any
    handle: Any


#: Held while functions are attached or removed, since TransformerLens does neither safely if
#: several threads do so at once.
_attaching = threading.Lock()


def _attach(
    model: TLModel, functions: Mapping[str, HookFn], scope: Scope, attached: list[_Attached]
) -> None:
    """Attach the functions, and add each to `attached`, also if an exception ends this early."""
    hook_dict = model.hook_dict
    hook_points = [hook_dict[name] for name in functions]
    hooks = [(name, partial(_act_in, scope, function)) for name, function in functions.items()]
    with _attaching:
        n_before = [len(hook_point.fwd_hooks) for hook_point in hook_points]
        try:
            for hook_point, (name, function) in zip(hook_points, hooks, strict=True):
                model.check_hooks_to_add(hook_point, name, function)
            # The context of `model.hooks` ends at once, and leaves the functions attached. At its
            # end it would remove the hooks of others too, if contexts are not left in order.
            with model.hooks(fwd_hooks=hooks, reset_hooks_end=False):
                pass
        except (AssertionError, ValueError) as error:
            raise HookNameError(str(error)) from error
        finally:
            for hook_point, n_old in zip(hook_points, n_before, strict=True):
                for handle in hook_point.fwd_hooks[n_old:]:
                    # At a level, or not permanent, it would be removed with the user's hooks.
                    handle.context_level = None
                    handle.is_permanent = True
                    attached.append(_Attached(hook_point, handle))


def _act_in(scope: Scope, function: HookFn, activation: Tensor, hook: object) -> Tensor | None:
    if not scope.is_open_here():
        return None
    return function(activation, hook)


def _detach(attached: list[_Attached]) -> None:
    with _attaching:
        for one in attached:
            one.handle.hook.remove()
            remaining = [handle for handle in one.hook_point.fwd_hooks if handle is not one.handle]
            one.hook_point.fwd_hooks = remaining


@checked()
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


@dataclass
class _Freeze:
    """What `frozen` restores once the last of its contexts on a model has ended."""

    was_training: dict[Any, bool]
    learned: list[Any]
    n_open: int = 0


#: Model → what is to be restored, for each model that is frozen at present.
_freezes: WeakKeyDictionary[Any, _Freeze] = WeakKeyDictionary()
_freezing = threading.Lock()


@checked()
@contextmanager
def frozen(model: TLModel) -> Iterator[None]:
    """Within the context, `model` is in eval mode and no parameter gets a gradient.

    Afterwards, all training modes and `requires_grad` flags are restored. If several threads freeze
    the same model, this happens after the last of them.
    """
    with _freezing:
        freeze = _freezes.get(model)
        if freeze is None:
            was_training = {module: module.training for module in model.modules()}
            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            freeze = _freezes[model] = _Freeze(was_training, learned)
            model.eval().requires_grad_(False)
        freeze.n_open += 1
    try:
        yield
    finally:
        with _freezing:
            freeze.n_open -= 1
            if freeze.n_open == 0:
                del _freezes[model]
                for parameter in freeze.learned:
                    parameter.requires_grad_(True)
                for module, mode in freeze.was_training.items():
                    module.training = mode
