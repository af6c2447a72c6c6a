"""The command line: `tl-sparse train`, `tasks`, `prune`, `evaluate`, `suite`, `search`, `view`,
`plot`, …
"""

import argparse
import dataclasses
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tl_sparse
from tl_sparse.config import merged
from tl_sparse.data import DataConfig
from tl_sparse.errors import CheckpointError, CircuitError, ConfigError, DataError, TLSparseError
from tl_sparse.network import SparseConfig
from tl_sparse.pruning import PruneConfig
from tl_sparse.training import PRESETS, RECIPES, TrainConfig, preset

CORPUS = (
    "text for the means: a folder, a glob, a file or 'builtin' (default: the model's own sample)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 1 after an error of the user's, which is printed in
    one line.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except TLSparseError as error:
        print(f"tl-sparse: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-sparse",
        description="Weight-sparse transformers as TransformerLens models, and their circuits.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    train = _command(
        commands,
        "train",
        "train a weight-sparse model",
        _train,
        SparseConfig,
        DataConfig,
        TrainConfig,
    )
    train.add_argument(
        "config",
        nargs="?",
        help="a YAML file: TrainConfig's fields, `model` and `data` with theirs",
    )
    train.add_argument(
        "--preset",
        choices=PRESETS,
        default="laptop",
        help="what file and flags change: laptop or …",
    )
    train.add_argument(
        "--recipe", choices=RECIPES, help="to the letter: the published script, or the paper's text"
    )
    train.add_argument(
        "--out", required=True, help="new folder for the model and the record of its training"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run in --out"
    )
    laptop = preset("laptop")
    _add_fields(train, laptop.model)
    _add_fields(train, laptop.data, skip=["seed"])
    _add_fields(train, laptop, skip=["model", "data"])

    prune = _command(
        commands, "prune", "find the circuit of a task in a model", _prune, PruneConfig
    )
    prune.add_argument("model", help="a model: a folder, or a name that tl_sparse.load knows")
    prune.add_argument(
        "task", help="its name, for example single_double_quote, or a file of pairs, *.jsonl"
    )
    prune.add_argument("--out", required=True, help="new folder for the circuit")
    prune.add_argument(
        "--edges", action="store_true", help="then prune its edges too, into `edges` in --out"
    )

    suite = _command(
        commands,
        "suite",
        "prune many tasks in many models, with several seeds",
        _suite,
        PruneConfig,
    )
    suite.add_argument(
        "model", nargs="+", help="models: folders, or names that tl_sparse.load knows"
    )
    suite.add_argument(
        "--tasks", help="names, or files of pairs, with commas (default: all twenty)"
    )
    suite.add_argument("--seeds", default="0,1,2", help="with commas (default: %(default)s)")
    search = _command(
        commands, "search", "find good settings of prune, with Optuna", _search, PruneConfig
    )
    search.add_argument("model", help="a model: a folder, or a name that tl_sparse.load knows")
    search.add_argument("task", nargs="+", help="names, or files of pairs, *.jsonl")
    search.add_argument(
        "--trials", type=int, default=50, help="of the whole study (default: %(default)s)"
    )
    search.add_argument(
        "--storage", help="a file, or the URL of a database, shared by all (default: in --out)"
    )
    for command in (suite, search):
        command.add_argument(
            "--out", required=True, help="folder for the results; one that is begun goes on"
        )
        command.add_argument(
            "--workers", type=int, default=1, help="processes (default: %(default)s)"
        )
    for command in (prune, suite, search):
        command.add_argument("--corpus", help=CORPUS)
        command.add_argument(
            "--config", help="a YAML file of PruneConfig's fields, such as search writes; flags win"
        )
        _add_fields(command, PruneConfig(), skip=["seed"] if command is suite else [])

    tasks = _command(commands, "tasks", "list which tasks a model solves", _tasks)
    tasks.add_argument("model", help="a model: a folder, or a name that tl_sparse.load knows")
    tasks.add_argument(
        "--pairs", type=int, default=256, help="prompt pairs of each task (default: %(default)s)"
    )
    tasks.add_argument("--seed", type=int, default=0, help="of the pairs (default: %(default)s)")

    view = _command(
        commands, "view", "write an interactive page of a circuit, one HTML file", _view
    )
    view.add_argument(
        "--corpus", help="text for passages, as in prune (default: the model's own sample)"
    )
    view.add_argument(
        "--min-weight", type=float, default=0.0, help="leave out edges of a smaller absolute weight"
    )
    export = _command(commands, "export", "write a circuit for other tools", _export)
    judge = _command(commands, "evaluate", "measure a circuit on held-out pairs", _evaluate)
    judge.add_argument(
        "--corpus", help=CORPUS.replace("the model's own sample", "the circuit's means")
    )
    judge.add_argument("--pairs", type=int, help="how many (default: as many as when it was found)")
    judge.add_argument(
        "--seed",
        type=int,
        help="of the pairs, and of random circuits (default: as when it was found)",
    )
    endings = "the file, of the format it ends in: .graphml, .dot, .mmd (Mermaid), .csv, .json (attribution graph)"
    for command, out in (
        (view, "the page"),
        (export, endings),
        (judge, "a JSON file with all figures"),
    ):
        command.add_argument("circuit", help="a folder, or a repository of the hub")
        command.add_argument("-o", "--out", required=command is not judge, help=out)
        command.add_argument(
            "--model", help="a folder, or a name that tl_sparse.load knows (default: the circuit's)"
        )
        command.add_argument("--task", help="of the prompts (default: the circuit's)")

    plot = _command(commands, "plot", "draw circuits, suites and models", _plot)
    kinds = "loss and accuracy of a circuit by size; size by task; loss by size of many circuits; of a model by layer"
    plot.add_argument("kind", choices=("curve", "tasks", "frontier", "sparsity"), help=kinds)
    plot.add_argument(
        "source",
        nargs="+",
        help="files that `evaluate -o` or `suite` wrote; for sparsity, one model",
    )
    plot.add_argument("-o", "--out", required=True, help="the picture, *.png or *.svg")
    plot.add_argument(
        "--against", choices=("edges", "nodes"), default="edges", help="size (default: %(default)s)"
    )
    plot.add_argument("--corpus", help="text for activations (default: the model's own sample)")

    demo = _command(
        commands, "demo", "find how a small sparse model closes strings, in a minute", _demo
    )
    demo.add_argument(
        "--out",
        default="demo",
        help="folder for the results; those of an earlier demo are replaced",
    )
    demo.add_argument(
        "--train",
        action="store_true",
        help="train a model first, in minutes (default: the bundled one)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    demo.add_argument(
        "--steps", type=int, default=TrainConfig().steps, help="of training (default: %(default)s)"
    )
    for command in (train, prune, suite, search, tasks, judge, view, export, plot, demo):
        command.add_argument("--device", help="cpu, cuda, … (default: the GPU if there is one)")
    return parser


def _command(
    commands: Any, name: str, help: str, run: Any, *configs: type
) -> argparse.ArgumentParser:
    described = "\n\n".join(
        f"{config.__name__}: {inspect.cleandoc(config.__doc__ or '')}" for config in configs
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=described,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_fields(parser: argparse.ArgumentParser, defaults: Any, skip: Sequence[str] = ()) -> None:
    """One flag for each field of a config dataclass; what they mean stands below the list of
    flags.
    """
    hints = get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):
        if field.name in skip:
            continue
        flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        # Only flags that are given change anything.
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"(default: {getattr(defaults, field.name)})",
        }
        if field.name == "abs_topk":
            text = "fraction kept by AbsTopK at the paper's eight locations; 1 for none (default: 0.25)"
            options |= {"type": float, "help": text}
        elif hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        elif get_origin(hint) is Mapping:
            options |= {"type": json.loads, "metavar": "JSON"}
        else:
            options |= {"type": hint, "metavar": hint.__name__}
        parser.add_argument(flag, **options)


def _given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a config dataclass whose flags were given."""
    return {
        f.name: getattr(args, f.name) for f in dataclasses.fields(config) if hasattr(args, f.name)
    }


def _train_config(args: argparse.Namespace) -> TrainConfig:
    """The preset, changed by the file, changed by the flags."""
    config = _with_file(preset(args.preset, args.recipe), args.config)
    model, data = _given(args, SparseConfig), _given(args, DataConfig)
    if "abs_topk" in model:
        model["abs_topk"] = {} if args.abs_topk == 1 else tl_sparse.paper_topk(args.abs_topk)
    return merged(config, {**_given(args, TrainConfig), "model": model, "data": data})


def _with_file(config: Any, path: str | None) -> Any:
    """The configuration, changed by a YAML file if there is one."""
    from tl_sparse.files import errors_name_file, read_yaml

    with errors_name_file(path):
        return config if path is None else merged(config, read_yaml(Path(path)))


def _prune_config(args: argparse.Namespace) -> PruneConfig:
    return dataclasses.replace(_with_file(PruneConfig(), args.config), **_given(args, PruneConfig))


def _train(args: argparse.Namespace) -> None:
    config = _train_config(
        args
    )  # first: what is wrong in it is said before anything slow is imported
    _, record = tl_sparse.train(config, args.out, args.device, resume=args.resume)
    if os.environ.get("RANK", "0") == "0":  # the main process of several
        print(_training_summary(record))
        print(f"Saved in {args.out}; open it with tl_sparse.load({args.out!r})")


def _training_summary(record: dict[str, Any]) -> str:
    return (
        f"Trained on {record['training_tokens_seen']:,} tokens in {record['seconds']['training']:.0f} s "
        f"({record['tokens_per_second']:,.0f} tokens/s): validation loss {record['validation_loss']:.3f} nats per "
        f"token, {record['nonzero_weights']:,} of {record['weights']:,} weights nonzero"
    )


def _prune(args: argparse.Namespace) -> None:
    config = _prune_config(args)
    from tl_sparse.files import check_new_folder

    check_new_folder(args.out)
    _prune_and_report(args.model, args.task, config, args.out, args.device, args.corpus, args.edges)


def _suite(args: argparse.Namespace) -> None:
    config = _prune_config(args)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise ConfigError(
            f"seeds = {args.seeds!r} is not possible; it must be numbers with commas: 0,1,2"
        ) from None
    from tl_sparse.suites import results_table, run_suite
    from tl_sparse.tasks import TASKS

    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    results = run_suite(
        args.model, tasks, args.out, seeds, config, args.corpus, args.workers, args.device
    )
    print(f"\n{results_table(results)}\nSaved in {args.out}")


def _search(args: argparse.Namespace) -> None:
    config = _prune_config(args)
    from tl_sparse.suites import search

    corpus, device = args.corpus, args.device
    _, text = search(
        args.model,
        args.task,
        args.out,
        args.trials,
        args.workers,
        args.storage,
        config,
        corpus,
        device,
    )
    print(f"\n{text}\n\nSaved {Path(args.out, 'best.yaml')}, for --config of prune and suite")


def _evaluate(args: argparse.Namespace) -> None:
    from tl_sparse.circuits import EMBED_HOOK
    from tl_sparse.evaluation import full_evaluation
    from tl_sparse.files import write_json
    from tl_sparse.pruning import corpus_means, task_splits
    from tl_sparse.view import evaluation_tables

    circuit, model = _circuit_and_model(args)
    n_ctx = model.cfg.n_ctx
    if args.corpus is not None or not circuit.means:
        tokens = tl_sparse.load_corpus(args.model, model.tokenizer, n_ctx, args.corpus)
        circuit = circuit.with_means(corpus_means(model, tokens, embed=EMBED_HOOK in circuit.kept))
    task = tl_sparse.get_task(args.task or circuit.task)
    values, known = circuit.measured.get("config", {}), PruneConfig()
    config = dataclasses.replace(
        known, **{name: values[name] for name in values.keys() & known.__dict__}
    )
    *used, data = task_splits(model, task, config) if values else (None,)
    if data is None or args.pairs is not None or args.seed is not None:
        seen = [prompt for part in used for prompt in part.prompts]
        n_pairs = config.heldout_pairs if args.pairs is None else args.pairs
        data = tl_sparse.make_task_data(
            task, model.tokenizer, n_pairs, args.seed or 0, n_ctx, exclude=seen
        )
        data = data.to(next(model.parameters()).device)
    found = full_evaluation(circuit, model, data, config.batch_size, args.seed or 0)
    print(evaluation_tables(found))
    if args.out:
        write_json(Path(args.out), found)


def _tasks(args: argparse.Namespace) -> None:
    from tl_sparse.evaluation import task_scores
    from tl_sparse.tasks import tasks_table

    print(tasks_table(task_scores(tl_sparse.load(args.model, args.device), args.pairs, args.seed)))


def _circuit_and_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The circuit, and its model, after putting the model's source into `args.model`."""
    circuit = tl_sparse.Circuit.load(args.circuit)
    given, args.model = args.model, args.model or circuit.model_name
    if not args.model:
        raise CircuitError(f"{args.circuit} does not name its model; give it with --model")
    try:
        return circuit, tl_sparse.load(args.model, args.device)
    except CheckpointError as error:
        raise (
            error if given else CheckpointError(f"{error}; give the circuit's model with --model")
        ) from error


def _view(args: argparse.Namespace) -> None:
    from tl_sparse.files import replacing

    circuit, model = _circuit_and_model(args)
    with replacing(Path(args.out)) as temporary:  # first, since what follows takes a while
        try:
            corpus = tl_sparse.load_corpus(
                args.model, model.tokenizer, model.cfg.n_ctx, args.corpus
            )
        except DataError as error:
            if args.corpus is not None:
                raise
            print(f"tl-sparse: the page has no passages: {error} (--corpus)", file=sys.stderr)
            corpus = None
        page = circuit.view(model, args.task, corpus, min_weight=args.min_weight)
        temporary.write_text(page.html, encoding="utf-8")
    print(f"Saved {args.out} ({len(page.html):,} bytes); any browser opens it")


def _export(args: argparse.Namespace) -> None:
    from tl_sparse.circuits import export

    export(*_circuit_and_model(args), args.out, args.task)
    print(f"Saved {args.out}")


def _plot(args: argparse.Namespace) -> None:
    from tl_sparse.files import read_json
    from tl_sparse.view import plots

    plots.check_drawing(args.out)
    first, *more = args.source
    if more and args.kind in ("tasks", "sparsity"):
        raise ConfigError(f"{args.kind} is drawn of one source, not of {len(args.source)}")
    if args.kind == "sparsity":
        model = tl_sparse.load(first, args.device)
        corpus = tl_sparse.load_corpus(first, model.tokenizer, model.cfg.n_ctx, args.corpus)
        figure = plots.sparsity(model, corpus)
    elif args.kind == "tasks":
        figure = plots.tasks(read_json(Path(first)), args.against, first)
    else:
        draw = plots.curve if args.kind == "curve" else plots.frontier
        figure = draw({path: read_json(Path(path)) for path in args.source}, args.against)
    plots.save(figure, args.out)
    print(f"Saved {args.out}")


def _prune_and_report(
    source: str,
    task_name: str,
    config: PruneConfig,
    out: str,
    device: Any,
    corpus: Any,
    edges: bool = False,
) -> None:
    task, model = tl_sparse.get_task(task_name), tl_sparse.load(source, device)
    tokens = tl_sparse.load_corpus(source, model.tokenizer, model.cfg.n_ctx, corpus)
    found, folder = tl_sparse.prune(model, task, tokens, config), out
    for title, again in (("", edges), ("Pruned by edges\n\n", False)):
        circuit, evaluation = found
        circuit.save(folder)
        text = title + tl_sparse.report(circuit, model, task, evaluation)
        (Path(folder) / "report.txt").write_text(text + "\n", encoding="utf-8")
        print("\n" + text + "\n")
        print(f"Saved in {folder}; open it with tl_sparse.Circuit.load({folder!r})")
        if not again:
            break
        found, folder = tl_sparse.prune_edges(circuit, model, task, config), str(Path(out, "edges"))


def _demo(args: argparse.Namespace) -> None:
    """Prune and explain, after training if that is asked for."""
    config = TrainConfig(steps=args.steps, seed=args.seed, data=DataConfig(seed=args.seed))
    prune_config = PruneConfig(seed=args.seed)
    started, out = time.perf_counter(), Path(args.out)
    model_folder, circuit_folder = str(out / "model"), str(out / "circuit")
    if out.exists():
        if not out.is_dir() or {path.name for path in out.iterdir()} - {"model", "circuit"}:
            raise TLSparseError(
                f"{out} holds other files than an earlier demo's; give another folder with --out"
            )
        for folder in (model_folder, circuit_folder):
            shutil.rmtree(folder, ignore_errors=True)
    model = "tiny-python-sparse"
    if args.train:
        model = model_folder
        print("Training a small transformer on Python code, nearly all weights at zero")
        _, record = tl_sparse.train(config, model, args.device)
        print(_training_summary(record))
    print(
        f"How does {model} close strings, print('… → ') and print(\"… → \")? Looking for the circuit"
    )
    _prune_and_report(
        model, "single_double_quote", prune_config, circuit_folder, args.device, corpus=None
    )
    print(f"{time.perf_counter() - started:.0f} s in all")
