"""Whether a model may skip positions that do not matter for its answer.

The last block can be computed at the answer's position alone. This changes nothing for functions
that do the same at every position, such as mean ablation. A function of the user's may depend on
the other positions: it may record them, or change some of them.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from tl_sparse.arguments import checked
from tl_sparse.errors import UnsupportedError

#: The attribute of functions in `nn.Module`'s lists of hooks that do the same at every position.
_MARK = "treats_positions_alike"
#: The lists of hooks of a module; and those that torch calls for every module.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def mark_positions_alike(hook_point: Any, handle: Any) -> None:
    """Mark the function that TransformerLens' handle stands for; see `treats_positions_alike`."""
    setattr(hook_point._forward_hooks[handle.hook.id], _MARK, True)


def treats_positions_alike(model: Any) -> bool:
    """Whether all that acts on a run of this model of tl_sparse does the same at every position.

    It is false if there is any function that this package has not marked: at a hook point, as a
    hook of a torch module or of all modules, or in place of the `forward` of a module. It is false
    too if a hook point has been replaced, as SAELens does.

    Raises:
        UnsupportedError: if it is not a model of tl_sparse.
    """
    if not hasattr(model, "network"):
        raise UnsupportedError("only models of tl_sparse can leave positions out")
    return all_treat_positions_alike([model, *model.network.modules()])


@checked()
def all_treat_positions_alike(modules: Sequence[nn.Module]) -> bool:
    """Whether all that acts on these modules of tl_sparse does the same at every position."""
    if any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        return False
    return all(_is_alike(module) for module in modules)


def _is_alike(module: nn.Module) -> bool:
    for hooks in _HOOKS:
        for function in list(getattr(module, hooks).values()):  # other threads may add some
            if not hasattr(function, _MARK):
                return False
    for name, child in module._modules.items():
        is_hook_point = hasattr(child, "fwd_hooks")
        if name.startswith("hook_") and not is_hook_point:
            return False
    return "forward" not in vars(module)
