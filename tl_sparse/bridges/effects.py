"""What changes of a circuit's nodes do in the dense model that its model is bridged to.

If the circuit says something of the dense model, then the same changes of its nodes, carried over,
move the dense model's answer as they move the sparse one's (Gao et al. 2025, sections 3.3 and A.4),
and random nodes do not.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.bridges.carrying import NodeChange, default_site, masks_of
from tl_sparse.bridges.effects_records import (
    AlongProbe,
    Answers,
    AtSite,
    DenseEffects,
    NodeAlone,
    SiteEffects,
)
from tl_sparse.bridges.effects_runs import (
    Batch,
    Changes,
    Margins,
    in_batches,
    joined,
    streams_at_the_end,
)
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.probes import LEAST_PROBE_PAIRS, Probe, trained_probe
from tl_sparse.circuits import Circuit, Node
from tl_sparse.config import check
from tl_sparse.errors import counted
from tl_sparse.evaluation import (
    Change,
    check_measurable,
    correlation_of_changes,
    mean_of_pairs,
    random_circuits_like,
)
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData

#: Probes are trained on at most so many pairs.
MAX_PROBE_PAIRS = 256
#: Each node is changed alone, unless there are more than this many.
MAX_NODES_ALONE = 500


@checked()
@torch.no_grad()
def dense_effects(
    circuit: Circuit,
    bridges: Bridges,
    data: TaskData,
    n_pairs: int = 24,
    n_random: int = 4,
    batch_size: int = 256,
    seed: int = 0,
    strength: float = 1.0,
) -> DenseEffects:
    """Change a circuit's nodes in the sparse model, and carry the changes into the dense one.

    The nodes take the values that they have on the other prompt of the pair, aligned from the end
    of the prompts, or are held at the circuit's means. What this does to the sparse stream at a
    site is decoded and added to the dense stream there, for one site at a time. All other nodes
    are as they are.

    Two measures stand beside an interchange at each site: the dense stream moved along the
    direction of a linear probe of the right answer, and all of the dense stream interchanged. The
    probes are trained on the pairs of `data` that are not among the first `n_pairs`, at most
    `MAX_PROBE_PAIRS`, at the last position of the prompts.

    Args:
        circuit: a circuit of the sparse model.
        bridges: the two models and the maps between them.
        data: the prompts of the task.
        n_pairs: at most so many pairs are measured, the first ones.
        n_random: the number of draws of random nodes.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of the random nodes.
        strength: what the differences at the sites are multiplied by; between 0 and 1, a change is
            partial.

    Raises:
        CircuitError: if the circuit is not one of the sparse model, or has no means or nodes.
        ConfigError: if `n_pairs` or `batch_size` is below 1, `n_random` negative, or `strength` not
            finite.
        UnsupportedError: if a model sees padding, and prompts differ in length.
    """
    check_measurable(circuit, bridges.sparse)
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    check(n_random >= 0, "n_random", n_random, "at least 0")
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    check(math.isfinite(strength), "strength", strength, "a finite number")
    data = data.to(next(bridges.sparse.parameters()).device)
    measured = data.first(n_pairs)
    others = data.pairs(range(measured.n_pairs, data.n_pairs)).first(MAX_PROBE_PAIRS)
    probes, no_probe = _probes(bridges.dense, others, batch_size)
    alone, no_nodes = _nodes_to_change_alone(circuit)
    random = [each.kept for each in random_circuits_like(circuit, n_random, seed)]
    changes = Changes([circuit.kept, *random], circuit.means, alone, probes, strength)

    batches = in_batches(measured, batch_size)
    margins = joined([Batch.of(bridges, batch, changes).margins() for batch in batches])
    nodes = _nodes_alone(margins, bridges, alone)
    correlation, no_correlation = correlation_of_changes(
        [node.sparse.change.value for node in nodes],
        [node.dense.change.value for node in nodes],
        ("in the sparse model", "in the dense model"),
    )
    return DenseEffects(
        sparse=_answers(margins.sparse),
        dense=_answers(margins.dense),
        interchanged=Change.between(margins.sparse, margins.sparse_changed[:, 0]),
        ablated=Change.between(margins.sparse, margins.sparse_changed[:, 1]),
        sites=[_site_effects(margins, number, site) for number, site in enumerate(bridges.sites)],
        nodes=nodes,
        correlation=correlation,
        strength=float(strength),
        n_pairs=measured.n_pairs,
        n_probe_pairs=others.n_pairs if probes else 0,
        no_correlation=no_correlation,
        no_probe=no_probe,
        no_nodes=no_nodes,
    )


def _probes(dense: TLModel, data: TaskData, batch_size: int) -> tuple[list[Probe], str]:
    """A probe of the right answer for each site; or none, and why."""
    if data.n_pairs < LEAST_PROBE_PAIRS:
        return [], (
            f"it is trained on pairs that are not measured, at least {LEAST_PROBE_PAIRS}, and "
            f"there {'is' if data.n_pairs == 1 else 'are'} {data.n_pairs}"
        )
    streams = streams_at_the_end(dense, data, batch_size)
    return [trained_probe(stream, data.correct) for stream in streams], ""


def _nodes_to_change_alone(circuit: Circuit) -> tuple[list[Node], str]:
    """The nodes that are changed alone; or none, and why."""
    if circuit.node_kind == "components":
        return [], "the circuit's nodes are whole components"
    if circuit.n_nodes > MAX_NODES_ALONE:
        return [], f"the circuit has more than {counted(MAX_NODES_ALONE, 'node')}"
    return circuit.nodes, ""


def _answers(margins: Float[Tensor, " prompt"]) -> Answers:
    return Answers(mean_of_pairs((margins > 0).float()), mean_of_pairs(margins))


def _site_effects(margins: Margins, number: int, site: str) -> SiteEffects:
    probe = None
    if margins.probe.shape[1] > 0:
        moved = Change.between(margins.dense, margins.probe[:, number])
        probe = AlongProbe(moved, mean_of_pairs(margins.probe_is_right[:, number]))
    return SiteEffects(
        site=site,
        interchanged=_change_at_site(margins, number, kind=0),
        ablated=_change_at_site(margins, number, kind=1),
        probe=probe,
        everything=Change.between(margins.dense, margins.everything[:, number]),
    )


def _change_at_site(margins: Margins, number: int, kind: int) -> AtSite:
    """What a change moves at a site; its kind is its number in `Margins`."""
    in_dense = margins.dense_at_site[:, kind, :, number]
    of_circuit, *of_random = [Change.between(margins.dense, after) for after in in_dense.unbind(1)]
    in_sparse = margins.sparse_at_site[:, kind, number]
    return AtSite(Change.between(margins.sparse, in_sparse), of_circuit, of_random)


def _nodes_alone(margins: Margins, bridges: Bridges, alone: Sequence[Node]) -> list[NodeAlone]:
    """What each node moves alone, those that move the sparse model most first."""
    nodes = []
    for number, node in enumerate(alone):
        site = default_site(bridges.sparse, NodeChange(masks_of(bridges.sparse, [node]), {}))
        nodes.append(
            NodeAlone(
                node=str(node),
                site=bridges.sites[site],
                sparse=Change.between(margins.sparse, margins.node_sparse[:, number]),
                dense=Change.between(margins.dense, margins.node_dense[:, number]),
            )
        )
    return sorted(nodes, key=lambda node: -node.sparse.size.value)
