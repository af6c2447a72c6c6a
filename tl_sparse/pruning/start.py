"""Initial values of the gates: one value with noise, or values in the order of a ranking."""

import dataclasses
import math

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.circuits import Circuit, node_hooks
from tl_sparse.errors import PruneError
from tl_sparse.hooks import NodeGates, TLModel
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.criterion import Criterion
from tl_sparse.pruning.fixed import FixedGates
from tl_sparse.pruning.gates import attribution
from tl_sparse.tasks import TaskData

#: The size of the first circuit that a warm start tries, and the factor by which each further
#: circuit is larger.
FIRST_SIZE = 32
GROWTH = 1.5


def initial_gates(empty: Circuit, model: TLModel, config: PruneConfig) -> NodeGates:
    """Gates for all nodes, initialised to `init_bias` plus noise, as in the paper."""
    held_at = {name: empty.means[name] for name in empty.kept}
    if config.ablation == "zero":
        held_at = {name: torch.zeros_like(mean) for name, mean in held_at.items()}
    return NodeGates(
        held_at,
        init_bias=config.init_bias,
        init_scale=config.init_scale,
        temperature=config.temperature,
        seed=config.seed,
        tied=_tied_keys(empty, model) if config.tied_qk else None,
        vectors=empty.component_hooks,
    )


def _tied_keys(empty: Circuit, model: TLModel) -> dict[str, str]:
    """Key hook point → the query hook point of the same layer, whose gates the keys share."""
    hooks = node_hooks(model)
    tied = {}
    for (layer, location), key in hooks.items():
        if location == "attn_k":
            query = hooks[layer, "attn_q"]
            query_shape = list(empty.means[query].shape)
            key_shape = list(empty.means[key].shape)
            if query_shape != key_shape:
                raise PruneError(
                    "tied_qk needs a key channel for each query channel; "
                    f"[n_heads, d_head] is {query_shape} for queries and {key_shape} for keys"
                )
            tied[key] = query
    return tied


def start_from_ranking(
    gates: NodeGates,
    empty: Circuit,
    model: TLModel,
    train: TaskData,
    selection: TaskData,
    config: PruneConfig,
    fixed: FixedGates,
    progress: bool = False,
) -> None:
    """Set the gates to values in the order of a ranking of the nodes.

    As many gates as reach the target loss are open, with values from init_bias down to 0; the
    others are just closed. If the gates are still to be learned, their noise is added. For the
    method "random", the ranking is drawn.
    """
    noise = gates.tau.detach() - config.init_bias
    if config.method == "random":
        # Not the noise of the gates, which `init_scale` may switch off.
        generator = torch.Generator().manual_seed(config.seed)
        scores = torch.rand(len(noise), generator=generator).to(noise)
    else:
        scores = attribution(model, gates, train, config, progress).abs()
    scores[fixed.included] = torch.inf
    scores[fixed.excluded] = -torch.inf
    order = scores.argsort(descending=True, stable=True)
    rank = order.argsort()  # the rank of each gate, from 0
    size = _sufficient_size(rank, gates, empty, model, selection, config)
    if_open = config.init_bias * (1 - rank / size)
    if_closed = 0.3 * (size - rank) / len(rank)
    tau = torch.where(rank < size, if_open, if_closed)
    if config.method in ("learned", "any_size"):
        tau = tau + noise
    gates.tau.data = tau
    fixed.apply(gates)


def _sufficient_size(
    rank: Int[Tensor, " gate"],
    gates: NodeGates,
    empty: Circuit,
    model: TLModel,
    selection: TaskData,
    config: PruneConfig,
) -> int:
    """Approximately how many of the highest-ranked nodes are needed to reach the target loss."""
    pairs = selection.first(config.cleanup_pairs)
    criterion = Criterion(model, config)
    size = FIRST_SIZE
    while size < len(rank):
        circuit = dataclasses.replace(empty, kept=gates.at_nodes(rank < size))
        fails_clearly = criterion.fails_clearly(circuit, pairs)
        if not fails_clearly and criterion.loss(circuit, pairs) <= config.target_loss:
            break
        size = math.ceil(GROWTH * size)
    return size
