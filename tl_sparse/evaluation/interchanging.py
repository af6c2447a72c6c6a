"""Interchange: values of a circuit's nodes are taken from other prompts (Geiger et al. 2021,
arXiv 2106.02997).

A value from a prompt with the same answer should change nothing. One from a prompt with the other
answer should move the answer under the circuit as it does in the full model.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, holding_reads
from tl_sparse.config import check
from tl_sparse.errors import ArgumentError
from tl_sparse.evaluation.agreement import ROUNDING
from tl_sparse.evaluation.baselines import check_measurable, random_circuits_like
from tl_sparse.evaluation.estimates import Estimate, correlation, mean_of_pairs
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.like_model import groups_by_answer
from tl_sparse.evaluation.running import RunContext, prompt_batches, task_logits
from tl_sparse.evaluation.scores import Ablation
from tl_sparse.hooks import NodeMasks, TLModel, ablating, recording
from tl_sparse.tasks import TaskData, right_minus_wrong

#: A correlation over nodes needs at least so many.
LEAST_NODES = 3


@dataclass(frozen=True)
class Change:
    """What values from other prompts change in one run.

    Attributes:
        change: the mean change of the logit difference, right answer minus wrong one.
        size: the mean absolute change. Where the other prompts have the same answer, this is the
            one to read: changes up and down cancel in the mean, since every prompt gives and takes.
        flips: the share of prompts at which the preferred answer changes.
    """

    change: Estimate
    size: Estimate
    flips: Estimate

    @classmethod
    def between(cls, before: Float[Tensor, " prompt"], after: Float[Tensor, " prompt"]) -> "Change":
        """The change from some logit differences, right minus wrong, to others."""
        difference = after - before
        flips = (before > 0) != (after > 0)
        return cls(
            change=mean_of_pairs(difference),
            size=mean_of_pairs(difference.abs()),
            flips=mean_of_pairs(flips.float()),
        )


@dataclass(frozen=True)
class Exchange:
    """The same values exchanged in the full model and under the circuit.

    Attributes:
        model: what they change in the full model.
        circuit: what they change under the circuit.
    """

    model: Change
    circuit: Change


@dataclass(frozen=True)
class NodeInterchange:
    """What the value of one node moves.

    Attributes:
        node: the name of the node.
        other_answer: its value is that of the other prompt of the pair.
        same_answer: its value is that of a prompt of another pair with the same answer; None if
            some prompt has none.
    """

    node: str
    other_answer: Exchange
    same_answer: Exchange | None


@dataclass(frozen=True)
class Interchange:
    """What values from other prompts move, in the full model and under the circuit.

    Attributes:
        nodes: each kept node alone, in the order of the forward pass.
        all_nodes: all kept nodes at once.
        everything: what would change if everything were taken from the other prompt of the pair,
            as a measure for the others: the other prompt's run itself.
        random: for each draw, as many random nodes at each hook point, at once, taken from the
            other prompt of the pair in the full model.
        correlation: the correlation over nodes of the circuit's change with the model's, for values
            from the other answer. Its standard error is the asymptotic one. None if it cannot be
            told; see `no_correlation`.
        ablation: the values at which the other nodes were held under the circuit.
        n_pairs: the number of pairs of prompts.
        no_correlation: why `correlation` is None; else empty.
        no_same_answer: why there are no values from prompts with the same answer; else empty.
    """

    nodes: list[NodeInterchange]
    all_nodes: NodeInterchange
    everything: Exchange
    random: list[Change]
    correlation: Estimate | None
    ablation: str
    n_pairs: int
    no_correlation: str = ""
    no_same_answer: str = ""


@dataclass(frozen=True)
class _Margins:
    """Logit differences, right minus wrong, of one kind of donors.

    Attributes:
        model: `[prompt, set]`, in the full model: without any exchange, with each node alone, with
            all of them, and with each set of random nodes.
        circuit: the same under the circuit, without the random sets.
    """

    model: Float[Tensor, "prompt set"]
    circuit: Float[Tensor, "prompt set"]


@checked("ablation")
@torch.no_grad()
def interchange(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    ablation: Ablation = "mean",
    n_pairs: int = 24,
    n_random: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> Interchange:
    """Take values of the circuit's nodes from other prompts, in the model and under the circuit.

    Under the circuit, they are the values that the other prompt has under it. Values are taken at
    all positions, aligned from the end of the prompts: the last position gets the value of the
    other prompt's last, and so on. Where the other prompt is shorter, the value of its second
    position stands for those before it; the first position gets that of the first. The other
    prompts with the same answer are, as far as possible, of the same length.

    Nodes before attention act where their token stands, which in another pair may be elsewhere: a
    value that a head then looks for in vain changes the answer in the model, too. So read what the
    circuit changes beside what the model changes, never alone.

    Args:
        data: the prompts of the task.
        ablation: the values at which the other nodes are held.
        n_pairs: at most so many pairs are used, the first ones: each node takes four runs on them.
        n_random: the number of draws of random nodes.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of the random nodes, of the prompts with the same answer, and of partners in
            resample ablation.

    Raises:
        CircuitError: if `model` is not the circuit's model, or the circuit has no means or nodes.
        ConfigError: for an unknown `ablation`, `n_pairs` below 1, or a negative `n_random`.
        TaskError: if there is a single pair, although `ablation` is "resample".
        UnsupportedError: if the model sees padding, and prompts differ in length.
    """
    check_measurable(circuit, model)
    check(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
    check(n_random >= 0, "n_random", n_random, "at least 0")
    data = data.first(n_pairs).partnered(seed)
    random = [each.kept for each in random_circuits_like(circuit, n_random, seed)]
    runs = _Runs(circuit, model, holding_nodes(circuit, model, ablation), random)

    other = runs.margins(data, other_of_pair(data), batch_size)
    same_donors = _same_answer(data, seed)
    same = None
    if same_donors is not None:
        same = runs.margins(data, same_donors, batch_size)
    nodes = []
    names = [*map(str, circuit.nodes), "all"]
    for i, name in enumerate(names):
        of_same = None if same is None else _exchange(same, i)
        nodes.append(NodeInterchange(name, _exchange(other, i), of_same))
    *single, all_nodes = nodes
    over_nodes, no_correlation = _correlation_over_nodes(single)
    return Interchange(
        nodes=single,
        all_nodes=all_nodes,
        everything=Exchange(_everything(other.model[:, 0]), _everything(other.circuit[:, 0])),
        random=[_change(other.model, len(names) + i) for i in range(n_random)],
        correlation=over_nodes,
        ablation=ablation,
        n_pairs=data.n_pairs,
        no_correlation=no_correlation,
        no_same_answer="" if same else "some prompts are the only ones with their answers",
    )


# --- which prompts give their values


def other_of_pair(data: TaskData) -> Int[Tensor, " prompt"]:
    """For each prompt, the row of the other prompt of its pair."""
    rows = torch.arange(len(data.prompts), device=data.last.device)
    return rows.view(-1, 2).flip(1).flatten()


def _same_answer(data: TaskData, seed: int) -> Int[Tensor, " prompt"] | None:
    """For each prompt, the row of another one with the same two answers and the same right one.

    Within each group, prompts in order of their length, at random among equals, take from the next
    one. None if a prompt is alone in its group.
    """
    groups, n_groups = groups_by_answer(data)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(data.prompts), generator=generator).to(data.last.device)
    by_length = shuffled[data.last[shuffled].argsort(stable=True)]
    donors = torch.empty_like(by_length)
    for group in range(n_groups):
        rows = by_length[groups[by_length] == group]
        if len(rows) < 2:
            return None
        donors[rows] = torch.cat([rows[1:], rows[-2:-1]])
    return donors


def _rows(data: TaskData, rows: Int[Tensor, " prompt"]) -> TaskData:
    """The prompts in these rows, which need not be pairs."""
    return replace(
        data,
        prompts=tuple(data.prompts[row] for row in rows.tolist()),
        tokens=data.tokens[rows],
        last=data.last[rows],
        candidates=data.candidates[rows],
        correct=data.correct[rows],
        partners=data.partners and data.partners.rows(rows),
    )


def _aligned_positions(data: TaskData, donors: TaskData) -> Int[Tensor, "prompt pos"]:
    """For each position of each prompt, the position of its donor that gives the value there."""
    positions = torch.arange(int(data.last.max()) + 1, device=data.last.device)
    last = data.last[:, None]
    donor_last = donors.last[:, None]
    aligned = positions + donor_last - last
    aligned = aligned.clamp(min=1).minimum(donor_last)
    return torch.where(positions == 0, 0, aligned)


@checked()
def from_other_of_pair(
    activation: Float[Tensor, "prompt pos *node"], data: TaskData
) -> Float[Tensor, "prompt pos *node"]:
    """For each prompt, the activation on the other prompt of its pair, aligned from the end.

    Args:
        activation: the activation on the prompts of `data`, at all positions up to the last.
        data: the prompts.

    Raises:
        ArgumentError: if the activation has another number of prompts or positions.
    """
    expected = [len(data.prompts), int(data.last.max()) + 1]
    if list(activation.shape[:2]) != expected:
        raise ArgumentError(
            f"an activation on these prompts must begin with {expected} prompts and positions, not "
            f"{list(activation.shape[:2])}"
        )
    rows = other_of_pair(data)
    positions = _aligned_positions(data, _rows(data, rows))
    return activation[rows[:, None], positions]


# --- running with exchanged values


@dataclass(frozen=True)
class _Runs:
    """The runs of a model, and of its circuit, with values from other prompts."""

    circuit: Circuit
    model: TLModel
    under_circuit: RunContext
    random: Sequence[NodeMasks]

    def margins(
        self, data: TaskData, donor_rows: Int[Tensor, " prompt"], batch_size: int
    ) -> _Margins:
        """The logit differences if each prompt takes values from the prompt in its donor row."""
        of_circuit = [*_single_nodes(self.circuit.kept), self.circuit.kept]
        of_model = [*of_circuit, *self.random]
        rows = []
        model_margins = []
        circuit_margins = []
        for batch in prompt_batches(self.model, data, batch_size):
            batch_rows = (2 * batch.pairs[:, None] + torch.tensor([0, 1]).to(batch.pairs)).flatten()
            donors = _rows(data, donor_rows[batch_rows])
            rows.append(batch_rows)
            model_margins.append(self._batch_margins(_as_it_is, batch.data, donors, of_model))
            circuit_margins.append(
                self._batch_margins(self.under_circuit, batch.data, donors, of_circuit)
            )
        in_order = torch.cat(rows).argsort()
        return _Margins(torch.cat(model_margins)[in_order], torch.cat(circuit_margins)[in_order])

    def _batch_margins(
        self, context: RunContext, data: TaskData, donors: TaskData, sets: Sequence[NodeMasks]
    ) -> Float[Tensor, "prompt set"]:
        """The logit differences without any exchange, and with that of each set of nodes."""
        aligned = _aligned_positions(data, donors)
        by_row = torch.arange(len(aligned), device=aligned.device)[:, None]
        with (
            context(donors),
            holding_reads(self.model),
            recording(self.model, self.circuit.kept) as activations,
        ):
            task_logits(self.model, donors)
        values = {name: recorded[by_row, aligned] for name, recorded in activations.items()}
        with context(data), holding_reads(self.model):
            margins = [right_minus_wrong(task_logits(self.model, data), data.correct)]
            for nodes in sets:
                with ablating(self.model, nodes, values):
                    margins.append(right_minus_wrong(task_logits(self.model, data), data.correct))
        return torch.stack(margins, dim=1)


def _as_it_is(data: TaskData) -> AbstractContextManager[None]:
    """The context of the full model."""
    return nullcontext()


def _single_nodes(kept: NodeMasks) -> list[NodeMasks]:
    """For each kept node, in the order of the forward pass, the mask of it alone."""
    single: list[NodeMasks] = []
    for name, mask in kept.items():
        for index in mask.flatten().nonzero()[:, 0].tolist():
            alone = torch.zeros_like(mask)
            alone.view(-1)[index] = True
            single.append({name: alone})
    return single


# --- what changes


def _exchange(margins: _Margins, i: int) -> Exchange:
    """What the exchange of the set of nodes `i` changes."""
    return Exchange(_change(margins.model, i), _change(margins.circuit, i))


def _change(margins: Float[Tensor, "prompt set"], i: int) -> Change:
    return Change.between(margins[:, 0], margins[:, 1 + i])


def _everything(margins: Float[Tensor, " prompt"]) -> Change:
    """What changes if the run is that of the other prompt of the pair.

    There, the right answer is this prompt's wrong one.
    """
    return Change.between(margins, -margins.view(-1, 2).flip(1).flatten())


def _correlation_over_nodes(nodes: Sequence[NodeInterchange]) -> tuple[Estimate | None, str]:
    """The correlation of the changes under the circuit and in the model; or None, and why."""
    of_model = [node.other_answer.model.change.value for node in nodes]
    of_circuit = [node.other_answer.circuit.change.value for node in nodes]
    return correlation_of_changes(of_model, of_circuit, ("in the model", "under the circuit"))


@checked()
def correlation_of_changes(
    first: Sequence[float], second: Sequence[float], places: tuple[str, str]
) -> tuple[Estimate | None, str]:
    """The correlation over nodes of what they change in two places; or None, and why.

    Args:
        first: the change of the logit difference by each node, in the first place.
        second: the same in the second place.
        places: which places these are, for the text.

    Raises:
        ArgumentError: if the numbers of changes differ.
    """
    if len(first) != len(second):
        raise ArgumentError(f"{len(first)} changes cannot be compared with {len(second)}")
    if len(first) < LEAST_NODES:
        return None, f"the circuit has fewer than {LEAST_NODES} nodes"
    changes = torch.tensor([first, second], dtype=torch.float64)
    for of_place, place in zip(changes, places, strict=True):
        if float(of_place.std()) <= ROUNDING * float(of_place.abs().max()):
            return None, f"all nodes change the logit difference alike {place}"
    return correlation(changes[0], changes[1]), ""
