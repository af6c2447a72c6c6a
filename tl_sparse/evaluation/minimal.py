"""Whether each part of a circuit is needed: its effect against noise, and against random parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, Edge, Node, weight_matrices
from tl_sparse.config import check
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like
from tl_sparse.evaluation.estimates import Estimate, mean_of
from tl_sparse.evaluation.prompt_runs import Runs
from tl_sparse.evaluation.removal import removable_parts, rises_above
from tl_sparse.evaluation.scores import Ablation
from tl_sparse.evaluation.significance import PValue, exceeds_fewer, holm, sign_flip_tests
from tl_sparse.hooks import TLModel, is_sparse_model
from tl_sparse.tasks import TaskData

#: Shi et al. ask of a part that it matters more than this share of random parts.
QUANTILE = 0.9
#: Random parts are removed from so many enlarged circuits in turn.
N_ENLARGED = 4
#: At least so many sign flips, and so many for each part, since a p-value cannot be smaller than
#: one over their number, and is multiplied by up to the number of parts.
LEAST_FLIPS = 9999
FLIPS_PER_PART = 200


@dataclass(frozen=True)
class PartEffect:
    """What the removal of one node or edge does to the circuit.

    Attributes:
        name: the name of the node or edge.
        kind: "node" or "edge".
        rise: the rise of the circuit's task loss in nats, with its standard error over pairs.
        p_no_rise: that the loss rises at no more pairs and by no more than it falls; corrected.
        exceeds: the share of the random parts of the same kind whose removal raises the loss of an
            enlarged circuit by less; None if there are none.
        p_matters: that the part matters more than 90 % of random parts; corrected. If it is small,
            the part is superfluous by the test of Shi et al.
    """

    name: str
    kind: str
    rise: Estimate
    p_no_rise: PValue
    exceeds: float | None
    p_matters: PValue


@dataclass(frozen=True)
class RandomRemovals:
    """What the removal of random parts does to randomly enlarged circuits.

    Attributes:
        rise: the mean rise of the loss, with its standard error over random parts; None without.
        n: the number of random parts.
    """

    rise: Estimate | None
    n: int


@dataclass(frozen=True)
class Minimality:
    """Whether each part of a circuit is needed.

    Attributes:
        circuit_loss: the task loss of the whole circuit on these pairs, in nats.
        parts: the effect of each part, the largest first.
        random_nodes: the baseline of the nodes.
        random_edges: the baseline of the edges.
        indistinct: the names of the parts whose effect is not distinguishable from noise: no
            significant rise of the loss. None of those for which there are too few pairs for a
            test.
        superfluous: the names of the parts that matter no more than random ones.
        n_pairs: the number of pairs.
        n_left_out: the number of parts that were not measured, because there are too many.
        correction: how the p-values are corrected for the number of parts.
    """

    circuit_loss: Estimate
    parts: list[PartEffect]
    random_nodes: RandomRemovals
    random_edges: RandomRemovals
    indistinct: list[str]
    superfluous: list[str]
    n_pairs: int
    n_left_out: int
    correction: str = "Holm"


@checked()
def minimality(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    ablation: Ablation = "mean",
    n_pairs: int = 48,
    n_random: int = 20,
    max_parts: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Minimality:
    """Remove each node and edge of the circuit alone, and compare its effect with two baselines.

    - Noise: a sign-flip test over pairs of whether the loss rises at all.
    - Random parts (the minimality test of Shi et al. 2024, arXiv 2410.13032): the circuit is
      enlarged by random nodes and weights, and one of these is removed from it. A binomial test
      asks whether the part matters more than 90 % of them.

    An enlarged circuit has as many more nodes at each hook point as the circuit has there, at most,
    and the ends of as many random nonzero weights as the circuit has edges. Edges are removed only
    in models of this package. Both p-values are corrected for the number of parts by Holm's method.

    Args:
        ablation: the values at which the nodes outside a circuit are held; see `Ablation`.
        n_pairs: parts are removed on the first so many pairs, to save time.
        n_random: the number of random nodes, and of random edges, that are removed; fewer if the
            enlarged circuits have no more.
        max_parts: of a larger circuit, so many parts are drawn at random and measured.
        batch_size: the largest number of prompts to run at a time.
        seed: the seed of everything random.
        progress: show a progress bar while parts are removed.

    Raises:
        ConfigError: if a number is below its least value.
        CircuitError: if the circuit is of another model, or has no means or no nodes.
    """
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    check(n_random >= 1, "n_random", n_random, "at least 1")
    check(max_parts >= 1, "max_parts", max_parts, "at least 1")
    check_measurable(circuit, model)
    some_pairs = data.partnered(seed).first(n_pairs)
    generator = torch.Generator().manual_seed(seed)
    all_parts = removable_parts(circuit, model)
    parts = _drawn(all_parts, max_parts, generator)
    runs = Runs(model, some_pairs, batch_size, ablation, seed)
    whole = runs.alone(circuit)
    rises = rises_above(whole, runs, circuit, parts, progress)
    random = _random_rises(circuit, all_parts, runs, n_random, generator)
    effects = _part_effects(parts, rises, random, seed)
    return Minimality(
        circuit_loss=whole.loss,
        parts=sorted(effects, key=lambda effect: effect.rise.value, reverse=True),
        random_nodes=_baseline(random["node"]),
        random_edges=_baseline(random["edge"]),
        indistinct=[effect.name for effect in effects if _is_indistinct(effect)],
        superfluous=[effect.name for effect in effects if effect.p_matters.is_significant],
        n_pairs=some_pairs.n_pairs,
        n_left_out=len(all_parts) - len(parts),
    )


def _kind(part: Node | Edge) -> str:
    return "node" if isinstance(part, Node) else "edge"


def _drawn(parts: Sequence[Node | Edge], n: int, generator: torch.Generator) -> list[Node | Edge]:
    """At most `n` of these parts, drawn at random, in their order."""
    chosen = torch.randperm(len(parts), generator=generator)[:n]
    return [parts[i] for i in sorted(chosen.tolist())]


def _part_effects(
    parts: Sequence[Node | Edge],
    rises: Float[Tensor, "part pair"],
    random: dict[str, list[float]],
    seed: int,
) -> list[PartEffect]:
    """The effect of each part with both p-values, corrected for the number of parts."""
    n_flips = max(LEAST_FLIPS, FLIPS_PER_PART * len(parts))
    no_rise = holm(sign_flip_tests(rises, n_flips, seed))
    estimates = [mean_of(of_part) for of_part in rises]
    matters = []
    for part, rise in zip(parts, estimates, strict=True):
        of_kind = random[_kind(part)]
        n_exceeded = _n_below(of_kind, rise.value)
        matters.append(exceeds_fewer(n_exceeded, len(of_kind), f"random {_kind(part)}s", QUANTILE))
    effects = []
    tested = zip(parts, estimates, no_rise, holm(matters), strict=True)
    for part, rise, p_no_rise, p_matters in tested:
        of_kind = random[_kind(part)]
        exceeds = _n_below(of_kind, rise.value) / len(of_kind) if of_kind else None
        effects.append(PartEffect(str(part), _kind(part), rise, p_no_rise, exceeds, p_matters))
    return effects


def _is_indistinct(effect: PartEffect) -> bool:
    return effect.p_no_rise.value is not None and not effect.p_no_rise.is_significant


def _n_below(values: Sequence[float], limit: float) -> int:
    return sum(value < limit for value in values)


def _baseline(rises: Sequence[float]) -> RandomRemovals:
    rise = mean_of(torch.tensor(rises)) if rises else None
    return RandomRemovals(rise, len(rises))


# --- random parts of randomly enlarged circuits


def _random_rises(
    circuit: Circuit,
    parts: Sequence[Node | Edge],
    runs: Runs,
    n_random: int,
    generator: torch.Generator,
) -> dict[str, list[float]]:
    """The kind of a part → by how much the removal of each random part raises the loss."""
    rises: dict[str, list[float]] = {"node": [], "edge": []}
    n_edges = sum(isinstance(part, Edge) for part in parts)
    for number in range(N_ENLARGED):
        enlarged = _enlarged(circuit, n_edges, runs.model, generator)
        added = _added_parts(parts, enlarged, runs.model)
        whole = runs.alone(enlarged)
        # The shares of the enlarged circuits add up to n_random.
        n_now = n_random * (number + 1) // N_ENLARGED - n_random * number // N_ENLARGED
        for kind, of_kind in added.items():
            chosen = _drawn(of_kind, n_now, generator)
            removed = rises_above(whole, runs, enlarged, chosen)
            rises[kind] += removed.double().mean(1).tolist()
    return rises


def _enlarged(
    circuit: Circuit, n_edges: int, model: TLModel, generator: torch.Generator
) -> Circuit:
    """The circuit with random nodes, and with random weights together with their ends."""
    seed = int(torch.randint(2**31, (), generator=generator))
    (random,) = random_circuits_like(circuit, 1, seed)
    kept = {name: mask | random.kept[name] for name, mask in circuit.kept.items()}
    if is_sparse_model(model):
        for hook_name, index in _random_ends(circuit, model, n_edges, generator):
            kept[hook_name].view(-1)[index] = True
    enlarged = replace(circuit, kept=kept, edge_set=None, measured={}, scores={}, labels={})
    if circuit.edge_set is None:
        return enlarged
    old_nodes = set(circuit.nodes)
    edges = set()
    for edge in enlarged.edges(model):
        is_new = not old_nodes.issuperset(edge.ends)
        if is_new or edge.ends in circuit.edge_set:
            edges.add(edge.ends)
    return replace(enlarged, edge_set=frozenset(edges))


def _random_ends(
    circuit: Circuit, model: TLModel, n_weights: int, generator: torch.Generator
) -> list[tuple[str, int]]:
    """The hook points and indices of both ends of random nonzero weights of the model."""
    hooks = circuit.hooks
    places: list[tuple[str, str]] = []
    entries: list[Tensor] = []
    for layer in range(model.cfg.n_layers):
        for source, target, weights in weight_matrices(model, layer):
            if (layer, source) in hooks and (layer, target) in hooks:
                places.append((hooks[layer, source], hooks[layer, target]))
                entries.append(weights.nonzero())
    total = sum(map(len, entries))
    ends = []
    for number in torch.randperm(total, generator=generator)[:n_weights].tolist():
        place = 0
        while number >= len(entries[place]):
            number -= len(entries[place])
            place += 1
        source_index, target_index = entries[place][number].tolist()
        source_hook, target_hook = places[place]
        ends += [(source_hook, source_index), (target_hook, target_index)]
    return ends


def _added_parts(
    parts: Sequence[Node | Edge], enlarged: Circuit, model: TLModel
) -> dict[str, list[Node | Edge]]:
    """The kind of a part → the parts of the enlarged circuit that are not in the circuit.

    Args:
        parts: those of the circuit.
    """
    old = set(parts)
    added: dict[str, list[Node | Edge]] = {"node": [], "edge": []}
    for part in removable_parts(enlarged, model):
        if part not in old:
            added[_kind(part)].append(part)
    return added
