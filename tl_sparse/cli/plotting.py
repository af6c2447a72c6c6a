"""`tl-sparse plot`."""

import argparse
from pathlib import Path

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command
from tl_sparse.errors import ConfigError


def add_plot(commands: Commands) -> None:
    parser = add_command(commands, "plot", "Draw circuits, suites and models.", _run_plot)
    parser.add_argument(
        "kind",
        choices=("curve", "tasks", "frontier", "sparsity"),
        help="curve: the loss and accuracy of a circuit by its size. tasks: the size of the "
        "circuits of a suite by task. frontier: the loss by size of many circuits. sparsity: the "
        "nonzero weights and activations of a model by layer.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        help="Files that `evaluate -o` or `suite` wrote; for sparsity, one model.",
    )
    parser.add_argument("-o", "--out", required=True, help="The picture, *.png or *.svg.")
    parser.add_argument(
        "--against",
        choices=("edges", "nodes"),
        default="edges",
        help="What the size of a circuit counts (default: %(default)s).",
    )
    parser.add_argument(
        "--corpus",
        help="For sparsity: the text of the activations (default: the sample that is stored with "
        "the model).",
    )


def _run_plot(args: argparse.Namespace) -> None:
    from tl_sparse.files import read_json
    from tl_sparse.view import plots

    plots.check_drawing(args.out)
    first = args.source[0]
    if len(args.source) > 1 and args.kind in ("tasks", "sparsity"):
        raise ConfigError(f"{args.kind} is drawn of one source, not of {len(args.source)}")
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
    plots.save(figure, args.out)
    print(f"Saved {args.out}")
