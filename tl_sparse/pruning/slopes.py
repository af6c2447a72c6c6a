"""How much the loss depends on each gate, to first order, at a circuit."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.hooks import NodeMasks
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.gates import gated_loss
from tl_sparse.pruning.ranking import Ranking
from tl_sparse.tasks import TaskData


def steepest_first(slopes: Float[Tensor, " gate"], gates: Bool[Tensor, " gate"]) -> list[int]:
    """Those of `gates` that lower the loss when they open, to first order; the best ones first."""
    lowers = gates & (slopes < 0)
    in_order = slopes.argsort()
    lowering: list[int] = in_order[lowers[in_order]].tolist()
    return lowering


def slopes_at(
    kept: Bool[Tensor, " gate"],
    ranking: Ranking,
    criterion: Criterion,
    pairs: TaskData,
    left: NodeMasks | None = None,
) -> Float[Tensor, " gate"]:
    """The change of the loss when each gate opens, to first order, while those of `kept` are open.

    It is Σ gradient · (activation − held value), as in attribution patching (Syed et al. 2023,
    arXiv 2310.10348), at the circuit instead of the full model. One run forward and backward gives
    it for all gates.

    Args:
        left: masks of nodes that are left as they are if they are outside the circuit. When a node
            of the circuit closes, it is held, also if it is one of these.
    """
    gates = ranking.gates
    openings = kept.to(gates.tau.dtype).requires_grad_()
    left_open = None
    if left is not None:
        left_open = (gates.of_nodes(left) & ~kept).to(openings)
    loss = gated_loss(criterion.model, gates, pairs, criterion.config, openings, left_open)
    (slopes,) = torch.autograd.grad(loss, openings)
    return slopes
