"""Circuits of many tasks in many models, found by several processes: resumable, ending in a table, JSON and a plot."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.checkpoints import load
from tl_sparse.circuit import Circuit
from tl_sparse.config import PruneConfig, check
from tl_sparse.data import load_corpus
from tl_sparse.errors import CheckpointError, SuiteError, TLSparseError
from tl_sparse.files import read_json, replacing, write_json
from tl_sparse.hooks.points import NodeValues, TLModel
from tl_sparse.nodes import weight_matrices
from tl_sparse.pruning import corpus_means, prune, prune_edges
from tl_sparse.sources import find
from tl_sparse.tasks import get_task

T, R = TypeVar("T"), TypeVar("R")
#: A circuit of more edges is not pruned by edges: each is tried alone.
MAX_EDGES = 2000


@dataclass(frozen=True)
class Job:
    """One circuit to find: of a task in a model, with a seed. Its folder is there whole or not at all."""

    model: str
    task: str
    seed: int
    folder: Path


def run_suite(
    models: Sequence[str], tasks: Sequence[str], out: str | Path, seeds: Sequence[int] = (0, 1, 2),
    config: PruneConfig | None = None, corpus: str | None = None, workers: int = 1, device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Find the circuit of each task in each model with each seed; of weight-sparse models also pruned by edges.

    They are saved in `out/model/task/seed` and its folder `edges`; those that are there are not searched again. What
    is in results.json is returned; results.md has it as a table, and results.svg as a plot, if matplotlib is installed.

    Args:
        models, tasks: as `load` and `get_task` know them.
        config: of `prune`; its seed is replaced.
        corpus: text for the means, as in `load_corpus`.
        workers: processes; each of several has one thread. A script that asks for several needs Python's
            `if __name__ == "__main__":`.

    Raises:
        SuiteError: if the folder is of a suite with other settings, a process died, or Ctrl-C was pressed.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used. That a task has no
            circuit in a model does not stop the suite: the results say why.
    """
    out, config = Path(out), dataclasses.replace(config or PruneConfig(), seed=0)
    check(workers >= 1, "workers", workers, "at least 1")
    sources = _by_name("models", {model: Path(model).resolve().name for model in models if find(model)})
    names = _by_name("tasks", {task: get_task(task).name for task in tasks})
    settings = {"config": dataclasses.asdict(config), "corpus": corpus}
    for path in out.glob("*/*/*/job.json"):
        before = read_json(path).get("settings", {})
        refuse_another(path.parent, before, settings | {"model": sources.get(path.parts[-4], before.get("model"))})
    jobs = [
        Job(source, task, seed, out / model / name / str(seed))
        for (model, source), (name, task), seed in itertools.product(sources.items(), names.items(), seeds)
    ]
    left = [job for job in jobs if not job.folder.exists()]
    run = functools.partial(run_job, config=config, corpus=corpus, device=device)
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="circuits", unit="circuit") as bar:
        for _ in in_processes(run, left, workers):
            bar.update()
    results = settings | {"seeds": list(seeds)} | collected(jobs)
    write_json(out / "results.json", results)
    with replacing(out / "results.md") as temporary:
        temporary.write_text(results_table(results), encoding="utf-8")
    if find_spec("matplotlib"):
        plot(results, out / "results.svg")
    return results


def _by_name(what: str, names: Mapping[str, str]) -> dict[str, str]:
    """Name → source; `ConfigError` if there is none, or two have one name."""
    sources = {name: source for source, name in names.items()}
    check(0 < len(sources) == len(names), what, list(names), "at least one, of different names")
    return sources


def refuse_another(place: object, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `SuiteError`, which names what differs, unless the settings found in a place are those of now."""
    old, new = ({**settings, **settings.get("config", {}), "config": None} for settings in (before, now))
    changed = [f"{name} = {old.get(name)!r}, now {new.get(name)!r}" for name in new if old.get(name) != new.get(name)]
    if changed:
        raise SuiteError(f"{place} was made with {'; '.join(changed)}. Go on with those settings, or give a new place")


def in_processes(function: Callable[[T], R], arguments: Iterable[T], workers: int) -> Iterator[R]:
    """What `function` gives for each argument, as it is done; in this process if `workers` is 1.

    Raises:
        SuiteError: if a process died, or Ctrl-C was pressed. What was done before remains.
    """
    try:
        if workers == 1:
            yield from map(function, arguments)
            return
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)
        try:
            for future in as_completed([pool.submit(function, argument) for argument in arguments]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        raise SuiteError("interrupted; what is finished is kept, and the same command goes on from there") from None
    except BrokenProcessPool as error:
        raise SuiteError("a process died, perhaps for lack of memory; go on with fewer --workers") from error


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once; the main process reports it


@functools.cache
def loaded(
    model: str, corpus: str | None, device: str | None, batch_size: int
) -> tuple[TLModel, Int[Tensor, "seq pos"], NodeValues]:
    """A model, tokens of its corpus, and the means over these: once in each process."""
    face = load(model, device)
    tokens = load_corpus(model, face.tokenizer, face.cfg.n_ctx, corpus)
    return face, tokens, corpus_means(face, tokens, batch_size)


def run_job(job: Job, config: PruneConfig, corpus: str | None, device: str | None) -> None:
    """Find one circuit and save it, or why there is none."""
    model, tokens, means = loaded(job.model, corpus, device, config.batch_size)
    task, config = get_task(job.task), dataclasses.replace(config, seed=job.seed)
    circuits: dict[str, Circuit] = {}
    seconds: dict[str, float] = {}
    started, problem = time.perf_counter(), None
    try:
        circuits["."], _ = prune(model, task, tokens, config, False, means)
        seconds["."] = time.perf_counter() - started
        if is_weight_sparse(model) and len(circuits["."].edges(model)) <= MAX_EDGES:
            circuits["edges"], _ = prune_edges(circuits["."], model, task, config, False)
            seconds["edges"] = time.perf_counter() - started - seconds["."]
    except TLSparseError as error:
        problem = str(error)
    settings = {"model": job.model, "corpus": corpus, "config": dataclasses.asdict(config) | {"seed": 0}}
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=job.folder.parent) as temporary:
            whole = Path(temporary, "job")
            write_json(whole / "job.json", {"settings": settings, "problem": problem, "seconds": seconds})
            for name, circuit in circuits.items():
                circuit.save(whole / name)
            whole.replace(job.folder)
    except OSError as error:
        if not job.folder.is_dir():  # else another process was faster
            raise CheckpointError(f"cannot write {job.folder}: {error}") from error


def is_weight_sparse(model: TLModel) -> bool:
    """One of ours, with most of the weights between its nodes at zero."""
    if not hasattr(model, "network"):
        return False
    matrices = [matrix for layer in range(model.cfg.n_layers) for *_, matrix in weight_matrices(model, layer)]
    return sum(int(m.count_nonzero()) for m in matrices) < 0.5 * sum(m.numel() for m in matrices)


# --- results --------------------------------------------------------------------------------------------------


def collected(jobs: Collection[Job]) -> dict[str, Any]:
    """What the finished `jobs` found, by model and task: median and range over the seeds.

    Node-pruned and edge-pruned circuits are never mixed. Geometric means are of the median edges (at least 1) over the
    tasks that every model solved with every seed; ratios are to the model with the fewest.
    """
    models: dict[str, dict[str, Any]] = {}
    for (model, task), group in itertools.groupby(jobs, lambda job: job.folder.parts[-3:-1]):
        models.setdefault(model, {})[task] = _over_seeds(list(group))
    shared = [
        task for task in next(iter(models.values()))
        if all("node_pruned" in tasks[task] and not tasks[task]["problems"] for tasks in models.values())
    ]  # fmt: skip
    means: dict[str, dict[str, float]] = {}
    for kind, model in itertools.product(("node_pruned", "edge_pruned"), models if shared else ()):
        if all(kind in models[model][task] for task in shared):
            edges = [max(1, models[model][task][kind]["edges"]["median"]) for task in shared]
            means.setdefault(kind, {})[model] = statistics.geometric_mean(edges)
    ratios = {model: mean / min(means["node_pruned"].values()) for model, mean in means.get("node_pruned", {}).items()}
    return {"models": models, "solved_by_all": shared, "geometric_mean_edges": means, "ratio": ratios}


def _over_seeds(jobs: list[Job]) -> dict[str, Any]:
    about = {job.seed: read_json(job.folder / "job.json") for job in jobs}
    result: dict[str, Any] = {"problems": {seed: a["problem"] for seed, a in about.items() if a["problem"]}}
    for kind, name in (("node_pruned", "."), ("edge_pruned", "edges")):
        found = [(Circuit.load(job.folder / name), about[job.seed]["seconds"][name]) for job in jobs
                 if name in about[job.seed]["seconds"]]  # fmt: skip
        if not found:
            continue
        held = [circuit.measured["heldout"] for circuit, _ in found]
        figures = {
            "nodes": [h["n_nodes"] for h in held], "edges": [h["n_edges"] for h in held],
            "loss": [h["circuit"]["loss"] for h in held],
            "standard_error": [h["circuit"]["standard_error"] for h in held],
            "accuracy_without": [h["ablated"]["accuracy"] for h in held], "seconds": [s for _, s in found],
        }  # fmt: skip
        result[kind] = {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in figures.items()}
        pairs = itertools.combinations([set(circuit.nodes) for circuit, _ in found], 2)
        overlaps = [len(a & b) / len(a | b) for a, b in pairs if a | b]
        result[kind]["overlap"] = statistics.mean(overlaps) if overlaps else None
    return result


def results_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""

    def spread(values: Mapping[str, float], digits: str = "g") -> str:
        low, high, median = (format(values[name], digits) for name in ("min", "max", "median"))
        return median if low == high else f"{median} ({low}–{high})"

    lines = ["| model | task | nodes | edges | edge-pruned: nodes | edges | held-out loss | without it | overlap | s |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    problems = []
    for model, tasks in results["models"].items():
        for task, found in tasks.items():
            problems += [f"- {model}, {task}, seed {seed}: {why}" for seed, why in found["problems"].items()]
            if (nodes := found.get("node_pruned")) is None:
                continue
            cut = found.get("edge_pruned")
            counts = [spread(of[what]) if of else "–" for of in (nodes, cut) for what in ("nodes", "edges")]
            loss = f"{nodes['loss']['median']:.3f} ± {nodes['standard_error']['median']:.3f}"
            overlap = "–" if nodes["overlap"] is None else f"{nodes['overlap']:.2f}"
            rest = [loss, spread(nodes["accuracy_without"], ".1%"), overlap, f"{nodes['seconds']['median']:.1f}"]
            lines.append(f"| {' | '.join([model, task, *counts, *rest])} |")
    lines += ["", "Median and range over seeds. Loss, accuracy without the circuit (held-out pairs), overlap of the nodes"]
    lines += ["of two seeds (Jaccard) and seconds are of the node-pruned circuits."]
    if means := results["geometric_mean_edges"]:
        tasks = ", ".join(results["solved_by_all"])
        lines += ["", f"Geometric mean of edges over the tasks that all models solved with every seed ({tasks}):", ""]
        lines += ["| model | node-pruned | × the fewest | edge-pruned |", "|---|---|---|---|"]
        for model, mean in means["node_pruned"].items():
            edge = means.get("edge_pruned", {}).get(model)
            cells = [model, f"{mean:.1f}", f"{results['ratio'][model]:.1f}", "–" if edge is None else f"{edge:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + (["", "No circuit:", "", *problems] if problems else [])) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Edges of the node-pruned circuits of each task, one mark a model, with the range over seeds."""
    from matplotlib.figure import Figure

    models = results["models"]
    tasks = [task for task in next(iter(models.values())) if any("node_pruned" in m[task] for m in models.values())]
    edges = {
        name: {task: found[task]["node_pruned"]["edges"] for task in tasks if "node_pruned" in found[task]}
        for name, found in models.items()
    }
    tasks.sort(key=lambda task: -max(of[task]["median"] for of in edges.values() if task in of))
    figure = Figure(figsize=(5.5, 1.2 + 0.24 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for i, (name, of) in enumerate(edges.items()):
        y = [tasks.index(task) for task in of]
        color, marker = f"C{i}", "osD^vPX*"[i % 8]
        axes.hlines(y, [e["min"] for e in of.values()], [e["max"] for e in of.values()], color=color, alpha=0.5)
        axes.plot([e["median"] for e in of.values()], y, marker, color=color, label=name)
        if mean := results["geometric_mean_edges"].get("node_pruned", {}).get(name):
            axes.axvline(mean, color=color, linestyle=":", linewidth=1)
    axes.set_xscale("symlog", linthresh=1)  # a circuit can do without edges
    axes.set(xlim=(0, None), xlabel="edges of the circuit", yticks=range(len(tasks)), yticklabels=tasks)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")
