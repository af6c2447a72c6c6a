"""What leaves nodes outside the circuit as they are while its gates are learned."""

import copy
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.evaluation import ADVERSARY_LR, ADVERSARY_SPREAD
from tl_sparse.hooks import NodeGates
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.seeds import seed_of_opponent

#: In every fourth step nothing is left, so that a circuit also learns to do without the rest.
_CYCLE = 4
#: After so many steps, the adversary starts anew: one that is met for long can be evaded.
_LIFETIME = 40


class Opponent(Protocol):
    """Chooses, for each step, which nodes are left if their gates are closed."""

    def left(self, step: int) -> Float[Tensor, " gate"] | None:
        """1 for each node that is left in this step, else 0; None if all are held."""

    def learn(self) -> None:
        """Take in the gradients of the step."""


class NoOpponent:
    """Leaves nothing: all nodes with closed gates are held, as in the paper."""

    def left(self, step: int) -> None:
        return None

    def learn(self) -> None:
        pass


class RandomSubsets:
    """Leaves random nodes, of which each step has another share, and a quarter of steps none."""

    def __init__(self, gates: NodeGates, seed: int) -> None:
        self.like = gates.tau
        self.generator = torch.Generator().manual_seed(seed)

    def left(self, step: int) -> Float[Tensor, " gate"] | None:
        if step % _CYCLE == 0:
            return None
        share = torch.rand(1, generator=self.generator)
        draws = torch.rand(len(self.like), generator=self.generator)
        return (draws < share).to(self.like)

    def learn(self) -> None:
        pass


class Adversary:
    """Leaves the nodes that raise the loss most, which it learns by gradient ascent on masks.

    In a quarter of the steps it leaves nothing, and in another quarter random nodes. It learns from
    the same gradients as the gates, and starts anew now and then.
    """

    def __init__(self, gates: NodeGates, seed: int) -> None:
        self.gates = gates
        self.generator = torch.Generator().manual_seed(seed)
        self.random = RandomSubsets(gates, seed)
        self._start()

    def _start(self) -> None:
        noise = torch.randn(len(self.gates.tau), generator=self.generator)
        self.masks = copy.deepcopy(self.gates)
        self.masks.tau.data = (ADVERSARY_SPREAD * noise).clamp(-1, 1).to(self.gates.tau)
        self.optimizer = torch.optim.Adam([self.masks.tau], lr=ADVERSARY_LR, maximize=True)

    def left(self, step: int) -> Float[Tensor, " gate"] | None:
        if step % _LIFETIME == _LIFETIME - 1:
            self._start()
        if step % _CYCLE < 2:
            return self.random.left(step)
        return self.masks.openings()

    def learn(self) -> None:
        tau = self.masks.tau
        if tau.grad is None:  # this step had random nodes, or none
            return
        if bool(tau.grad.isfinite().all()):
            self.optimizer.step()
            self.masks.clamp()
        else:
            self._start()
        self.masks.tau.grad = None


def opponent(gates: NodeGates, config: PruneConfig) -> Opponent:
    """The opponent that the settings ask for."""
    if config.robust == "subsets":
        return RandomSubsets(gates, config.seed)
    if config.robust == "adversary":
        return Adversary(gates, seed_of_opponent(config.seed))
    return NoOpponent()
