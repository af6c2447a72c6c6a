"""`tl-sparse view`, `export` and `evaluate`, which take a saved circuit."""

import argparse
import sys
from typing import Any

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command, add_out_file, report_saved, seed
from tl_sparse.errors import CheckpointError, CircuitError, DataError


def _add_circuit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "circuit", help="The circuit: a folder, or a repository on the Hugging Face hub."
    )
    parser.add_argument(
        "--model",
        help="The model: a folder, or a name that tl_sparse.load knows (default: the model "
        "that the circuit names).",
    )
    parser.add_argument(
        "--task", help="The task of the prompts (default: the task of the circuit)."
    )


def _open(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The circuit, its model, and the source of the model, which is a folder or a name."""
    circuit = tl_sparse.Circuit.load(args.circuit)
    source = args.model or circuit.model_name
    if not source:
        raise CircuitError(f"{args.circuit} does not name its model; give it with --model")
    try:
        model = tl_sparse.load(source, args.device)
    except CheckpointError as error:
        if args.model:
            raise
        raise CheckpointError(f"{error}; give the circuit's model with --model") from error
    return circuit, model, source


def add_view(commands: Commands) -> None:
    """Add the command `view` to the parser."""
    parser = add_command(
        commands,
        "view",
        "Write an interactive page about a circuit, as a single HTML file.",
        _run_view,
    )
    _add_circuit(parser)
    add_out_file(parser, "The page, an HTML file.")
    parser.add_argument(
        "--corpus",
        help="The text of the passages: a folder, a glob pattern, a file or 'builtin' (default: "
        "the sample that is stored with the model).",
    )
    parser.add_argument(
        "--min-weight",
        type=float,
        default=0.0,
        help="Leave out edges whose absolute weight is smaller than this (default: %(default)s).",
    )


def _run_view(args: argparse.Namespace) -> None:
    from tl_sparse.outputs import check_new_file

    check_new_file(args.out, args.overwrite)
    circuit, model, source = _open(args)
    corpus = _passages(model, source, args.corpus)
    page = circuit.view(model, args.task, corpus, min_weight=args.min_weight)
    page.save(args.out, args.overwrite)
    report_saved(args.out, f" ({len(page.html):,} bytes); any browser opens it")


def _passages(model: Any, source: str, corpus: str | None) -> Any:
    """The tokens of the passages; None if the model has no text and none was given."""
    try:
        return tl_sparse.load_corpus(source, model.tokenizer, model.cfg.n_ctx, corpus)
    except DataError as error:
        if corpus is not None:
            raise
        print(
            f"tl-sparse: the page has no passages: {error}; give their text with --corpus",
            file=sys.stderr,
        )
        return None


def add_export(commands: Commands) -> None:
    """Add the command `export` to the parser."""
    parser = add_command(commands, "export", "Write a circuit for other tools.", _run_export)
    _add_circuit(parser)
    add_out_file(
        parser,
        "The file, whose extension selects the format: .graphml, .dot, .mmd (Mermaid), .csv or "
        ".json (attribution graph).",
    )


def _run_export(args: argparse.Namespace) -> None:
    from tl_sparse.circuits import circuit_task, export
    from tl_sparse.outputs import check_new_file

    check_new_file(args.out, args.overwrite)
    circuit, model, _ = _open(args)
    if args.task:  # only some formats use it, but a mistake in it is always one
        circuit_task(circuit, args.task)
    export(circuit, model, args.out, args.task, args.overwrite)
    report_saved(args.out)


def add_evaluate(commands: Commands) -> None:
    """Add the command `evaluate` to the parser."""
    parser = add_command(
        commands, "evaluate", "Measure a circuit on held-out pairs.", _run_evaluate
    )
    _add_circuit(parser)
    add_out_file(parser, "A JSON file for all results.", required=False)
    parser.add_argument(
        "--corpus",
        help="The text over which mean activations are taken: a folder, a glob pattern, a file or "
        "'builtin' (default: the means that are stored with the circuit).",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        help="The number of pairs (default: as many as the circuit was evaluated on when it was "
        "found).",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        help="The seed of the pairs and of the random circuits (default: the pairs on which the "
        "circuit was evaluated when it was found, and seed 0 for random circuits).",
    )


def _run_evaluate(args: argparse.Namespace) -> None:
    from tl_sparse.evaluation import full_evaluation
    from tl_sparse.files import write_json
    from tl_sparse.outputs import check_new_file
    from tl_sparse.pruning import heldout_pairs, recorded_config
    from tl_sparse.view import evaluation_tables

    if args.out:
        check_new_file(args.out, args.overwrite)
    circuit, model, source = _open(args)
    if args.corpus is not None or not circuit.means:
        circuit = _with_means(circuit, model, source, args.corpus)
    data = heldout_pairs(circuit, model, args.task, args.pairs, args.seed)
    batch_size = recorded_config(circuit).batch_size
    results = full_evaluation(circuit, model, data, batch_size, args.seed or 0)
    if args.out:
        # Written before anything is printed, since printing can fail.
        write_json(args.out, results, args.overwrite)
    print(evaluation_tables(results))


def _with_means(circuit: Any, model: Any, source: str, corpus: str | None) -> Any:
    """The circuit, with mean activations over a corpus."""
    from tl_sparse.circuits import EMBED_HOOK
    from tl_sparse.pruning import corpus_means

    tokens = tl_sparse.load_corpus(source, model.tokenizer, model.cfg.n_ctx, corpus)
    return circuit.with_means(corpus_means(model, tokens, embed=EMBED_HOOK in circuit.kept))
