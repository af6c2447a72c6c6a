"""`tl-sparse certify`, which measures whether a saved circuit is true."""

import argparse
from pathlib import Path
from typing import Any

from tl_sparse.cli.arguments import (
    Commands,
    add_command,
    add_running_flags,
    remark,
    seed,
)
from tl_sparse.cli.circuits import add_circuit, open_circuit
from tl_sparse.errors import ConfigError, DataError


def add_certify(commands: Commands) -> None:
    """Add the command `certify` to the parser."""
    parser = add_command(
        commands,
        "certify",
        "CIRCUIT [--quick] [options]",
        "Measure whether a circuit is true, and say which criteria it meets.",
        _run_certify,
    )
    add_circuit(parser)
    group = parser.add_argument_group("the certificate")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="The folder for certificate.json and certificate.txt (default: the folder "
        "'certificate' in that of the circuit). A certificate that was interrupted is continued.",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help="Measure less, in about half a minute for a small circuit, and leave out stability "
        "and controls, which search for other circuits.",
    )
    group.add_argument(
        "--corpus",
        metavar="TEXT",
        help="The text on which next tokens are compared: a folder, a glob pattern, a file or "
        "'builtin' (default: the sample that is stored with the model).",
    )
    group.add_argument(
        "--family",
        metavar="FILE",
        help="The results of `tl-sparse family` for this task: family.json.",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="The seed of everything random (default: %(default)s).",
    )
    add_running_flags(parser)


def _run_certify(args: argparse.Namespace) -> None:
    folder = _folder(args.out, args.circuit)

    from tl_sparse.certificates import certificate_text, certify
    from tl_sparse.data import check_source
    from tl_sparse.pruning import recorded_config

    if args.corpus is not None:
        check_source(args.corpus)  # before the model is opened
    circuit, model, source = open_circuit(args.circuit, args.model, args.device, args.task)
    certificate = certify(
        circuit,
        model,
        args.task,
        corpus=text_corpus(model, source, args.corpus),
        family=args.family,
        quick=args.quick,
        folder=folder,
        progress=not args.quiet,
        batch_size=recorded_config(circuit).batch_size,
        seed=args.seed,
    )
    print(certificate_text(certificate))
    remark(f"\nSaved in {folder}", args.quiet)


def _folder(out: str | None, circuit: str) -> Path:
    """The folder of the certificate: the given one, or one in that of the circuit.

    Raises:
        ConfigError: if none is given, and the circuit is not in a folder.
    """
    if out is not None:
        return Path(out)
    from tl_sparse.certificates import CERTIFICATE_FOLDER

    if not Path(circuit).is_dir():
        raise ConfigError(
            f"{circuit} is not a folder, so the certificate needs one of its own; give it with "
            "--out FOLDER"
        )
    return Path(circuit, CERTIFICATE_FOLDER)


def text_corpus(model: Any, source: str, corpus: str | None) -> Any:
    """The tokens of the corpus; None if the model has no text and none was given."""
    from tl_sparse.checkpoints import corpus_of

    try:
        return corpus_of(model, source, corpus)
    except DataError:
        if corpus is not None:
            raise
        return None  # what is made says why a part of it is missing
