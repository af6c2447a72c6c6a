"""The jobs of a family: one search each, in a folder of its own with a file job.json.

A job that is there is not done again. Several machines can therefore work in the same folder: what
follows from the jobs is the same everywhere.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tl_sparse.circuits import Circuit
from tl_sparse.errors import ConfigError, DataError, PruneError, SuiteError
from tl_sparse.evaluation import (
    CoreCandidate,
    Estimate,
    Evaluation,
    FamilySearch,
    circuit_of,
    loss_without,
    ready_for,
)
from tl_sparse.files import read_json, write_json
from tl_sparse.pruning import PruneConfig, find_circuit, prune, task_splits
from tl_sparse.records import record_from
from tl_sparse.resuming import other_contents
from tl_sparse.suites.content import check_unchanged, content_of_task
from tl_sparse.suites.folders import whole_folder
from tl_sparse.suites.models import loaded, model_name
from tl_sparse.suites.suite import refuse_another
from tl_sparse.tasks import get_task

R = TypeVar("R")
#: Errors of a search in which more nodes are forbidden than in round 0. Settings that were possible
#: there are impossible if no node is left.
_FINDS_NOTHING = (PruneError, ConfigError)


@dataclass(frozen=True)
class FamilySetup:
    """What all jobs share, which is sent to each process.

    Attributes:
        folder: the folder of the family.
        model, task: what `load` and `get_task` take.
        seeds: the seeds of each round.
        contents: the hashes of the model, its corpus and the task.
    """

    folder: Path
    model: str
    task: str
    seeds: list[int]
    config: PruneConfig
    corpus: str | None
    device: str | None
    contents: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same in all jobs of a folder."""
        return {
            "model": model_name(self.model),
            "task": get_task(self.task).name,
            "seeds": self.seeds,
            "corpus": self.corpus,
            "config": self.config.to_json(),
        }

    def config_of(self, seed: int, forbidden: Sequence[str]) -> PruneConfig:
        """The settings of a search with this seed, in which more nodes are forbidden."""
        exclude = (*self.config.exclude, *forbidden)
        return dataclasses.replace(self.config, seed=seed, exclude=exclude)


class SearchJob(NamedTuple):
    """A search of a round."""

    folder: Path
    seed: int
    forbidden: tuple[str, ...]


class CoreJob(NamedTuple):
    """The question whether there is a circuit without a node.

    Attributes:
        found: the folder of a circuit that has the node.
    """

    folder: Path
    node: str
    seed: int
    found: Path


@dataclass(frozen=True)
class SearchReport:
    """The contents of job.json of a search."""

    search: FamilySearch
    forbidden: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CoreReport:
    """The contents of job.json of a candidate for the core."""

    candidate: CoreCandidate
    settings: dict[str, Any] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)


def read_search(setup: FamilySetup, job: SearchJob) -> FamilySearch:
    """What a finished search found.

    Raises:
        CheckpointError: if its job.json is missing or not JSON, or its checksum is wrong.
        SuiteError: if it is damaged, or the search had other settings or forbidden nodes.
    """
    report = _read(SearchReport, job.folder)
    before = {**report.settings, "forbidden": report.forbidden}
    now = {**setup.settings, "forbidden": list(job.forbidden)}
    refuse_another(job.folder, before, now, other_contents(report.content, setup.contents))
    return report.search


def read_core(setup: FamilySetup, job: CoreJob) -> CoreCandidate:
    """What is known of a candidate for the core; the errors are those of `read_search`."""
    report = _read(CoreReport, job.folder)
    others = other_contents(report.content, setup.contents)
    refuse_another(job.folder, report.settings, setup.settings, others)
    return report.candidate


def refuse_other_jobs(setup: FamilySetup) -> None:
    """Raise `SuiteError` if any job in the folder has other settings or contents, or is damaged."""
    for path in sorted(setup.folder.glob("rounds/*/*/job.json")):
        searched = _read(SearchReport, path.parent)
        others = other_contents(searched.content, setup.contents)
        refuse_another(path.parent, searched.settings, setup.settings, others)
    for path in sorted(setup.folder.glob("core/*/job.json")):
        tried = _read(CoreReport, path.parent)
        others = other_contents(tried.content, setup.contents)
        refuse_another(path.parent, tried.settings, setup.settings, others)


def _read(record: type[R], folder: Path) -> R:
    path = folder / "job.json"
    try:
        return record_from(record, read_json(path))
    except DataError as error:
        raise SuiteError(
            f"{path} is damaged: {error}; remove the folder {folder} to search again"
        ) from error


def run_search(setup: FamilySetup, job: SearchJob) -> None:
    """Search a circuit without the forbidden nodes, and save it, or why there is none.

    Raises:
        SuiteError: if the model, its corpus or the task was replaced since the family began.
        TLSparseError: if a search is not possible at all, as `prune` raises it.
    """
    if job.folder.exists():  # another machine has done it
        return
    search, circuit = _searched(setup, job.seed, job.forbidden)
    report = SearchReport(search, list(job.forbidden), setup.settings, setup.contents)
    with whole_folder(job.folder) as written:
        write_json(written / "job.json", asdict(report))
        if circuit is not None:
            circuit.save(written)


def _searched(
    setup: FamilySetup, seed: int, forbidden: Sequence[str]
) -> tuple[FamilySearch, Circuit | None]:
    model, tokens, means = loaded(
        setup.model, setup.corpus, setup.device, setup.config, setup.contents
    )
    check_unchanged(setup.contents, content_of_task(setup.task))
    config = setup.config_of(seed, forbidden)
    finds_nothing = _FINDS_NOTHING if forbidden else (PruneError,)
    started = time.perf_counter()
    try:
        circuit, evaluation = prune(model, get_task(setup.task), tokens, config, False, means)
    except finds_nothing as error:
        seconds = time.perf_counter() - started
        return FamilySearch(seed, str(error), [], None, None, None, seconds), None
    seconds = time.perf_counter() - started
    return _search_of(seed, circuit, evaluation, seconds), circuit


def _search_of(seed: int, circuit: Circuit, evaluation: Evaluation, seconds: float) -> FamilySearch:
    return FamilySearch(
        seed=seed,
        problem=None,
        nodes=list(circuit.node_names),
        n_edges=evaluation.n_edges,
        loss=Estimate(evaluation.circuit.loss, evaluation.circuit.standard_error),
        accuracy_without=evaluation.ablated.accuracy,
        seconds=seconds,
    )


def run_core(setup: FamilySetup, job: CoreJob) -> None:
    """Find out whether there is a circuit without a node, and save the answer.

    If the model still reaches the target while the node alone is held, its other nodes are one, if
    so many are allowed. If not, a circuit is searched: the errors of held nodes may cancel. Any set
    of nodes that passes is an answer, so nothing is removed from it.
    """
    if job.folder.exists():
        return
    started = time.perf_counter()
    without = _loss_without_node(setup, job)
    problem = n_nodes = None
    if setup.config.max_nodes is not None or not without.value <= setup.config.target_loss:
        try:
            n_nodes = _sufficient_set(setup, job).n_nodes
        except _FINDS_NOTHING as error:
            problem = str(error)
    candidate = CoreCandidate(
        node=job.node,
        is_needed=problem is not None,
        loss_without=without,
        problem=problem,
        n_nodes=n_nodes,
        seconds=time.perf_counter() - started,
    )
    report = CoreReport(candidate, setup.settings, setup.contents)
    with whole_folder(job.folder) as written:
        write_json(written / "job.json", asdict(report))


def _sufficient_set(setup: FamilySetup, job: CoreJob) -> Circuit:
    """A set of nodes without that of the job that passes.

    Raises:
        PruneError: if none is found.
    """
    model, _, means = loaded(setup.model, setup.corpus, setup.device, setup.config, setup.contents)
    check_unchanged(setup.contents, content_of_task(setup.task))
    config = setup.config_of(job.seed, [job.node])
    return find_circuit(model, get_task(setup.task), means, config, stage="size")


def _loss_without_node(setup: FamilySetup, job: CoreJob) -> Estimate:
    """The loss of the full model on the selection pairs while the node alone is held."""
    model, _, _ = loaded(setup.model, setup.corpus, setup.device, setup.config, setup.contents)
    config = setup.config_of(job.seed, [])
    _, selection, _ = task_splits(model, get_task(setup.task), config)
    selection = ready_for(config.objective, model, selection, config.batch_size)
    node = circuit_of(Circuit.load(job.found), [*config.exclude, job.node])
    return loss_without(node, model, selection, config.objective, config.ablation)
