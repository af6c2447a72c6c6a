"""Shared code of the commands: their parsers, and configurations from flags and files."""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tl_sparse.config import MAX_SEED, merged
from tl_sparse.parsing import parse_json

#: The type of what `parser.add_subparsers` returns, for which argparse has no public name.
Commands = Any

MODEL_HELP = "The model: a folder, or a name that tl_sparse.load knows."
CORPUS_HELP = (
    "The text over which mean activations are taken: a folder, a glob pattern, a file or 'builtin' "
    "(default: the sample that is stored with the model)."
)


def add_command(
    commands: Commands,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], None],
    *configs: type,
) -> argparse.ArgumentParser:
    """Add a command with the flag --device.

    Args:
        commands: the subparsers to add it to.
        name: the name of the command.
        help: what the command does, in one line.
        run: the function that runs the command with the parsed arguments.
        configs: config dataclasses whose docstrings are shown below the list of flags.
    """
    docstrings = []
    for config in configs:
        docstrings.append(f"{config.__name__}: {inspect.cleandoc(config.__doc__ or '')}")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog="\n\n".join(docstrings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--device",
        help="The device: cpu, cuda, … (default: the GPU if there is one, else the CPU).",
    )
    return parser


def add_out_file(parser: argparse.ArgumentParser, help: str, required: bool = True) -> None:
    """Add the flag -o for the file that a command writes, and --overwrite."""
    parser.add_argument("-o", "--out", required=required, help=help)
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the file if it exists already."
    )


def report_saved(path: str, remark: str = "") -> None:
    """Print where the results are; to stderr if they themselves went to a pipe or a device."""
    from tl_sparse.outputs import is_stream

    stream = sys.stderr if is_stream(Path(path)) else sys.stdout
    print(f"Saved {path}{remark}", file=stream)


def add_config_flags(
    parser: argparse.ArgumentParser, defaults: Any, skip: Sequence[str] = ()
) -> None:
    """Add a flag for each field of a config dataclass except those in `skip`.

    `add_command` shows the meaning of the fields below the list of flags. A flag that is not given
    leaves no attribute in the parsed arguments and so changes nothing; see `given_fields`.
    """
    types = get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        options = _flag_options(field.name, types[field.name], getattr(defaults, field.name))
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)


def _flag_options(name: str, declared: Any, default: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for the flag of a field."""
    if name == "abs_topk":
        # The field maps locations to fractions; the flag is one fraction for the paper's locations.
        return {
            "type": float,
            "help": "The share of activations that AbsTopK keeps at the paper's eight locations; "
            "1 uses no AbsTopK (default: 0.25).",
        }
    options: dict[str, Any] = {"help": f"(default: {default})"}
    if get_origin(declared) is UnionType:  # `X | None`: a flag that is given is an X
        declared, _ = get_args(declared)
    if declared is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(declared) is Literal:
        options["choices"] = get_args(declared)
    elif get_origin(declared) is Mapping:
        options["type"] = json_value
        options["metavar"] = "JSON"
    else:
        options["type"] = declared
        options["metavar"] = declared.__name__
    return options


def json_value(text: str) -> Any:
    """The JSON value of a flag."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid JSON: {error}") from error


def seed(text: str) -> int:
    """The seed of a flag."""
    if text.isdecimal() and int(text) <= MAX_SEED:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_SEED}")


def given_fields(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a config dataclass whose flags were given."""
    values = {}
    for field in dataclasses.fields(config):
        if hasattr(args, field.name):
            values[field.name] = getattr(args, field.name)
    return values


def changed_by_file(config: Any, path: str | None) -> Any:
    """The configuration with the changes of a YAML file, if one is given."""
    if path is None:
        return config

    from tl_sparse.files import errors_name_file, read_yaml

    with errors_name_file(path):
        return merged(config, read_yaml(Path(path)))
