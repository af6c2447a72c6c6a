"""Attention and MLPs that a search no longer runs, since it has closed all that they write."""

from tl_sparse.hooks import NodeGates, TLModel, is_sparse_model
from tl_sparse.pruning.config import PruneConfig

#: The hook points of what attention and an MLP write. Where all gates are closed there, no gradient
#: reaches the gates within.
_WRITES = (".hook_attn_out", ".hook_mlp_out")
#: All gates of such a hook point stay closed once they have been closed for so many steps.
SETTLED_STEPS = 20


class SettledWrites:
    """The hook points of writes at which all gates have been closed for many steps.

    The gates there stay closed, so that a model of this package need not run what writes there: a
    step gets faster as the circuit gets smaller. None are settled where all of the model must run:
    while nodes outside the circuit are left as they are, for robustness, or have their values on
    other prompts, or other gates are open in each step; and in models of other packages.
    """

    def __init__(self, model: TLModel, gates: NodeGates, config: PruneConfig) -> None:
        self._gates = gates
        self._steps_closed: dict[str, int] = {}
        holds_constants = config.robust == "none" and config.ablation != "resample"
        if is_sparse_model(model) and config.method == "learned" and holds_constants:
            writes = [name for name in gates.index if name.endswith(_WRITES)]
            self._steps_closed = dict.fromkeys(writes, 0)

    @property
    def hook_names(self) -> list[str]:
        """The names of these hook points."""
        return [name for name, steps in self._steps_closed.items() if steps >= SETTLED_STEPS]

    def update(self) -> None:
        """Take in the gates after a step."""
        for name in self._steps_closed:
            is_open = self._gates.tau[self._gates.index[name]] > 0
            self._steps_closed[name] = 0 if bool(is_open.any()) else self._steps_closed[name] + 1
