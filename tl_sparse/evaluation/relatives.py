"""Whether circuits that were found one after the other can stand in for each other."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like, without_nodes
from tl_sparse.evaluation.estimates import Estimate, mean_of, mean_of_pairs
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.like_model import value_agreement, within_answers
from tl_sparse.evaluation.objectives import all_objective_losses
from tl_sparse.evaluation.prompt_runs import PromptScores, Runs
from tl_sparse.evaluation.scores import Ablation, Objective
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData


@dataclass(frozen=True)
class Relative:
    """The first circuit and a later one.

    Two circuits stand in for each other if the model keeps the task while either is gone, but loses
    it while both are. Nodes that both have are not held, since either circuit needs them.

    Attributes:
        name: the name of the later circuit.
        n_own_first: the number of nodes that only the first circuit has.
        n_own: the number of those that only the later one has.
        overlap: the Jaccard index of their nodes.
        agreement: the correlation, over prompts with the same answers, of the logit of the right
            answer minus that of the wrong one, each circuit running alone: whether one is sure
            where the other is. None if there is none to measure.
        without_first: the loss of the model while the first circuit's own nodes are held.
        without: that while the later one's own nodes are held.
        without_both: that while both are.
        union: the loss of both circuits together, all other nodes held.
    """

    name: str
    n_own_first: int
    n_own: int
    overlap: float
    agreement: Estimate | None
    without_first: Estimate
    without: Estimate
    without_both: Estimate
    union: Estimate


@dataclass(frozen=True)
class Relatedness:
    """How later circuits stand to the first one. Losses are task losses in nats.

    Attributes:
        first: the name of the first circuit.
        relatives: each later circuit beside the first one.
        losses: circuit → its loss alone.
        agreements_with_model: circuit → the same correlation as `Relative.agreement`, with the full
            model.
        random_agreement: the mean correlation of the first circuit with random circuits of its
            size, with its standard error over them. None if there is none to measure.
        full_loss: the loss of the full model.
        no_nodes_loss: that with every node held.
        n_pairs: the number of pairs of prompts.
    """

    first: str
    relatives: list[Relative]
    losses: dict[str, Estimate]
    agreements_with_model: dict[str, Estimate | None]
    random_agreement: Estimate | None
    full_loss: Estimate
    no_nodes_loss: Estimate
    n_pairs: int


@checked()
def relatedness(
    circuits: Mapping[str, Circuit],
    model: TLModel,
    data: TaskData,
    ablation: Ablation = "mean",
    n_pairs: int = 64,
    n_random: int = 3,
    batch_size: int = 256,
    seed: int = 0,
) -> Relatedness:
    """Measure whether later circuits can stand in for the first one.

    Args:
        circuits: name → circuit, the first one first.
        ablation: the values at which nodes are held; see `Ablation`.
        n_pairs: the number of pairs of prompts, of those that there are.
        n_random: the number of random circuits.
        batch_size: the largest number of prompts to run at a time.
        seed: the seed of the random circuits, and of the prompts for resample ablation.

    Raises:
        ConfigError: if a number is below its least value.
        CircuitError: if there is no circuit, or one is of another model, or has no means or no
            nodes.
    """
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    check(n_random >= 0, "n_random", n_random, "at least 0")
    if not circuits:
        raise CircuitError("no circuits are given, so there is nothing to compare")
    for circuit in circuits.values():
        check_measurable(circuit, model)
    runs = Runs(model, data.first(n_pairs), batch_size, ablation, seed)
    (first_name, first), *later = circuits.items()
    alone = {name: runs.alone(circuit) for name, circuit in circuits.items()}
    relatives = []
    for name, circuit in later:
        agreement = _agreement(alone[first_name], alone[name], runs.data)
        relatives.append(_relative(first, circuit, name, runs, agreement))
    full = runs.full()
    random = []
    for circuit in random_circuits_like(first, n_random, seed):
        agreement = _agreement(alone[first_name], runs.alone(circuit), runs.data)
        if agreement is not None:
            random.append(agreement.value)
    return Relatedness(
        first=first_name,
        relatives=relatives,
        losses={name: scores.loss for name, scores in alone.items()},
        agreements_with_model={
            name: _agreement(full, scores, runs.data) for name, scores in alone.items()
        },
        random_agreement=mean_of(torch.tensor(random)) if random else None,
        full_loss=full.loss,
        no_nodes_loss=runs.alone(without_nodes(first)).loss,
        n_pairs=runs.data.n_pairs,
    )


def _relative(
    first: Circuit, later: Circuit, name: str, runs: Runs, agreement: Estimate | None
) -> Relative:
    own_first = first - later
    own = later - first
    union = first | later
    return Relative(
        name=name,
        n_own_first=own_first.n_nodes,
        n_own=own.n_nodes,
        overlap=jaccard(first.node_names, later.node_names),
        agreement=agreement,
        without_first=runs.without(own_first).loss,
        without=runs.without(own).loss,
        without_both=runs.without(own_first | own).loss,
        union=runs.alone(union).loss,
    )


def _agreement(first: PromptScores, second: PromptScores, data: TaskData) -> Estimate | None:
    """The correlation of the margins among prompts with the same answers."""
    of_first, of_second = within_answers(first.margins, data), within_answers(second.margins, data)
    return value_agreement(of_first, of_second).correlation


@checked()
def loss_without(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    objective: Objective = "candidates",
    ablation: Ablation = "mean",
    batch_size: int = 256,
) -> Estimate:
    """The loss of the model in nats while the nodes of the circuit are held.

    Args:
        objective: what the loss measures; see `PruneConfig`.
        ablation: the values at which nodes are held; see `Ablation`.
        batch_size: the largest number of prompts to run at a time.

    Raises:
        CircuitError: if the circuit is of another model, or has no means or no nodes.
        ArgumentError: for the objective "model", if `data` has no `reference`.
    """
    check_measurable(circuit, model)
    run_context = holding_nodes(circuit, model, ablation, inverted=True)
    return mean_of_pairs(all_objective_losses(model, data, objective, batch_size, run_context))


@checked()
def circuit_of(circuit: Circuit, names: list[str]) -> Circuit:
    """The circuit of the nodes with these names, at the hook points of another circuit.

    Raises:
        CircuitError: if there is no such node.
    """
    kept = circuit.masks_of(map(circuit.node, names))
    return replace(without_nodes(circuit), kept=kept)


@checked()
def jaccard(first: Collection[str], second: Collection[str]) -> float:
    """The Jaccard index of two sets of nodes; 1 if both are empty."""
    in_either = set(first) | set(second)
    if not in_either:
        return 1.0
    return len(set(first) & set(second)) / len(in_either)
