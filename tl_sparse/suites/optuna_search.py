"""Hyper-parameters of the pruner, found by Optuna (Gao et al. 2025, A.5, search them for each model
and task).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
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
from tl_sparse.tasks import get_task
from tl_sparse.text import table

#: Field, or 1 minus it → lowest and highest value, on a logarithmic scale around the paper's
#: centres (A.5), as far as these fit gates that start from a ranking.
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
    geometric mean; a task without a circuit counts as all weights of the model. Returns them, with
    a table, and writes `out/best.yaml`.

    Args:
        n_trials: of the whole study, which goes on if it is there; the first is of the settings
            given.
        workers: processes, as in `run_suite`. The same command elsewhere, with the same storage,
            shares the work.
        storage: a file that all can write to (default: study.journal in `out`), or the URL of a
            database.
        config: what is not searched, and where to start; its seed is also that of the search.

    Raises:
        SuiteError: if Optuna is missing, the storage cannot be used, or its study is of something
            else.
        PruneError: if no trial found a circuit of every task.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used.
    """
    for what, value in (
        ("trials", n_trials),
        ("workers", workers),
        ("number of tasks", len(tasks)),
    ):
        check(value >= 1, what, value, "at least 1")
    config, storage = config or PruneConfig(), storage or str(Path(out, "study.journal"))
    start = {
        name: 1 - config.beta2 if name == "1 - beta2" else getattr(config, name) for name in RANGES
    }
    fixed = {
        name: v
        for name, v in dataclasses.asdict(config).items()
        if not RANGES.keys() & {name, f"1 - {name}"}
    }
    names = [get_task(task).name for task in tasks]
    settings = {
        "model": find(model).resolve().name,
        "tasks": names,
        "ranges": RANGES,
        "corpus": corpus,
    }
    settings["config"] = fixed
    with _study(storage) as study:
        if not study.user_attrs:
            study.set_user_attr("settings", settings)
        refuse_another(f"the study in {storage}", study.user_attrs.get("settings", {}), settings)
        there = [
            t.user_attrs.get("given")
            for t in study.trials
            if t.state.name in ("WAITING", "COMPLETE")
        ]
        if start not in there:
            study.enqueue_trial(start, user_attrs={"given": start})
        left = range(len(_done(study)), n_trials)
    run = functools.partial(
        run_trial, model, list(tasks), n_trials, storage, config, corpus, device
    )
    with tqdm(total=n_trials, initial=left.start, desc="trials", unit="trial") as bar:
        for _ in in_processes(run, left, workers):
            bar.update()
    with _study(storage) as study:
        done = _done(study)
    best = min(
        done, key=lambda trial: ([*trial.user_attrs["edges"].values()].count(None), trial.value)
    )
    if None in best.user_attrs["edges"].values():
        raise PruneError(
            f"none of {len(done)} trials found a circuit of every task; try more, or other tasks"
        )
    shown = dict(
        [("as given", trial) for trial in done if trial.user_attrs.get("given") == start][:1]
    )
    shown[f"the best, {best.number} of {len(done)}"] = best
    rows = [["edges, geometric mean", *(f"{trial.value:.1f}" for trial in shown.values())]]
    rows += [
        [name, *(str(trial.user_attrs["edges"][name]) for trial in shown.values())]
        for name in names
    ]
    rows += [[name, *(f"{trial.params[name]:.3g}" for trial in shown.values())] for name in RANGES]
    found = _changed(config, best.params)
    write_text(Path(out, "best.yaml"), yaml.safe_dump(dataclasses.asdict(found), sort_keys=False))
    return found, table(["", *shown], rows)


def run_trial(
    model: str,
    tasks: list[str],
    n_trials: int,
    storage: str,
    config: PruneConfig,
    corpus: str | None,
    device: str | None,
    _: int,
) -> None:
    """Prune with settings that the study proposes, unless it has its trials already."""
    import optuna

    face, tokens, means = loaded(model, corpus, device, config.batch_size, config.embed_gates)
    with _study(storage) as study:
        if len(_done(study)) >= n_trials:
            return
        trial = study.ask()
        # A seed for each trial: the same whichever process does it, and after an interruption.
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + trial.number)
        for name, ends in RANGES.items():
            (trial.suggest_int if name == "steps" else trial.suggest_float)(name, *ends, log=True)
    edges: dict[str, int | None] = {}
    for task in map(get_task, tasks):
        try:
            edges[task.name] = prune(
                face, task, tokens, _changed(config, trial.params), False, means
            )[1].n_edges
        except PruneError:
            edges[task.name] = None
    cost = geometric_mean([max(1, n_weights(face)[0] if n is None else n) for n in edges.values()])
    with _study(storage) as study:
        trial.set_user_attr("edges", edges)
        study.tell(trial, cost)


def _changed(config: PruneConfig, values: dict[str, Any]) -> PruneConfig:
    fields = {
        name.removeprefix("1 - "): 1 - v if name.startswith("1 - ") else v
        for name, v in values.items()
    }
    return dataclasses.replace(config, **fields)


def _done(study: Any) -> list[Any]:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


@contextmanager
def _study(storage: str) -> Iterator[Any]:
    """The study, made if need be. Many processes can write a journal file, but not, Optuna says, a
    sqlite one.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage, journal

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        place: Any = storage
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            place = JournalStorage(journal.JournalFileBackend(storage))
        yield optuna.create_study(study_name="tl_sparse", storage=place, load_if_exists=True)
    except SuiteError:
        raise
    except ImportError as error:
        raise SuiteError(
            f"{error}; pip install 'tl-sparse[search]', or what the storage needs"
        ) from error
    except Exception as error:  # of many kinds: the file system's, each database's
        raise SuiteError(
            f"cannot use the storage {storage}: {error}; is it locked, or no study of Optuna?"
        ) from error
