"""What a set of nodes must pass to be a circuit."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.evaluation import (
    Estimate,
    all_objective_losses,
    holding_nodes,
    mean_of_pairs,
    random_subsets,
    score,
)
from tl_sparse.hooks import NodeMasks, TLModel
from tl_sparse.pruning.config import PruneConfig
from tl_sparse.pruning.seeds import seed_of_batch
from tl_sparse.tasks import TaskData

#: A quick test tries only so many subsets: those that have made circuits fail most recently.
_QUICK_SUBSETS = 3
#: A circuit fails clearly if its loss on a few pairs is larger than the target by this factor.
_CLEARLY = 1.5
#: A thorough test also tries so many others for each subset of the criterion. With one, a circuit
#: passed whose loss the worst of 64 subsets then brought to 0.26, with a target of 0.15.
_OTHERS_PER_SUBSET = 2
#: For each subset of the criterion, there are so many others in all.
_BATCHES_OF_OTHERS = 5
#: So many pairs are a few.
_FEW = 24
#: Under a subset, of which there are many, so many are. They often decide whether it is withstood.
_FEW_PER_SUBSET = 12
#: They decide if their mean loss is so many of its standard errors away from the target.
_STANDARD_ERRORS = 3


class Criterion:
    """Whether circuits of a model are sufficient, and necessary if that is asked for.

    A circuit is sufficient if it reaches the target loss while all other nodes are held, and while
    all but those in each of `subsets` are. It is necessary if the accuracy of the model without it
    is at most `ablated_accuracy`; if that is 1, this is not tested.

    Attributes:
        model: the model.
        config: the settings of pruning.
        subsets: masks of nodes that are left as they are if they are outside the circuit. Those
            that have made a circuit fail most recently come first.
        most_subsets: the largest number of them. If another one joins, the last one leaves that is
            not required.
        required: those that never leave.
        drawn: the subsets at first, some of which may have left.
    """

    def __init__(
        self,
        model: TLModel,
        config: PruneConfig,
        subsets: Iterable[NodeMasks] = (),
        others: Iterable[NodeMasks] = (),
    ) -> None:
        """A criterion of these subsets.

        Args:
            others: further subsets, which are tried one after another.
        """
        self.model = model
        self.config = config
        self.subsets = list(subsets)
        self.most_subsets = max(len(self.subsets), config.subsets)
        self.required: list[NodeMasks] = []
        self.drawn = tuple(self.subsets)
        self._others = iter(others)

    @classmethod
    def of_config(cls, circuit: Circuit, model: TLModel, config: PruneConfig) -> "Criterion":
        """The criterion with the random subsets that `config` asks for, if any.

        Args:
            circuit: any circuit with the hook points of the search.
        """
        if config.robust == "none":
            return cls(model, config)
        subsets = random_subsets(circuit, config.subsets, seed_of_batch(config.seed, 0))
        return cls(model, config, subsets, _other_subsets(circuit, config))

    def fresh_subsets(self, circuit: Circuit, i: int) -> list[NodeMasks]:
        """The random subsets of the i-th round in which a robust circuit is tried at last."""
        if self.config.fresh_subsets == 0:
            return []
        seed = seed_of_batch(self.config.seed, 1 + _BATCHES_OF_OTHERS + i)
        return random_subsets(circuit, self.config.fresh_subsets, seed)

    def with_target(self, target_loss: float) -> "Criterion":
        """The criterion with another target loss, and with the same subsets, also in future."""
        other = copy.copy(self)
        other.config = replace(self.config, target_loss=target_loss)
        return other

    def add(self, subset: NodeMasks) -> None:
        """Add a subset that all circuits must withstand, besides those that there are."""
        self.most_subsets += 1
        self.required.append(subset)
        self._join(subset)

    def begin_again(self) -> None:
        """Return to the subsets at first, besides those that are required."""
        self.subsets[:] = [*self.required, *self.drawn]

    def _join(self, subset: NodeMasks) -> None:
        # In place, because criteria with other targets have the same list.
        self.subsets.insert(0, subset)
        if len(self.subsets) <= self.most_subsets:
            return
        for i in reversed(range(len(self.subsets))):
            if not any(self.subsets[i] is each for each in self.required):
                del self.subsets[i]
                return

    def loss(self, circuit: Circuit, data: TaskData, left: NodeMasks | None = None) -> float:
        """The loss of the circuit, with the nodes in `left` as they are in the model."""
        return float(self.losses(circuit, data, left).mean())

    def losses(
        self, circuit: Circuit, data: TaskData, left: NodeMasks | None = None
    ) -> Float[Tensor, " prompt"]:
        """The same, for each prompt."""
        under = holding_nodes(circuit, self.model, self.config.ablation, left=left)
        return all_objective_losses(
            self.model, data, self.config.objective, self.config.batch_size, under
        )

    def ablated_accuracy(self, circuit: Circuit, data: TaskData) -> float:
        """The accuracy of the model without the circuit."""
        without = holding_nodes(circuit, self.model, self.config.ablation, inverted=True)
        return score(self.model, data, self.config.batch_size, without).accuracy

    def passes(self, circuit: Circuit, data: TaskData, n_others: int | None = None) -> bool:
        """Whether the circuit is sufficient and necessary on these pairs.

        Args:
            n_others: the number of other subsets that are tried too, by default twice as many as
                the search has. With 0, the answer is the same each time.
        """
        if not self._passes(circuit, data, len(self.subsets)):
            return False
        n_others = _OTHERS_PER_SUBSET * self.config.subsets if n_others is None else n_others
        return self._withstands_others(circuit, data, n_others)

    def passes_quickly(self, circuit: Circuit, data: TaskData) -> bool:
        """The same in less time: only some of the subsets are tried, and a circuit that clearly
        fails on a few of the pairs is not tried on the others.
        """
        # Where there are subsets, the first one shows it on even fewer pairs.
        if not self.subsets and self.fails_clearly(circuit, data):
            return False
        if not self._passes(circuit, data, _QUICK_SUBSETS):
            return False
        return self._withstands_others(circuit, data, 1)

    def fails_clearly(self, circuit: Circuit, data: TaskData) -> bool:
        """Whether the loss is far above the target on a few of the pairs already.

        Where there are no more than a few, it is not measured: the test itself takes no longer.
        """
        if data.n_pairs <= _FEW:
            return False
        return not self.loss(circuit, few_of(data)) <= _CLEARLY * self.config.target_loss

    @property
    def all_subsets(self) -> list[NodeMasks]:
        """The subsets, and those that have left."""
        present = {id(subset) for subset in self.subsets}
        return [*self.subsets, *[subset for subset in self.drawn if id(subset) not in present]]

    @property
    def hardest(self) -> NodeMasks | None:
        """The subset that has made a circuit fail most recently, if there are any."""
        return self.subsets[0] if self.subsets else None

    @property
    def quick_conditions(self) -> list[NodeMasks | None]:
        """What is left in the runs of a quick test: nothing (None), and the first subsets."""
        return [None, *self.subsets[:_QUICK_SUBSETS]]

    def _passes(self, circuit: Circuit, data: TaskData, n_subsets: int) -> bool:
        # Where there are subsets, one of them fails first as a rule, and on fewer pairs.
        if not self._withstands_first(circuit, data, n_subsets):
            return False
        # A loss that is no number is below no target, nor above it.
        if not self.loss(circuit, data) <= self.config.target_loss:
            return False
        if self.config.ablated_accuracy == 1:
            return True
        return self.ablated_accuracy(circuit, data) <= self.config.ablated_accuracy

    def _withstands_others(self, circuit: Circuit, data: TaskData, n_subsets: int) -> bool:
        """Whether the circuit withstands the next of the other subsets.

        One that makes it fail joins those of the criterion. Otherwise, a circuit from which much is
        removed would in the end withstand the same few subsets, and no others. The one that made a
        circuit fail least recently leaves, or the more circuits a search tries, the more subsets
        they would have to withstand, and the longer would each test take.
        """
        some_pairs = evenly(data, self.config.subset_pairs)
        for subset in itertools.islice(self._others, n_subsets):
            if not self.withstands(circuit, some_pairs, subset):
                self._join(subset)
                return False
        return True

    def _withstands_first(self, circuit: Circuit, data: TaskData, n_subsets: int) -> bool:
        """Whether the circuit reaches the target loss under each of the first subsets.

        They are tried on `subset_pairs` pairs, since there are many of them.
        """
        some_pairs = evenly(data, self.config.subset_pairs)
        for i, subset in enumerate(self.subsets[:n_subsets]):
            if not self.withstands(circuit, some_pairs, subset):
                self.subsets.insert(0, self.subsets.pop(i))
                return False
        return True

    def withstands(self, circuit: Circuit, data: TaskData, subset: NodeMasks) -> bool:
        """Whether the circuit reaches the target loss on these pairs, with the subset left.

        Most circuits are far below the target under most subsets, or far above. A few of the pairs
        then show it, in a fraction of the time of all.
        """
        target = self.config.target_loss
        few, others = _few_and_others(data)
        losses = self.losses(circuit, few, subset)
        if others is not None and _is_in_doubt(mean_of_pairs(losses), target):
            losses = torch.cat([losses, self.losses(circuit, others, subset)])
        return float(losses.mean()) <= target


def _is_in_doubt(loss: Estimate, target: float) -> bool:
    """Whether the loss may be on the other side of the target, as far as its error tells."""
    if loss.standard_error is None:
        return True  # it is of a single pair
    return abs(loss.value - target) <= _STANDARD_ERRORS * loss.standard_error


def _other_subsets(circuit: Circuit, config: PruneConfig) -> Iterator[NodeMasks]:
    """Random subsets other than those of the criterion, the same ones over and over.

    With ever new ones, the criterion would come to hold the worst of thousands: the more circuits
    a search tries, the larger the one that it finds would be.
    """
    for batch in itertools.cycle(range(1, 1 + _BATCHES_OF_OTHERS)):
        yield from random_subsets(circuit, config.subsets, seed_of_batch(config.seed, batch))


def evenly(data: TaskData, n_pairs: int) -> TaskData:
    """`n_pairs` of the pairs, or all if there are fewer.

    They are at even intervals, so that of pairs that are sorted by their loss, they represent all.
    """
    return data.pairs(_even_positions(data.n_pairs, n_pairs))


def _even_positions(n_pairs: int, n_chosen: int) -> list[int]:
    n_chosen = min(n_chosen, n_pairs)
    return [i * n_pairs // n_chosen for i in range(n_chosen)]


def few_of(data: TaskData) -> TaskData:
    """Enough of the pairs to see roughly what the loss is."""
    return evenly(data, _FEW)


def few_per_subset(data: TaskData) -> TaskData:
    """The same under one of several subsets."""
    return evenly(data, _FEW_PER_SUBSET)


def _few_and_others(data: TaskData) -> tuple[TaskData, TaskData | None]:
    """`few_per_subset` and the other pairs; all and None if there are not twice as many."""
    if data.n_pairs < 2 * _FEW_PER_SUBSET:
        return data, None
    few = _even_positions(data.n_pairs, _FEW_PER_SUBSET)
    others = sorted(set(range(data.n_pairs)).difference(few))
    return data.pairs(few), data.pairs(others)


def representative(circuit: Circuit, criterion: Criterion, data: TaskData) -> TaskData:
    """A sample of `cleanup_pairs` pairs, on which many circuits can be tested quickly.

    The pairs are sorted by the circuit's loss and sampled at even intervals, so that its mean loss
    over the sample is close to its mean loss over all pairs.
    """
    by_loss = criterion.losses(circuit, data).view(-1, 2).mean(1).argsort()
    n_chosen = min(criterion.config.cleanup_pairs, data.n_pairs)
    positions = (torch.arange(n_chosen, device=by_loss.device) + 0.5) * data.n_pairs / n_chosen
    return data.pairs(by_loss[positions.long()])


@dataclass(frozen=True)
class SearchData:
    """The pairs of a task that decide which nodes a circuit loses, or exchanges for others.

    Attributes:
        train: the pairs on which the effects of nodes are estimated.
        some: the pairs on which circuits are tried; see `representative`.
        selection: the pairs on which a circuit must pass.
    """

    train: TaskData
    some: TaskData
    selection: TaskData

    @classmethod
    def around(
        cls, circuit: Circuit, criterion: Criterion, train: TaskData, selection: TaskData
    ) -> "SearchData":
        """The pairs with which a search goes on from this circuit."""
        return cls(train, representative(circuit, criterion, selection), selection)
