"""`tl-sparse plot`."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from tl_sparse.cli.arguments import (
    Commands,
    add_command,
    add_out_file,
    add_running_flags,
    report_saved,
)
from tl_sparse.errors import ConfigError, DataError

#: The kinds that are plotted from one source.
SINGLE_KINDS = ("tasks", "specificity", "family", "training", "sparsity")


def add_plot(commands: Commands) -> None:
    """Add the command `plot` to the parser."""
    parser = add_command(
        commands,
        "plot",
        "KIND SOURCE … -o FILE [options]",
        "Plot circuits, suites and models.",
        _run_plot,
    )
    group = parser.add_argument_group("what to plot")
    group.add_argument(
        "kind",
        choices=("curve", "tasks", "frontier", "specificity", "family", "training", "sparsity"),
        metavar="KIND",
        help="curve: the loss and accuracy of circuits against their size. tasks: the size of a "
        "suite's circuits for each task. frontier: the loss of many circuits against their size. "
        "specificity: what each task loses without the circuit of each task. "
        "family: the size of a family's circuits by round. "
        "training: the size and loss of circuits by step, of a suite with --checkpoints. "
        "sparsity: the nonzero weights and activations in each layer of a model.",
    )
    group.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="curve: files that `evaluate -o` wrote. frontier: such files, or the folders of "
        "suites. tasks, training: the folder of a suite, or its results.json. specificity: what "
        "the Python function specificity_matrix returns, as JSON. family: the folder of a family, "
        "or its family.json. sparsity: one model.",
    )
    group.add_argument(
        "--against",
        choices=("edges", "nodes"),
        default="edges",
        help="What the size of a circuit is measured in (default: %(default)s).",
    )
    group.add_argument(
        "--corpus",
        metavar="TEXT",
        help="sparsity: the text on which activations are counted (default: the sample that is "
        "stored with the model).",
    )
    add_out_file(parser.add_argument_group("the image"), "The image file, *.png or *.svg.")
    add_running_flags(parser)


def _run_plot(args: argparse.Namespace) -> None:
    from tl_sparse.outputs import check_new_file
    from tl_sparse.view import plots

    plots.check_drawing(args.out)
    check_new_file(args.out, args.overwrite)
    first = args.source[0]
    if len(args.source) > 1 and args.kind in SINGLE_KINDS:
        raise ConfigError(f"{args.kind} is plotted from one source, not from {len(args.source)}")
    if args.kind == "sparsity":
        from tl_sparse.checkpoints import open_with_corpus

        model, corpus = open_with_corpus(first, args.corpus, args.device)
        figure = plots.sparsity(model, corpus)
    elif args.kind in ("tasks", "family", "training"):
        draw = {"tasks": plots.tasks, "family": plots.family, "training": plots.training}[args.kind]
        figure = draw(_figures(first, args.kind), args.against, first)
    elif args.kind == "specificity":
        figure = plots.specificity(_figures(first, args.kind), first)
    else:
        evaluations = {path: _figures(path, args.kind) for path in args.source}
        if args.kind == "curve":
            figure = plots.curve(evaluations, args.against)
        else:
            figure = plots.frontier(evaluations, args.against)
    plots.save(figure, args.out, args.overwrite)
    report_saved(args.out, args.quiet)


def _figures(source: str, kind: str) -> dict[str, Any]:
    """The figures in a JSON file, or in the results.json of a suite's folder.

    Raises:
        DataError: if it is something else that the commands read or write; the message names the
            command that makes the figures.
        CheckpointError: if it cannot be read.
    """
    from tl_sparse.checkpoints import contents_of
    from tl_sparse.files import read_json
    from tl_sparse.outputs import listing

    path = Path(source)
    if path.is_dir():
        contents = contents_of(path)
        if contents == "suite":
            return read_json(path / "results.json")
        if contents == "family":
            return read_json(path / "family.json")
        what = f"a {contents}"
        if contents == "nothing":
            what = f"a folder with {listing(path)}"
        folders = {"tasks": "the folder of a suite", "family": "the folder of a family"}
        folders["training"] = folders["tasks"]
        wanted = folders.get(kind, "a file of figures")
        given = shlex.quote(source) if contents == "circuit" else "CIRCUIT"
        raise DataError(f"{source} is {what}, not {wanted}; {_how_to_measure(given, kind)}")
    if path.is_file() and path.suffix.lower() != ".json":
        how = _how_to_measure("CIRCUIT", kind)
        raise DataError(f"{source} is not a file of figures, *.json; {how}")
    return read_json(path)


def _how_to_measure(circuit: str, kind: str) -> str:
    """The command that writes the figures from which this kind of plot is drawn."""
    if kind == "specificity":
        return "tl_sparse.evaluation.specificity_matrix measures the circuits of a suite"
    if kind == "family":
        return "`tl-sparse family MODEL TASK --out FOLDER` finds one"
    if kind == "tasks":
        return "`tl-sparse suite MODEL --out FOLDER` measures the circuits of all tasks"
    if kind == "training":
        return "`tl-sparse suite RUN --checkpoints --out FOLDER` measures those of all kept steps"
    return f"`tl-sparse evaluate {circuit} -o figures.json` measures a circuit and writes one"
