"""A search for the hyper-parameters of the pruner with Optuna.

Gao et al. 2025 (section A.5) search them for each model and task.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.checkpoints import open_with_corpus
from tl_sparse.circuits import n_weights
from tl_sparse.config import check
from tl_sparse.errors import DataError, PruneError, SuiteError
from tl_sparse.files import write_text
from tl_sparse.hooks import NodeValues, TLModel
from tl_sparse.pruning import PruneConfig, prune
from tl_sparse.records import record_from
from tl_sparse.resuming import other_contents
from tl_sparse.suites import arguments
from tl_sparse.suites.content import check_unchanged, content_of_model, content_of_task
from tl_sparse.suites.models import loaded, model_name, name_in_study
from tl_sparse.suites.suite import refuse_another
from tl_sparse.suites.workers import has_ended, in_processes, this_process
from tl_sparse.tasks import Task, get_task, table

#: The lowest and highest value of each field of `PruneConfig`, or of 1 minus the field. Values are
#: searched on a logarithmic scale. The centres are those of the paper (section A.5), where these
#: suit gates that are initialised from a ranking.
RANGES: dict[str, list[float]] = {
    "k_coef": [1e-6, 1e-2],
    "lr": [3e-4, 5e-2],
    "weight_decay": [1e-5, 1e-1],
    "1 - beta2": [5e-3, 0.5],
    "init_bias": [1e-2, 1.0],
    "init_scale": [1e-3, 0.2],
    "temperature": [0.2, 5.0],
    "steps": [50, 800],
    "steer_to": [0.5, 1.0],
}
#: How each line of a journal of Optuna begins.
JOURNAL_BEGINNING = b'{"op_code":'


@dataclasses.dataclass(frozen=True)
class _Setup:
    """The arguments of a trial, which are sent to each process.

    Attributes:
        contents: the hashes of the model, its corpus and the tasks.
    """

    model: str
    tasks: list[str]
    n_trials: int
    storage: str
    config: PruneConfig
    corpus: str | None
    device: str | None
    contents: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A completed trial, as it is read from the study.

    Attributes:
        value: the geometric mean of the edges.
        params: the searched values, by name in `RANGES`.
        edges: task → the edges of its circuit; None if none was found.
        given: the searched values, if the trial has those that the search was given.
    """

    value: float
    params: dict[str, float]
    edges: dict[str, int | None]
    given: dict[str, float] | None = None

    @property
    def n_failures(self) -> int:
        return list(self.edges.values()).count(None)


def search(
    model: str | Path,
    tasks: arguments.Names,
    out: str | Path,
    n_trials: int = 50,
    workers: int = 1,
    storage: str | Path | None = None,
    config: PruneConfig | None = None,
    corpus: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[PruneConfig, str]:
    """Find the settings with which the circuits of `tasks` have the fewest edges, by their
    geometric mean.

    A task without a circuit counts as if its circuit had all nonzero weights of the model as edges.
    The settings are also written to `out/best.yaml`. Arguments that are not listed here are as for
    `run_suite`.

    Args:
        n_trials: the number of trials in the whole study, which is continued if it exists. The
            first trial has the settings in `config`.
        workers: the number of processes. The same command on other machines shares the work if it
            has the same storage.
        storage: a file that all processes can write to (default: study.journal in `out`), or the
            URL of a database.
        config: the settings of the first trial, and the values of fields that are not searched. Its
            seed is also the seed of the search.

    Returns:
        The best settings, and a table that compares them with `config`.

    Raises:
        SuiteError: if Optuna is not installed, the storage cannot be used or is damaged, or its
            study has other settings, or another model, text or pairs under the same names.
        ConfigError: if an argument has the wrong type or value, or `out` holds anything else.
        PruneError: if no trial found a circuit of every task.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used.
    """
    folder = arguments.folder("out", out)
    workers = arguments.at_least_one("workers", workers)
    setup = _Setup(
        model=arguments.name("model", model),
        tasks=arguments.names("tasks", tasks),
        n_trials=arguments.at_least_one("trials", n_trials),
        storage=arguments.optional_name("storage", storage) or str(folder / "study.journal"),
        config=arguments.pruning(config),
        corpus=arguments.optional_name("corpus", corpus),
        device=arguments.device_name(device),
        contents={},
    )
    own_files = ["best.yaml", Path(setup.storage).name]
    arguments.check_own_folder(folder, own_files, "a search")
    setup = dataclasses.replace(setup, contents=_contents(setup))
    n_completed = _prepare_study(setup)
    _run_trials(setup, n_completed, workers, progress)
    return _write_best(folder, setup)


def _contents(setup: _Setup) -> dict[str, str]:
    """The hashes of the model, its corpus and the tasks.

    Raises:
        ConfigError: if two tasks have the same name.
    """
    contents: dict[str, str] = {}
    for task in setup.tasks:
        contents |= content_of_task(task)
    has_names = len(contents) == len(setup.tasks)
    check(has_names, "tasks", setup.tasks, "one or more, all with different names")
    model, tokens = open_with_corpus(setup.model, setup.corpus, setup.device)
    return contents | content_of_model(model_name(setup.model), model, tokens)


def _write_best(folder: Path, setup: _Setup) -> tuple[PruneConfig, str]:
    """Write the settings of the best trial; they, and a table that compares them.

    Raises:
        PruneError: if no trial found a circuit of every task.
    """
    with _study(setup.storage) as study:
        completed = _completed(study)
    best = min(completed, key=lambda trial: (trial.n_failures, trial.value))
    if best.n_failures:
        raise PruneError(
            f"none of {len(completed)} trials found a circuit of every task; try more trials or "
            "other tasks"
        )
    config = _with_values(setup.config, best.params)
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_text(folder / "best.yaml", text)
    return config, _comparison(completed, best, _searched_values(setup.config))


def _run_trials(setup: _Setup, n_completed: int, workers: int, progress: bool) -> None:
    run = functools.partial(run_trial, setup)
    missing = range(n_completed, setup.n_trials)
    options = {"initial": n_completed, "desc": "trials", "unit": "trial"}
    with tqdm(total=setup.n_trials, disable=not progress, **options) as bar:
        for _ in in_processes(run, missing, workers):
            bar.update()


def _searched_values(config: PruneConfig) -> dict[str, Any]:
    """The searched values of a configuration, by name in `RANGES`; inverts `_with_values`."""
    values = {}
    for name in RANGES:
        if name.startswith("1 - "):
            values[name] = 1 - getattr(config, name.removeprefix("1 - "))
        else:
            values[name] = getattr(config, name)
    return values


def _with_values(config: PruneConfig, values: Mapping[str, Any]) -> PruneConfig:
    """A configuration with the given searched values, by name in `RANGES`."""
    fields = {}
    for name, value in values.items():
        if name.startswith("1 - "):
            fields[name.removeprefix("1 - ")] = 1 - value
        else:
            fields[name] = value
    return dataclasses.replace(config, **fields)


def _prepare_study(setup: _Setup) -> int:
    """Create the study if it does not exist, and enqueue a trial of the settings to start from.

    Returns:
        The number of completed trials.

    Raises:
        SuiteError: if the study has other settings than this search.
    """
    settings = _settings(setup)
    given = _searched_values(setup.config)
    with _study(setup.storage) as study:
        if not study.user_attrs:
            study.set_user_attr("settings", settings)
        if "content" not in study.user_attrs:  # studies from before it existed have none
            study.set_user_attr("content", setup.contents)
        stored = _stored(study, setup.storage)
        others = other_contents(stored.content, setup.contents)
        refuse_another(f"the study in {setup.storage}", stored.settings, settings, others)
        _end_killed_trials(study)
        known = []
        for trial in study.trials:
            if trial.state.name != "FAIL":
                known.append(trial.user_attrs.get("given"))
        if given not in known:
            study.enqueue_trial(given, user_attrs={"given": given})
        return len(_completed(study))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What a study records besides its trials."""

    settings: dict[str, Any]
    content: dict[str, str]


def _stored(study: Any, storage: str) -> _Stored:
    try:
        return record_from(_Stored, study.user_attrs)
    except DataError as error:
        raise SuiteError(f"the study in {storage} is damaged: {error}") from error


def _end_killed_trials(study: Any) -> None:
    """Mark the trials of processes that were killed as failed, so that they are run again."""
    for trial in study.trials:
        is_running = trial.state.name == "RUNNING"
        if is_running and has_ended(str(trial.user_attrs.get("process"))):
            _fail(study, trial.number)


def _fail(study: Any, trial: Any) -> None:
    """Mark a trial, or the trial of that number, as failed; it is not counted."""
    from optuna.trial import TrialState

    study.tell(trial, state=TrialState.FAIL)


def _settings(setup: _Setup) -> dict[str, Any]:
    """The settings that all trials of a study share."""
    searched = {name.removeprefix("1 - ") for name in RANGES}
    fixed = {}
    for name, value in dataclasses.asdict(setup.config).items():
        if name not in searched:
            fixed[name] = value
    return {
        "model": name_in_study(setup.model),
        "tasks": [get_task(task).name for task in setup.tasks],
        "ranges": RANGES,
        "corpus": setup.corpus,
        "config": fixed,
    }


def _comparison(completed: Sequence[_Trial], best: _Trial, given: Mapping[str, Any]) -> str:
    """A table of the trial with the given settings, if it was completed, and of the best trial."""
    columns = {}
    for trial in completed:
        if trial.given == given:
            columns["as given"] = trial
            break
    columns[f"the best, {completed.index(best)} of {len(completed)}"] = best
    tasks = list(best.edges)
    names = ["edges, geometric mean", *tasks, *RANGES]
    cells = [_cells(trial, tasks) for trial in columns.values()]
    rows = list(zip(names, *cells, strict=True))
    return table(["", *columns], rows)


def _cells(trial: _Trial, tasks: Sequence[str]) -> list[str]:
    """The table column of a trial."""
    cells = [f"{trial.value:.1f}"]
    for task in tasks:
        cells.append(str(trial.edges.get(task)))
    for name in RANGES:
        cells.append(f"{trial.params[name]:.3g}")
    return cells


def run_trial(setup: _Setup, _index: int) -> None:
    """Run one trial with settings that the study proposes, unless enough trials are completed."""
    model, tokens, means = loaded(
        setup.model, setup.corpus, setup.device, setup.config, setup.contents
    )
    for source in setup.tasks:
        check_unchanged(setup.contents, content_of_task(source))
    with _study(setup.storage) as study:
        if len(_completed(study)) >= setup.n_trials:
            return
        trial = _proposed(study, setup.config.seed)
    config = _with_values(setup.config, trial.params)
    edges: dict[str, int | None] = {}
    try:
        for task in map(get_task, setup.tasks):
            edges[task.name] = _n_edges(model, task, tokens, config, means)
    except BaseException:  # also Ctrl-C; whatever it was, the trial has to be run again
        with _study(setup.storage) as study:
            _fail(study, trial)
        raise
    n_nonzero, _ = n_weights(model)
    costs = [max(1, n_nonzero if n is None else n) for n in edges.values()]
    with _study(setup.storage) as study:
        trial.set_user_attr("edges", edges)
        study.tell(trial, geometric_mean(costs))


def _n_edges(
    model: TLModel, task: Task, tokens: Tensor, config: PruneConfig, means: NodeValues
) -> int | None:
    """The edges of the circuit that these settings find; None if they find none."""
    try:
        _, evaluation = prune(model, task, tokens, config, False, means)
    except PruneError:
        return None
    return evaluation.n_edges


def _proposed(study: Any, seed: int) -> Any:
    """A new trial with the values that the study proposes."""
    import optuna

    trial = study.ask()
    trial.set_user_attr("process", this_process())
    # Each trial has its own seed, which depends neither on the process that runs it nor on earlier
    # interruptions.
    n_before = 0
    for other in study.trials[: trial.number]:
        if other.state.name != "FAIL":
            n_before += 1
    study.sampler = optuna.samplers.TPESampler(seed=seed + n_before)
    for name, (low, high) in RANGES.items():
        if name == "steps":
            trial.suggest_int(name, low, high, log=True)
        else:
            trial.suggest_float(name, low, high, log=True)
    return trial


def _completed(study: Any) -> list[_Trial]:
    """The completed trials.

    Raises:
        SuiteError: if one of them is damaged.
    """
    completed = []
    for trial in study.trials:
        if trial.state.name != "COMPLETE":
            continue
        try:
            read = record_from(
                _Trial, {"value": trial.value, "params": trial.params, **trial.user_attrs}
            )
            if read.params.keys() != RANGES.keys():
                raise DataError(f"'params' must be of {', '.join(RANGES)}")
        except DataError as error:
            raise SuiteError(f"trial {trial.number} of the study is damaged: {error}") from error
        completed.append(read)
    return completed


@contextmanager
def _study(storage: str) -> Iterator[Any]:
    """The study, which is created if it does not exist.

    A file is opened as a journal, because many processes can write to a journal; for an SQLite file
    Optuna advises against that.

    Raises:
        SuiteError: if Optuna or a package for the storage is not installed, or for any error of the
            storage within the context.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage, journal

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        opened: Any = storage
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            _prepare_journal(Path(storage))
            opened = JournalStorage(journal.JournalFileBackend(storage))
        yield optuna.create_study(study_name="tl_sparse", storage=opened, load_if_exists=True)
    except SuiteError:
        raise
    except ImportError as error:
        raise SuiteError(
            f"{error}; pip install 'tl-sparse[search]', or the package that the storage needs"
        ) from error
    except Exception as error:  # file systems and databases raise errors of many kinds
        raise SuiteError(
            f"cannot use the storage {storage}: {error}; it may be locked, or not an Optuna study"
        ) from error


def _prepare_journal(journal: Path) -> None:
    """Make sure that a file, if it exists, is a journal to which Optuna can add lines.

    Optuna would also add lines to any other file. If the disk was full, or the process was killed,
    while the last line of a journal was being written, its beginning is removed: with more lines
    after it, the journal could not be read.

    Raises:
        ValueError: if the file is something else.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if not _is_torn(journal):
        return
    lock = JournalFileSymlinkLock(str(journal))  # another process may just be writing the line
    lock.acquire()
    try:
        if _is_torn(journal):
            with open(journal, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _is_torn(journal: Path) -> bool:
    """Whether the end of the last line is missing."""
    if not journal.exists() or (journal.is_file() and journal.stat().st_size == 0):
        return False
    if not journal.is_file():
        raise ValueError("it is not a file")
    with open(journal, "rb") as file:
        beginning = file.read(len(JOURNAL_BEGINNING))
        file.seek(-1, os.SEEK_END)
        end = file.read()
    if beginning != JOURNAL_BEGINNING:
        raise ValueError("it is a file of another kind")
    return end != b"\n"
