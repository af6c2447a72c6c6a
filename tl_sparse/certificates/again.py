"""Repeating the search that found a circuit, with another seed, pairs or weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.config import check
from tl_sparse.errors import CircuitError, PruneError
from tl_sparse.evaluation import (
    Estimate,
    all_objective_losses,
    check_measurable,
    holding_nodes,
    mean_of_pairs,
    random_subsets,
    ready_for,
    without_nodes,
)
from tl_sparse.hooks import NodeMasks, NodeValues, TLModel
from tl_sparse.pruning import PruneConfig, Stage, find_circuit, recorded_config
from tl_sparse.tasks import Task, TaskData

#: Subsets are first tried on so many pairs; those that harm most there, on all pairs.
_PAIRS_TO_COMPARE = 24
_MOST_HARMFUL = 2


@dataclass(frozen=True)
class Found:
    """What a search has found. Losses are those of its objective, in nats, on held-out pairs.

    Attributes:
        full_loss: the loss of the full model.
        n_nodes: the number of nodes of the circuit; None, as in the following, if none was found.
        n_edges: its number of edges.
        loss: its loss.
        worst_loss: its loss under the worst of the random subsets of the other nodes that are left
            as they are in the model. Which is the worst is decided on a few of the pairs.
        empty_loss: the loss if no node is kept.
        not_found: why no circuit was found; empty if one was.
    """

    full_loss: Estimate
    n_nodes: int | None = None
    n_edges: int | None = None
    loss: Estimate | None = None
    worst_loss: Estimate | None = None
    empty_loss: Estimate | None = None
    not_found: str = ""


@dataclass(frozen=True)
class Search:
    """A search, and how what it finds is measured.

    Attributes:
        config: the settings of the search.
        with_edges: whether edges are pruned too.
        n_subsets: the number of random subsets of which the worst is reported.
        batch_size: the number of prompts to run at once.
        seed: the seed of the subsets, and of the partners in resample ablation.
    """

    config: PruneConfig
    with_edges: bool
    n_subsets: int
    batch_size: int
    seed: int

    def run(self, model: TLModel, task: Task, means: NodeValues) -> Circuit:
        """The circuit that the search finds.

        Raises:
            PruneError: if it finds none.
            TaskError, ConfigError, DataError, TokenizerError: if the task does not suit the search.
        """
        device = next(model.parameters()).device
        means = {name: mean.to(device) for name, mean in means.items()}
        stage: Stage = "edges" if self.with_edges else "nodes"
        return find_circuit(model, task, means, self.config, stage)

    def outcome(self, model: TLModel, task: Task, means: NodeValues, data: TaskData) -> Found:
        """What the search finds, measured on `data`; that it finds nothing is an outcome too."""
        try:
            circuit = self.run(model, task, means)
        except PruneError as error:
            return Found(self._full_loss(model, data), not_found=str(error))
        return self.measured(circuit, model, data)

    def measured(self, circuit: Circuit, model: TLModel, data: TaskData) -> Found:
        """The size and the losses of a circuit."""
        data = self._ready(model, data)  # once for all that follows
        empty = without_nodes(circuit)
        return Found(
            full_loss=self._full_loss(model, data),
            n_nodes=circuit.n_nodes,
            n_edges=circuit.n_edges(model),
            loss=mean_of_pairs(self.losses(circuit, model, data)),
            worst_loss=self._worst_loss(circuit, model, data),
            empty_loss=mean_of_pairs(self.losses(empty, model, data)),
        )

    def losses(
        self, circuit: Circuit, model: TLModel, data: TaskData, subset: NodeMasks | None = None
    ) -> Float[Tensor, " prompt"]:
        """The loss of each prompt, with the nodes in `subset` as they are in the model."""
        data = self._ready(model, data)
        under = holding_nodes(circuit, model, self.config.ablation, left=subset)
        return all_objective_losses(
            model, data, self.config.objective, self.batch_size, under, self.seed
        )

    def _worst_loss(self, circuit: Circuit, model: TLModel, data: TaskData) -> Estimate:
        # Searches draw their own subsets with seeds from 0, so these are others.
        subsets = random_subsets(circuit, self.n_subsets, seed=-1 - self.seed)
        some_pairs = data.first(_PAIRS_TO_COMPARE)
        losses = torch.empty(self.n_subsets)
        for i, subset in enumerate(subsets):
            losses[i] = self.losses(circuit, model, some_pairs, subset).mean()
        under_worst = []
        for i in losses.argsort(descending=True)[:_MOST_HARMFUL].tolist():
            under_worst.append(mean_of_pairs(self.losses(circuit, model, data, subsets[i])))
        return max(under_worst, key=lambda loss: loss.value)

    def _full_loss(self, model: TLModel, data: TaskData) -> Estimate:
        data = self._ready(model, data)
        losses = all_objective_losses(model, data, self.config.objective, self.batch_size)
        return mean_of_pairs(losses)

    def _ready(self, model: TLModel, data: TaskData) -> TaskData:
        return ready_for(self.config.objective, model, data, self.batch_size)


def search_of(
    circuit: Circuit,
    model: TLModel,
    n_subsets: int,
    batch_size: int,
    seed: int,
) -> Search:
    """The search that found a circuit, by the settings that the circuit records.

    Raises:
        CircuitError: if the circuit is of another model, has no means or no nodes, or records no
            settings of a search.
        ConfigError: if `n_subsets` or `batch_size` is below 1, or `seed` below 0.
    """
    check(n_subsets >= 1, "n_subsets", n_subsets, "at least 1")
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    check(seed >= 0, "seed", seed, "at least 0")
    check_measurable(circuit, model)
    if not circuit.measured.get("config"):
        raise CircuitError(
            "the circuit does not record the settings with which it was found, so its search "
            "cannot be repeated; circuits that `prune` finds have them in measured['config']"
        )
    with_edges = circuit.edge_set is not None
    return Search(recorded_config(circuit), with_edges, n_subsets, batch_size, seed)
