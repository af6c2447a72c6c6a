"""TransformerLens' flags that give each head its own read, in which there are no nodes."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from tl_sparse.arguments import checked
from tl_sparse.errors import UnsupportedError
from tl_sparse.hooks import TLModel, is_sparse_model

#: The flags, and the hook points of a block that run only with them.
_FLAGS = ("use_split_qkv_input", "use_attn_in")
_HOOK_POINTS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in")


@checked()
@contextmanager
def shared_reads(model: TLModel) -> Iterator[None]:
    """Within the context, all heads of a block share one read, whose entries are nodes.

    TransformerLens' flags `use_split_qkv_input` and `use_attn_in` give each head its own copy of
    the residual stream, so that a read is `[batch, pos, head, d_model]`. Since they change no
    value, they are off within the context.

    Raises:
        UnsupportedError: if a function is attached to a hook point that runs only with these flags.
    """
    flags = [flag for flag in _FLAGS if getattr(model.cfg, flag, False)]
    if not flags:
        yield
        return
    for name, hook_point in model.hook_dict.items():
        if name.endswith(_HOOK_POINTS) and hook_point.has_hooks():
            raise UnsupportedError(
                f"a function is attached to {name}, which gives each head its own read; nodes are "
                f"entries of one read for all heads. Remove the function, or "
                f"model.set_{flags[0]}(False)"
            )
    for flag in flags:
        getattr(model, f"set_{flag}")(False)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user has seen the warning of the flag
            for flag in flags:
                getattr(model, f"set_{flag}")(True)


def holding_reads(model: TLModel) -> AbstractContextManager[None]:
    """The context in which the reads of a model are recorded and held.

    In our own models, what is recorded or held in the read of each head is right too, so that users
    may edit the reads of heads under a circuit.
    """
    if is_sparse_model(model):
        return nullcontext()
    return shared_reads(model)
