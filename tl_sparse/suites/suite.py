"""Search for the circuits of many tasks in many models.

Several processes can share the work, an interrupted suite can be resumed, and the results are
written as a table, JSON and a plot.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.checkpoints import find, load, load_corpus
from tl_sparse.circuits import Circuit, n_weights
from tl_sparse.config import check
from tl_sparse.errors import SuiteError, TLSparseError
from tl_sparse.evaluation import Evaluation
from tl_sparse.files import read_json, write_json, write_text
from tl_sparse.hooks import NodeValues, TLModel
from tl_sparse.pruning import PruneConfig, corpus_means, prune, prune_edges
from tl_sparse.suites.results import (
    EDGE_PRUNED,
    NODE_PRUNED,
    CircuitFigures,
    Job,
    collected,
    results_table,
)
from tl_sparse.tasks import Task, get_task
from tl_sparse.view import plots

T = TypeVar("T")
#: A circuit with more edges is not pruned by edges, because each edge is tried separately.
MAX_EDGES = 2000
#: Kind of circuit → where it is saved in the folder of the job.
CIRCUIT_FOLDERS = {NODE_PRUNED: ".", EDGE_PRUNED: "edges"}


def run_suite(
    models: Sequence[str],
    tasks: Sequence[str],
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    config: PruneConfig | None = None,
    corpus: str | None = None,
    workers: int = 1,
    device: str | None = None,
) -> dict[str, Any]:
    """Find the circuit of each task in each model with each seed; in weight-sparse models, also
    prune it by edges.

    The circuits are saved in `out/model/task/seed`, and those pruned by edges in its folder
    `edges`. A circuit that is already there is not searched again. The results are written to
    results.json, as a table to results.md, and as a plot to results.svg if matplotlib is installed.

    Args:
        models, tasks, corpus: folders, files or names, as for `load`, `get_task` and `load_corpus`.
        out: the folder for the circuits and the results.
        seeds: the pruning seeds.
        config: how to prune; its own seed is not used.
        workers: the number of processes, each with one thread. A script that uses more than one
            needs `if __name__ == "__main__":`.
        device: the device, as for `load`.

    Returns:
        The contents of results.json.

    Raises:
        SuiteError: if `out` holds a suite with other settings, a process died, or Ctrl-C was
            pressed.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used. A
            task for which a model has no circuit is not an error; the results give the reason.
    """
    config = dataclasses.replace(config or PruneConfig(), seed=0)
    check(workers >= 1, "workers", workers, "at least 1")
    sources = {}
    for model in models:
        find(model)  # raises if there is no such model
        sources[Path(model).resolve().name] = model
    task_names = {get_task(task).name: task for task in tasks}
    _check_distinct("models", models, sources)
    _check_distinct("tasks", tasks, task_names)
    _check_distinct("seeds", seeds, set(seeds))
    settings = {"config": dataclasses.asdict(config), "corpus": corpus}
    _refuse_other_jobs(Path(out), settings, sources)
    write_json(Path(out, "suite.json"), settings)
    jobs = []
    for model, task, seed in itertools.product(sources, task_names, seeds):
        jobs.append(Job(sources[model], task_names[task], seed, Path(out, model, task, str(seed))))
    _run_missing(jobs, functools.partial(run_job, config, corpus, device), workers)
    results = {**settings, "seeds": list(seeds), **collected(jobs)}
    write_json(Path(out, "results.json"), results)
    write_text(Path(out, "results.md"), results_table(results))
    if _has_circuit(results) and find_spec("matplotlib"):
        plots.save(plots.tasks(results), Path(out, "results.svg"), overwrite=True)
    return results


def _check_distinct(field: str, given: Sequence[object], names: Sized) -> None:
    """Raise `ConfigError` if nothing is given, or two of the given items have the same name."""
    is_valid = 0 < len(given) == len(names)
    check(is_valid, field, list(given), "one or more, all with different names")


def _refuse_other_jobs(out: Path, settings: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Raise `SuiteError` if a job in the folder of the suite has other settings.

    Args:
        out: the folder of the suite.
        settings: the settings of this suite.
        sources: the name of each model → its source. Models may be added to a suite, but not a
            model with an existing name and another source.
    """
    for path in out.glob("*/*/*/job.json"):
        before = read_json(path).get("settings", {})
        model_name = path.parts[-4]
        model = sources.get(model_name, before.get("model"))
        refuse_another(path.parent, before, {**settings, "model": model})


def _run_missing(jobs: Sequence[Job], run: Callable[[Job], None], workers: int) -> None:
    missing = [job for job in jobs if not job.folder.exists()]
    n_finished = len(jobs) - len(missing)
    with tqdm(total=len(jobs), initial=n_finished, desc="circuits", unit="circuit") as bar:
        for _ in in_processes(run, missing, workers):
            bar.update()


def _has_circuit(results: Mapping[str, Any]) -> bool:
    for tasks in results["models"].values():
        for entry in tasks.values():
            if entry[NODE_PRUNED]:
                return True
    return False


def refuse_another(place: object, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a `SuiteError` that names the differences between stored and current settings, if any.

    Args:
        place: where the settings are stored, for the message.
        before: the stored settings.
        now: the current settings.
    """
    old = _flat(before)
    changes = []
    for name, value in _flat(now).items():
        if old.get(name) != value:
            changes.append(f"{name} = {old.get(name)!r}, now {value!r}")
    if changes:
        raise SuiteError(
            f"{place} was made with {'; '.join(changes)}. Continue with those settings, or give "
            "another folder or storage"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the fields of `config` are at the top level."""
    return {**settings, **settings.get("config", {}), "config": None}


def in_processes(
    function: Callable[[T], None], arguments: Iterable[T], workers: int
) -> Iterator[None]:
    """Call `function` with each argument, in this process if `workers` is 1.

    Raises:
        SuiteError: if a process died, or after Ctrl-C.
    """
    try:
        if workers == 1:
            yield from map(function, arguments)
        else:
            yield from _in_pool(function, arguments, workers)
    except KeyboardInterrupt:
        raise SuiteError(
            "interrupted; finished work is kept, and the same command continues from there"
        ) from None
    except BrokenProcessPool as error:
        raise SuiteError(
            "a process died, perhaps because memory ran out; continue with fewer --workers"
        ) from error


def _in_pool(function: Callable[[T], None], arguments: Iterable[T], workers: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _prepare_process)
    try:
        futures = [pool.submit(function, argument) for argument in arguments]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_process() -> None:
    torch.set_num_threads(1)
    # Ctrl-C ends the process at once, without a traceback; the main process reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@functools.lru_cache(maxsize=1)  # jobs are ordered by model
def loaded(
    source: str, corpus: str | None, device: str | None, batch: int, embed: bool
) -> tuple[TLModel, Tensor, NodeValues]:
    """A model, the tokens [seq, pos] of its corpus, and their `corpus_means`; cached."""
    model = load(source, device)
    tokens = load_corpus(source, model.tokenizer, model.cfg.n_ctx, corpus)
    return model, tokens, corpus_means(model, tokens, batch, embed)


def run_job(config: PruneConfig, corpus: str | None, device: str | None, job: Job) -> None:
    """Find one circuit and save it, or save the reason why there is none."""
    model, tokens, means = loaded(job.model, corpus, device, config.batch_size, config.embed_gates)
    settings = {"config": dataclasses.asdict(config), "corpus": corpus, "model": job.model}
    report: dict[str, Any] = {"settings": settings, "problem": None}
    seeded = dataclasses.replace(config, seed=job.seed)
    circuits: dict[str, Circuit] = {}
    try:
        for kind, circuit, figures in _searched(model, get_task(job.task), tokens, means, seeded):
            circuits[kind] = circuit
            report[kind] = dataclasses.asdict(figures)
    except TLSparseError as error:
        report["problem"] = str(error)
    _save(job.folder, report, circuits)


def _searched(
    model: TLModel, task: Task, tokens: Tensor, means: NodeValues, config: PruneConfig
) -> Iterator[tuple[str, Circuit, CircuitFigures]]:
    """The circuit pruned by nodes and, in a weight-sparse model, also the one pruned by edges."""
    started = time.perf_counter()
    circuit, evaluation = prune(model, task, tokens, config, False, means)
    seconds = time.perf_counter() - started
    yield NODE_PRUNED, circuit, CircuitFigures.of(circuit, evaluation, seconds)
    if _can_cut_edges(model, evaluation):
        started = time.perf_counter()
        circuit, evaluation = prune_edges(circuit, model, task, config, False)
        seconds = time.perf_counter() - started
        yield EDGE_PRUNED, circuit, CircuitFigures.of(circuit, evaluation, seconds)


def _can_cut_edges(model: TLModel, evaluation: Evaluation) -> bool:
    n_nonzero, n_total = n_weights(model)
    is_weight_sparse = hasattr(model, "network") and 2 * n_nonzero < n_total
    return is_weight_sparse and evaluation.n_edges <= MAX_EDGES


def _save(folder: Path, report: Mapping[str, Any], circuits: Mapping[str, Circuit]) -> None:
    """Write the folder of a job, completely or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        written = Path(temporary, "job")
        write_json(written / "job.json", report)
        for kind, circuit in circuits.items():
            circuit.save(written / CIRCUIT_FOLDERS[kind])
        if not folder.exists():  # otherwise, another suite wrote it first
            written.replace(folder)
