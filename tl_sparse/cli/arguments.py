"""Shared code of the commands: their parsers and the flags that many of them have."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from tl_sparse.config import MAX_SEED

#: The type of what `parser.add_subparsers` returns, for which argparse has no public name.
Commands = Any
#: The type of what `parser.add_argument_group` returns, for which argparse has no public name.
Flags = Any

MODEL_HELP = (
    "The model: a folder, a name that tl_sparse.load knows, or a dense model of Hugging Face."
)
CORPUS_HELP = (
    "The text over which mean activations are taken: a folder, a glob pattern, a file or 'builtin' "
    "(default: the sample that is stored with the model)."
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, followed by one that says where the help is."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and end the process with status 2."""
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        if wrong is not None:
            message += _did_you_mean(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists the options\n")

    # Overridden because the parser of a command leaves what it does not know to the one above it,
    # which would name neither the command nor a flag of it.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the arguments; any that is not known is an error."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = re.findall(r"--[\w-]+", self.format_help())
            hint = _did_you_mean(unknown[0].partition("=")[0], flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        assert parsed is not None
        return parsed, []


def _did_you_mean(given: str, possible: Sequence[str]) -> str:
    near = get_close_matches(given, possible, n=1)
    if given.startswith("--"):  # it may be an abbreviation
        near = [flag for flag in possible if flag.startswith(given)] or near
    return f"; did you mean {near[0]}?" if near else ""


def help_formatter(prog: str) -> argparse.HelpFormatter:
    """Help in which the texts begin far enough to the right of most flags."""
    return argparse.HelpFormatter(prog, max_help_position=30)


def add_command(
    commands: Commands,
    name: str,
    usage: str,
    help: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """Add a command without any arguments; `add_running_flags` adds those that all commands have.

    Args:
        commands: the subparsers to add it to.
        name: the name of the command.
        usage: the arguments that it needs, as its help shows them behind the name.
        help: what the command does, in one line.
        run: the function that runs the command with the parsed arguments.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=f"tl-sparse {name} {usage}",
        help=help,
        description=help,
        formatter_class=help_formatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """Add the last group of flags, which all commands have: --device, --quiet and --help."""
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--device",
        help="The device: cpu, cuda, … (default: the GPU if there is one, else the CPU).",
    )
    group.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="Show no progress bars and no remarks, only results, warnings and errors.",
    )
    group.add_argument("-h", "--help", action="help", help="Show this help and exit.")


def add_out_file(flags: Flags, help: str, required: bool = True) -> None:
    """Add the flag -o for the file that a command writes, and --overwrite."""
    flags.add_argument("-o", "--out", required=required, metavar="FILE", help=help)
    flags.add_argument(
        "--overwrite", action="store_true", help="Replace the file if it exists already."
    )


def remark(text: str, quiet: bool) -> None:
    """Print what is not a result, unless --quiet is given."""
    if not quiet:
        print(text)


def report_saved(path: str, quiet: bool, more: str = "") -> None:
    """Say where the results are; on stderr if they themselves went to a pipe or a device."""
    from tl_sparse.outputs import is_stream

    if not quiet:
        stream = sys.stderr if is_stream(Path(path)) else sys.stdout
        print(f"Saved {path}{more}", file=stream)


def seed(text: str) -> int:
    """The seed of a flag."""
    if text.isdecimal() and int(text) <= MAX_SEED:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_SEED}")
