"""Whether circuits that were found one after the other can stand in for each other."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.errors import CircuitError
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like, without_nodes
from tl_sparse.evaluation.estimates import Estimate, mean_of, mean_of_pairs
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.like_model import groups_by_answer, value_agreement
from tl_sparse.evaluation.objectives import all_objective_losses
from tl_sparse.evaluation.removal import PromptScores, first_pairs, prompt_scores
from tl_sparse.evaluation.running import RunContext
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
    runs = _Runs(model, first_pairs(data, n_pairs), ablation, batch_size, seed)
    (first_name, first), *later = circuits.items()
    alone = {name: runs.alone(circuit) for name, circuit in circuits.items()}
    relatives = []
    for name, circuit in later:
        agreement = runs.agreement(alone[first_name], alone[name])
        relatives.append(_relative(first, circuit, name, runs, agreement))
    full = runs.scores(None)
    random = []
    for circuit in random_circuits_like(first, n_random, seed):
        agreement = runs.agreement(alone[first_name], runs.alone(circuit))
        if agreement is not None:
            random.append(agreement.value)
    return Relatedness(
        first=first_name,
        relatives=relatives,
        losses={name: scores.loss for name, scores in alone.items()},
        agreements_with_model={
            name: runs.agreement(full, scores) for name, scores in alone.items()
        },
        random_agreement=mean_of(torch.tensor(random)) if random else None,
        full_loss=full.loss,
        no_nodes_loss=runs.alone(without_nodes(first)).loss,
        n_pairs=runs.data.n_pairs,
    )


def _relative(
    first: Circuit, later: Circuit, name: str, runs: "_Runs", agreement: Estimate | None
) -> Relative:
    own_first = first - later
    own = later - first
    union = first | later
    n_shared = (first & later).n_nodes
    return Relative(
        name=name,
        n_own_first=own_first.n_nodes,
        n_own=own.n_nodes,
        overlap=n_shared / union.n_nodes,
        agreement=agreement,
        without_first=runs.without(own_first).loss,
        without=runs.without(own).loss,
        without_both=runs.without(own_first | own).loss,
        union=runs.alone(union).loss,
    )


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of a model on the same prompts."""

    model: TLModel
    data: TaskData
    ablation: Ablation
    batch_size: int
    seed: int

    def scores(self, run_context: RunContext | None) -> PromptScores:
        return prompt_scores(self.model, self.data, self.batch_size, run_context, self.seed)

    def alone(self, circuit: Circuit) -> PromptScores:
        """All nodes outside the circuit are held."""
        return self.scores(holding_nodes(circuit, self.model, self.ablation))

    def without(self, circuit: Circuit) -> PromptScores:
        """The circuit's nodes are held."""
        return self.scores(holding_nodes(circuit, self.model, self.ablation, inverted=True))

    def agreement(self, first: PromptScores, second: PromptScores) -> Estimate | None:
        """The correlation of the margins among prompts with the same answers."""
        return value_agreement(self._within(first), self._within(second)).correlation

    def _within(self, scores: PromptScores) -> Float[Tensor, "prompt 1"]:
        """The margins without their mean over the prompts with the same answers.

        Their mean size is added, so that what is only rounding beside it can be told.
        """
        margins = scores.margins.double()
        groups, n_groups = groups_by_answer(self.data)
        sums = margins.new_zeros(n_groups).index_add(0, groups, margins)
        means = sums / groups.bincount(minlength=n_groups)
        return (margins - means[groups] + margins.abs().mean())[:, None]


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
    kept = {name: torch.zeros_like(mask) for name, mask in circuit.kept.items()}
    for name in names:
        node = circuit.node(name)
        kept[circuit.hooks[node.layer, node.location]].view(-1)[node.index] = True
    return replace(without_nodes(circuit), kept=kept)
