"""`tl-sparse compile`, which writes a saved circuit as a program that runs without its model."""

import argparse
from pathlib import Path
from typing import Any

from tl_sparse.cli.arguments import Commands, add_command, add_running_flags, report_saved
from tl_sparse.cli.circuits import add_circuit, open_circuit
from tl_sparse.errors import ConfigError

#: The names of `--dtype`.
DTYPES = ("float32", "float64")
#: The names of `--tokens`.
TOKENS = ("candidates", "all")
#: The file that `--onnx` writes.
ONNX_NAME = "program.onnx"


def add_compile(commands: Commands) -> None:
    """Add the command `compile` to the parser."""
    parser = add_command(
        commands,
        "compile",
        "CIRCUIT --out FOLDER [options]",
        "Write a circuit as a program that runs without its model, with the same logits.",
        _run_compile,
    )
    add_circuit(parser)
    group = parser.add_argument_group("the program")
    group.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="FOLDER",
        help="The folder for program.json and program.safetensors, which "
        "tl_sparse.programs.CompiledCircuit.load reads.",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="Replace a program that is in the folder already."
    )
    group.add_argument(
        "--tokens",
        choices=TOKENS,
        default="candidates",
        help="The tokens whose logits it has: the candidate answers of the task, which makes it "
        "small, or all (default: %(default)s).",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="The dtype of its numbers (default: that of the model).",
    )
    _add_python(parser)
    _add_onnx(parser)
    add_running_flags(parser)


def _add_python(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the Python source")
    group.add_argument(
        "--python",
        action="store_true",
        help="Write circuit.py and circuit.npz too: the program as readable source for NumPy.",
    )
    group.add_argument(
        "--explanation",
        metavar="FILE",
        help="The explanation of the circuit that `tl-sparse explain` wrote: names and comments of "
        "the source.",
    )


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the ONNX file")
    group.add_argument(
        "--onnx",
        action="store_true",
        help="Write program.onnx too, for onnxruntime and other runtimes.",
    )
    group.add_argument(
        "--last",
        action="store_true",
        help="It takes one position of each row as a second input, `last`, and has the logits "
        "there alone.",
    )
    group.add_argument(
        "--opset",
        type=int,
        default=18,
        metavar="N",
        help="The version of ONNX's operators (default: %(default)s).",
    )


def _check(args: argparse.Namespace, folder: Path) -> None:
    """Say what is wrong before the model is opened."""
    from tl_sparse.programs import check_onnx, check_program, check_python

    if args.explanation is not None and not args.python:
        raise ConfigError("--explanation gives names to the Python source, so it needs --python")
    if args.last and not args.onnx:
        raise ConfigError("--last is for the ONNX file, so it needs --onnx")
    check_program(folder, args.overwrite)
    if args.python:
        check_python(folder, args.overwrite)
    if args.onnx:
        check_onnx(folder / ONNX_NAME, args.opset, args.overwrite)


def _run_compile(args: argparse.Namespace) -> None:
    folder = Path(args.out)
    _check(args, folder)

    import torch

    from tl_sparse.explanations import Explanation

    explanation = None if args.explanation is None else Explanation.load(args.explanation)
    circuit, model, _ = open_circuit(args.circuit, args.model, args.device, args.task)
    tokens = None
    if args.tokens == "candidates":
        tokens = _candidates(circuit, model, args.task)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    compiled = circuit.compile(model, tokens, dtype)
    compiled.save(folder, args.overwrite)
    if args.python:
        if explanation is None:
            program = circuit.to_python(model, tokens)
        else:
            program = explanation.to_python(circuit, model, tokens)
        program.save(folder, args.overwrite)
    if args.onnx:
        compiled.to_onnx(folder / ONNX_NAME, args.last, args.opset, args.overwrite)
    logits = "all logits" if tokens is None else f"the logits of {len(tokens)} tokens"
    about = f" ({circuit.n_nodes:,} nodes, {logits}, {compiled.n_bytes:,} bytes)"
    report_saved(args.out, args.quiet, about)


def _candidates(circuit: Any, model: Any, task: str | None) -> list[int]:
    """The candidate answers of the task, in the order in which its pairs have them."""
    from tl_sparse.pruning import heldout_pairs

    candidates = heldout_pairs(circuit, model, task).candidates.flatten().tolist()
    return list(dict.fromkeys(candidates))
