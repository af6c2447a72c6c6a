"""The results of a suite over its circuits, as JSON and as a table."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import geometric_mean, mean, median
from typing import Any

from tl_sparse.evaluation import jaccard
from tl_sparse.suites.jobs import (
    EDGE_PRUNED,
    NODE_PRUNED,
    CircuitFigures,
    Job,
    JobReport,
    read_reports,
)
from tl_sparse.suites.robustness import LIMIT
from tl_sparse.view import SuiteResults, Summaries, TaskResults, read_results, summary

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
    "kl": ".2f",
    "zero_loss": ".2f",
    "resample_loss": ".2f",
    "subsets_worst": ".3f",
    "limited_adversary": ".3f",
    "adversary": ".2f",
    "accuracy_without": ".1%",
    "seconds": ".1f",
    "overlap": ".2f",
}

#: The figures of circuits pruned by edges that results.md gives after those of all circuits.
_AFTER_EDGES = ("nodes", "edges", "loss", "subsets_worst", "limited_adversary")

#: The mark of a loss that misses the target.
MISSES_TARGET = "†"

#: Model → task → the fields of `TaskResults`.
ModelResults = dict[str, dict[str, dict[str, Any]]]


def collected(jobs: Iterable[Job]) -> dict[str, Any]:
    """The results of finished jobs by model and task, summarised over the seeds.

    Circuits pruned by nodes and circuits pruned by edges are summarised separately. Geometric means
    are taken of the median numbers of edges (at least 1), over the tasks that every model solved
    with every seed. Ratios are relative to the model with the fewest edges.
    """
    models: ModelResults = {}
    for (model, task), reports in read_reports(jobs).items():
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


def _task_results(reports: Mapping[str, JobReport]) -> TaskResults:
    problems = {}
    full = []
    node_pruned = []
    edge_pruned = []
    for seed, report in reports.items():
        if report.full:
            full.append(report.full)
        if report.problem:
            problems[seed] = report.problem
        if report.node_pruned:
            node_pruned.append(report.node_pruned)
        if report.edge_pruned:
            edge_pruned.append(report.edge_pruned)
    return TaskResults(
        problems=problems,
        full=_summaries_of(full, ("loss", "accuracy")),
        node_pruned=_summarised(node_pruned),
        edge_pruned=_summarised(edge_pruned),
    )


def _summarised(circuits: Sequence[CircuitFigures]) -> Summaries:
    names = [name for name in (*FORMATS, "target_loss", "reached_loss") if name != "overlap"]
    summaries = _summaries_of(circuits, names)
    overlaps = _overlaps(circuits)
    if overlaps:
        summaries["overlap"] = _summary_of(overlaps)
    return summaries


def _summaries_of(measured: Sequence[Any], names: Iterable[str]) -> Summaries:
    """Figure → its summaries over the seeds, of those in which it is known."""
    summaries = {}
    for name in names:
        values = [getattr(each, name) for each in measured]
        values = [value for value in values if value is not None]
        if values:
            summaries[name] = _summary_of(values)
    return summaries


def _summary_of(values: list[float]) -> dict[str, float]:
    return {key: statistic(values) for key, statistic in SUMMARIES.items()}


def _overlaps(circuits: Iterable[CircuitFigures]) -> list[float]:
    """The Jaccard index of the nodes, for every pair of circuits."""
    overlaps = []
    for first, second in itertools.combinations(circuits, 2):
        overlaps.append(jaccard(first.kept, second.kept))
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

    Raises:
        DataError: if `results` do not have the form of such results.
    """
    read = read_results(results)
    of_nodes = [name.replace("_", " ") for name in FORMATS]
    of_edges = [f"edge-pruned: {name.replace('_', ' ')}" for name in _AFTER_EDGES]
    header = ["model", "task", *of_nodes, *of_edges]
    rows = []
    problems = []
    for model, tasks in read.models.items():
        for task, entry in tasks.items():
            cells = [*_cells(entry.node_pruned, FORMATS), *_cells(entry.edge_pruned, _AFTER_EDGES)]
            rows.append([model, task, *cells])
            for seed, problem in entry.problems.items():
                problems.append(in_one_line(f"- {model}, {task}, seed {seed}: {problem}"))
    for model, ratio in read.ratio.items():
        row = [""] * len(header)
        row[:2] = [model, f"**geometric mean**, × {ratio:.1f}"]
        row[header.index("edges")] = _mean_cell(read, NODE_PRUNED, model)
        row[header.index("edge-pruned: edges")] = _mean_cell(read, EDGE_PRUNED, model)
        rows.append(row)
    note = [
        "Cells are the median (range) over seeds, on held-out pairs. The overlap is the mean "
        "Jaccard index of the nodes found with",
        "two seeds. Geometric means are over the tasks that all models solved with every seed:",
        f"{in_one_line(', '.join(read.solved_by_all)) or 'none'}.",
        "The kl is the divergence of the circuit's next-token distribution from the model's, in "
        "nats. Losses are with all other nodes at their",
        "means, at zero, resampled; with the worst of 64 random subsets of them as in the model; "
        f"and with those, at most {LIMIT} or any number, that",
        "a fresh adversary chooses.",
    ]
    if any(MISSES_TARGET in cell for row in rows for cell in row):
        note.append(
            f"{MISSES_TARGET} misses, on held-out pairs and with some seed, the loss that the "
            "search had to reach."
        )
    without_edges = _without_edges(read)
    if without_edges:
        note.append(
            "Tasks that need no circuit, since the last token alone decides the answer, count as "
            f"one edge in geometric means: {in_one_line(', '.join(without_edges))}."
        )
    return "\n".join([markdown_table(header, rows), "", *note, "", *problems]) + "\n"


def _cells(summaries: Summaries, names: Iterable[str]) -> list[str]:
    """The figures of one kind of circuit of a task."""
    cells = []
    for name in names:
        text = cell(summaries, name)
        if name == "loss" and _misses_target(summaries):
            text += f" {MISSES_TARGET}"
        cells.append(text)
    return cells


def _misses_target(summaries: Summaries) -> bool:
    """Whether the circuit of some seed has a larger loss than it had to reach."""
    if "target_loss" not in summaries:
        return False
    reached = "reached_loss" if "reached_loss" in summaries else "loss"
    largest = summary(summaries, reached, "max", "the results")
    return largest > summary(summaries, "target_loss", "min", "the results")


def _without_edges(results: SuiteResults) -> list[str]:
    """The tasks, each with its model, whose median circuit has no edges."""
    found = []
    for model, tasks in results.models.items():
        for task, entry in tasks.items():
            has_circuit = bool(entry.node_pruned)
            if has_circuit and not summary(entry.node_pruned, "edges", "median", "the results"):
                found.append(f"{task} in {model}")
    return found


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, in which names may contain any character."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(map(_table_line, lines))


def _table_line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    # The name of a folder or a file can hold anything.
    escaped = [in_one_line(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def in_one_line(text: str) -> str:
    """A text without line breaks."""
    # A name can also hold bytes that are no text, which Python represents by half a surrogate pair.
    encodable = text.encode(errors="backslashreplace").decode()
    return " ".join(encodable.splitlines())


def _mean_cell(results: SuiteResults, kind: str, model: str) -> str:
    means = results.geometric_mean_edges.get(kind, {})
    return f"{means[model]:.1f}" if model in means else "–"


def cell(summaries: Summaries, name: str) -> str:
    """The median and range of a figure, or the mean and range of the overlap."""
    if name not in summaries:
        return "–"
    middle = "mean" if name == "overlap" else "median"
    texts = []
    for statistic in (middle, "min", "max"):
        value = summary(summaries, name, statistic, "the results")
        texts.append(format(value, FORMATS[name]))
    shown, lowest, highest = texts
    return shown if lowest == highest else f"{shown} ({lowest}–{highest})"
