"""`tl-sparse explain`, which finds an expression over the tokens for each node of a circuit."""

import argparse
from pathlib import Path

from tl_sparse.cli.arguments import Commands, add_command, add_running_flags, remark, seed
from tl_sparse.cli.certifying import text_corpus
from tl_sparse.cli.circuits import add_circuit, open_circuit
from tl_sparse.errors import ConfigError


def add_explain(commands: Commands) -> None:
    """Add the command `explain` to the parser."""
    parser = add_command(
        commands,
        "explain",
        "CIRCUIT [options]",
        "Say in expressions over the tokens what each node computes, and how well that holds.",
        _run_explain,
    )
    add_circuit(parser)
    group = parser.add_argument_group("the explanation")
    group.add_argument(
        "-o",
        "--out",
        metavar="FILE.json",
        help="Where to save the explanation (default: explanation.json in the folder of the "
        "circuit).",
    )
    group.add_argument(
        "--own",
        metavar="NODE=EXPRESSION",
        action="append",
        type=_assignment,
        default=[],
        help="Your own expression for a node, such as \"0.attn_v h3.7=token in {'(', '['}\"; it "
        "may be given several times.",
    )
    group.add_argument(
        "--name",
        metavar="NODE=NAME",
        action="append",
        type=_assignment,
        default=[],
        help="Your own name for a node; it may be given several times.",
    )
    group.add_argument(
        "--corpus",
        metavar="TEXT",
        help="The text on which expressions are fitted and judged, beside prompts: a folder, a "
        "glob pattern, a file or 'builtin' (default: the sample that is stored with the model).",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="The seed of everything random (default: %(default)s).",
    )
    add_running_flags(parser)


def _assignment(text: str) -> tuple[str, str]:
    node, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '=' between the node and the rest")
    return node.strip(), value.strip()


def _run_explain(args: argparse.Namespace) -> None:
    out = _out_file(args.out, args.circuit)
    if args.corpus is not None:
        from tl_sparse.data import check_source

        check_source(args.corpus)  # before the model is opened
    circuit, model, source = open_circuit(args.circuit, args.model, args.device, args.task)
    explanation = circuit.explain(
        model,
        args.task,
        corpus=text_corpus(model, source, args.corpus),
        own=dict(args.own),
        names=dict(args.name),
        progress=not args.quiet,
        seed=args.seed,
    )
    explanation.save(out)
    print(explanation)
    remark(f"\nSaved in {out}", args.quiet)


def _out_file(out: str | None, circuit: str) -> Path:
    """The file of the explanation: the given one, or one in the folder of the circuit.

    Raises:
        ConfigError: if none is given and the circuit is not in a folder, or it is no JSON file.
    """
    if out is None and not Path(circuit).is_dir():
        raise ConfigError(
            f"{circuit} is not a folder, so the explanation needs a file of its own; give it with "
            "--out FILE.json"
        )
    if out is not None and Path(out).suffix != ".json":
        raise ConfigError(f"--out {out} must end in .json")
    return Path(circuit, "explanation.json") if out is None else Path(out)
