"""`tl-sparse attack`, which searches prompts on which a saved circuit errs."""

import argparse

from tl_sparse.cli.arguments import (
    Commands,
    add_command,
    add_running_flags,
    report_saved,
    seed,
)
from tl_sparse.cli.circuits import add_circuit, open_circuit


def add_attack(commands: Commands) -> None:
    """Add the command `attack` to the parser."""
    parser = add_command(
        commands,
        "attack",
        "CIRCUIT [-o FILE.json] [options]",
        "Search prompts on which a circuit errs, and try them on the full model.",
        _run_attack,
    )
    add_circuit(parser)
    group = parser.add_argument_group("the attack")
    group.add_argument("-o", "--out", metavar="FILE", help="A file for the results, *.json.")
    group.add_argument(
        "--overwrite", action="store_true", help="Replace the file if it exists already."
    )
    group.add_argument(
        "--prompts",
        type=int,
        default=20_000,
        metavar="N",
        help="The number of prompts that the search runs on the compiled circuit (default: "
        "%(default)s).",
    )
    group.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="End the search after this time even if prompts are left.",
    )
    group.add_argument(
        "--test-prompts",
        type=int,
        default=64,
        metavar="N",
        help="The number of fresh prompts on which each change is tested, in the circuit and in "
        "the model (default: %(default)s).",
    )
    group.add_argument(
        "--families",
        type=int,
        default=8,
        metavar="N",
        help="The largest number of insertions that are tested (default: %(default)s).",
    )
    group.add_argument(
        "--neutral",
        action="append",
        default=[],
        metavar="TEXT",
        help="A text that changes no right answer, wherever in a prompt it is inserted before the "
        "last word; can be given several times. Tasks that are not built in need some.",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="The seed of everything random (default: %(default)s).",
    )
    add_running_flags(parser)


def _run_attack(args: argparse.Namespace) -> None:
    from tl_sparse.attacks import attack, attack_text
    from tl_sparse.outputs import check_ending, check_new_file

    if args.out is not None:
        check_ending(args.out, (".json",), "an attack")
        check_new_file(args.out, args.overwrite)
    circuit, model, _ = open_circuit(args.circuit, args.model, args.device, args.task)
    found = attack(
        circuit,
        model,
        args.task,
        neutral=args.neutral,
        n_prompts=args.prompts,
        seconds=args.seconds,
        n_test=args.test_prompts,
        n_families=args.families,
        progress=not args.quiet,
        seed=args.seed,
    )
    print(attack_text(found))
    if args.out is not None:
        found.save(args.out, args.overwrite)
        report_saved(args.out, args.quiet)
