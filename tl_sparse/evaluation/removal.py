"""What the removal of nodes and edges changes, measured pair by pair."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit, Edge, Node
from tl_sparse.evaluation.estimates import Estimate, mean_of_pairs
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.running import RunContext, all_logits
from tl_sparse.hooks import TLModel, is_sparse_model
from tl_sparse.tasks import TaskData, task_loss_and_accuracy


@dataclass(frozen=True, eq=False)
class PromptScores:
    """The answers of one run to each prompt; prompts 2i and 2i + 1 are pair i.

    Attributes:
        losses: the task loss at each prompt, in nats.
        right: whether the right answer has the larger logit.
        margins: the logit of the right answer minus that of the wrong one.
    """

    losses: Float[Tensor, " prompt"]
    right: Bool[Tensor, " prompt"]
    margins: Float[Tensor, " prompt"]

    @property
    def loss(self) -> Estimate:
        """The task loss in nats."""
        return mean_of_pairs(self.losses)

    @property
    def accuracy(self) -> Estimate:
        """The share of prompts at which the right answer has the larger logit."""
        return mean_of_pairs(self.right.float())

    @property
    def pair_losses(self) -> Float[Tensor, " pair"]:
        """The task loss of each pair."""
        return self.losses.view(-1, 2).mean(1)

    def first(self, n_pairs: int) -> "PromptScores":
        """The scores of the first `n_pairs` pairs."""
        n_prompts = 2 * n_pairs
        return PromptScores(
            self.losses[:n_prompts], self.right[:n_prompts], self.margins[:n_prompts]
        )


def prompt_scores(
    model: TLModel,
    data: TaskData,
    batch_size: int,
    run_context: RunContext | None = None,
    seed: int = 0,
) -> PromptScores:
    """The answers of `model` to each prompt; for the arguments and errors see `all_logits`."""
    logits = all_logits(model, data, batch_size, run_context, seed)
    losses, right = task_loss_and_accuracy(logits, data.correct)
    of_right = logits.gather(1, data.correct[:, None])[:, 0]
    of_wrong = logits.gather(1, 1 - data.correct[:, None])[:, 0]
    return PromptScores(losses, right, of_right - of_wrong)


def first_pairs(data: TaskData, n_pairs: int) -> TaskData:
    """The first `n_pairs` pairs, or all of them if there are fewer."""
    return data.pairs(range(min(n_pairs, data.n_pairs)))


def removable_parts(circuit: Circuit, model: TLModel) -> list[Node | Edge]:
    """The nodes of the circuit and, in models of this package, its edges; no others can be cut."""
    if not is_sparse_model(model):
        return list(circuit.nodes)
    return [*circuit.nodes, *circuit.edges(model)]


@checked()
def removal_rises(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    parts: Sequence[Node | Edge],
    batch_size: int = 256,
    progress: bool = False,
) -> Float[Tensor, "part pair"]:
    """By how much the circuit's loss at each pair rises when one of its nodes or edges is removed.

    A node is removed by holding it at its mean, an edge by cutting it: its contribution is held at
    its mean. This does not check that `model` is the circuit's model.

    Args:
        parts: the nodes and edges, each of which is removed alone.
        progress: show a progress bar.

    Raises:
        CircuitError: if a part is not in the circuit, or the circuit has no means.
        PruneError: if an edge is to be cut in a model that is not of this package.
    """
    whole = prompt_scores(model, data, batch_size, holding_nodes(circuit, model)).pair_losses
    rises = []
    for part in tqdm(parts, "removing parts", disable=not progress, unit=" parts"):
        rest = circuit.without([part], model)
        losses = prompt_scores(model, data, batch_size, holding_nodes(rest, model)).pair_losses
        rises.append(losses - whole)
    return torch.stack(rises) if rises else whole.new_zeros(0, len(whole))


@checked()
def effects(
    circuit: Circuit,
    model: TLModel,
    data: TaskData,
    batch_size: int = 256,
    progress: bool = False,
) -> dict[Node | Edge, float]:
    """The effect of each node and edge of the circuit: the mean of `removal_rises` over the pairs.

    Edges can only be cut in models of this package, and have no entry for others.

    Raises:
        CircuitError: if `model` is not the circuit's model.
    """
    circuit.check_model(model)
    parts = removable_parts(circuit, model)
    rises = removal_rises(circuit, model, data, parts, batch_size, progress)
    return dict(zip(parts, rises.double().mean(1).tolist(), strict=True))
