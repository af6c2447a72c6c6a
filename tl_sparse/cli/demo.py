"""`tl-sparse demo`: from a model to a circuit and its page in about a minute."""

import argparse
import hashlib
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import tl_sparse
from tl_sparse.cli.arguments import Commands, add_command, add_running_flags, remark, seed
from tl_sparse.cli.circuits import write_page
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
        "[options]",
        "Find the circuit with which a small sparse model closes strings, in about a minute.",
        _run_demo,
    )
    group = parser.add_argument_group("what it does")
    group.add_argument(
        "--out",
        default="demo",
        metavar="FOLDER",
        help="A folder for the results, in which those of an earlier demo are replaced (default: "
        "%(default)s).",
    )
    group.add_argument(
        "--train",
        action="store_true",
        help="Train a model first, which takes minutes (default: use the bundled model).",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="The seed of training and pruning (default: %(default)s).",
    )
    group.add_argument(
        "--steps",
        type=int,
        default=TrainConfig().steps,
        metavar="N",
        help="The number of training steps with --train (default: %(default)s).",
    )
    add_running_flags(parser)


def _run_demo(args: argparse.Namespace) -> None:
    """Train a model if --train is given, then find a circuit in it and write its page."""
    # Made first, so that a mistake in it is reported before anything is removed.
    config = TrainConfig(steps=args.steps, seed=args.seed, data=DataConfig(seed=args.seed))
    # Fewer held-out pairs than by default, since the page measures each node on all of them.
    prune_config = PruneConfig(seed=args.seed, heldout_pairs=256)
    started = time.perf_counter()
    out = Path(args.out)
    _remove_earlier(out)

    model = "tiny-python-wide"
    if args.train:
        model = str(out / "model")
        remark("Training a small transformer on Python code, nearly all weights zero", args.quiet)
        _, record = tl_sparse.train(config, model, args.device, not args.quiet)
        print(training_summary(record))
        _record_files(out)
    strings = "print('… → ') and print(\"… → \")"
    remark(f"How does {model} close strings, {strings}? Looking for the circuit", args.quiet)
    circuit = str(out / "circuit")
    task = "single_double_quote"
    prune_and_report(model, task, prune_config, circuit, args.device, quiet=args.quiet)
    _record_files(out)
    page = str(out / "page.html")
    write_page(page, circuit, model, device=args.device, progress=not args.quiet)
    _record_files(out)
    remark(
        f"{time.perf_counter() - started:.0f} s in all\n\n{_next(page, circuit, model)}", args.quiet
    )


def _next(page: str, circuit: str, model: str) -> str:
    """What to try after the demo, as commands that work from the current folder."""
    evaluate = ["evaluate", circuit]
    if os.sep in model:  # a circuit knows the name of its model, not the folder that this is in
        evaluate += ["--model", model]
    prune = ["prune", model, "var_swap", "--out", "my-circuit"]
    steps = {
        shlex.join(evaluate): "how good the circuit is, and what each node does for it",
        shlex.join(["tasks", model]): "which of the paper's twenty tasks the model does",
        shlex.join(prune): "the circuit of another of them",
    }
    program = _program()
    lines = [f"{page} is the circuit as a page; open it in any browser. What to try next:"]
    lines += [f"  {program} {words}    # {what}" for words, what in steps.items()]
    return "\n".join(lines)


def _program() -> str:
    """The words with which a shell in the current folder starts this program."""
    if shutil.which("tl-sparse"):
        return "tl-sparse"
    if Path(sys.argv[0]).name == "tl-sparse":
        return shlex.quote(sys.argv[0])
    return shlex.join([sys.executable, "-m", "tl_sparse"])


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
