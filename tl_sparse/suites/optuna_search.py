"""A search for the hyper-parameters of the pruner with Optuna.

Gao et al. 2025 (section A.5) search them for each model and task.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import yaml
from tqdm.auto import tqdm

from tl_sparse.checkpoints import find
from tl_sparse.circuits import n_weights
from tl_sparse.config import check
from tl_sparse.errors import PruneError, SuiteError
from tl_sparse.files import write_text
from tl_sparse.pruning import PruneConfig, prune
from tl_sparse.suites.suite import in_processes, loaded, refuse_another
from tl_sparse.tasks import get_task, table

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


@dataclasses.dataclass(frozen=True)
class _Setup:
    """The arguments of a trial, which are sent to each process."""

    model: str
    tasks: list[str]
    n_trials: int
    storage: str
    config: PruneConfig
    corpus: str | None
    device: str | None


def search(
    model: str,
    tasks: Sequence[str],
    out: str | Path,
    n_trials: int = 50,
    workers: int = 1,
    storage: str | None = None,
    config: PruneConfig | None = None,
    corpus: str | None = None,
    device: str | None = None,
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
        SuiteError: if Optuna is not installed, the storage cannot be used, or its study has other
            settings.
        PruneError: if no trial found a circuit of every task.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used.
    """
    check(n_trials >= 1, "trials", n_trials, "at least 1")
    check(workers >= 1, "workers", workers, "at least 1")
    check(len(tasks) >= 1, "number of tasks", len(tasks), "at least 1")
    config = config or PruneConfig()
    storage = storage or str(Path(out, "study.journal"))
    setup = _Setup(model, list(tasks), n_trials, storage, config, corpus, device)
    given = _searched_values(config)
    n_completed = _prepare_study(setup, given)
    _run_trials(setup, n_completed, workers)
    with _study(storage) as study:
        completed = _completed(study)
    best = min(completed, key=_failures_and_cost)
    if _n_failures(best):
        n = len(completed)
        raise PruneError(
            f"none of {n} trials found a circuit of every task; try more trials or other tasks"
        )
    best_config = _with_values(config, best.params)
    text = yaml.safe_dump(dataclasses.asdict(best_config), sort_keys=False)
    write_text(Path(out, "best.yaml"), text)
    return best_config, _comparison(completed, best, given)


def _run_trials(setup: _Setup, n_completed: int, workers: int) -> None:
    run = functools.partial(run_trial, setup)
    missing = range(n_completed, setup.n_trials)
    with tqdm(total=setup.n_trials, initial=n_completed, desc="trials", unit="trial") as bar:
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


def _prepare_study(setup: _Setup, given: Mapping[str, Any]) -> int:
    """Create the study if it does not exist, and enqueue a trial of the given settings.

    Returns:
        The number of completed trials.

    Raises:
        SuiteError: if the study has other settings than this search.
    """
    settings = _settings(setup)
    with _study(setup.storage) as study:
        if not study.user_attrs:
            study.set_user_attr("settings", settings)
        before = study.user_attrs.get("settings", {})
        refuse_another(f"the study in {setup.storage}", before, settings)
        known = []
        for trial in study.trials:
            if trial.state.name in ("WAITING", "COMPLETE"):
                known.append(trial.user_attrs.get("given"))
        if given not in known:
            study.enqueue_trial(given, user_attrs={"given": given})
        return len(_completed(study))


def _settings(setup: _Setup) -> dict[str, Any]:
    """The settings that all trials of a study share."""
    searched = {name.removeprefix("1 - ") for name in RANGES}
    fixed = {}
    for name, value in dataclasses.asdict(setup.config).items():
        if name not in searched:
            fixed[name] = value
    return {
        "model": find(setup.model).resolve().name,
        "tasks": [get_task(task).name for task in setup.tasks],
        "ranges": RANGES,
        "corpus": setup.corpus,
        "config": fixed,
    }


def _n_failures(trial: Any) -> int:
    """The number of tasks for which a trial found no circuit."""
    return list(trial.user_attrs["edges"].values()).count(None)


def _failures_and_cost(trial: Any) -> tuple[int, float]:
    return _n_failures(trial), trial.value


def _comparison(completed: Sequence[Any], best: Any, given: Mapping[str, Any]) -> str:
    """A table of the trial with the given settings, if it was completed, and of the best trial."""
    columns = {}
    for trial in completed:
        if trial.user_attrs.get("given") == given:
            columns["as given"] = trial
            break
    columns[f"the best, {best.number} of {len(completed)}"] = best
    tasks = list(best.user_attrs["edges"])
    names = ["edges, geometric mean", *tasks, *RANGES]
    cells = [_cells(trial, tasks) for trial in columns.values()]
    rows = list(zip(names, *cells, strict=True))
    return table(["", *columns], rows)


def _cells(trial: Any, tasks: Sequence[str]) -> list[str]:
    """The table column of a trial."""
    cells = [f"{trial.value:.1f}"]
    for task in tasks:
        cells.append(str(trial.user_attrs["edges"][task]))
    for name in RANGES:
        cells.append(f"{trial.params[name]:.3g}")
    return cells


def run_trial(setup: _Setup, _index: int) -> None:
    """Run one trial with settings that the study proposes, unless enough trials are completed."""
    batch_size = setup.config.batch_size
    embed = setup.config.embed_gates
    model, tokens, means = loaded(setup.model, setup.corpus, setup.device, batch_size, embed)
    with _study(setup.storage) as study:
        if len(_completed(study)) >= setup.n_trials:
            return
        trial = _proposed(study, setup.config.seed)
    config = _with_values(setup.config, trial.params)
    n_nonzero, _ = n_weights(model)
    edges: dict[str, int | None] = {}
    costs = []
    for task in map(get_task, setup.tasks):
        try:
            _, evaluation = prune(model, task, tokens, config, False, means)
        except PruneError:
            edges[task.name] = None
            costs.append(max(1, n_nonzero))
        else:
            edges[task.name] = evaluation.n_edges
            costs.append(max(1, evaluation.n_edges))
    with _study(setup.storage) as study:
        trial.set_user_attr("edges", edges)
        study.tell(trial, geometric_mean(costs))


def _proposed(study: Any, seed: int) -> Any:
    """A new trial with the values that the study proposes."""
    import optuna

    trial = study.ask()
    # Each trial has its own seed, which depends neither on the process that runs it nor on earlier
    # interruptions.
    study.sampler = optuna.samplers.TPESampler(seed=seed + trial.number)
    for name, (low, high) in RANGES.items():
        if name == "steps":
            trial.suggest_int(name, low, high, log=True)
        else:
            trial.suggest_float(name, low, high, log=True)
    return trial


def _completed(study: Any) -> list[Any]:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


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
