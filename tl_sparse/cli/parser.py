"""The entry point, and the parser of all commands.

Neither this file nor the top level of the commands' files imports torch, so that `--help` is fast.
A command imports what it needs when it runs.
"""

import argparse
import sys
from collections.abc import Sequence

from tl_sparse.cli.circuits import add_evaluate, add_export, add_view
from tl_sparse.cli.demo import add_demo
from tl_sparse.cli.plotting import add_plot
from tl_sparse.cli.pruning import add_prune, add_search, add_suite
from tl_sparse.cli.tasks import add_tasks
from tl_sparse.cli.training import add_train
from tl_sparse.errors import TLSparseError
from tl_sparse.parsing import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `tl-sparse`; None uses those of this process.

    Returns:
        The exit status: 0, or 1 after a `TLSparseError`, which is printed without a traceback.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except TLSparseError as error:
        message = printable(str(error), keep="\n")
        print(f"tl-sparse: error: {message}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, in the order in which `--help` lists them.

    The parsed arguments have an attribute `run`, the function that runs the command with them.
    """
    parser = argparse.ArgumentParser(
        prog="tl-sparse",
        description="Weight-sparse transformers as TransformerLens models, and their circuits.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    add_train(commands)
    add_prune(commands)
    add_suite(commands)
    add_search(commands)
    add_tasks(commands)
    add_view(commands)
    add_export(commands)
    add_evaluate(commands)
    add_plot(commands)
    add_demo(commands)
    return parser
