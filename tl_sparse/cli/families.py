"""`tl-sparse family`."""

import argparse

from tl_sparse.cli.arguments import MODEL_HELP, Commands, add_command, remark
from tl_sparse.cli.pruning import (
    add_corpus,
    add_pruning_flags,
    add_seeds,
    add_shared_work,
    check_order,
    prune_config,
    seeds_of,
)


def add_family(commands: Commands) -> None:
    """Add the command `family` to the parser."""
    parser = add_command(
        commands,
        "family",
        "MODEL TASK --out FOLDER [options]",
        "Find circuits of a task until there are no others.",
        _run_family,
    )
    group = parser.add_argument_group("what to prune")
    group.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group.add_argument("task", metavar="TASK", help="The task: a name or a file of pairs, *.jsonl.")
    add_seeds(group)
    group.add_argument(
        "--rounds",
        type=int,
        default=20,
        metavar="N",
        help="The largest number of rounds. In each, the nodes are forbidden that all circuits of "
        "the one before it have, except for those that every circuit needs (default: %(default)s).",
    )
    add_corpus(group)
    add_shared_work(parser.add_argument_group("the result"))
    add_pruning_flags(parser, "seed")


def _run_family(args: argparse.Namespace) -> None:
    config = prune_config(args)
    seeds = seeds_of(args.seeds)
    check_order(args.model, [args.task])

    from tl_sparse.suites import family_table, find_family

    family = find_family(
        args.model,
        args.task,
        args.out,
        seeds,
        args.rounds,
        config,
        args.corpus,
        args.workers,
        args.device,
        progress=not args.quiet,
    )
    print(f"\n{family_table(family)}")
    remark(f"Saved in {args.out}", args.quiet)
