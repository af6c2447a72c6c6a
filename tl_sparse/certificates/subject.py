"""What a certificate is about: a circuit with its model and prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

from tl_sparse.certificates.efforts import Effort
from tl_sparse.circuits import Circuit, circuit_task
from tl_sparse.config import MAX_SEED
from tl_sparse.errors import DataError, TaskError, counted
from tl_sparse.evaluation import Ablation
from tl_sparse.hooks import TLModel
from tl_sparse.pruning import PruneConfig, as_corpus, heldout_pairs, recorded_config, task_splits
from tl_sparse.tasks import Task, TaskData

#: Adversaries need so many pairs to learn on.
LEAST_TRAINING_PAIRS = 4


def _unheard(what: str) -> None:
    """Nobody wants to know what is measured."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A circuit, its model, and what both are measured on.

    Attributes:
        circuit: the circuit.
        model: its model.
        task: the task of the prompts.
        data: the held-out pairs, none of which was used to find the circuit.
        corpus: the first rows of the corpus; None if there is no text.
        whole_corpus: all rows, over which controls take means.
        no_corpus: why there is none; else empty.
        config: the settings with which the circuit was found; the defaults if it records none.
        effort: how much is measured.
        batch_size: the largest number of prompts to run at a time.
        seed: the seed of everything random.
        tell: the function that a section with several long steps tells which one it takes.
    """

    circuit: Circuit
    model: TLModel
    task: Task
    data: TaskData
    corpus: Int[Tensor, "seq pos"] | None
    whole_corpus: Int[Tensor, "seq pos"] | None
    no_corpus: str
    config: PruneConfig
    effort: Effort
    batch_size: int
    seed: int
    tell: Callable[[str], object] = _unheard

    @property
    def ablation(self) -> Ablation:
        """The values at which the search for the circuit held nodes."""
        return self.config.ablation

    @property
    def target_loss(self) -> float:
        """The task loss that the circuit must reach.

        It is the target of the search, or the paper's if the search had another objective.
        """
        is_task_loss = self.config.objective == "candidates"
        return self.config.target_loss if is_task_loss else PruneConfig().target_loss

    @property
    def adversary_seed(self) -> int:
        """The seed of adversaries, which the search has not used: it trained some with small ones.

        Each restart has the next seed, so it is not the largest.
        """
        return MAX_SEED // 2 + self.seed

    @cached_property
    def training(self) -> TaskData:
        """Pairs on which adversaries learn; none of them is in `data`.

        Raises:
            TaskError: if the task has too few pairs.
        """
        training, _, _ = task_splits(self.model, self.task, self.config)
        judged = set(self.data.prompts)
        rows = []
        for row in range(training.n_pairs):
            if judged.isdisjoint(training.prompts[2 * row : 2 * row + 2]):
                rows.append(row)
        if len(rows) < LEAST_TRAINING_PAIRS:
            raise TaskError(
                f"task {self.task.name} has {counted(len(rows), 'pair')} beside the held-out ones, "
                f"and adversaries need at least {LEAST_TRAINING_PAIRS} to learn on"
            )
        return training.pairs(rows)


def subject_of(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None,
    corpus: Int[Tensor, "seq pos"] | None,
    effort: Effort,
    batch_size: int,
    seed: int,
) -> Subject:
    """Collect what the sections measure on.

    Raises:
        CircuitError, TaskError, DataError, TokenizerError: as for `heldout_pairs`.
    """
    chosen = circuit_task(circuit, task)
    config = recorded_config(circuit)
    data = heldout_pairs(circuit, model, task)
    rows, no_corpus = _rows(model, corpus)
    return Subject(
        circuit=circuit,
        model=model,
        task=chosen,
        data=data.first(effort.pairs),
        corpus=None if rows is None else rows[: effort.corpus_rows],
        whole_corpus=rows,
        no_corpus=no_corpus,
        config=config,
        effort=effort,
        batch_size=batch_size,
        seed=seed,
    )


def _rows(
    model: TLModel, corpus: Int[Tensor, "seq pos"] | None
) -> tuple[Int[Tensor, "seq pos"] | None, str]:
    """The rows of the corpus, or None and why there are none."""
    if corpus is not None:
        return as_corpus(corpus, model), ""
    try:
        return as_corpus(None, model), ""
    except DataError as error:
        return None, str(error)
