"""The jobs of a suite: one circuit each, in a folder of its own with a file job.json."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tl_sparse.circuits import Circuit
from tl_sparse.errors import DataError, SuiteError
from tl_sparse.evaluation import Evaluation
from tl_sparse.files import read_json, write_json
from tl_sparse.records import record_from
from tl_sparse.suites.robustness import Robustness
from tl_sparse.tasks import Score

#: The two kinds of circuit of a job, which are never summarised together.
NODE_PRUNED = "node_pruned"
EDGE_PRUNED = "edge_pruned"


class Job(NamedTuple):
    """One circuit to find. Its folder is written completely or not at all."""

    model: str
    task: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class CircuitFigures:
    """The figures of one circuit in job.json.

    Attributes:
        nodes, edges: how many it has.
        seconds: how long it took to find it.
        loss, standard_error: the task loss of the circuit alone on held-out pairs.
        accuracy_without: the accuracy of the model without the circuit.
        kept: the names of its nodes in files.
        kl: the divergence of the circuit's next-token distribution from the model's; see
            `NextToken`. None in older files, as is the next.
        target_loss: the loss that the circuit had to reach on its selection pairs.
        reached_loss: the same loss on held-out pairs: by the objective of the search, and with
            nodes held as in the search. None in files that were written before it was kept.
        zero_loss, resample_loss: the task loss with all other nodes at zero and resampled.
        subsets_mean, subsets_worst, limited_adversary, adversary: see `Robustness`.
    """

    nodes: int
    edges: int
    seconds: float
    loss: float
    standard_error: float | None
    accuracy_without: float
    kept: list[str]
    kl: float | None = None
    target_loss: float | None = None
    reached_loss: float | None = None
    zero_loss: float | None = None
    resample_loss: float | None = None
    subsets_mean: float | None = None
    subsets_worst: float | None = None
    limited_adversary: float | None = None
    adversary: float | None = None

    @classmethod
    def of(
        cls, circuit: Circuit, evaluation: Evaluation, seconds: float, robustness: Robustness
    ) -> "CircuitFigures":
        next_token = evaluation.circuit.next_token
        resample = evaluation.resample
        return cls(
            nodes=evaluation.n_nodes,
            edges=evaluation.n_edges,
            seconds=seconds,
            loss=evaluation.circuit.loss,
            standard_error=evaluation.circuit.standard_error,
            accuracy_without=evaluation.ablated.accuracy,
            kept=[node.indexed_name for node in circuit.nodes],
            kl=next_token.kl if next_token else None,
            target_loss=evaluation.target_loss,
            reached_loss=evaluation.reached_loss,
            zero_loss=evaluation.zero.loss,
            resample_loss=resample.loss if resample else None,
            subsets_mean=robustness.subsets_mean,
            subsets_worst=robustness.subsets_worst,
            limited_adversary=robustness.limited_adversary,
            adversary=robustness.adversary,
        )


@dataclass(frozen=True)
class JobReport:
    """The contents of job.json.

    Attributes:
        problem: why there is no circuit, or no edge-pruned one.
        node_pruned, edge_pruned: the figures of the circuits that were found.
        full: the score of the whole model on held-out pairs. None in older files, and if the task
            has no pairs for this model.
        settings: the settings of the suite.
        content: what the circuits belong to, see `tl_sparse.suites.content`. It is empty in files
            that were written before it existed.
    """

    problem: str | None
    node_pruned: CircuitFigures | None = None
    edge_pruned: CircuitFigures | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    full: Score | None = None


def read_report(folder: Path) -> JobReport:
    """Read the job.json of a finished job.

    Raises:
        CheckpointError: if it is missing or not JSON, or its checksum is wrong.
        SuiteError: if an entry is missing or has the wrong type.
    """
    path = folder / "job.json"
    advice = f"remove the folder {folder} to search this circuit again"
    values = read_json(path)
    try:
        report = record_from(JobReport, values)
    except DataError as error:
        raise SuiteError(f"{path} is damaged: {error}; {advice}") from error
    if report.node_pruned is None and not report.problem:
        raise SuiteError(
            f"{path} is damaged: it has neither 'node_pruned' nor a 'problem'; {advice}"
        )
    return report


def write_report(folder: Path, report: JobReport) -> None:
    """Write the job.json of a job."""
    values = {name: value for name, value in asdict(report).items() if value is not None}
    values["problem"] = report.problem
    write_json(folder / "job.json", values)


def read_reports(jobs: Iterable[Job]) -> dict[tuple[str, str], dict[str, JobReport]]:
    """(model, task) → seed → the contents of job.json."""
    reports: dict[tuple[str, str], dict[str, JobReport]] = {}
    for job in jobs:
        model, task, seed = job.folder.parts[-3:]
        reports.setdefault((model, task), {})[seed] = read_report(job.folder)
    return reports
