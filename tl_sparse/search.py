"""Hyper-parameters of the pruner, found by Optuna (Gao et al. 2025, A.5, search them for each model and task)."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from tl_sparse.config import PruneConfig, check
from tl_sparse.errors import PruneError, SuiteError
from tl_sparse.files import replacing
from tl_sparse.nodes import weight_matrices
from tl_sparse.pruning import prune
from tl_sparse.sources import find
from tl_sparse.suite import in_processes, loaded, refuse_another
from tl_sparse.tables import table
from tl_sparse.tasks import get_task

#: Field, or 1 minus it → lowest and highest value, searched on a logarithmic scale around the paper's centres (A.5),
#: which do not know the start from a ranking that `steps` and `init_bias` belong to.
RANGES: dict[str, list[float]] = {
    "k_coef": [1e-6, 1e-2], "lr": [3e-4, 5e-2], "weight_decay": [1e-5, 1e-1], "1 - beta2": [5e-3, 0.5],
    "init_bias": [1e-2, 1.0], "init_scale": [1e-3, 0.2], "temperature": [0.2, 5.0],
    "steps": [50, 800], "steer_to": [0.5, 1.0],
}  # fmt: skip


def search(
    model: str, tasks: Sequence[str], out: str | Path, n_trials: int = 50, workers: int = 1, storage: str | None = None,
    config: PruneConfig | None = None, corpus: str | None = None, device: str | None = None,
) -> tuple[PruneConfig, str]:  # fmt: skip
    """Find the settings with which the circuits of `tasks` have the fewest edges: their geometric mean, in which a
    task without a circuit counts as all weights of the model. Writes `out/best.yaml`.

    Args:
        n_trials: of the whole study; the default settings are the first. A study that is there goes on.
        workers: processes, as in `run_suite`. The same command elsewhere, on the same storage, shares the work.
        storage: a file that all can write to (default: study.journal in `out`), or the URL of a database.
        config: what is not searched; its seed is also that of the search.

    Returns:
        The best settings, and a table of them beside the default ones.

    Raises:
        SuiteError: if Optuna is missing, the storage is locked, unreachable or damaged, or its study is of another
            model, tasks, ranges or config; and as `in_processes`.
        PruneError: if no trial found a circuit of every task.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used.
    """
    find(model)
    check(n_trials >= 1, "trials", n_trials, "at least 1")
    check(workers >= 1, "workers", workers, "at least 1")
    config, storage = config or PruneConfig(), storage or str(Path(out, "study.journal"))
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if not {name, f"1 - {name}"} & {*RANGES}}
    names = [get_task(task).name for task in tasks]
    settings = {"model": Path(model).resolve().name, "tasks": names, "ranges": RANGES, "config": fixed}
    start = {name: 1 - config.beta2 if name == "1 - beta2" else getattr(config, name) for name in RANGES}
    with _using(storage):
        study = open_study(storage)
        if not study.user_attrs:
            study.set_user_attr("settings", settings)
        before, trials = study.user_attrs.get("settings", {}), study.trials
    refuse_another(f"the study in {storage}", before, settings)
    if start not in (t.system_attrs.get("fixed_params") for t in trials if t.state.name in ("WAITING", "COMPLETE")):
        study.enqueue_trial(start)
    run = functools.partial(run_trial, model, list(tasks), n_trials, storage, config, corpus, device)
    left = range(n_done(study), n_trials)
    with tqdm(total=n_trials, initial=left.start, desc="trials", unit="trial") as bar:
        for _ in in_processes(run, left, workers):
            bar.update()
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    best = min(done, key=lambda trial: trial.value)
    shown = [trial for trial in done if trial.system_attrs.get("fixed_params") == start][:1] + [best]
    if None in best.user_attrs["edges"].values():
        raise PruneError(f"none of {len(done)} trials found a circuit of every task; try longer, or other tasks")
    found = with_values(config, best.params)
    with replacing(Path(out, "best.yaml")) as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(found), sort_keys=False), encoding="utf-8")
    rows = [["geometric mean of edges", *(f"{trial.value:.1f}" for trial in shown)]]
    for name in names:
        edges = [trial.user_attrs["edges"][name] for trial in shown]
        rows.append([f"edges of {name}", *("no circuit" if n is None else str(n) for n in edges)])
    rows += [[name, *(f"{trial.params[name]:.3g}" for trial in shown)] for name in RANGES]
    return found, table(["", *["as given", f"the best: trial {best.number} of {len(done)}"][-len(shown) :]], rows)


def run_trial(
    model: str, tasks: list[str], n_trials: int, storage: str, config: PruneConfig, corpus: str | None,
    device: str | None, _: int,
) -> None:  # fmt: skip
    """Prune with settings that the study proposes, unless the study has its trials."""
    import optuna

    face, tokens, means = loaded(model, corpus, device, config.batch_size)
    with _using(storage):
        study = open_study(storage)
        if n_done(study) >= n_trials:
            return
        trial = study.ask()
        # A seed for each trial: whichever process does it, and whether or not the search was interrupted.
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + trial.number)
        values = {name: (trial.suggest_int if name == "steps" else trial.suggest_float)(name, *ends, log=True)
                  for name, ends in RANGES.items()}  # fmt: skip
    all_weights = sum(
        int(m.count_nonzero()) for layer in range(face.cfg.n_layers) for *_, m in weight_matrices(face, layer)
    )
    edges: dict[str, int | None] = {}
    for task in map(get_task, tasks):
        try:
            edges[task.name] = prune(face, task, tokens, with_values(config, values), False, means)[1].n_edges
        except PruneError:
            edges[task.name] = None
    with _using(storage):
        trial.set_user_attr("edges", edges)
        study.tell(trial, statistics.geometric_mean(max(1, all_weights if n is None else n) for n in edges.values()))


def with_values(config: PruneConfig, values: Mapping[str, Any]) -> PruneConfig:
    """The settings with those of a trial."""
    fields = {n.removeprefix("1 - "): 1 - value if n.startswith("1 - ") else value for n, value in values.items()}
    return dataclasses.replace(config, **fields)


def n_done(study: Any) -> int:
    """How many trials of a study are finished."""
    return sum(trial.state.name == "COMPLETE" for trial in study.trials)


def open_study(storage: str) -> Any:
    """The study, made if it is not there. A journal file is locked right also on network disks and by many processes;
    Optuna advises against sqlite there."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place: Any = storage
    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        place = optuna.storages.JournalStorage(JournalFileBackend(storage))
    return optuna.create_study(study_name="tl_sparse", storage=place, load_if_exists=True)


@contextmanager
def _using(storage: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise SuiteError(f"{error}; pip install 'tl-sparse[search]', or what the storage needs") from error
    except Exception as error:  # of many kinds: the file system's, each database's
        raise SuiteError(f"cannot use the storage {storage}: {error}; is it locked, or no study?") from error
