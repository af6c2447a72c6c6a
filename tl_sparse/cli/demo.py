"""`tl-sparse demo`: from a model to a circuit in about a minute."""

import argparse
import hashlib
import os
import time
from pathlib import Path

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command, seed
from tl_sparse.cli.pruning import prune_and_report
from tl_sparse.cli.training import training_summary
from tl_sparse.data import DataConfig
from tl_sparse.errors import TLSparseError
from tl_sparse.pruning import PruneConfig
from tl_sparse.training import TrainConfig

#: The file in --out that lists the files that the demo wrote there.
WRITTEN = "demo.json"


def add_demo(commands: Commands) -> None:
    """Add the command `demo` to the parser."""
    parser = add_command(
        commands,
        "demo",
        "Find the circuit with which a small sparse model closes strings, in a minute.",
        _run_demo,
    )
    parser.add_argument(
        "--out",
        default="demo",
        help="A folder for the results, in which those of an earlier demo are replaced (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="Train a model first, which takes minutes (default: use the bundled model).",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="The seed of training and pruning (default: %(default)s).",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=TrainConfig().steps,
        help="The number of training steps with --train (default: %(default)s).",
    )


def _run_demo(args: argparse.Namespace) -> None:
    """Train a model if --train is given, then prune it and print the report of the circuit."""
    # Made first, so that a mistake in it is reported before anything is removed.
    config = TrainConfig(steps=args.steps, seed=args.seed, data=DataConfig(seed=args.seed))
    prune_config = PruneConfig(seed=args.seed)
    started = time.perf_counter()
    out = Path(args.out)
    _remove_earlier(out)

    model = "tiny-python-sparse"
    if args.train:
        model = str(out / "model")
        print("Training a small transformer on Python code, with nearly all weights at zero")
        _, record = tl_sparse.train(config, model, args.device)
        print(training_summary(record))
        _record_files(out)
    strings = "print('… → ') and print(\"… → \")"
    print(f"How does {model} close strings, {strings}? Looking for the circuit")
    circuit = str(out / "circuit")
    prune_and_report(model, "single_double_quote", prune_config, circuit, args.device)
    _record_files(out)
    print(f"{time.perf_counter() - started:.0f} s in all")


def _record_files(out: Path) -> None:
    """Record the files that the demo wrote and their checksums, so that the next one may remove
    them."""
    from tl_sparse.files import write_json

    checksums = {}
    for path in _files_in(out):
        checksums[path.relative_to(out).as_posix()] = _checksum(path)
    write_json(out / WRITTEN, checksums)


def _remove_earlier(out: Path) -> None:
    """Remove the files of an earlier demo, unless the folder holds anything else.

    Raises:
        TLSparseError: if there is a file that no demo wrote, or that was changed since.
    """
    from tl_sparse.files import read_json

    if out.exists() and not out.is_dir():
        raise TLSparseError(f"{out} is not a folder; give another one with --out")
    record = out / WRITTEN
    checksums = read_json(record) if record.is_file() else {}
    files = _files_in(out)
    for path in files:
        name = path.relative_to(out).as_posix()
        is_file = path.is_file() and not path.is_symlink()  # the demo writes no links or pipes
        if not is_file or checksums.get(name) != _checksum(path):
            raise TLSparseError(
                f"{out} holds files that are not from an earlier demo, such as {path}; give "
                "another folder with --out"
            )
    for path in files:
        path.unlink()
    record.unlink(missing_ok=True)


def _files_in(out: Path) -> list[Path]:
    """All files below `out` except the record; a link counts as a file, and is not followed."""
    files = []
    for folder, subfolders, names in os.walk(out):
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        files += [Path(folder, name) for name in [*names, *links]]
    return [path for path in files if path != out / WRITTEN]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
