"""Section 1: is the circuit sufficient, also when others choose what is held?"""

from dataclasses import dataclass

import torch

from tl_sparse.certificates.subject import Subject
from tl_sparse.circuits import Circuit
from tl_sparse.errors import TaskError, counted
from tl_sparse.evaluation import (
    AdversaryScore,
    Estimate,
    Evaluation,
    SubsetScores,
    adversary_score,
    evaluate,
    holding_nodes,
    mean_of,
    random_circuits_like,
    score,
    subset_score,
    subset_scores,
)
from tl_sparse.hooks import NodeMasks
from tl_sparse.tasks import Score


@dataclass(frozen=True)
class Attack:
    """What an adversary with a budget does to the circuit, beside chance.

    Attributes:
        adversary: the circuit under the adversary.
        random: the circuit while as many random nodes outside are left as they are.
    """

    adversary: AdversaryScore
    random: Score


@dataclass(frozen=True)
class Sufficiency:
    """Whether the circuit alone does the task.

    Attributes:
        evaluation: the circuit with all other nodes at their means, at zero and resampled, beside
            the full model and no nodes.
        random_loss: the task loss of random circuits of equal size: the mean and its standard
            error over circuits.
        n_random: the number of these.
        subsets: the circuit while random subsets of the other nodes are left as they are.
        random_subsets: the same subsets around a random circuit of equal size.
        attacks: fresh adversaries, from the smallest budget to no limit; empty if there are too few
            pairs to learn on.
        n_steps: the number of steps in which each of them learned.
        ablation: the values at which nodes are held in `random_loss` and below.
        n_training_pairs: the number of pairs on which the adversaries learned.
        no_attacks: why there are no adversaries; else empty.
    """

    evaluation: Evaluation
    random_loss: Estimate
    n_random: int
    subsets: SubsetScores
    random_subsets: SubsetScores
    attacks: list[Attack]
    n_steps: int
    ablation: str
    n_training_pairs: int
    no_attacks: str = ""

    @property
    def alone(self) -> Score:
        """The circuit with all other nodes held as in its search."""
        if self.ablation == "resample" and self.evaluation.resample is not None:
            return self.evaluation.resample
        return self.evaluation.zero if self.ablation == "zero" else self.evaluation.circuit


def limit_in_words(budget: int | None) -> str:
    """The budget of an adversary."""
    return "no limit" if budget is None else f"at most {counted(budget, 'node')}"


def sufficiency(subject: Subject) -> Sufficiency:
    """Measure the circuit alone under every ablation, under subsets, and under adversaries."""
    effort = subject.effort
    circuit, model, data = subject.circuit, subject.model, subject.data
    options = {"batch_size": subject.batch_size, "seed": subject.seed}
    random = random_circuits_like(circuit, effort.random_circuits, subject.seed)
    random_losses = []
    subject.tell("random circuits")
    for each in random:
        run_context = holding_nodes(each, model, subject.ablation)
        random_losses.append(score(model, data, run_context=run_context, **options).loss)

    def under_subsets(circuit: Circuit) -> SubsetScores:
        return subset_scores(
            circuit,
            model,
            data,
            subject.ablation,
            effort.subsets,
            effort.subset_pairs,
            **options,
        )

    attacks: list[Attack] = []
    no_attacks = ""
    try:
        attacks = _attacks(subject)
    except TaskError as error:  # the task has too few pairs beside the held-out ones
        no_attacks = str(error)
    subject.tell("ablations and subsets")
    return Sufficiency(
        evaluation=evaluate(circuit, model, data, **options),
        random_loss=mean_of(torch.tensor(random_losses)),
        n_random=len(random),
        subsets=under_subsets(circuit),
        random_subsets=under_subsets(random[0]),
        attacks=attacks,
        n_steps=effort.adversary_steps,
        ablation=subject.ablation,
        n_training_pairs=subject.training.n_pairs if attacks else 0,
        no_attacks=no_attacks,
    )


def _attacks(subject: Subject) -> list[Attack]:
    effort = subject.effort
    n_outside = subject.circuit.n_candidates - subject.circuit.n_nodes
    budgets = [budget for budget in sorted(effort.budgets) if budget < n_outside]
    attacks = [_attack(subject, budget, restarts=1) for budget in budgets]
    return [*attacks, _attack(subject, None, effort.adversaries)]


def _attack(subject: Subject, budget: int | None, restarts: int) -> Attack:
    subject.tell(f"adversary with {limit_in_words(budget)}")
    data = subject.data.first(subject.effort.adversary_pairs)
    adversary = adversary_score(
        subject.circuit,
        subject.model,
        subject.training,
        data,
        budget,
        subject.ablation,
        subject.effort.adversary_steps,
        restarts,
        subject.batch_size,
        subject.adversary_seed,
    )
    left = _random_nodes(subject.circuit, adversary.n_left, subject.seed)
    random = subset_score(
        subject.circuit,
        subject.model,
        data,
        left,
        subject.ablation,
        subject.batch_size,
        subject.seed,
    )
    return Attack(adversary, random)


def _random_nodes(circuit: Circuit, n_nodes: int, seed: int) -> NodeMasks:
    """Masks of random nodes outside the circuit."""
    numbers = circuit.numbers_in(circuit.dropped)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(numbers), generator=generator)
    return circuit.masks_of_numbers(numbers[order[:n_nodes]])
