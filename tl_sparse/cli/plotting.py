"""`tl-sparse plot`."""

import argparse
from pathlib import Path

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command, add_out_file, report_saved
from tl_sparse.errors import ConfigError


def add_plot(commands: Commands) -> None:
    """Add the command `plot` to the parser."""
    parser = add_command(commands, "plot", "Plot circuits, suites and models.", _run_plot)
    parser.add_argument(
        "kind",
        choices=("curve", "tasks", "frontier", "sparsity"),
        help="curve: the loss and accuracy of circuits against their size. tasks: the size of a "
        "suite's circuits for each task. frontier: the loss of many circuits against their size. "
        "sparsity: the nonzero weights and activations in each layer of a model.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        help="curve: files that `evaluate -o` wrote. frontier: such files, or the results.json of "
        "suites. tasks: the results.json of a suite. sparsity: one model.",
    )
    add_out_file(parser, "The image file, *.png or *.svg.")
    parser.add_argument(
        "--against",
        choices=("edges", "nodes"),
        default="edges",
        help="What the size of a circuit is measured in (default: %(default)s).",
    )
    parser.add_argument(
        "--corpus",
        help="sparsity: the text on which activations are counted (default: the sample that is "
        "stored with the model).",
    )


def _run_plot(args: argparse.Namespace) -> None:
    from tl_sparse.files import read_json
    from tl_sparse.outputs import check_new_file
    from tl_sparse.view import plots

    plots.check_drawing(args.out)
    check_new_file(args.out, args.overwrite)
    first = args.source[0]
    if len(args.source) > 1 and args.kind in ("tasks", "sparsity"):
        raise ConfigError(f"{args.kind} is plotted from one source, not from {len(args.source)}")
    if args.kind == "sparsity":
        model = tl_sparse.load(first, args.device)
        corpus = tl_sparse.load_corpus(first, model.tokenizer, model.cfg.n_ctx, args.corpus)
        figure = plots.sparsity(model, corpus)
    elif args.kind == "tasks":
        figure = plots.tasks(read_json(Path(first)), args.against, first)
    else:
        evaluations = {path: read_json(Path(path)) for path in args.source}
        if args.kind == "curve":
            figure = plots.curve(evaluations, args.against)
        else:
            figure = plots.frontier(evaluations, args.against)
    plots.save(figure, args.out, args.overwrite)
    report_saved(args.out)
