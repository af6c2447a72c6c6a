"""`tl-sparse demo`: from a model to a circuit in about a minute."""

import argparse
import shutil
import time
from pathlib import Path

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command
from tl_sparse.cli.pruning import prune_and_report
from tl_sparse.cli.training import training_summary
from tl_sparse.data import DataConfig
from tl_sparse.errors import TLSparseError
from tl_sparse.pruning import PruneConfig
from tl_sparse.training import TrainConfig


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
        type=int,
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
    strings = "print('… → ') and print(\"… → \")"
    print(f"How does {model} close strings, {strings}? Looking for the circuit")
    circuit = str(out / "circuit")
    prune_and_report(model, "single_double_quote", prune_config, circuit, args.device)
    print(f"{time.perf_counter() - started:.0f} s in all")


def _remove_earlier(out: Path) -> None:
    """Remove the results of an earlier demo, unless the folder holds anything else."""
    if not out.exists():
        return
    ours = {"model", "circuit"}
    if not out.is_dir() or {path.name for path in out.iterdir()} - ours:
        raise TLSparseError(
            f"{out} holds files that are not from an earlier demo; give another folder with --out"
        )
    for name in ours:
        shutil.rmtree(out / name, ignore_errors=True)
