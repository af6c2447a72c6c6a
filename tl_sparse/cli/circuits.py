"""`tl-sparse view`, `export` and `evaluate`, which take a saved circuit."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import tl_sparse
from tl_sparse.cli.arguments import (
    Commands,
    Flags,
    add_command,
    add_out_file,
    add_running_flags,
    report_saved,
    seed,
)
from tl_sparse.cli.bridging import open_bridges
from tl_sparse.errors import CheckpointError, CircuitError, DataError


def add_circuit(parser: argparse.ArgumentParser) -> Flags:
    """Add the group of arguments that say which circuit; it is returned for further ones."""
    group = parser.add_argument_group("which circuit")
    group.add_argument(
        "circuit",
        metavar="CIRCUIT",
        help="The circuit: a folder that `prune` wrote, or a repository on the Hugging Face hub.",
    )
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="The model, as for `prune` (default: the model that the circuit names).",
    )
    group.add_argument(
        "--task",
        metavar="TASK",
        help="The task of the prompts: a name, or a file of pairs (default: that of the circuit).",
    )
    return group


def add_explanation(flags: Flags, use: str) -> None:
    """Add the flag --explanation; `use` says what becomes of the explanation."""
    flags.add_argument(
        "--explanation",
        metavar="FILE",
        help=f"The circuit's explanation.json, {use} (default: the one that `explain` wrote into "
        "the folder of the circuit, if it did).",
    )


def open_circuit(
    circuit_source: str, model_source: str | None, device: str | None, task: str | None
) -> tuple[Any, Any, str]:
    """The circuit, its model, and the source of the model, which is a folder or a name.

    A mistake in the task is said even if what the command writes does not need it.
    """
    from tl_sparse.checkpoints import open_model
    from tl_sparse.circuits import circuit_task

    circuit = tl_sparse.Circuit.load(circuit_source)
    if task is not None:
        circuit_task(circuit, task)
    source = model_source or circuit.model_name
    if not source:
        raise CircuitError(f"{circuit_source} does not name its model; give it with --model")
    try:
        model = open_model(source, device)
    except CheckpointError as error:
        if model_source:
            raise
        raise CheckpointError(f"{error}; give the circuit's model with --model") from error
    return circuit, model, source


def add_view(commands: Commands) -> None:
    """Add the command `view` to the parser."""
    parser = add_command(
        commands,
        "view",
        "CIRCUIT -o FILE.html [options]",
        "Write an interactive page about a circuit, as a single HTML file.",
        _run_view,
    )
    add_circuit(parser)
    group = parser.add_argument_group("the page")
    add_out_file(group, "The page, *.html.")
    group.add_argument(
        "--corpus",
        metavar="TEXT",
        help="The text of the passages: a folder, a glob pattern, a file or 'builtin' (default: "
        "the sample that is stored with the model).",
    )
    group.add_argument(
        "--certificate",
        metavar="FILE",
        help="The circuit's certificate.json (default: the one that `certify` wrote into the "
        "folder of the circuit, if it did).",
    )
    add_explanation(group, "shown with the names of nodes")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="A prompt of your own, whose values and next tokens the page shows too; can be given "
        "several times.",
    )
    group.add_argument(
        "--min-weight",
        type=float,
        default=0.0,
        metavar="X",
        help="Leave out edges whose absolute weight is smaller than this (default: %(default)s).",
    )
    add_running_flags(parser)


def _run_view(args: argparse.Namespace) -> None:
    from tl_sparse.outputs import check_ending, check_new_file
    from tl_sparse.view import PAGE_ENDINGS

    check_ending(args.out, PAGE_ENDINGS, "a page")
    check_new_file(args.out, args.overwrite)
    size = write_page(
        args.out,
        args.circuit,
        args.model,
        args.task,
        args.corpus,
        device=args.device,
        min_weight=args.min_weight,
        prompts=args.prompt,
        certificate=args.certificate,
        explanation=args.explanation,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    report_saved(args.out, args.quiet, f" ({size:,} bytes); any browser opens it")


def write_page(
    out: str,
    circuit_source: str,
    model_source: str | None = None,
    task: str | None = None,
    corpus: str | None = None,
    *,
    device: str | None = None,
    min_weight: float = 0.0,
    prompts: Sequence[str] = (),
    certificate: str | None = None,
    explanation: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write the page of a saved circuit; its size in bytes."""
    from tl_sparse.data import check_source

    if corpus is not None:
        check_source(corpus)  # before the model is opened
    circuit, model, source = open_circuit(circuit_source, model_source, device, task)
    tokens = _passages(model, source, corpus)
    page = circuit.view(
        model,
        task,
        tokens,
        min_weight=min_weight,
        prompts=prompts,
        source=circuit_source,
        progress=progress,
        certificate=certificate,
        explanation=explanation,
    )
    page.save(out, overwrite)
    return len(page.html)


def _passages(model: Any, source: str, corpus: str | None) -> Any:
    """The tokens of the passages; None if the model has no text and none was given."""
    from tl_sparse.checkpoints import corpus_of

    try:
        return corpus_of(model, source, corpus)
    except DataError as error:
        if corpus is not None:
            raise
        print(f"tl-sparse: warning: the page has no passages: {error}", file=sys.stderr)
        return None


def add_export(commands: Commands) -> None:
    """Add the command `export` to the parser."""
    parser = add_command(
        commands,
        "export",
        "CIRCUIT -o FILE [options]",
        "Write a circuit for other tools.",
        _run_export,
    )
    add_circuit(parser)
    add_out_file(
        parser.add_argument_group("the file"),
        "The file, whose extension selects the format: .graphml, .dot, .mmd (Mermaid), .csv, "
        ".json (attribution graph), or .eap.json and .pt (EAP-IG's graph of heads and MLPs).",
    )
    add_running_flags(parser)


def _run_export(args: argparse.Namespace) -> None:
    from tl_sparse.circuits import check_export
    from tl_sparse.outputs import check_new_file

    check_export(args.out)
    check_new_file(args.out, args.overwrite)
    circuit, model, _ = open_circuit(args.circuit, args.model, args.device, args.task)

    from tl_sparse.circuits import export

    export(circuit, model, args.out, args.task, args.overwrite)
    report_saved(args.out, args.quiet)


def add_evaluate(commands: Commands) -> None:
    """Add the command `evaluate` to the parser."""
    parser = add_command(
        commands,
        "evaluate",
        "CIRCUIT [-o FILE.json] [options]",
        "Measure a circuit on held-out pairs.",
        _run_evaluate,
    )
    add_circuit(parser)
    group = parser.add_argument_group("the measurement, and the file")
    add_out_file(group, "A file for all results, *.json, from which `plot` draws.", required=False)
    group.add_argument(
        "--corpus",
        metavar="TEXT",
        help="The text over which mean activations are taken: a folder, a glob pattern, a file or "
        "'builtin' (default: the means that are stored with the circuit or, if there are none, "
        "those over the sample of text that is stored with the model).",
    )
    group.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help="The number of pairs (default: as many as the circuit was evaluated on when it was "
        "found).",
    )
    group.add_argument(
        "--seed",
        type=seed,
        metavar="N",
        help="The seed of the pairs and of the random circuits (default: the pairs on which the "
        "circuit was evaluated when it was found, and seed 0 for random circuits).",
    )
    add_explanation(group, "printed after the measurements, with the circuit as a program")
    group.add_argument(
        "--dense",
        metavar="MODEL",
        help="For a circuit in a model with bridges to a dense one: the dense model, as for "
        "`bridge` (default: the one that the bridges name).",
    )
    add_running_flags(parser)


def _run_evaluate(args: argparse.Namespace) -> None:
    from tl_sparse.outputs import check_ending, check_new_file

    if args.out:
        check_ending(args.out, [".json"], "a measurement")
        check_new_file(args.out, args.overwrite)

    from tl_sparse.data import check_source
    from tl_sparse.evaluation import full_evaluation
    from tl_sparse.files import write_json
    from tl_sparse.pruning import heldout_pairs, recorded_config
    from tl_sparse.view import evaluation_tables, explained_report, explanation_of

    if args.corpus is not None:
        check_source(args.corpus)  # before the model is opened
    circuit, model, source = open_circuit(args.circuit, args.model, args.device, args.task)
    bridges = open_bridges(source, args.dense, args.device)
    explanation = explanation_of(circuit, args.explanation, args.circuit)
    explained = circuit
    if args.corpus is not None or not circuit.means:
        if args.corpus is None:
            _say_whose_means(circuit, source, args.quiet)
        circuit = _with_means(circuit, model, source, args.corpus)
    data = heldout_pairs(circuit, model, args.task, args.pairs, args.seed)
    batch_size = recorded_config(circuit).batch_size
    results = full_evaluation(
        circuit, model, data, batch_size, args.seed or 0, progress=not args.quiet
    )
    in_dense = None
    if bridges is not None and circuit.n_nodes:
        from tl_sparse.bridges import dense_effects

        in_dense = dense_effects(circuit, bridges, data, seed=args.seed or 0)
        results["dense_effects"] = asdict(in_dense)
    if args.out:
        # Written before anything is printed, since printing can fail.
        write_json(args.out, results, args.overwrite)
    print(evaluation_tables(results))
    if in_dense is not None:
        print(f"\n{in_dense}")
    if explanation is not None:
        print(f"\n{explained_report(explained, model, args.task, explanation)}")


def _say_whose_means(circuit: Any, source: str, quiet: bool) -> None:
    if circuit.n_nodes and not quiet:
        text = f"the circuit has no means; they are taken over the sample of text of {source}"
        print(f"tl-sparse: {text} (--corpus TEXT takes another text)", file=sys.stderr)


def _with_means(circuit: Any, model: Any, source: str, corpus: str | None) -> Any:
    """The circuit, with mean activations over a corpus."""
    from tl_sparse.checkpoints import corpus_of
    from tl_sparse.circuits import EMBED_HOOK
    from tl_sparse.pruning import corpus_means

    tokens = corpus_of(model, source, corpus)
    embed = EMBED_HOOK in circuit.kept
    return circuit.with_means(corpus_means(model, tokens, embed=embed, kind=circuit.node_kind))
