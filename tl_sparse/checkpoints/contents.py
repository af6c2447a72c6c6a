"""What a folder holds, for messages where something else was expected."""

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tl_sparse.errors import CheckpointError
from tl_sparse.faces import transformer_lens_line
from tl_sparse.files import read_json

#: What a command or function can be given.
Wanted = Literal["model", "circuit"]
#: What a folder can hold.
Contents = Literal[
    "model", "dense model", "circuit", "unfinished run", "suite", "family", "nothing"
]

#: `model_type` in config.json of the formats that `load` reads.
OWN_TYPES = ("tl_sparse", "circuitgpt")
#: File → what a folder with it holds, unless that is a model.
_MARKS: dict[str, Contents] = {
    "circuit.json": "circuit",
    "beeg_config.json": "model",
    "sparse_model.bin": "model",
    "run.json": "unfinished run",
    "results.json": "suite",
    "family.json": "family",
}


def contents_of(folder: Path) -> Contents:
    """What a folder holds, judged by the names of its files, and by config.json."""
    config = folder / "config.json"
    if config.is_file():
        return "dense model" if _is_dense(config) else "model"
    for name, contents in _MARKS.items():
        if (folder / name).is_file():
            return contents
    return "nothing"


def _is_dense(config: Path) -> bool:
    """Whether config.json is of a type that `load` does not read, but TransformerLens may open."""
    try:
        values = read_json(config)
    except CheckpointError:
        return False  # `load` says best what is wrong with it
    model_type = values.get("model_type")
    is_ours = "model_config" in values or model_type in OWN_TYPES
    return isinstance(model_type, str) and not is_ours


def no_model(folder: Path) -> str:
    """A message about a folder that holds no model, and what it holds instead."""
    contents = contents_of(folder)
    if contents == "circuit":
        return f"{folder} holds a circuit, not a model{_model_of_circuit(folder)}"
    if contents == "unfinished run":
        command = resuming_command(folder)
        return f"{folder} holds an unfinished training run, not a model yet; `{command}` goes on"
    if contents == "suite":
        return f"{folder} holds the results of a suite, not a model"
    if contents == "family":
        return f"{folder} holds a family of circuits, not a model"
    files = "neither config.json (ours) nor beeg_config.json (OpenAI's)"
    return f"{folder} holds no model: {files}{_inside(folder, ('model', 'dense model'))}"


def resuming_command(folder: Path) -> str:
    """The command that continues the unfinished training run in a folder."""
    values: dict[str, Any] = {}
    with suppress(CheckpointError):  # the command says best what is wrong with it
        values = read_json(folder / "run.json")
    objective = values.get("objective")
    command = objective.get("command") if isinstance(objective, dict) else "train"
    return shlex.join(["tl-sparse", str(command), "--resume", "--out", str(folder)])


def no_circuit(folder: Path) -> str:
    """A message about a folder that holds no circuit, and what it holds instead."""
    contents = contents_of(folder)
    if contents in ("model", "dense model"):
        return a_model_is_no_circuit(str(folder))
    if contents == "suite":
        return f"{folder} holds a suite; its circuits are in {folder}/MODEL/TASK/SEED"
    if contents == "family":
        return f"{folder} holds a family; its circuits are in {folder}/rounds/ROUND/SEED"
    if contents == "unfinished run":
        return f"{folder} holds an unfinished training run, not a circuit"
    return f"{folder} holds no circuit: there is no circuit.json{_inside(folder, ('circuit',))}"


def a_model_is_no_circuit(source: str) -> str:
    """A message about a model that was given where a circuit is wanted."""
    command = f"tl-sparse prune {shlex.quote(source)} TASK --out FOLDER"
    return f"{source} is a model, not a circuit; `{command}` finds a circuit in it"


def a_dense_model(source: str) -> str:
    """A message about a dense model of Hugging Face that was given to `load`."""
    if transformer_lens_line() == 4:
        call = f"TransformerBridge.boot_transformers({source!r})"
    else:
        call = f"HookedTransformer.from_pretrained_no_processing({source!r})"
    return (
        f"{source} is a dense model, which TransformerLens opens: {call}. tl_sparse.prune takes "
        "what that returns, and the commands take the model's name or folder"
    )


def _model_of_circuit(folder: Path) -> str:
    values: dict[str, Any] = {}
    with suppress(CheckpointError):  # if it is damaged, it still is a circuit
        values = read_json(folder / "circuit.json")
    name = values.get("model_name")
    return f"; its model is {name!r}" if isinstance(name, str) and name else ""


def _inside(folder: Path, wanted: tuple[Contents, ...]) -> str:
    """A hint at a folder inside this one that holds what is wanted."""
    for name in sorted(os.listdir(folder)):
        inner = folder / name
        if inner.is_dir() and contents_of(inner) in wanted:
            return f"; did you mean {str(inner)!r}?"
    return ""
