"""Circuits of many tasks in many models, found by several processes: resumable, ending in a table,
JSON and a plot.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean, mean, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.checkpoints import find, load, load_corpus
from tl_sparse.circuits import Circuit, n_weights
from tl_sparse.config import check
from tl_sparse.errors import SuiteError, TLSparseError
from tl_sparse.files import read_json, write_json, write_text
from tl_sparse.hooks import NodeValues, TLModel
from tl_sparse.pruning import PruneConfig, corpus_means, prune, prune_edges
from tl_sparse.tasks import get_task
from tl_sparse.view import plots

T = TypeVar("T")
SUMMARIES: tuple[Callable[[list[float]], float], ...] = (mean, median, min, max)
#: A circuit of more edges is not pruned by edges: each is tried alone.
MAX_EDGES = 2000
KINDS = {"node_pruned": ".", "edge_pruned": "edges"}
#: What is reported of each circuit.
FIGURES = {
    "nodes": "g",
    "edges": "g",
    "loss": ".3f",
    "standard_error": ".3f",
    "accuracy_without": ".1%",
    "seconds": ".1f",
    "overlap": ".2f",
}


class Job(NamedTuple):
    """One circuit to find. Its folder is there whole or not at all."""

    model: str
    task: str
    seed: int
    folder: Path


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
    """Find the circuit of each task in each model with each seed; in weight-sparse models, prune it
    by edges too.

    They are in `out/model/task/seed` and its folder `edges`; those that are there already are not
    searched again. Returns what is in results.json; results.md has it as tables, results.svg as a
    plot if matplotlib is installed. Several `workers` have one thread each; a script that asks for
    them needs `if __name__ == "__main__":`.

    Raises:
        SuiteError: if the folder is of other settings, a process died, or Ctrl-C was pressed.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used. That
            a model has no circuit for a task stops nothing: the results say why.
    """
    config = dataclasses.replace(config or PruneConfig(), seed=0)
    sources = {Path(model).resolve().name: model for model in models if find(model)}
    names = {get_task(task).name: task for task in tasks}
    check(workers >= 1, "workers", workers, "at least 1")
    for what, given, named in (
        ("models", models, sources),
        ("tasks", tasks, names),
        ("seeds", seeds, set(seeds)),
    ):
        check(
            0 < len(given) == len(named), what, list(given), "one or more, all of different names"
        )
    settings = {"config": dataclasses.asdict(config), "corpus": corpus}
    for path in Path(out).glob("*/*/*/job.json"):
        before = read_json(path).get("settings", {})
        refuse_another(
            path.parent,
            before,
            settings | {"model": sources.get(path.parts[-4], before.get("model"))},
        )
    write_json(Path(out, "suite.json"), settings)
    grid = itertools.product(sources, names, seeds)
    jobs = [
        Job(sources[model], names[task], s, Path(out, model, task, str(s)))
        for model, task, s in grid
    ]
    left = [job for job in jobs if not job.folder.exists()]
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(left), desc="circuits", unit="circuit"
    ) as bar:
        for _ in in_processes(functools.partial(run_job, config, corpus, device), left, workers):
            bar.update()
    results = settings | {"seeds": list(seeds)} | collected(jobs)
    write_json(Path(out, "results.json"), results)
    write_text(Path(out, "results.md"), results_table(results))
    found = [
        entry for of in results["models"].values() for entry in of.values() if entry["node_pruned"]
    ]
    if found and find_spec("matplotlib"):
        plots.save(plots.tasks(results), Path(out, "results.svg"))
    return results


def refuse_another(place: object, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `SuiteError`, which names what differs, unless the settings found in a place are those
    of now.
    """
    old, new = (
        {**settings, **settings.get("config", {}), "config": None} for settings in (before, now)
    )
    changed = [
        f"{name} = {old.get(name)!r}, now {new.get(name)!r}"
        for name in new
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise SuiteError(
            f"{place} was made with {'; '.join(changed)}. Go on with those settings, or give a new place"
        )


def in_processes(
    function: Callable[[T], None], arguments: Iterable[T], workers: int
) -> Iterator[None]:
    """Call `function` with each argument, here if `workers` is 1. `SuiteError` if a process died,
    or after Ctrl-C.
    """
    pool = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)
        if workers > 1
        else None
    )
    try:
        if pool is None:
            yield from map(function, arguments)
        else:
            yield from (
                done.result()
                for done in as_completed([pool.submit(function, a) for a in arguments])
            )
    except KeyboardInterrupt:
        raise SuiteError(
            "interrupted; what is finished is kept, and the same command goes on from there"
        ) from None
    except BrokenProcessPool as error:
        raise SuiteError(
            "a process died, perhaps for lack of memory; go on with fewer --workers"
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once; the main process says so


@functools.lru_cache(maxsize=1)  # jobs come model by model
def loaded(
    source: str, corpus: str | None, device: str | None, batch: int, embed: bool
) -> tuple[TLModel, Tensor, NodeValues]:
    """A model, tokens [seq, pos] of its corpus, and `corpus_means` of these: once in a process."""
    model = load(source, device)
    tokens = load_corpus(source, model.tokenizer, model.cfg.n_ctx, corpus)
    return model, tokens, corpus_means(model, tokens, batch, embed)


def run_job(config: PruneConfig, corpus: str | None, device: str | None, job: Job) -> None:
    """Find one circuit and save it, or why there is none."""
    model, tokens, means = loaded(job.model, corpus, device, config.batch_size, config.embed_gates)
    settings = {"config": dataclasses.asdict(config), "corpus": corpus, "model": job.model}
    about: dict[str, Any] = {"settings": settings, "problem": None}
    task, config = get_task(job.task), dataclasses.replace(config, seed=job.seed)
    (nonzero, weights), circuits = n_weights(model), dict[str, Circuit]()
    sparse = hasattr(model, "network") and 2 * nonzero < weights
    try:
        for kind in KINDS:
            started = time.perf_counter()
            if kind == "node_pruned":
                circuit, judged = prune(model, task, tokens, config, False, means)
            elif sparse and judged.n_edges <= MAX_EDGES:
                circuit, judged = prune_edges(circuit, model, task, config, False)
            else:
                break
            about[kind], circuits[kind] = (
                {
                    "nodes": judged.n_nodes,
                    "edges": judged.n_edges,
                    "seconds": time.perf_counter() - started,
                    "loss": judged.circuit.loss,
                    "standard_error": judged.circuit.standard_error,
                    "accuracy_without": judged.ablated.accuracy,
                    "kept": [str(node) for node in circuit.nodes],
                },
                circuit,
            )
    except TLSparseError as error:
        about["problem"] = str(error)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=job.folder.parent) as temporary:
        write_json(Path(temporary, "job", "job.json"), about)
        for kind, circuit in circuits.items():
            circuit.save(Path(temporary, "job", KINDS[kind]))
        if not job.folder.exists():  # else another suite was faster
            Path(temporary, "job").replace(job.folder)


def collected(jobs: Iterable[Job]) -> dict[str, Any]:
    """What finished jobs found, by model and task, over the seeds; never mixing circuits pruned by
    nodes and by edges.

    Geometric means are of the median edges (at least 1), over the tasks that every model solved
    with every seed; ratios are to the model with the fewest.
    """
    models: dict[str, dict[str, Any]] = {}
    for (model, task), group in itertools.groupby(jobs, lambda job: job.folder.parts[-3:-1]):
        made = {job.folder.name: read_json(job.folder / "job.json") for job in group}
        entry = {
            "problems": {seed: about["problem"] for seed, about in made.items() if about["problem"]}
        }
        for kind in KINDS:
            found = [about[kind] for about in made.values() if kind in about]
            kept = itertools.combinations([set(one["kept"]) for one in found], 2)
            values = {name: [one[name] for one in found] for name in FIGURES if name != "overlap"}
            values["overlap"] = [len(a & b) / max(1, len(a | b)) for a, b in kept]
            entry[kind] = {
                name: {of.__name__: of(v) for of in SUMMARIES} for name, v in values.items() if v
            }
        models.setdefault(model, {})[task] = entry
    shared = [
        task for task in models[model] if not any(of[task]["problems"] for of in models.values())
    ]
    means = {
        kind: {
            model: geometric_mean([max(1, of[task][kind]["edges"]["median"]) for task in shared])
            for model, of in models.items()
            if shared and all(of[task][kind] for task in shared)
        }
        for kind in KINDS
    }
    ratios = {
        model: edges / min(means["node_pruned"].values())
        for model, edges in means["node_pruned"].items()
    }
    return {
        "models": models,
        "solved_by_all": shared,
        "geometric_mean_edges": means,
        "ratio": ratios,
    }


def results_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""

    def cell(of: Mapping[str, Any], name: str) -> str:
        numbers = (
            [of[name][x] for x in ("mean" if name == "overlap" else "median", "min", "max")]
            if name in of
            else []
        )
        middle, low, high = (
            (format(number, FIGURES[name]) for number in numbers) if numbers else "–––"
        )
        return middle if low == high else f"{middle} ({low}–{high})"

    header = [
        "model",
        "task",
        *(name.replace("_", " ") for name in FIGURES),
        "edge-pruned: nodes",
        "edges",
    ]
    rows, problems, means = [header, ["---"] * len(header)], [""], results["geometric_mean_edges"]
    for model, task in (
        (model, task) for model, tasks in results["models"].items() for task in tasks
    ):
        entry = results["models"][model][task]
        problems += [
            f"- {model}, {task}, seed {seed}: {why}" for seed, why in entry["problems"].items()
        ]
        rows.append([model, task, *(cell(entry["node_pruned"], name) for name in FIGURES)])
        rows[-1] += [cell(entry["edge_pruned"], name) for name in ("nodes", "edges")]
    for model, ratio in results["ratio"].items():
        node, edge = (
            format(means[kind][model], ".1f") if model in means[kind] else "–" for kind in KINDS
        )
        rows.append([model, f"**geometric mean**, × {ratio:.1f}", "", node, *[""] * 6, edge])
    note = (
        "Median (range) over seeds, on held-out pairs; overlap: mean Jaccard index of the nodes of two seeds. Only the",
        "last two columns are of circuits pruned by edges. Geometric means are over the tasks that all models solved",
        f"with every seed: {', '.join(results['solved_by_all']) or 'none'}.",
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *note, *problems]) + "\n"
