"""The sites at which bridges join the residual streams of a dense and a sparse model.

A model of L layers has 2L + 1 of them (Gao et al. 2025, section 2.3): the stream entering block 0,
and the stream after the attention and after the MLP of each block.
"""

import re
from collections.abc import Sequence

from tl_sparse.errors import HookNameError

_SITE = re.compile(r"blocks\.(\d{1,9})\.hook_resid_(pre|mid|post)")


def site_names(n_layers: int) -> list[str]:
    """The hook points of all sites of a model, in the order of the forward pass.

    The first is `blocks.0.hook_resid_pre`; `blocks.i.hook_resid_mid` and `blocks.i.hook_resid_post`
    follow for each layer i.
    """
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(n_layers):
        names.append(f"blocks.{layer}.hook_resid_mid")
        names.append(f"blocks.{layer}.hook_resid_post")
    return names


def site_number(site: str, n_layers: int) -> int:
    """The number of a site, from 0, by its hook point.

    `blocks.i.hook_resid_pre` is the same site as `blocks.{i-1}.hook_resid_post`.

    Raises:
        HookNameError: if the model has no such site.
    """
    match = _SITE.fullmatch(site) if isinstance(site, str) else None
    layer = int(match[1]) if match else n_layers
    if match is None or layer >= n_layers:
        raise HookNameError(
            f"{site!r} is not a site of bridges; in a model of {n_layers} layers these are "
            f"{_listed(site_names(n_layers))}"
        )
    return 2 * layer + ("pre", "mid", "post").index(match[2])


def _listed(names: Sequence[str]) -> str:
    if len(names) > 5:
        names = [*names[:3], "…", names[-1]]
    return ", ".join(names)
