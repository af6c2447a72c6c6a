"""The files of a compiled circuit.

`program.json` describes its parts, nested as the modules are: the name of each part's class, and
the arguments that make it again. `program.safetensors` has the tensors among them, each under its
name in the module.
"""

from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tl_sparse.arguments import checked
from tl_sparse.checksums import FILES, check_files, checksums_of
from tl_sparse.errors import CheckpointError
from tl_sparse.files import read_json, read_tensors, write_json, write_tensors
from tl_sparse.outputs import FileSet, check_new_files, finish_replacing, replacing_together

FORMAT = "tl_sparse compiled circuit"
FORMAT_VERSION = 1
PROGRAM_FILES = FileSet(
    what="program", described_by="program.json", required=("program.safetensors",)
)


@checked()
def check_program(folder: str | Path, overwrite: bool = False) -> None:
    """Check, before the slow work of compiling a circuit, that `save` can write it.

    Raises:
        CheckpointError: if it cannot.
        ConfigError: if `folder` holds a compiled circuit, and `overwrite` is False.
    """
    check_new_files(PROGRAM_FILES, folder, overwrite)


def write_program(folder: Path, program: nn.Module, overwrite: bool) -> None:
    """Write a compiled circuit; see `CompiledCircuit.save`."""
    tensors = {name: values.contiguous() for name, values in program.named_buffers()}
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "program": _described(program)}
    with replacing_together(PROGRAM_FILES, folder, overwrite) as new:
        write_tensors(new / "program.safetensors", tensors)
        write_json(new / "program.json", {**values, FILES: checksums_of(new)})


def _described(part: nn.Module) -> dict[str, Any]:
    """The class of a part, and its arguments: its attributes of the same names.

    Tensors are left out.
    """
    arguments: dict[str, Any] = {}
    for name in signature(type(part)).parameters:
        value = getattr(part, name)
        if isinstance(value, nn.ModuleList):
            arguments[name] = [_described(each) for each in value]
        elif isinstance(value, nn.Module):
            arguments[name] = _described(value)
        elif not isinstance(value, Tensor):
            arguments[name] = value
    return {"part": type(part).__name__, "arguments": arguments}


def read_program(folder: Path, parts: Iterable[type[nn.Module]]) -> nn.Module:
    """Read what `write_program` wrote.

    Args:
        folder: the folder.
        parts: the classes that the files may name.

    Raises:
        CheckpointError: if a file is missing, damaged, or has another format or version.
    """
    finish_replacing(PROGRAM_FILES, folder)
    path = folder / "program.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} holds no compiled circuit: it has no program.json, which "
            "circuit.compile(model).save(folder) writes"
        )
    values = read_json(path)
    tensors_path = folder / "program.safetensors"
    check_files(path, values, tensors_path)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is not {FORMAT!r}: this is not a compiled circuit")
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {values.get('format_version')!r}; "
            f"this version of tl_sparse reads format_version {FORMAT_VERSION}"
        )
    reader = _PartReader(parts, read_tensors(tensors_path))
    try:
        program = reader.part(values["program"], "")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or malformed entry: {error}") from error
    return program


class _PartReader:
    """Makes the parts of a compiled circuit again from their descriptions."""

    def __init__(self, parts: Iterable[type[nn.Module]], tensors: Mapping[str, Tensor]) -> None:
        self._class_named = {part.__name__: part for part in parts}
        self._tensors = tensors

    def part(self, description: Mapping[str, Any], prefix: str) -> nn.Module:
        """The part of this description; the names of its tensors begin with `prefix`."""
        arguments = dict(description["arguments"])
        make = self._class_named[description["part"]]
        for name in signature(make).parameters:
            if name not in arguments:
                arguments[name] = self._tensors[prefix + name]
            else:
                arguments[name] = self._argument(arguments[name], f"{prefix}{name}.")
        return make(**arguments)

    def _argument(self, value: Any, prefix: str) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            parts = [self.part(each, f"{prefix}{i}.") for i, each in enumerate(value)]
            return nn.ModuleList(parts)
        if isinstance(value, dict):
            return self.part(value, prefix)
        return value
