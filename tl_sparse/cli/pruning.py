"""`tl-sparse prune`, and `tl-sparse suite` and `search`, which prune many times."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import tl_sparse
from tl_sparse.cli.arguments import (
    CORPUS_HELP,
    MODEL_HELP,
    Commands,
    add_command,
    add_config_flags,
    changed_by_file,
    given_fields,
)
from tl_sparse.errors import ConfigError
from tl_sparse.pruning import PruneConfig


def add_prune(commands: Commands) -> None:
    """Add the command `prune` to the parser."""
    parser = add_command(
        commands, "prune", "Find the circuit of a task in a model.", _run_prune, PruneConfig
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "task",
        help="The task: its name, for example single_double_quote, or a file of pairs, *.jsonl.",
    )
    parser.add_argument("--out", required=True, help="A new folder for the circuit.")
    parser.add_argument(
        "--edges",
        action="store_true",
        help="Also prune the edges of the circuit, and save the result in the folder `edges` in "
        "--out.",
    )
    _add_pruning_flags(parser)


def _run_prune(args: argparse.Namespace) -> None:
    config = _prune_config(args)

    from tl_sparse.outputs import check_new_folder

    check_new_folder(args.out)
    prune_and_report(args.model, args.task, config, args.out, args.device, args.corpus, args.edges)


def prune_and_report(
    source: str,
    task_name: str,
    config: PruneConfig,
    out: str,
    device: str | None,
    corpus: str | None = None,
    edges: bool = False,
) -> None:
    """Find the circuit of a task in a model, save it in `out`, and save and print its report.

    With `edges`, the circuit is then also pruned by edges, and the result is saved in the folder
    `edges` in `out`.
    """
    task = tl_sparse.get_task(task_name)
    model = tl_sparse.load(source, device)
    tokens = tl_sparse.load_corpus(source, model.tokenizer, model.cfg.n_ctx, corpus)

    circuit, evaluation = tl_sparse.prune(model, task, tokens, config)
    _save(circuit, out, tl_sparse.report(circuit, model, task, evaluation))
    if edges:
        circuit, evaluation = tl_sparse.prune_edges(circuit, model, config=config)
        report = tl_sparse.report(circuit, model, task, evaluation)
        _save(circuit, str(Path(out, "edges")), "Pruned by edges\n\n" + report)


def _save(circuit: Any, folder: str, report: str) -> None:
    from tl_sparse.files import write_text

    circuit.save(folder)
    write_text(Path(folder, "report.txt"), report + "\n")
    print("\n" + report + "\n")
    print(f"Saved in {folder}; open it with tl_sparse.Circuit.load({folder!r})")


def add_suite(commands: Commands) -> None:
    """Add the command `suite` to the parser."""
    parser = add_command(
        commands,
        "suite",
        "Prune many tasks in many models, with several seeds.",
        _run_suite,
        PruneConfig,
    )
    parser.add_argument(
        "model", nargs="+", help="The models: folders, or names that tl_sparse.load knows."
    )
    parser.add_argument(
        "--tasks",
        help="The tasks: names or files of pairs, *.jsonl, separated by commas (default: all "
        "twenty built-in tasks).",
    )
    parser.add_argument(
        "--seeds", default="0,1,2", help="The seeds, separated by commas (default: %(default)s)."
    )
    _add_shared_work(parser)
    _add_pruning_flags(parser, "seed")


def _run_suite(args: argparse.Namespace) -> None:
    config = _prune_config(args)
    seeds = _seeds(args.seeds)

    from tl_sparse.suites import results_table, run_suite
    from tl_sparse.tasks import TASKS

    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    results = run_suite(
        args.model, tasks, args.out, seeds, config, args.corpus, args.workers, args.device
    )
    print(f"\n{results_table(results)}\nSaved in {args.out}")


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        expected = "whole numbers separated by commas, such as 0,1,2"
        raise ConfigError(f"seeds = {text!r} is not possible; it must be {expected}") from None


def add_search(commands: Commands) -> None:
    """Add the command `search` to the parser."""
    parser = add_command(
        commands,
        "search",
        "Search for good settings of prune with Optuna.",
        _run_search,
        PruneConfig,
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("task", nargs="+", help="The tasks: names or files of pairs, *.jsonl.")
    parser.add_argument(
        "--trials",
        type=int,
        default=50,
        help="The number of trials in the whole study (default: %(default)s).",
    )
    parser.add_argument(
        "--storage",
        help="A file or the URL of a database, which all machines that work on the study share "
        "(default: study.journal in --out).",
    )
    _add_shared_work(parser)
    _add_pruning_flags(parser)


def _run_search(args: argparse.Namespace) -> None:
    config = _prune_config(args)

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
    )
    best = Path(args.out, "best.yaml")
    print(f"\n{table}\n\nSaved {best}; give it to prune or suite with --config")


def _add_shared_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        required=True,
        help="A folder for the results; unfinished work in it is continued.",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="The number of processes (default: %(default)s)."
    )


def _add_pruning_flags(parser: argparse.ArgumentParser, *skip: str) -> None:
    """Add the flags that these commands share, except for the fields of PruneConfig in `skip`."""
    parser.add_argument("--corpus", help=CORPUS_HELP)
    parser.add_argument(
        "--config",
        help="A YAML file with fields of PruneConfig, such as `search` writes. Flags override the "
        "file.",
    )
    add_config_flags(parser, PruneConfig(), skip=skip)


def _prune_config(args: argparse.Namespace) -> PruneConfig:
    """The defaults, overridden by the file, which is overridden by the flags."""
    config = changed_by_file(PruneConfig(), args.config)
    return dataclasses.replace(config, **given_fields(args, PruneConfig))
