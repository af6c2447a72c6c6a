"""Configurations from flags and files: a flag for each field of a config dataclass."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tl_sparse.cli.arguments import Flags
from tl_sparse.config import merged
from tl_sparse.parsing import parse_json

#: An entry under "Attributes:" in the docstring of a config: its name and its text.
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n        .*)*)", re.MULTILINE)


def add_config_flags(flags: Flags, defaults: Any, *names: str) -> None:
    """Add a flag for each of these fields of a config dataclass.

    Its help is the first sentence about the field in the docstring of the dataclass. A flag that is
    not given leaves no attribute in the parsed arguments and so changes nothing; see
    `given_fields`.
    """
    types = get_type_hints(type(defaults))
    texts = field_texts(type(defaults))
    for name in names:
        options = _flag_options(name, types[name])
        default = getattr(defaults, name)
        text = f"{texts.get(name, '')} (default: {_written(default)})."  # python -OO has no texts
        if name == "abs_topk":
            text = f"{_ONE_FRACTION} (default: 0.25)."
        flag = "--" + name.replace("_", "-")
        flags.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


#: The field abs_topk maps locations to fractions; its flag is one fraction.
_ONE_FRACTION = (
    "The share of entries that AbsTopK keeps at the paper's eight locations; 1 uses no AbsTopK"
)


def field_texts(config: type) -> dict[str, str]:
    """Field → the first sentence about it in the docstring of a config dataclass.

    The sentence begins with a capital letter, and has no full stop.
    """
    docstring = inspect.cleandoc(config.__doc__ or "")
    attributes = docstring.partition("Attributes:\n")[2].partition("\n\n")[0]
    texts = {}
    for name, text in _ENTRY.findall(attributes):
        words = " ".join(text.split())
        sentence = re.split(r"\.(?:$| (?=[A-Z`\"]))", words)[0]
        texts[name] = sentence[0].upper() + sentence[1:]
    return texts


def _written(default: Any) -> str:
    """A default value as the help shows it."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    return "none" if default in (None, {}, "", ()) else str(default)


def _flag_options(name: str, declared: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for the flag of a field."""
    options: dict[str, Any] = {}
    if get_origin(declared) is UnionType:  # `X | None`: a flag that is given is an X
        declared, _ = get_args(declared)
    if name == "abs_topk":
        options["type"] = float
        options["metavar"] = "SHARE"
    elif declared is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(declared) is Literal:
        options["choices"] = get_args(declared)
    elif get_origin(declared) is Union:  # a number, or one of several words
        words = get_args(get_args(declared)[1])
        options["type"] = number_or_word
        options["metavar"] = "|".join(["N", *words])
    elif declared == tuple[str, ...]:
        options["type"] = node_names
        options["metavar"] = "NODE,…|CIRCUIT"
    elif get_origin(declared) is Mapping:
        options["type"] = json_value
        options["metavar"] = "JSON"
    else:
        options["type"] = declared
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}[declared]
    return options


def node_names(text: str) -> tuple[str, ...]:
    """The names of nodes, or those of the circuit in a folder."""
    if not Path(text).is_dir():
        return tuple(name.strip() for name in text.split(","))

    from tl_sparse.circuits import Circuit

    return Circuit.load(text).node_names


def number_or_word(text: str) -> int | str:
    """The value of a flag that takes a number or a word, both of which the config checks."""
    return int(text) if text.isdecimal() else text


def json_value(text: str) -> Any:
    """The JSON value of a flag."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid JSON: {error}") from error


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

    values = read_yaml(Path(path))
    with errors_name_file(path):
        return merged(config, values)
