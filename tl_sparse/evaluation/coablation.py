"""Backups of a circuit: nodes whose effect grows once the circuit is gone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, shared_reads
from tl_sparse.config import check
from tl_sparse.evaluation.baselines import check_measurable, without_nodes
from tl_sparse.evaluation.batches import ordinary
from tl_sparse.evaluation.estimates import Estimate, mean_of
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.prompt_runs import Runs
from tl_sparse.evaluation.running import prompt_batches, task_loss
from tl_sparse.evaluation.significance import PValue, holm, sign_flip_tests
from tl_sparse.hooks import TLModel, differentiating, frozen, mixing, without_inference
from tl_sparse.precision import at_least_float32
from tl_sparse.tasks import TaskData

#: Sign flips of the tests of growth.
N_FLIPS = 19999
#: If the loss of the model without the circuit is not so far below that of no nodes at all, in
#: nats, nothing of the task is left that backups could have taken over.
LEAST_GAP = 0.05


@dataclass(frozen=True)
class Backup:
    """A node outside the circuit, and its effect with and without the circuit.

    Attributes:
        node: the name of the node.
        effect: the rise of the model's task loss in nats when the node is held at its mean.
        effect_without: the same rise in the model without the circuit.
        growth: the latter minus the former, compared pair by pair.
        p_no_growth: that the effect does not grow, by sign flips over pairs; corrected for the
            number of candidates by Holm's method.
    """

    node: str
    effect: Estimate
    effect_without: Estimate
    growth: Estimate
    p_no_growth: PValue


@dataclass(frozen=True)
class Backups:
    """The nodes whose effect grows most once the circuit is gone.

    Attributes:
        candidates: the nodes that were measured, the largest growth first.
        n_found: how many of these grow significantly; below, these are the found ones.
        random_growth: the mean growth of random nodes outside the circuit, with its standard error
            over nodes; None if there are no nodes outside.
        largest_random_growth: the largest growth of these.
        full_loss: the task loss of the full model, in nats.
        without_loss: the loss without the circuit.
        without_found_loss: the loss without the circuit and the found nodes.
        without_random_loss: the loss without the circuit and as many random nodes.
        no_nodes_loss: the loss with every node at its mean.
        share: the share of what the model without the circuit can still do that goes with the found
            nodes:
            (without_found_loss - without_loss) / (no_nodes_loss - without_loss). None if it cannot
            be told.
        problem: why there is no share; empty if there is one.
        n_outside: the number of all nodes outside the circuit.
        n_random: the number of random nodes.
        n_pairs: the number of pairs on which nodes were measured.
        ranked_on_others: whether nodes were ranked on other pairs. If not, the growth of the
            highest is a little overestimated, because they were chosen for it.
    """

    candidates: list[Backup]
    n_found: int
    random_growth: Estimate | None
    largest_random_growth: float | None
    full_loss: Estimate
    without_loss: Estimate
    without_found_loss: Estimate
    without_random_loss: Estimate
    no_nodes_loss: Estimate
    share: float | None
    problem: str
    n_outside: int
    n_random: int
    n_pairs: int
    ranked_on_others: bool


@checked()
def backups(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    n_candidates: int = 20,
    n_random: int = 10,
    n_pairs: int = 48,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Backups:
    """Find the nodes whose effect on the task grows most once the circuit is gone.

    This is conditional co-ablation (CoAx, arXiv 2607.01940), with the rise of the task loss as the
    effect, where the paper has a distance of the output distributions. Nodes are held at their
    means. All nodes outside are ranked by a first-order estimate of the growth, gradient times
    (mean - activation) without the circuit minus the same in the full model; the highest are
    then measured exactly.

    Args:
        n_candidates: the number of nodes that are measured exactly.
        n_random: the number of random nodes outside the circuit that are measured beside them.
        n_pairs: nodes are measured on the first so many pairs, to save time, and ranked on as many
            others, if there are others.
        batch_size: the largest number of prompts to run at a time.
        seed: the seed of the random nodes and of the sign flips.
        progress: show a progress bar while nodes are measured.

    Raises:
        ConfigError: if a number is below its least value.
        CircuitError: if the circuit is of another model, or has no means or no nodes.
        UnsupportedError: if gradients cannot flow through the model.
    """
    check(n_candidates >= 1, "n_candidates", n_candidates, "at least 1")
    check(n_random >= 1, "n_random", n_random, "at least 1")
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    check_measurable(circuit, model)
    runs = Runs(model, data.first(n_pairs), batch_size)
    effects = _CoAblation(circuit, runs)
    for_ranking = _pairs_for_ranking(data, n_pairs)
    ranked = _ranked_outside(circuit, model, for_ranking, batch_size)
    candidates = effects.measured(ranked[:n_candidates], seed, progress)
    random = effects.measured(_drawn(ranked, n_random, seed), seed, progress)
    found = [node.number for node in candidates if node.backup.p_no_growth.is_significant]
    without_found = runs.without(_union(circuit, found))
    without_random = runs.without(_union(circuit, _drawn(ranked, len(found), seed + 1)))
    no_nodes = runs.alone(without_nodes(circuit))
    share, problem = _share(effects.without_circuit.loss, without_found.loss, no_nodes.loss)
    random_growths = [node.backup.growth.value for node in random]
    return Backups(
        candidates=[node.backup for node in candidates],
        n_found=len(found),
        random_growth=mean_of(torch.tensor(random_growths)) if random else None,
        largest_random_growth=max(random_growths, default=None),
        full_loss=effects.full.loss,
        without_loss=effects.without_circuit.loss,
        without_found_loss=without_found.loss,
        without_random_loss=without_random.loss,
        no_nodes_loss=no_nodes.loss,
        share=share,
        problem=problem,
        n_outside=len(ranked),
        n_random=len(random),
        n_pairs=runs.data.n_pairs,
        ranked_on_others=data.n_pairs > n_pairs,
    )


def _pairs_for_ranking(data: TaskData, n_pairs: int) -> TaskData:
    """Other pairs than the first `n_pairs`, which measure the nodes; the same if there are none."""
    if data.n_pairs <= n_pairs:
        return data
    return data.pairs(range(n_pairs, min(2 * n_pairs, data.n_pairs)))


def _drawn(numbers: Sequence[int], n: int, seed: int) -> list[int]:
    """At most `n` of these numbers, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(numbers), generator=generator)
    return [numbers[i] for i in order[:n].tolist()]


def _share(
    without: Estimate, without_found: Estimate, no_nodes: Estimate
) -> tuple[float | None, str]:
    """What `Backups.share` is, or None and why it cannot be told."""
    gap = no_nodes.value - without.value
    if gap >= LEAST_GAP:
        return (without_found.value - without.value) / gap, ""
    return None, (
        f"without the circuit the task loss is {without.value:.3f}, and {no_nodes.value:.3f} "
        "without any nodes: nothing of the task is left, so no node has taken over"
    )


# --- the nodes outside, as numbers: positions among all nodes, in the order of the circuit's masks


def _only(circuit: Circuit, numbers: Sequence[int]) -> Circuit:
    """The circuit of these nodes alone."""
    return replace(without_nodes(circuit), kept=circuit.masks_of_numbers(numbers))


def _union(circuit: Circuit, numbers: Sequence[int]) -> Circuit:
    """The circuit's nodes together with these."""
    only = _only(circuit, numbers)
    kept = {name: mask | only.kept[name] for name, mask in circuit.kept.items()}
    return replace(only, kept=kept)


def _ranked_outside(circuit: Circuit, model: TLModel, data: TaskData, batch_size: int) -> list[int]:
    """The numbers of all nodes outside the circuit, the largest estimated growth first."""
    in_full = estimated_effects(without_nodes(circuit), model, data, batch_size)
    without = estimated_effects(circuit, model, data, batch_size)
    ranked = (without - in_full).argsort(descending=True, stable=True)
    outside = ranked[torch.isin(ranked, circuit.numbers_in(circuit.dropped))]
    numbers: list[int] = outside.tolist()
    return numbers


def estimated_effects(
    held: Circuit, model: TLModel, data: TaskData, batch_size: int
) -> Float[Tensor, " node"]:
    """The first-order estimate of the effect of every node in the model without the circuit `held`.

    It is Σ gradient · (mean - activation) over positions, averaged over prompts: by how much the
    task loss rises when the node is held at its mean, as far as the loss is linear in it.
    """
    with differentiating(model), frozen(model), shared_reads(model):
        total = torch.zeros(held.n_candidates)
        held = replace(held, kept=without_inference(held.kept), means=without_inference(held.means))
        hold = holding_nodes(held, model, inverted=True)
        dtype = at_least_float32(next(model.parameters()).dtype)
        for batch in prompt_batches(model, data, batch_size):
            prompts = ordinary(batch.data)
            opened = {}
            for name, mask in held.kept.items():
                opened[name] = torch.ones_like(mask, dtype=dtype).requires_grad_()
            with hold(prompts), mixing(model, opened, held.means):
                loss = task_loss(model, prompts) * prompts.n_pairs
            gradients = torch.autograd.grad(loss, list(opened.values()), materialize_grads=True)
            total -= torch.cat([gradient.flatten().float().cpu() for gradient in gradients])
        return total / data.n_pairs


# --- exact effects


@dataclass(frozen=True)
class _Measured:
    """A node outside the circuit by its number, and what was measured of it."""

    number: int
    backup: Backup


class _CoAblation:
    """The effects of nodes on the same prompts, with and without a circuit."""

    def __init__(self, circuit: Circuit, runs: Runs) -> None:
        self.circuit = circuit
        self.runs = runs
        self.full = runs.full()
        self.without_circuit = runs.without(circuit)

    def measured(self, numbers: Sequence[int], seed: int, progress: bool) -> list[_Measured]:
        """The effects of the nodes with these numbers, the largest growth first."""
        effects = []
        effects_without = []
        for number in tqdm(numbers, "co-ablating", disable=not progress, unit=" nodes"):
            alone = self.runs.without(_only(self.circuit, [number])).pair_losses
            both = self.runs.without(_union(self.circuit, [number])).pair_losses
            effects.append(alone - self.full.pair_losses)
            effects_without.append(both - self.without_circuit.pair_losses)
        if not effects:
            return []
        growths = torch.stack(effects_without) - torch.stack(effects)
        p_values = holm(sign_flip_tests(growths, N_FLIPS, seed))
        nodes = []
        for row, number in enumerate(numbers):
            (node,) = _only(self.circuit, [number]).nodes
            backup = Backup(
                node=str(node),
                effect=mean_of(effects[row]),
                effect_without=mean_of(effects_without[row]),
                growth=mean_of(growths[row]),
                p_no_growth=p_values[row],
            )
            nodes.append(_Measured(number, backup))
        return sorted(nodes, key=lambda node: node.backup.growth.value, reverse=True)
