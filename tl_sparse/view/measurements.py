"""The measurements that are shown and drawn, read from the JSON in which they are stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tl_sparse.arguments import checked
from tl_sparse.checkpoints import StepRecord
from tl_sparse.errors import DataError
from tl_sparse.evaluation import Evaluation, Family, SizedScore, SpecificityMatrix
from tl_sparse.records import record_from
from tl_sparse.tasks import Score

R = TypeVar("R")
#: Figure → name of a summary over the seeds → its value.
Summaries = dict[str, dict[str, float]]


@dataclass(frozen=True)
class WholeScore:
    """The size of a circuit, its score, and that of the full model.

    `target_loss` is the loss that the circuit was to reach; None if it is not known.
    """

    n_nodes: int
    n_edges: int
    circuit: Score
    full: Score
    target_loss: float | None = None


@dataclass(frozen=True)
class Drawn:
    """What is drawn of the result of `full_evaluation`."""

    model: str
    task: str
    evaluation: WholeScore
    ladder: list[SizedScore]
    random: list[SizedScore]


@dataclass(frozen=True)
class Tabulated:
    """What is shown in tables of the result of `full_evaluation`."""

    evaluation: Evaluation
    kinds: dict[str, int]
    ladder: list[SizedScore]
    random: list[SizedScore]
    effects: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """The circuits of one task in one model, over the seeds of a suite.

    Attributes:
        problems: seed → why there is no circuit.
        node_pruned: empty if there is no circuit.
        edge_pruned: empty if there is no circuit.
        full: the score of the whole model on held-out pairs; empty if it is not known.
    """

    problems: dict[str, str] = field(default_factory=dict)
    node_pruned: Summaries
    edge_pruned: Summaries
    full: Summaries = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteSettings:
    """What is shown of the settings with which a suite pruned."""

    target_loss: float | None = None
    objective: str = "candidates"


@dataclass(frozen=True)
class StepModel:
    """The model of a step of a training run.

    Attributes:
        model: what a suite calls it.
        record: the step, and what is known of the run there.
    """

    model: str
    record: StepRecord


@dataclass(frozen=True)
class SuiteResults:
    """What is shown of the result of `run_suite`.

    Attributes:
        geometric_mean_edges: kind of pruning → model → its mean over the tasks.
        models: model → task → its circuits.
        solved_by_all: the tasks over which the means are taken.
        ratio: model → its mean, relative to the least of all models.
        config: the settings of the pruner.
        steps: training run → its models by step, of a suite along training.
    """

    geometric_mean_edges: dict[str, dict[str, float]]
    models: dict[str, dict[str, TaskResults]]
    solved_by_all: list[str] = field(default_factory=list)
    ratio: dict[str, float] = field(default_factory=dict)
    config: SuiteSettings = field(default_factory=SuiteSettings)
    steps: dict[str, list[StepModel]] = field(default_factory=dict)

    def along(self, run: str) -> dict[str, list[tuple[StepModel, TaskResults]]]:
        """Task → the steps of a run at which it was pruned, each with its circuits."""
        found: dict[str, list[tuple[StepModel, TaskResults]]] = {}
        for step in self.steps[run]:
            for task, entry in self.models.get(step.model, {}).items():
                found.setdefault(task, []).append((step, entry))
        return found

    def is_solved(self, entry: TaskResults) -> bool | None:
        """Whether the whole model reaches the target loss of a task; None if that is not known."""
        target = self.config.target_loss
        losses = entry.full.get("loss", {})
        if target is None or "median" not in losses or self.config.objective != "candidates":
            return None
        return losses["median"] <= target


def read_drawn(values: Mapping[str, Any], name: str, command: str = "evaluate") -> Drawn:
    """What is drawn of the measurements called `name`.

    Raises:
        DataError: if an entry is missing or has the wrong type; it names the command that writes
            such measurements.
    """
    return _read(Drawn, values, name, command)


def read_tabulated(values: Mapping[str, Any]) -> Tabulated:
    """What is shown in tables of measurements.

    Raises:
        DataError: if an entry is missing or has the wrong type.
    """
    return _read(Tabulated, values, "this", "evaluate")


@checked()
def read_results(values: Mapping[str, Any], name: str = "the results") -> SuiteResults:
    """What is shown of the results of a suite called `name`.

    Raises:
        DataError: if an entry is missing or has the wrong type.
    """
    return _read(SuiteResults, values, name, "suite")


def read_family(values: Mapping[str, Any], name: str) -> Family:
    """A family, read from the contents of family.json, which are called `name`.

    Raises:
        DataError: if an entry is missing or has the wrong type.
    """
    return _read(Family, values, name, "family")


def read_matrix(values: Mapping[str, Any], name: str) -> SpecificityMatrix:
    """What `specificity_matrix` returned, read from its JSON, which is called `name`.

    Raises:
        DataError: if an entry is missing or has the wrong type.
    """
    try:
        return record_from(SpecificityMatrix, values)
    except DataError as error:
        raise DataError(
            f"{name} is not what `specificity_matrix` returns, as JSON; missing or malformed "
            f"entry: {error}"
        ) from error


@checked()
def summary(summaries: Summaries, figure: str, statistic: str, place: str) -> float:
    """One summary of a figure over the seeds.

    Raises:
        DataError: if it is missing; `place` says where.
    """
    try:
        return summaries[figure][statistic]
    except KeyError as error:
        raise DataError(f"{place}: the {statistic} of {figure!r} is missing") from error


def _read(record: type[R], values: Mapping[str, Any], name: str, command: str) -> R:
    try:
        return record_from(record, values)
    except DataError as error:
        raise DataError(
            f"{name} is not what `tl-sparse {command}` writes; missing or malformed entry: {error}"
        ) from error
