"""Search for the circuits of many tasks in many models.

Several processes can share the work, an interrupted suite can be resumed, and the results are
written as a table, JSON and a plot.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.checkpoints import is_dense, open_with_corpus
from tl_sparse.circuits import Circuit, n_weights
from tl_sparse.config import check
from tl_sparse.errors import CircuitError, SuiteError, TLSparseError
from tl_sparse.evaluation import Evaluation, score
from tl_sparse.files import write_json, write_text
from tl_sparse.hooks import NodeValues, TLModel
from tl_sparse.pruning import PruneConfig, prune, prune_edges, task_splits
from tl_sparse.records import check_finite
from tl_sparse.resuming import changed_settings, other_contents
from tl_sparse.suites import arguments
from tl_sparse.suites.along import Steps, steps_of_runs, steps_table
from tl_sparse.suites.content import (
    check_unchanged,
    content_of_model,
    content_of_task,
)
from tl_sparse.suites.folders import whole_folder
from tl_sparse.suites.jobs import (
    EDGE_PRUNED,
    NODE_PRUNED,
    CircuitFigures,
    Job,
    JobReport,
    read_report,
    write_report,
)
from tl_sparse.suites.models import loaded, model_name
from tl_sparse.suites.results import collected, results_table
from tl_sparse.suites.robustness import robustness
from tl_sparse.suites.workers import in_processes
from tl_sparse.tasks import Task, get_task
from tl_sparse.view import plots

#: A circuit with more edges is not pruned by edges, because each edge is tried separately.
MAX_EDGES = 2000
#: Any folder of a suite has one of these files.
_OWN_FILES = ("suite.json", "results.json", "*/*/*/job.json")
#: Kind of circuit → where it is saved in the folder of the job.
CIRCUIT_FOLDERS = {NODE_PRUNED: ".", EDGE_PRUNED: "edges"}


@dataclass(frozen=True)
class _Setup:
    """What all jobs share, which is sent to each process.

    Attributes:
        contents: the hashes of all models, their corpora and all tasks.
    """

    config: PruneConfig
    corpus: str | None
    device: str | None
    contents: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        return {"config": self.config.to_json(), "corpus": self.corpus}


def run_suite(
    models: arguments.Names,
    tasks: arguments.Names,
    out: str | Path,
    seeds: arguments.Numbers = (0, 1, 2),
    config: PruneConfig | None = None,
    corpus: str | Path | None = None,
    workers: int = 1,
    device: str | torch.device | None = None,
    progress: bool = True,
    checkpoints: Steps = False,
) -> dict[str, Any]:
    """Find the circuit of each task in each model with each seed; in weight-sparse models, also
    prune it by edges.

    With `checkpoints`, the models are those that training runs keep of their steps, so that the
    results tell how circuits change along training.

    The circuits are saved in `out/model/task/seed`, and those pruned by edges in its folder
    `edges`. A circuit that is already there is not searched again. The results are written to
    results.json, as a table to results.md, and as a plot to results.svg if matplotlib is installed.

    Several suites with the same settings can work in `out` at the same time, also on several
    machines. They do not share the work, so each needs tasks or seeds of its own. The results are
    those of the suite that ends last; one with all tasks and seeds then collects what is there.

    Args:
        models: folders or names, as for `load`; one or several.
        tasks: names or files, as for `get_task`; one or several.
        out: the folder for the circuits and the results.
        seeds: the pruning seeds; one or several.
        config: how to prune; its own seed is not used.
        corpus: a folder, file or name, as for `load_corpus`.
        workers: the number of processes, each with one thread. A script that uses more than one
            needs `if __name__ == "__main__":`.
        device: the device, as for `load`.
        progress: whether to show a progress bar.
        checkpoints: True means that `models` are the folders of runs, whose kept steps are opened
            (see `TrainConfig.keep_checkpoints`); one or several numbers are the steps to open.

    Returns:
        The contents of results.json. With `checkpoints`, its `steps` are the steps of each run, and
        their models are called RUN@STEP.

    Raises:
        SuiteError: if `out` holds a suite with other settings, or circuits of other models, texts
            or pairs under the same names, also such as another suite has made there meanwhile; if
            a file of it is damaged; if a process died; or if Ctrl-C was pressed.
        ConfigError: if an argument has the wrong type or value, or `out` holds anything else.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used. A
            task for which a model has no circuit is not an error; the results give the reason.
    """
    workers = arguments.at_least_one("workers", workers)
    config = dataclasses.replace(arguments.pruning(config), seed=0)
    corpus = arguments.optional_name("corpus", corpus)
    device = arguments.device_name(device)
    folder = arguments.folder("out", out)
    arguments.check_own_folder(folder, _OWN_FILES, "a suite")
    seed_list = arguments.seeds(seeds, config)
    models = arguments.names("models", models)
    along = steps_of_runs(models, checkpoints)
    sources = _by_name("models", along.sources or models, _name_of_model)
    task_sources = _by_name("tasks", tasks, _name_of_task)

    setup = _Setup(config, corpus, device, contents={})
    for name, source in sources.items():
        model, tokens = open_with_corpus(source, corpus, device)
        setup.contents.update(content_of_model(name, model, tokens))
        _refuse_old_circuits(folder / name, model)
    for source in task_sources.values():
        setup.contents.update(content_of_task(source))
    jobs = _jobs(folder, sources, task_sources, seed_list)
    _refuse_other_jobs(folder, setup, jobs)

    write_json(folder / "suite.json", setup.settings)
    _run_missing(jobs, functools.partial(run_job, setup), workers, progress)
    _refuse_other_jobs(folder, setup, jobs)  # another suite may have worked there meanwhile
    results = {**setup.settings, "seeds": seed_list, **collected(jobs), "steps": along.steps}
    _write_results(folder, results)
    return results


def _jobs(
    folder: Path, models: Mapping[str, str], tasks: Mapping[str, str], seeds: Sequence[int]
) -> list[Job]:
    """The jobs of a suite; models and tasks are name → source."""
    jobs = []
    for model, task, seed in itertools.product(models, tasks, seeds):
        place = Path(folder, model, task, str(seed))
        jobs.append(Job(models[model], tasks[task], seed, place))
    return jobs


def _by_name(field: str, given: arguments.Names, name_of: Callable[[str], str]) -> dict[str, str]:
    """Name → source, of models or tasks.

    Raises:
        ConfigError: if two of them have the same name, or one has a name that no folder can have.
    """
    sources = arguments.names(field, given)
    by_name = {name_of(source): source for source in sources}
    is_valid = len(by_name) == len(sources) and not {"", ".", ".."} & by_name.keys()
    check(is_valid, field, sources, "one or more, all with different names")
    return by_name


def _name_of_model(source: str) -> str:
    is_dense(source)  # raises if there is no such model
    return model_name(source)


def _name_of_task(source: str) -> str:
    return get_task(source).name


def _refuse_old_circuits(folder: Path, model: TLModel) -> None:
    """Raise `SuiteError` if a circuit in the folder of a model is of another model.

    Only circuits are checked whose job.json is older than the hashes that are now in it.
    """
    for path in folder.glob("*/*/job.json"):
        report = read_report(path.parent)
        if report.content or report.node_pruned is None:
            continue
        try:
            Circuit.load(path.parent).check_model(model)
        except CircuitError as error:
            raise SuiteError(
                f"{path.parent} was made with another model of that name: {error}. Continue with "
                "that model, or give another folder"
            ) from error


def _refuse_other_jobs(folder: Path, setup: _Setup, jobs: Sequence[Job]) -> None:
    """Raise `SuiteError` if a finished job has other settings or contents, or is damaged.

    Args:
        folder: the folder of the suite, in which there may also be jobs of an earlier one.
        setup: the settings and contents of this suite.
        jobs: the jobs of this suite.
    """
    sources = {job.folder.parts[-3]: job.model for job in jobs}
    for path in sorted(folder.glob("*/*/*/job.json")):
        report = read_report(path.parent)
        settings = setup.settings
        if not report.content:  # older; all that tells its model is the source
            source = sources.get(path.parts[-4], report.settings.get("model"))
            settings["model"] = source
        others = other_contents(report.content, setup.contents)
        refuse_another(path.parent, report.settings, settings, others)
    for job in jobs:
        if job.folder.exists():
            read_report(job.folder)


def _run_missing(
    jobs: Sequence[Job], run: Callable[[Job], None], workers: int, progress: bool
) -> None:
    missing = [job for job in jobs if not job.folder.exists()]
    n_finished = len(jobs) - len(missing)
    options = {"initial": n_finished, "desc": "circuits", "unit": "circuit"}
    with tqdm(total=len(jobs), disable=not progress, **options) as bar:
        for _ in in_processes(run, missing, workers):
            bar.update()


def _write_results(folder: Path, results: Mapping[str, Any]) -> None:
    write_json(folder / "results.json", results)
    tables = [results_table(results)]
    if results["steps"]:
        tables.insert(0, steps_table(results))
    write_text(folder / "results.md", "\n".join(tables))
    if not find_spec("matplotlib"):
        return
    if results["steps"]:
        plots.save(plots.training(results), folder / "results.svg", overwrite=True)
    elif _has_circuit(results):
        plots.save(plots.tasks(results), folder / "results.svg", overwrite=True)


def _has_circuit(results: Mapping[str, Any]) -> bool:
    for tasks in results["models"].values():
        for entry in tasks.values():
            if entry[NODE_PRUNED]:
                return True
    return False


def refuse_another(
    place: object,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    others: Sequence[str] = (),
) -> None:
    """Raise a `SuiteError` that names the differences between stored and current settings, if any.

    Args:
        place: where the settings are stored, for the message.
        before: the stored settings.
        now: the current settings.
        others: what is different besides the settings, see `other_contents`.
    """
    changes = [*changed_settings(_with_defaults(before, now), now), *others]
    if changes:
        raise SuiteError(
            f"{place} was made with {'; '.join(changes)}. Continue with those, or give another "
            "folder or storage"
        )


def _with_defaults(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings, in which fields of `config` that an older version lacked have their
    defaults.
    """
    old, new = before.get("config"), now.get("config")
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return dict(before)
    defaults = {name: getattr(PruneConfig(), name) for name in new}
    return {**before, "config": {**defaults, **old}}


def run_job(setup: _Setup, job: Job) -> None:
    """Find one circuit and save it, or save the reason why there is none.

    Raises:
        SuiteError: if the model, its corpus or the task was replaced since the suite began.
    """
    model, tokens, means = loaded(
        job.model, setup.corpus, setup.device, setup.config, setup.contents
    )
    task = get_task(job.task)
    check_unchanged(setup.contents, content_of_task(job.task))
    seeded = dataclasses.replace(setup.config, seed=job.seed)
    circuits: dict[str, Circuit] = {}
    found: dict[str, CircuitFigures] = {}
    full = problem = None
    try:
        _, _, heldout = task_splits(model, task, seeded)
        full = score(model, heldout, seeded.batch_size)
        for kind, circuit, figures in _searched(model, task, tokens, means, seeded):
            check_finite(dataclasses.asdict(figures), kind)
            circuits[kind] = circuit
            found[kind] = figures
    except TLSparseError as error:
        problem = str(error)
    report = JobReport(
        problem=problem,
        node_pruned=found.get(NODE_PRUNED),
        edge_pruned=found.get(EDGE_PRUNED),
        settings={**setup.settings, "model": job.model},
        content=_content_of(job, setup.contents),
        full=full,
    )
    _save(job.folder, report, circuits)


def _content_of(job: Job, contents: Mapping[str, str]) -> dict[str, str]:
    """The hashes that concern this job alone."""
    model, task, _ = job.folder.parts[-3:]
    names = [f"model {model}", f"corpus of {model}", f"task {task}"]
    return {name: contents[name] for name in names}


def _searched(
    model: TLModel, task: Task, tokens: Tensor, means: NodeValues, config: PruneConfig
) -> Iterator[tuple[str, Circuit, CircuitFigures]]:
    """The circuit pruned by nodes and, in a weight-sparse model, also the one pruned by edges."""
    started = time.perf_counter()
    circuit, evaluation = prune(model, task, tokens, config, False, means)
    seconds = time.perf_counter() - started
    train, _, heldout = task_splits(model, task, config)
    withstands = robustness(circuit, model, config, train, heldout)
    yield NODE_PRUNED, circuit, CircuitFigures.of(circuit, evaluation, seconds, withstands)
    if _can_cut_edges(model, evaluation):
        started = time.perf_counter()
        circuit, evaluation = prune_edges(circuit, model, None, config, False)
        seconds = time.perf_counter() - started
        withstands = robustness(circuit, model, config, train, heldout)
        yield EDGE_PRUNED, circuit, CircuitFigures.of(circuit, evaluation, seconds, withstands)


def _can_cut_edges(model: TLModel, evaluation: Evaluation) -> bool:
    n_nonzero, n_total = n_weights(model)
    is_weight_sparse = hasattr(model, "network") and 2 * n_nonzero < n_total
    return is_weight_sparse and evaluation.n_edges <= MAX_EDGES


def _save(folder: Path, report: JobReport, circuits: Mapping[str, Circuit]) -> None:
    """Write the folder of a job, completely or not at all."""
    with whole_folder(folder) as written:
        write_report(written, report)
        for kind, circuit in circuits.items():
            circuit.save(written / CIRCUIT_FOLDERS[kind])
