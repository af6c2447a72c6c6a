"""Make every table and figure in examples/results again.

    make results                                     # all of them
    python examples/results.py circuits --seeds 0    # one of them, in part

What is found and measured is kept in the folder --work. An interrupted call continues there, and
does nothing twice. All of it takes days on two cores: --tasks and --seeds choose what comes first.
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from statistics import geometric_mean
from typing import Any

from tl_sparse import PruneConfig, load, load_bridges, prune
from tl_sparse.attacks import Attack, attack, family_text, prediction_text
from tl_sparse.certificates import certificate_text, certify
from tl_sparse.checkpoints import open_with_corpus
from tl_sparse.circuits import Circuit
from tl_sparse.errors import CheckpointError
from tl_sparse.evaluation import Estimate, adversary_score, holding_circuit, score
from tl_sparse.files import read_json, write_json, write_text
from tl_sparse.pruning import heldout_pairs, task_splits
from tl_sparse.suites import find_family, markdown_table, results_table, run_suite, steps_table
from tl_sparse.tasks import TASKS
from tl_sparse.training import preset, train

REPOSITORY = Path(__file__).parents[1]
SPARSE, DENSE = "tiny-python-wide", "tiny-python-wide-dense"
MODELS = [SPARSE, DENSE]
#: The dense model to which a sparse one is bridged.
BRIDGED_TO = "tiny-python-dense"

#: Name of a search → its settings. Each is made for every task and both models.
SEARCHES = {
    "none": PruneConfig(),
    "subsets": PruneConfig(robust="subsets"),
    "adversary": PruneConfig(robust="adversary"),
}
#: The same with the whole distribution of the next token as the objective; targets are in nats.
LIKE_THE_MODEL = {
    "KL 0.15": PruneConfig(objective="model", target_loss=0.15),
    "KL 0.5": PruneConfig(objective="model", target_loss=0.5),
}
#: Rankings without learned gates.
BASELINES = {
    "attribution": PruneConfig(method="attribution"),
    "integrated gradients": PruneConfig(method="integrated_gradients"),
    "random": PruneConfig(method="random"),
}
#: The tasks whose circuits of all sizes are attacked, of which the first two have a family.
FEW_TASKS = ["single_double_quote", "bracket_brace", "class_init", "if_equals"]
#: The tasks whose circuits are run as programs, to find prompts that fool them.
ATTACKED_TASKS = [
    "bracket_brace",
    "bracket_counting",
    "single_double_quote",
    "class_init",
    "with_as",
    "for_while",
]
#: The tasks whose circuits are explained: those with the fewest edges.
EXPLAINED_TASKS = [
    "single_double_quote",
    "with_as",
    "class_init",
    "lambda_func",
    "fstring_brace",
    "var_swap",
    "for_while",
    "enumerate_range",
]
#: The tasks whose circuits are written as Python, to be read.
READ_TASKS = ["single_double_quote", "with_as"]
#: The tasks and the steps whose circuits are compared along training.
ALONG_TASKS = ["single_double_quote", "with_as", "bracket_counting"]
ALONG_STEPS = [1, 10, 100, 251, 2000]
#: The tasks whose circuits are found in a bridged model.
BRIDGED_TASKS = ["single_double_quote", "with_as", "bracket_brace"]
ABOUT_ATTACKS = """\
Prompts are draws of the task, longer and misleading contexts, and insertions that a search found on
the compiled circuit (edges pruned, first seed), which has seen none of these prompts. In the tables
of families, n is how often the text is inserted, and the last two columns are the mean logit of the
right answer minus that of the wrong one. ± is one standard error."""
#: The adversaries that attack each size: restarts, and steps of each.
RESTARTS, STEPS = 3, 200
#: The number of sizes that are attacked.
N_SIZES = 8


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
        out: the folder for tables and figures.
        work: the folder for circuits and measurements.
        tasks: the tasks; None means those that a result is about by default.
        models: the models.
        seeds: the seeds of searches.
        workers: the number of processes.
        only_tables: whether nothing is searched, and tables have only the circuits that are there.
    """

    out: Path
    work: Path
    tasks: list[str] | None
    models: list[str]
    seeds: list[int]
    workers: int
    only_tables: bool

    def folder(self, kind: str, model: str, task: str) -> Path:
        """The folder of one model and task, which may also be given as a folder and a file."""
        return self.work / kind / Path(model).name / Path(task).stem

    def few_tasks(self, n_tasks: int) -> list[str]:
        """The given tasks or, by default, the first of `FEW_TASKS`."""
        return self.tasks or FEW_TASKS[:n_tasks]


def write_result(plan: Plan, name: str, text: str) -> None:
    """Write a file of examples/results, with what made it."""
    packages = ["tl-sparse", "transformer-lens", "torch"]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    made_by = (
        f"Made by `{command_line()}` on {date.today()}, commit {commit()}, with {versions}, on "
        f"{machine()}."
    )
    write_text(plan.out / name, f"{text.rstrip()}\n\n{made_by}\n")


def command_line() -> str:
    return " ".join(["python examples/results.py", *sys.argv[1:]])


def commit() -> str:
    """The commit of the repository; marked if files have changed since."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {processor()}"


def processor() -> str:
    """The name of the processor, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.system()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.system()


# --- circuits of all tasks


def circuits(plan: Plan) -> None:
    """Circuits that need only hold while all other nodes are held, and robust ones."""
    compare_searches(plan, SEARCHES, "circuits", "Circuits of the two answers of each task")


def next_token(plan: Plan) -> None:
    """Circuits that predict the next token as the model does."""
    compare_searches(plan, LIKE_THE_MODEL, "next_token", "Circuits that are like the model")


def baselines(plan: Plan) -> None:
    """Circuits of nodes that are ranked without learned gates."""
    compare_searches(plan, BASELINES, "baselines", "Circuits without learned gates")


def compare_searches(
    plan: Plan, searches: Mapping[str, PruneConfig], name: str, title: str
) -> None:
    """Run suites that differ in their search, and write their tables task by task."""
    tasks = plan.tasks or list(TASKS)
    steps = [tasks] if plan.only_tables else [tasks[: i + 1] for i in range(len(tasks))]
    for until_now in steps:
        results = {}
        for search, config in searches.items():
            folder = plan.work / name / search.replace(" ", "-")
            of_search = until_now
            if plan.only_tables:
                of_search = [task for task in until_now if is_finished(plan, folder, task)]
            if of_search:
                results[search] = run_suite(
                    plan.models, of_search, folder, plan.seeds, config, workers=plan.workers
                )
        write_result(plan, f"{name}.md", searches_text(title, results, plan.models))


def is_finished(plan: Plan, suite: Path, task: str) -> bool:
    """Whether a suite has the circuits of a task in all models and with all seeds."""
    for model in plan.models:
        for seed in plan.seeds:
            if not (suite / Path(model).name / Path(task).stem / str(seed)).exists():
                return False
    return True


def searches_text(
    title: str, results: Mapping[str, Mapping[str, Any]], models: Iterable[str]
) -> str:
    """The edges of all searches side by side, and then the whole table of each."""
    parts = [f"# {title}", "", edges_side_by_side(results, models)]
    for search, of_search in results.items():
        parts += ["", f"## {search}", "", results_table(of_search)]
    return "\n".join(parts)


def edges_side_by_side(results: Mapping[str, Mapping[str, Any]], models: Iterable[str]) -> str:
    """Edges after the pruning of nodes and (of edges), by task, model and search: medians.

    The last row has geometric means over the tasks that have a circuit in every column.
    """
    columns = []
    for model in models:
        for search, of_search in results.items():
            name = Path(model).name
            columns.append(Column(f"{name}, {search}", of_search["models"][name]))
    tasks: list[str] = []
    for column in columns:
        tasks += [task for task in column.entries if task not in tasks]
    tasks = [task for task in tasks if any(column.edges(task) is not None for column in columns)]
    solved = [task for task in tasks if all(column.edges(task) is not None for column in columns)]
    rows = []
    for task in tasks:
        rows.append([task, *(column.cell(task) for column in columns)])
    if solved:
        means = []
        for column in columns:
            # A task that needs no circuit counts as one edge, as in the tables of suites.
            edges = [max(1.0, column.edges(task) or 0) for task in solved]
            means.append(f"{geometric_mean(edges):,.1f}")
        rows.append([f"geometric mean of {len(solved)}", *means])
    header = ["edges (after the pruning of edges)", *(column.title for column in columns)]
    return markdown_table(header, rows)


@dataclass(frozen=True)
class Column:
    """The circuits of one model and search.

    Attributes:
        title: the model and the search.
        entries: task → its entry in results.json.
    """

    title: str
    entries: Mapping[str, Any]

    def edges(self, task: str, kind: str = "node_pruned") -> float | None:
        """The median number of edges over seeds; None if there is no circuit."""
        entry = self.entries.get(task)
        if entry is None or not entry[kind]:
            return None
        median: float = entry[kind]["edges"]["median"]
        return median

    def cell(self, task: str) -> str:
        edges, fewer = self.edges(task), self.edges(task, "edge_pruned")
        if edges is None:
            return "–"
        return f"{edges:,.0f}" if fewer is None else f"{edges:,.0f} ({fewer:,.0f})"


# --- circuits of all sizes under adversaries


def sizes(plan: Plan) -> None:
    """The loss under fresh adversaries against the size, up to a quarter of all nodes."""
    curves: dict[str, dict[str, dict[str, float]]] = {}
    for task in plan.few_tasks(4):
        for model in plan.models:
            name = f"{Path(task).stem} in {Path(model).name}"
            curves[name] = attacked_sizes(plan, model, task)
            write_result(plan, "sizes.md", sizes_text(curves))
            draw_sizes(curves, plan.out / "sizes.svg")


def attacked_sizes(plan: Plan, source: str, task: str) -> dict[str, dict[str, float]]:
    """Size → the losses of the circuit of that size; measured once, and stored one by one."""
    folder = plan.folder("sizes", source, task)
    model, tokens = open_with_corpus(source)
    config = PruneConfig(method="any_size", robust="adversary", seed=plan.seeds[0])
    ranked = ranked_circuit(folder / "ranking", lambda: prune(model, task, tokens, config)[0])
    train, _, heldout = task_splits(model, task, config)
    found = stored(folder / "losses.json")
    for size in sizes_to_attack(ranked.n_candidates):
        if str(size) not in found:
            circuit = ranked.of_size(size)
            attacked = adversary_score(
                circuit, model, train, heldout, steps=STEPS, restarts=RESTARTS, seed=1
            )
            found[str(size)] = {
                "edges": len(circuit.edges(model)),
                "loss": score(model, heldout, run_context=holding_circuit(circuit, model)).loss,
                "under adversaries": attacked.score.loss,
                "accuracy": attacked.score.accuracy,
            }
            write_json(folder / "losses.json", {"sizes": found})
    return found


def sizes_to_attack(n_nodes: int) -> list[int]:
    """A quarter of all nodes, and half as many each time; the smallest size first."""
    sizes = [n_nodes // 2**power for power in range(2, 2 + N_SIZES)]
    return sorted(size for size in sizes if size > 0)


def ranked_circuit(folder: Path, find: Callable[[], Circuit]) -> Circuit:
    """The circuit in a folder, or the one that `find` finds, which is then saved there."""
    if not folder.exists():
        find().save(folder)
    return Circuit.load(folder)


def stored(path: Path) -> dict[str, dict[str, float]]:
    """The measurements that are stored so far."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, float]] = read_json(path)["sizes"]
    return found


def sizes_text(curves: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    rows = []
    for name, curve in curves.items():
        for size, losses in curve.items():
            cells = [f"{losses['edges']:,.0f}", f"{losses['loss']:.3f}"]
            cells += [f"{losses['under adversaries']:.3f}", f"{losses['accuracy']:.1%}"]
            rows.append([name, size, *cells])
    header = ["task and model", "nodes", "edges", "loss alone", "under adversaries", "accuracy"]
    return "\n".join(
        [
            "# How large must a circuit be to withstand adversaries?",
            "",
            "One ranking for all sizes, learned beside an adversary (`method=any_size`, "
            "`robust=adversary`). Of each size,",
            f"{RESTARTS} fresh adversaries of {STEPS} steps leave any of the other nodes as they "
            "are; the worst counts, on held-out pairs.",
            "",
            markdown_table(header, rows),
        ]
    )


def draw_sizes(curves: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tl_sparse.view import plots

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, curve in curves.items():
        losses = [each["under adversaries"] for each in curve.values()]
        style = "--" if DENSE in name else "-"
        axes.plot([int(size) for size in curve], losses, style, marker="o", label=name)
    axes.axhline(PruneConfig().target_loss, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="loss under adversaries (nats)")
    axes.legend(frameon=False, fontsize=7)
    plots.save(figure, path, overwrite=True)
    plt.close(figure)


# --- families and certificates


def families(plan: Plan) -> None:
    """The families of two tasks."""
    for task in plan.few_tasks(2):
        for model in plan.models:
            folder = plan.folder("families", model, task)
            find_family(model, task, folder, plan.seeds, workers=plan.workers)
            name = f"family_{Path(task).stem}_{Path(model).name}"
            write_result(plan, f"{name}.md", (folder / "family.md").read_text())
            if (folder / "family.svg").exists():
                copyfile(folder / "family.svg", plan.out / f"{name}.svg")


def certificates(plan: Plan) -> None:
    """The certificates of the circuits of the first model with the first seed."""
    source = plan.models[0]
    for task in plan.few_tasks(4):
        for search in ("none", "subsets"):
            circuit = circuit_found(plan, search, source, task)
            if circuit is None:
                continue
            family = plan.folder("families", source, task) / "family.json"
            model, tokens = open_with_corpus(source)
            certificate = certify(
                circuit,
                model,
                task,
                corpus=tokens,
                family=family if family.exists() else None,
                folder=plan.folder(f"certificates/{search}", source, task),
            )
            text = certificate_text(certificate)
            name = f"certificate_{Path(task).stem}_{search}.md"
            write_result(plan, name, f"```\n{text}\n```")


def circuit_found(plan: Plan, search: str, source: str, task: str) -> Circuit | None:
    """The circuit with fewer edges of the first seed; None if it is not made yet."""
    folder = plan.folder(f"circuits/{search}", source, task) / str(plan.seeds[0])
    try:
        return Circuit.load(folder / "edges")
    except CheckpointError:
        print(f"{folder} has no circuit yet: make the circuits first", file=sys.stderr)
        return None


# --- programs


def programs(plan: Plan) -> None:
    """How exact the programs of all circuits of the first model with the first seed are."""
    from exactness import Exactness, exactness_text, measured

    source = plan.models[0]
    model, tokens = open_with_corpus(source)
    precise_model = load(source, dtype="float64", device=str(model.cfg.device))
    rows: dict[str, Exactness] = {}
    for search in SEARCHES:
        for task in plan.tasks or TASKS:
            folder = plan.folder(f"circuits/{search}", source, task) / str(plan.seeds[0])
            for title, path in {"nodes": folder, "edges": folder / "edges"}.items():
                try:
                    circuit = Circuit.load(path)
                except CheckpointError:
                    continue
                if circuit.n_nodes == 0 or (title == "edges" and circuit.edge_set is None):
                    continue  # nothing to compile, or the circuit of nodes again
                store = plan.folder(f"programs/{search}", source, task) / f"{title}.json"
                name = f"{Path(task).stem}, {search}, pruned by {title}"
                rows[name] = measured(store, circuit, model, precise_model, tokens)
                write_result(plan, "programs.md", exactness_text(rows))


def attacks(plan: Plan) -> None:
    """Families of prompts that fool circuits of the first model, and how often they fool it."""
    source = plan.models[0]
    found = {}
    for task in plan.tasks or ATTACKED_TASKS:
        circuit = circuit_found(plan, "none", source, task)
        if circuit is None:
            continue
        path = plan.folder("attacks", source, task) / "attack.json"
        if not path.exists():
            model, _ = open_with_corpus(source)
            attack(circuit, model, task, n_prompts=40_000, n_test=128).save(path)
        found[task] = Attack.load(path)
    write_result(plan, "attacks.md", attacks_text(found))


def attacks_text(found: Mapping[str, Attack]) -> str:
    """Predictions of all circuits side by side, and the two best families of each."""
    rows = []
    sections = []
    for task, of_task in found.items():
        prediction = of_task.prediction
        held = f"{prediction.n_held:,} of {prediction.n_predicted:,}"
        shares = [prediction.holds, prediction.elsewhere, prediction.random]
        rows.append([task, str(of_task.n_nodes), held, *map(percent, shares)])
        sections += ["", f"## {task}", "", prediction_text(prediction)]
        for family in of_task.families[:2]:
            sections += ["", "```", family_text(family), "```"]
    header = ["task", "nodes", "model errs where the program does", "share"]
    header += ["elsewhere", "after random changes"]
    return "\n".join(
        [
            "# Prompts that fool circuits, tried on the full model",
            "",
            ABOUT_ATTACKS,
            "",
            markdown_table(header, rows),
            *sections,
        ]
    )


# --- explanations


def explanations(plan: Plan) -> None:
    """Expressions for the nodes of the first model's circuits with the first seed."""
    from explained import explained, explanations_text

    source = plan.models[0]
    model, _ = open_with_corpus(source)
    found = {}
    for title in ("edges", "nodes"):
        for task in plan.tasks or EXPLAINED_TASKS:
            circuit = circuit_to_explain(plan, title, source, task)
            if circuit is None:
                continue
            store = plan.folder("explanations", source, task) / f"{title}.json"
            if plan.only_tables and not store.exists():
                continue
            name = f"{Path(task).stem}, pruned by {title}"
            found[name] = explained(store, circuit, model, task)
            write_result(plan, "explanations.md", explanations_text(found))


def circuit_to_explain(plan: Plan, title: str, source: str, task: str) -> Circuit | None:
    """A circuit of the search `none`; None if it is not made yet, or has no edge that was cut."""
    with_fewer_edges = circuit_found(plan, "none", source, task)
    if with_fewer_edges is None or title == "edges":
        return with_fewer_edges
    folder = plan.folder("circuits/none", source, task) / str(plan.seeds[0])
    circuit = Circuit.load(folder)
    model, _ = open_with_corpus(source)
    n_cut = len(circuit.edges(model)) - len(with_fewer_edges.edges(model))
    return circuit if n_cut > 0 else None


def sources(plan: Plan) -> None:
    """Circuits with fewer edges of the first model as Python, with the names of explanations."""
    from explained import explained

    source = plan.models[0]
    model, _ = open_with_corpus(source)
    for task in plan.tasks or READ_TASKS:
        circuit = circuit_found(plan, "none", source, task)
        if circuit is None:
            continue
        store = plan.folder("explanations", source, task) / "edges.json"
        explanation = explained(store, circuit, model, task)
        candidates = heldout_pairs(circuit, model, task).candidates.unique().tolist()
        program = explanation.to_python(circuit, model, candidates)
        program.save(plan.out / f"program_{Path(task).stem}", overwrite=True)


def percent(share: Estimate | None) -> str:
    """A share with its standard error."""
    if share is None:
        return "–"
    error = "" if share.standard_error is None else f" ± {100 * share.standard_error:.1f}"
    return f"{share.value:.1%}{error}"


# --- bridges


def bridges(plan: Plan) -> None:
    """Circuits of a model that is bridged to the dense one, and what they do there."""
    from bridged import bridges_text, circuit_of, measured

    folder = plan.work / "tiny-python-bridged"
    if not (folder / "training.json").exists():
        if plan.only_tables:
            return
        settings = ["examples/tiny-python-bridged.yaml", "--sites-per-step", "2"]
        run("-m", "tl_sparse", "bridge", BRIDGED_TO, *settings, "--out", str(folder))
    opened = load_bridges(folder, BRIDGED_TO)
    losses = opened.recorded_losses()
    found = {}
    for task in plan.tasks or BRIDGED_TASKS:
        place = plan.folder("bridges", "tiny-python-bridged", task)
        if plan.only_tables and not (place / "circuit").exists():
            continue
        circuit = circuit_of(place / "circuit", folder, task)
        found[Path(task).stem] = measured(place / "effects.json", circuit, opened)
        write_result(plan, "bridges.md", bridges_text(losses, found))


# --- training and sparse execution


def along_training(plan: Plan) -> None:
    """Circuits of a few tasks in the models that a short run keeps of its steps, with one seed."""
    work = plan.work / "along_training"
    run_folder = work / "laptop"
    if not (run_folder / "training.json").exists():
        config = replace(preset("laptop"), steps=ALONG_STEPS[-1], keep_checkpoints="log")
        train(config, run_folder, resume=(run_folder / "run.json").exists())
    results = run_suite(
        run_folder,
        plan.tasks or ALONG_TASKS,
        work / "circuits",
        plan.seeds[0],
        # Adversaries are no part of this result, and take most of the time.
        PruneConfig(adversary_steps=10),
        workers=plan.workers,
        checkpoints=ALONG_STEPS,
    )
    title = "# Circuits along the training of a model of the preset laptop"
    write_result(plan, "along_training.md", f"{title}\n\n{steps_table(results)}")
    copyfile(work / "circuits" / "results.svg", plan.out / "along_training.svg")


def pretrained(plan: Plan) -> None:
    """Circuits of a pretrained dense model, of channels and of components."""
    from pretrained import SEARCHES, measured, pretrained_text, smollm

    model = smollm()
    rows = {}
    for search in SEARCHES:
        rows[search] = measured(plan.work / "pretrained" / f"{search}.json", search, model)
        write_result(plan, "pretrained.md", pretrained_text(rows))


def training(plan: Plan) -> None:
    """The grids of small models."""
    for grid in ("size", "recipe"):
        work = plan.work / "training"
        options = ["--out", str(work), "--processes", str(plan.workers), "--steps", "400"]
        run("examples/sweep.py", grid, *options)
        write_result(plan, f"{grid}.md", (work / f"{grid}.md").read_text())
    copyfile(work / "size.svg", plan.out / "size.svg")


def sparse_execution(plan: Plan) -> None:
    """Speed and memory of sparse execution."""
    printed = run("-m", "pytest", "-q", "-s", "tests/benchmarks/test_sparse_execution.py")
    write_result(plan, "sparse_execution.md", f"# What sparse execution gains\n\n{printed}")


def run(*arguments: str) -> str:
    """What Python prints with these arguments, in the repository."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout


#: Name → what makes it, in the order in which they are made.
RESULTS: dict[str, Callable[[Plan], None]] = {
    "circuits": circuits,
    "families": families,
    "certificates": certificates,
    "programs": programs,
    "attacks": attacks,
    "explanations": explanations,
    "sources": sources,
    "sizes": sizes,
    "next_token": next_token,
    "baselines": baselines,
    "pretrained": pretrained,
    "bridges": bridges,
    "training": training,
    "along_training": along_training,
    "sparse_execution": sparse_execution,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The names are checked below: argparse would compare an empty list of them with the choices.
    all_names = ", ".join(RESULTS)
    parser.add_argument("names", nargs="*", help=f"what to make (default: all): {all_names}")
    parser.add_argument("--tasks", type=_names, help="only these tasks, separated by commas")
    parser.add_argument("--models", type=_names, default=MODELS, help="only these models")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "results-work")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "examples" / "results")
    parser.add_argument(
        "--only-tables", action="store_true", help="search nothing: tables of the circuits found"
    )
    args = parser.parse_args()
    if unknown := {*args.names} - {*RESULTS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; it is one of {all_names}")
    args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        args.out,
        args.work,
        args.tasks,
        args.models,
        args.seeds,
        args.workers,
        args.only_tables,
    )
    for name in args.names or RESULTS:
        RESULTS[name](plan)


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
