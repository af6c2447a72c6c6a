"""Whether a circuit is necessary, and the tests of Shi et al. 2024 (arXiv 2410.13032) beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like
from tl_sparse.evaluation.estimates import Estimate, mean_of
from tl_sparse.evaluation.prompt_runs import PromptScores, Runs
from tl_sparse.evaluation.scores import Ablation
from tl_sparse.evaluation.significance import PValue, exceeds_most, independence_test, sign_test
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData

#: Shi et al. compare a circuit with this quantile of random circuits.
QUANTILE = 0.9
#: Shi et al. call circuit and model equivalent if each is the better one with a probability within
#: this margin of 1/2.
MARGIN = 0.1
#: Resample ablation takes several times as long as mean ablation, so that fewer random circuits are
#: removed by it.
MOST_RESAMPLED = 4


@dataclass(frozen=True)
class Independence:
    """Whether what the model answers without the circuit tells what the full model answers.

    Each pair has two values for each of the two runs: by how much the right answer is ahead at its
    two prompts. Dependence need not be knowledge of the answer: both runs may find the same prompts
    easy. `Without.told_apart` asks about the answer alone.

    Attributes:
        hsic: the Hilbert-Schmidt independence criterion of the two; None if it is not measured.
        p_value: that they are independent, by permuting the pairs of one run.
    """

    hsic: float | None
    p_value: PValue


@dataclass(frozen=True)
class Without:
    """The model without the circuit, beside the model without random circuits of its size.

    Attributes:
        ablation: the values at which the circuit's nodes are held.
        loss: the task loss in nats; chance is 0.693.
        accuracy: the share of prompts at which the right answer is ahead.
        told_apart: the share of pairs in which the difference of the answers' logits moves towards
            the right answer from one prompt to the other; 1/2 for a model that no longer knows it.
            In contrast to the accuracy, a constant preference for one answer plays no part.
        p_knows_nothing: that pairs are told apart and confused with equal probability.
        independence: whether it still depends on what the full model answers.
        random_loss: the loss without a random circuit: the mean and its error over circuits.
        random_accuracy: the accuracy without a random circuit.
        n_random: the number of random circuits.
    """

    ablation: str
    loss: Estimate
    accuracy: Estimate
    told_apart: Estimate
    p_knows_nothing: PValue
    independence: Independence
    random_loss: Estimate
    random_accuracy: Estimate
    n_random: int


@dataclass(frozen=True)
class AgainstRandom:
    """A comparison of the circuit with random circuits of as many nodes at each hook point.

    Attributes:
        share: the share of random circuits that do at least as well as the circuit.
        p_value: that the circuit does better than at most 90 % of all random circuits.
    """

    share: float
    p_value: PValue


@dataclass(frozen=True)
class Necessity:
    """Whether the model needs the circuit, and how the circuit compares with random ones.

    Attributes:
        full_loss: the task loss of the full model, in nats.
        full_accuracy: the accuracy of the full model.
        mean: the model with the circuit's nodes held at their means.
        resample: the same with their activations on another prompt; None for a single pair.
        better: the share of pairs at which the circuit alone has a smaller loss than the model.
        p_equivalent: that the circuit and the model have the same chance to be better, within 0.1
            of 1/2. The circuit alone is not the model if this is small.
        sufficiency: random circuits whose loss alone is as near to the model's.
        partial_necessity: random circuits whose removal moves the loss as far from the model's.
        n_pairs: the number of pairs.
        n_random_pairs: the number of pairs, the first ones, on which circuits are compared.
    """

    full_loss: Estimate
    full_accuracy: Estimate
    mean: Without
    resample: Without | None
    better: Estimate
    p_equivalent: PValue
    sufficiency: AgainstRandom
    partial_necessity: AgainstRandom
    n_pairs: int
    n_random_pairs: int


@checked()
def necessity(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    ablation: Ablation = "mean",
    n_random: int = 30,
    n_random_pairs: int = 24,
    n_permutations: int = 199,
    batch_size: int = 256,
    seed: int = 0,
) -> Necessity:
    """Measure the model without the circuit, by two ablations, and compare it with random circuits.

    The tests are those of Shi et al. 2024 (arXiv 2410.13032), with the task loss as the score, and
    with pairs as data, since the two prompts of a pair depend on each other:

    - equivalence: P(the circuit is better than the model) is within 0.1 of 1/2;
    - independence: the scores without the circuit are independent of the model's, by HSIC;
    - sufficiency: the circuit's loss is nearer to the model's than that of 90 % of random circuits;
    - partial necessity: without the circuit the loss is further from the model's than without 90 %
      of random circuits.

    Args:
        ablation: the values at which all other nodes are held where a circuit is alone. Without a
            circuit, its nodes are at their means, and resampled.
        n_random: the number of random circuits; the last two tests need at least 29.
        n_random_pairs: circuits are compared with random ones on the first so many pairs.
        n_permutations: the number of permutations in the tests of independence.
        batch_size: the largest number of prompts to run at a time.
        seed: the seed of the random circuits, the permutations, and the prompts that are resampled.

    Raises:
        ConfigError: if a number is below its least value.
        CircuitError: if the circuit is of another model, or has no means or no nodes.
    """
    check(n_random >= 1, "n_random", n_random, "at least 1")
    check(n_random_pairs >= 1, "n_random_pairs", n_random_pairs, "at least 1")
    check(n_permutations >= 1, "n_permutations", n_permutations, "at least 1")
    check_measurable(circuit, model)
    data = data.partnered(seed)  # drawn once, so that all runs have the same
    runs = Runs(model, data, batch_size, ablation, seed)
    some_runs = Runs(model, data.first(n_random_pairs), batch_size, ablation, seed)
    full = runs.full()
    alone = runs.alone(circuit)
    random = random_circuits_like(circuit, n_random, seed)

    def without(ablation: Ablation, circuits: Sequence[Circuit]) -> list[PromptScores]:
        """The model without the circuit, and without each of these."""
        of_circuit = replace(runs, ablation=ablation).without(circuit)
        of_random = replace(some_runs, ablation=ablation)
        return [of_circuit, *[of_random.without(each) for each in circuits]]

    by_mean = without("mean", random)
    resample = None
    if data.partners is not None:
        resampled = without("resample", random[:MOST_RESAMPLED])
        resample = _without("resample", resampled, full, n_permutations, seed)
    return Necessity(
        full_loss=full.loss,
        full_accuracy=full.accuracy,
        mean=_without("mean", by_mean, full, n_permutations, seed),
        resample=resample,
        better=mean_of((alone.pair_losses < full.pair_losses).double()),
        p_equivalent=_p_equivalent(alone, full),
        sufficiency=_sufficiency([alone, *[some_runs.alone(each) for each in random]], full),
        partial_necessity=_partial_necessity(by_mean, full),
        n_pairs=data.n_pairs,
        n_random_pairs=some_runs.data.n_pairs,
    )


def _without(
    ablation: Ablation,
    runs: Sequence[PromptScores],
    full: PromptScores,
    n_permutations: int,
    seed: int,
) -> Without:
    """The record of the model without the circuit, of which the first run is."""
    run, *random = runs
    # The sum of both margins is by how much the difference of the logits moves between the prompts.
    moves = run.margins.view(-1, 2).sum(1).cpu()
    shares = (torch.sign(moves).double() + 1) / 2  # a pair that does not move counts as half
    n_told_apart = int((moves > 0).sum())
    n_moved = int((moves != 0).sum())
    hsic, p_independent = independence_test(
        full.margins.view(-1, 2), run.margins.view(-1, 2), n_permutations, seed
    )
    return Without(
        ablation=ablation,
        loss=run.loss,
        accuracy=run.accuracy,
        told_apart=mean_of(shares),
        p_knows_nothing=sign_test(n_told_apart, n_moved, "pairs"),
        independence=Independence(hsic, p_independent),
        random_loss=mean_of(torch.tensor([each.loss.value for each in random])),
        random_accuracy=mean_of(torch.tensor([each.accuracy.value for each in random])),
        n_random=len(random),
    )


def _p_equivalent(alone: PromptScores, full: PromptScores) -> PValue:
    n_better = int((alone.pair_losses < full.pair_losses).sum())
    n_worse = int((alone.pair_losses > full.pair_losses).sum())
    return sign_test(n_better, n_better + n_worse, "pairs", MARGIN)


def _sufficiency(runs: Sequence[PromptScores], full: PromptScores) -> AgainstRandom:
    """How many random circuits are as near to the model's loss as the circuit, which is first."""
    distance, *of_random = _distances(runs, full)
    n_worse = sum(each > distance for each in of_random)
    return _against_random(n_worse, len(of_random))


def _partial_necessity(runs: Sequence[PromptScores], full: PromptScores) -> AgainstRandom:
    """How many random circuits are missed as much as the circuit, which is first."""
    distance, *of_random = _distances(runs, full)
    n_missed_less = sum(each < distance for each in of_random)
    return _against_random(n_missed_less, len(of_random))


def _distances(runs: Sequence[PromptScores], full: PromptScores) -> list[float]:
    """How far the loss of each run is from the full model's.

    All are compared on the pairs of the last ones, those of random circuits, which are the first.
    """
    n_pairs = len(runs[-1].pair_losses)
    reference = full.first(n_pairs).loss.value
    return [abs(run.first(n_pairs).loss.value - reference) for run in runs]


def _against_random(n_worse: int, n_random: int) -> AgainstRandom:
    p_value = exceeds_most(n_worse, n_random, "random circuits", QUANTILE)
    return AgainstRandom(1 - n_worse / n_random, p_value)
