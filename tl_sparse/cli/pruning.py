"""`tl-sparse prune`, and `tl-sparse suite` and `search`, which prune many times."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tl_sparse
from tl_sparse.cli.arguments import (
    CORPUS_HELP,
    MODEL_HELP,
    Commands,
    Flags,
    add_command,
    add_running_flags,
    remark,
)
from tl_sparse.cli.config_flags import add_config_flags, changed_by_file, given_fields
from tl_sparse.errors import ConfigError, TaskError
from tl_sparse.pruning import PruneConfig

#: Group of flags → the fields of PruneConfig in it.
PRUNING_FLAGS = {
    "the search": (
        "nodes target_loss objective method ablation means_over freeze_norms necessity "
        "ablated_accuracy exclude include max_nodes allow_failing_model exchanges "
        "removal_tests restarts seed "
        "batch_size"
    ),
    "robustness": (
        "robust subsets subset_pairs fresh_subsets adversaries adversary_steps adversary_budget"
    ),
    "the gates": (
        "steps pairs_per_step k_coef steer_to steer_rate steer_now lr beta1 beta2 weight_decay "
        "grad_clip warm_start init_bias init_scale temperature tied_qk embed_gates"
    ),
    "the pairs": "train_pairs ranking_pairs selection_pairs cleanup_pairs heldout_pairs",
}


def add_prune(commands: Commands) -> None:
    """Add the command `prune` to the parser."""
    parser = add_command(
        commands,
        "prune",
        "MODEL TASK --out FOLDER [options]",
        "Find the circuit of a task in a model.",
        _run_prune,
    )
    group = parser.add_argument_group("what to prune")
    group.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group.add_argument(
        "task",
        metavar="TASK",
        help="The task: its name (`tl-sparse tasks` lists them), or a file of pairs, *.jsonl.",
    )
    add_corpus(group)
    group = parser.add_argument_group("the result")
    group.add_argument(
        "--out", required=True, metavar="FOLDER", help="A new folder for the circuit."
    )
    group.add_argument(
        "--edges",
        action="store_true",
        help="Also prune the edges of the circuit, and save the result in the folder `edges` in "
        "--out.",
    )
    add_pruning_flags(parser)


def _run_prune(args: argparse.Namespace) -> None:
    config = prune_config(args)
    check_order(args.model, [args.task])

    from tl_sparse.outputs import check_new_folder

    check_new_folder(args.out)
    prune_and_report(
        args.model,
        args.task,
        config,
        args.out,
        args.device,
        args.corpus,
        edges=args.edges,
        quiet=args.quiet,
    )


def prune_and_report(
    source: str,
    task_name: str,
    config: PruneConfig,
    out: str,
    device: str | None,
    corpus: str | None = None,
    *,
    edges: bool = False,
    quiet: bool = False,
) -> None:
    """Find the circuit of a task in a model, save it in `out`, and save and print its report.

    With `edges`, the circuit is then also pruned by edges, and the result is saved in the folder
    `edges` in `out`.
    """
    from tl_sparse.checkpoints import open_with_corpus

    progress = not quiet
    task = tl_sparse.get_task(task_name)
    model, tokens = open_with_corpus(source, corpus, device)

    circuit, evaluation = tl_sparse.prune(model, task, tokens, config, progress)
    _save(circuit, out, tl_sparse.report(circuit, model, task, evaluation), quiet)
    if edges:
        circuit, evaluation = tl_sparse.prune_edges(
            circuit, model, config=config, progress=progress
        )
        report = tl_sparse.report(circuit, model, task, evaluation)
        _save(circuit, str(Path(out, "edges")), "Pruned by edges\n\n" + report, quiet)


def _save(circuit: Any, folder: str, report: str, quiet: bool) -> None:
    from tl_sparse.files import write_text

    circuit.save(folder)
    write_text(Path(folder, "report.txt"), report + "\n")
    print("\n" + report + "\n")
    remark(f"Saved in {folder}; open it with tl_sparse.Circuit.load({folder!r})", quiet)


def add_suite(commands: Commands) -> None:
    """Add the command `suite` to the parser."""
    parser = add_command(
        commands,
        "suite",
        "MODEL … --out FOLDER [options]",
        "Prune many tasks in many models, with several seeds.",
        _run_suite,
    )
    group = parser.add_argument_group("what to prune")
    group.add_argument("model", nargs="+", metavar="MODEL", help="The models, each as for `prune`.")
    group.add_argument(
        "--tasks",
        metavar="TASK,…",
        help="The tasks: names or files of pairs, *.jsonl, separated by commas (default: all "
        "twenty built-in tasks).",
    )
    group.add_argument(
        "--checkpoints",
        nargs="?",
        const="all",
        metavar="STEP,…",
        help="The models are the folders of training runs, of which the kept steps are pruned: all "
        "of them or, separated by commas, these (see `train --keep-checkpoints`).",
    )
    add_seeds(group)
    add_corpus(group)
    add_shared_work(parser.add_argument_group("the result"))
    add_pruning_flags(parser, "seed")


def _run_suite(args: argparse.Namespace) -> None:
    config = prune_config(args)
    seeds = seeds_of(args.seeds)
    checkpoints = checkpoints_of(args.checkpoints)

    from tl_sparse.suites import results_table, run_suite, steps_table
    from tl_sparse.tasks import TASKS

    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    results = run_suite(
        args.model,
        tasks,
        args.out,
        seeds,
        config,
        args.corpus,
        args.workers,
        args.device,
        progress=not args.quiet,
        checkpoints=checkpoints,
    )
    table = steps_table(results) if checkpoints else results_table(results)
    print(f"\n{table}")
    remark(f"Saved in {args.out}", args.quiet)


def add_seeds(flags: Flags) -> None:
    """Add the flag --seeds, whose text `seeds_of` reads."""
    flags.add_argument(
        "--seeds",
        default="0,1,2",
        metavar="N,…",
        help="The seeds, separated by commas (default: %(default)s).",
    )


def seeds_of(text: str) -> list[int]:
    """The seeds of the flag --seeds.

    Raises:
        ConfigError: if they are not whole numbers.
    """
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        expected = "whole numbers separated by commas, such as 0,1,2"
        raise ConfigError(f"seeds = {text!r} is not possible; it must be {expected}") from None


def checkpoints_of(text: str | None) -> bool | list[int]:
    """The steps of the flag --checkpoints, as `run_suite` takes them.

    Raises:
        ConfigError: if they are not whole numbers.
    """
    if text is None:
        return False
    if text == "all":
        return True
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        expected = "steps separated by commas, such as 100,1000; the models come before this flag"
        raise ConfigError(
            f"checkpoints = {text!r} is not possible; it must be {expected}"
        ) from None


def add_search(commands: Commands) -> None:
    """Add the command `search` to the parser."""
    parser = add_command(
        commands,
        "search",
        "MODEL TASK … --out FOLDER [options]",
        "Search for good settings of prune with Optuna.",
        _run_search,
    )
    group = parser.add_argument_group("what to prune")
    group.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group.add_argument(
        "task", nargs="+", metavar="TASK", help="The tasks: names or files of pairs, *.jsonl."
    )
    add_corpus(group)
    group = parser.add_argument_group("the study, and the result")
    group.add_argument(
        "--trials",
        type=int,
        default=50,
        metavar="N",
        help="The number of trials in the whole study (default: %(default)s).",
    )
    group.add_argument(
        "--storage",
        metavar="FILE|URL",
        help="A file or the URL of a database, which all machines that work on the study share "
        "(default: study.journal in --out).",
    )
    add_shared_work(group)
    add_pruning_flags(parser)


def _run_search(args: argparse.Namespace) -> None:
    config = prune_config(args)
    check_order(args.model, args.task)

    from tl_sparse.suites import search

    _, table = search(
        args.model,
        args.task,
        args.out,
        n_trials=args.trials,
        workers=args.workers,
        storage=args.storage,
        config=config,
        corpus=args.corpus,
        device=args.device,
        progress=not args.quiet,
    )
    best = Path(args.out, "best.yaml")
    print(f"\n{table}")
    remark(f"\nSaved {best}; give it to prune or suite with --config", args.quiet)


def check_order(model: str, tasks: Sequence[str]) -> None:
    """Raise `TaskError` if the name of a task stands where that of the model does.

    The model is not opened for this: only one of the two can be the name of a task.
    """
    from tl_sparse.tasks import is_task_name

    if is_task_name(model) and not is_task_name(tasks[0]):
        raise TaskError(f"{model} is a task; the model comes first: {tasks[0]} {model}")


def add_corpus(flags: Flags) -> None:
    """Add the flag --corpus."""
    flags.add_argument("--corpus", metavar="TEXT", help=CORPUS_HELP)


def add_shared_work(flags: Flags) -> None:
    """Add the flags --out and --workers of commands whose work is shared and continued."""
    flags.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="A folder for the results; unfinished work in it is continued.",
    )
    flags.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="The number of processes (default: %(default)s).",
    )


def add_pruning_flags(parser: argparse.ArgumentParser, *skip: str) -> None:
    """Add the flags that these commands share, except for the fields of PruneConfig in `skip`."""
    for title, names in PRUNING_FLAGS.items():
        group = parser.add_argument_group(title)
        if title == "the search":
            group.add_argument(
                "--config",
                metavar="FILE.yaml",
                help="Fields of PruneConfig, such as `search` writes. Flags override the file.",
            )
        fields = [name for name in names.split() if name not in skip]
        add_config_flags(group, PruneConfig(), *fields)
    add_running_flags(parser)


def prune_config(args: argparse.Namespace) -> PruneConfig:
    """The defaults, overridden by the file, which is overridden by the flags."""
    config = changed_by_file(PruneConfig(), args.config)
    return dataclasses.replace(config, **given_fields(args, PruneConfig))
