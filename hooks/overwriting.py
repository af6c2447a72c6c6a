"""Whether an activation need not be computed, because a function replaces all of it.

Under a small circuit, most blocks write only what they are held at. What attention or an MLP would
compute there has no effect.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tl_sparse.arguments import checked
from tl_sparse.hooks.scopes import Scope
from tl_sparse.hooks.whole_sequence import all_treat_positions_alike

#: The attribute of functions that replace an activation whatever it is: the scope in which they do.
_MARK = "overwrites_in"


def mark_overwriting(hook_point: Any, handle: Any, scope: Scope) -> None:
    """Mark the function that TransformerLens' handle stands for; see `is_overwritten`."""
    setattr(hook_point._forward_hooks[handle.hook.id], _MARK, scope)


@checked()
def is_overwritten(hook_point: nn.Module, made_by: Sequence[nn.Module]) -> bool:
    """Whether the first function at the hook point replaces the activation, whatever it is.

    It is false if anything else may act on the modules that compute the activation, or record what
    happens in them.

    Args:
        made_by: the modules of tl_sparse that compute the activation.
    """
    functions = list(hook_point._forward_hooks.values())
    if not functions:
        return False
    scope = getattr(functions[0], _MARK, None)
    if scope is None or not scope.is_open_here():
        return False
    modules: list[nn.Module] = []
    for part in made_by:
        modules += part.modules()
    return all_treat_positions_alike(modules)
