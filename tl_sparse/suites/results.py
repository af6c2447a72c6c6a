"""The results of a suite over its circuits, as JSON and as a table."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, mean, median
from typing import Any, NamedTuple

from tl_sparse.circuits import Circuit
from tl_sparse.evaluation import Evaluation
from tl_sparse.files import read_json

#: The two kinds of circuit of a job, which are never summarised together.
NODE_PRUNED = "node_pruned"
EDGE_PRUNED = "edge_pruned"
#: The summaries over the seeds that results.json gives of each figure.
SUMMARIES: dict[str, Callable[[list[float]], float]] = {
    "mean": mean,
    "median": median,
    "min": min,
    "max": max,
}
#: Figure → its format in results.md. All figures are fields of `CircuitFigures` except the overlap,
#: which belongs to a pair of circuits.
FORMATS = {
    "nodes": "g",
    "edges": "g",
    "loss": ".3f",
    "standard_error": ".3f",
    "accuracy_without": ".1%",
    "seconds": ".1f",
    "overlap": ".2f",
}
#: Figure → name of a summary → its value.
Summaries = dict[str, dict[str, float]]


class Job(NamedTuple):
    """One circuit to find. Its folder is written completely or not at all."""

    model: str
    task: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class CircuitFigures:
    """The figures of one circuit in job.json."""

    nodes: int
    edges: int
    seconds: float
    loss: float
    standard_error: float | None
    accuracy_without: float
    kept: list[str]

    @classmethod
    def of(cls, circuit: Circuit, evaluation: Evaluation, seconds: float) -> "CircuitFigures":
        return cls(
            nodes=evaluation.n_nodes,
            edges=evaluation.n_edges,
            seconds=seconds,
            loss=evaluation.circuit.loss,
            standard_error=evaluation.circuit.standard_error,
            accuracy_without=evaluation.ablated.accuracy,
            kept=[str(node) for node in circuit.nodes],
        )


@dataclass(frozen=True)
class TaskResults:
    """The circuits of one task in one model, over the seeds.

    Attributes:
        problems: seed → why there is no circuit.
        node_pruned: empty if there is no circuit.
        edge_pruned: empty if there is no circuit.
    """

    problems: dict[str, str]
    node_pruned: Summaries
    edge_pruned: Summaries


#: Model → task → the fields of `TaskResults`.
ModelResults = dict[str, dict[str, dict[str, Any]]]


def collected(jobs: Iterable[Job]) -> dict[str, Any]:
    """The results of finished jobs by model and task, summarised over the seeds.

    Circuits pruned by nodes and circuits pruned by edges are summarised separately. Geometric means
    are taken of the median numbers of edges (at least 1), over the tasks that every model solved
    with every seed. Ratios are relative to the model with the fewest edges.
    """
    models: ModelResults = {}
    for (model, task), reports in _reports(jobs).items():
        models.setdefault(model, {})[task] = asdict(_task_results(reports))
    shared = _solved_by_all(models)
    node_means = _mean_edges(models, shared, NODE_PRUNED)
    ratios = {}
    for model, edges in node_means.items():
        ratios[model] = edges / min(node_means.values())
    return {
        "models": models,
        "solved_by_all": shared,
        "geometric_mean_edges": {
            NODE_PRUNED: node_means,
            EDGE_PRUNED: _mean_edges(models, shared, EDGE_PRUNED),
        },
        "ratio": ratios,
    }


def _reports(jobs: Iterable[Job]) -> dict[tuple[str, str], dict[str, Any]]:
    """(model, task) → seed → the contents of job.json."""
    reports: dict[tuple[str, str], dict[str, Any]] = {}
    for job in jobs:
        model, task, seed = job.folder.parts[-3:]
        reports.setdefault((model, task), {})[seed] = read_json(job.folder / "job.json")
    return reports


def _task_results(reports: Mapping[str, Mapping[str, Any]]) -> TaskResults:
    problems = {}
    node_pruned = []
    edge_pruned = []
    for seed, report in reports.items():
        if report["problem"]:
            problems[seed] = report["problem"]
        if NODE_PRUNED in report:
            node_pruned.append(CircuitFigures(**report[NODE_PRUNED]))
        if EDGE_PRUNED in report:
            edge_pruned.append(CircuitFigures(**report[EDGE_PRUNED]))
    return TaskResults(problems, _summarised(node_pruned), _summarised(edge_pruned))


def _summarised(circuits: Sequence[CircuitFigures]) -> Summaries:
    summaries = {}
    for name in FORMATS:
        if name == "overlap":
            values = _overlaps(circuits)
        else:
            values = [getattr(circuit, name) for circuit in circuits]
            values = [value for value in values if value is not None]
        if values:
            summaries[name] = {key: summary(values) for key, summary in SUMMARIES.items()}
    return summaries


def _overlaps(circuits: Iterable[CircuitFigures]) -> list[float]:
    """The Jaccard index of the nodes, for every pair of circuits."""
    overlaps = []
    for first, second in itertools.combinations(circuits, 2):
        in_both = set(first.kept) & set(second.kept)
        in_either = set(first.kept) | set(second.kept)
        overlaps.append(len(in_both) / max(1, len(in_either)))
    return overlaps


def _solved_by_all(models: ModelResults) -> list[str]:
    """The tasks that every model solved with every seed."""
    solved = []
    for task in next(iter(models.values())):
        if not any(tasks[task]["problems"] for tasks in models.values()):
            solved.append(task)
    return solved


def _mean_edges(models: ModelResults, tasks: Sequence[str], kind: str) -> dict[str, float]:
    """Model → the geometric mean of its edges over these tasks, if it has a circuit of each."""
    means = {}
    for model, results in models.items():
        summaries = [results[task][kind] for task in tasks]
        if summaries and all(summaries):
            means[model] = geometric_mean(max(1, s["edges"]["median"]) for s in summaries)
    return means


def results_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown.

    Args:
        results: the result of `run_suite`.
    """
    figures = [name.replace("_", " ") for name in FORMATS]
    header = ["model", "task", *figures, "edge-pruned: nodes", "edges"]
    rows = [header, ["---"] * len(header)]
    problems = []
    for model, tasks in results["models"].items():
        for task, entry in tasks.items():
            cells = [_cell(entry[NODE_PRUNED], name) for name in FORMATS]
            cells += [_cell(entry[EDGE_PRUNED], name) for name in ("nodes", "edges")]
            rows.append([model, task, *cells])
            for seed, problem in entry["problems"].items():
                problems.append(f"- {model}, {task}, seed {seed}: {problem}")
    means = results["geometric_mean_edges"]
    for model, ratio in results["ratio"].items():
        row = [""] * len(header)
        row[:2] = [model, f"**geometric mean**, × {ratio:.1f}"]
        row[header.index("edges")] = f"{means[NODE_PRUNED][model]:.1f}"
        row[-1] = f"{means[EDGE_PRUNED][model]:.1f}" if model in means[EDGE_PRUNED] else "–"
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = [
        "Cells are the median (range) over seeds, on held-out pairs. The overlap is the mean "
        "Jaccard index of the nodes found with",
        "two seeds. Only the last two columns describe circuits pruned by edges. Geometric means "
        "are over the tasks that all models solved",
        f"with every seed: {', '.join(results['solved_by_all']) or 'none'}.",
    ]
    return "\n".join([*lines, "", *note, "", *problems]) + "\n"


def _cell(summaries: Mapping[str, Mapping[str, float]], name: str) -> str:
    """The median and range of a figure, or the mean and range of the overlap."""
    if name not in summaries:
        return "–"
    summary = summaries[name]
    middle = format(summary["mean" if name == "overlap" else "median"], FORMATS[name])
    lowest = format(summary["min"], FORMATS[name])
    highest = format(summary["max"], FORMATS[name])
    return middle if lowest == highest else f"{middle} ({lowest}–{highest})"
