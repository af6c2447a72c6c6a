"""Runs of a model on the same prompts, with its answer to each of them."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.evaluation.estimates import Estimate, mean_of_pairs
from tl_sparse.evaluation.holding import holding_nodes
from tl_sparse.evaluation.running import RunContext, all_logits
from tl_sparse.evaluation.scores import Ablation
from tl_sparse.hooks import TLModel
from tl_sparse.tasks import TaskData, right_minus_wrong, task_loss_and_accuracy


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


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of a model on the same prompts; for the errors see `all_logits`.

    Attributes:
        model: the model.
        data: the prompts.
        batch_size: the largest number of prompts to run at a time.
        ablation: the values at which nodes are held; see `Ablation`.
        seed: the seed of partners in resample ablation, if the prompts have none yet.
    """

    model: TLModel
    data: TaskData
    batch_size: int
    ablation: Ablation = "mean"
    seed: int = 0

    def full(self) -> PromptScores:
        """The full model."""
        return self._scores(None)

    def alone(self, circuit: Circuit) -> PromptScores:
        """The circuit alone: all nodes outside it are held."""
        return self._scores(holding_nodes(circuit, self.model, self.ablation))

    def without(self, circuit: Circuit) -> PromptScores:
        """The model without the circuit: its nodes are held."""
        return self._scores(holding_nodes(circuit, self.model, self.ablation, inverted=True))

    def _scores(self, run_context: RunContext | None) -> PromptScores:
        logits = all_logits(self.model, self.data, self.batch_size, run_context, self.seed)
        losses, right = task_loss_and_accuracy(logits, self.data.correct)
        return PromptScores(losses, right, right_minus_wrong(logits, self.data.correct))
