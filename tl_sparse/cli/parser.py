"""The entry point, and the parser of all commands.

Neither this file nor the top level of the commands' files imports torch, so that `--help` is fast.
A command imports what it needs when it runs.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

import tl_sparse
from tl_sparse.cli.arguments import Parser, help_formatter
from tl_sparse.cli.attacking import add_attack
from tl_sparse.cli.bridging import add_bridge
from tl_sparse.cli.certifying import add_certify
from tl_sparse.cli.circuits import add_evaluate, add_export, add_view
from tl_sparse.cli.compiling import add_compile
from tl_sparse.cli.demo import add_demo
from tl_sparse.cli.explaining import add_explain
from tl_sparse.cli.families import add_family
from tl_sparse.cli.output import (
    CLOSED_PIPE,
    discard_output,
    flush_output,
    print_any_character,
    print_error,
    warnings_in_one_line,
    without_bars,
)
from tl_sparse.cli.plotting import add_plot
from tl_sparse.cli.pruning import add_prune, add_search, add_suite
from tl_sparse.cli.tasks import add_tasks
from tl_sparse.cli.training import add_train
from tl_sparse.errors import TLSparseError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `tl-sparse`; None uses those of this process.

    Returns:
        The exit status: 0; 1 after an error, which is printed in one line without a traceback; 130
        after Ctrl-C; or `CLOSED_PIPE` if nobody reads the output any more.
    """
    print_any_character()
    try:
        try:
            return _run(argv)
        finally:
            flush_output()
    except BrokenPipeError:
        discard_output()
        return CLOSED_PIPE
    except OSError as error:
        print_error(f"cannot write the output: {error}")
        return 1


def _run(argv: Sequence[str] | None) -> int:
    """Run a command; its exit status."""
    args = build_parser().parse_args(argv)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings_in_one_line())
            if args.quiet:
                stack.enter_context(without_bars())
            args.run(args)
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except BrokenPipeError:
        raise
    except (TLSparseError, OSError, UnicodeError) as error:
        print_error(error)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, in the order in which `--help` lists them.

    The parsed arguments have an attribute `run`, the function that runs the command with them.
    """
    parser = Parser(
        prog="tl-sparse",
        usage="tl-sparse COMMAND …",
        description="Weight-sparse transformers as TransformerLens models, and their circuits.",
        epilog="`tl-sparse COMMAND --help` lists the options of a command. Begin with "
        "`tl-sparse demo`, which takes about a minute.",
        formatter_class=help_formatter,
        allow_abbrev=False,
    )
    version = f"tl-sparse {tl_sparse.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", title="commands", prog="tl-sparse"
    )
    add_train(commands)
    add_bridge(commands)
    add_prune(commands)
    add_suite(commands)
    add_search(commands)
    add_family(commands)
    add_tasks(commands)
    add_view(commands)
    add_export(commands)
    add_evaluate(commands)
    add_explain(commands)
    add_certify(commands)
    add_compile(commands)
    add_attack(commands)
    add_plot(commands)
    add_demo(commands)
    return parser
