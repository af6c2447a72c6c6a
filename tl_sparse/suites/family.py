"""The family of a task's circuits: found again and again, each time without the nodes they share.

After Hao & Goldstein 2026, "Exhausting backup circuits", who forbid the node that most circuits
share, and search again until no seed succeeds. Here all nodes that every circuit of a round has are
forbidden together, which takes fewer rounds. Where that leaves no circuit, half of them are, down
to a single one. Nodes of the core, which every circuit needs, are not forbidden.
"""

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from tl_sparse.checkpoints import is_dense, open_with_corpus
from tl_sparse.circuits import Circuit
from tl_sparse.evaluation import (
    EXHAUSTED,
    NO_CIRCUIT,
    OUT_OF_ROUNDS,
    CoreCandidate,
    Family,
    FamilyRound,
)
from tl_sparse.files import write_json, write_text
from tl_sparse.pruning import PruneConfig
from tl_sparse.suites import arguments
from tl_sparse.suites.content import content_of_model, content_of_task
from tl_sparse.suites.family_jobs import (
    CoreJob,
    FamilySetup,
    SearchJob,
    read_core,
    read_search,
    refuse_other_jobs,
    run_core,
    run_search,
)
from tl_sparse.suites.family_results import FAMILY_JSON, described_family, family_table
from tl_sparse.suites.models import model_name
from tl_sparse.suites.workers import in_processes
from tl_sparse.view import plots

J = TypeVar("J", SearchJob, CoreJob)
#: Any folder of a family has one of these.
_OWN_FILES = (FAMILY_JSON, "rounds/*/*/job.json", "rounds")


def find_family(
    model: str | Path,
    task: str | Path,
    out: str | Path,
    seeds: arguments.Numbers = (0, 1, 2),
    max_rounds: int = 20,
    config: PruneConfig | None = None,
    corpus: str | Path | None = None,
    workers: int = 1,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Family:
    """Find circuits of a task until there are no others, each round without the nodes they share.

    In each round, a circuit is searched with each seed. Then the nodes that are in all circuits of
    the round are forbidden, or, if there are none, the one that most have; of equal ones, the
    first. If a round finds no circuit with any seed, half of the nodes that were
    forbidden last are forbidden instead, and so on; a single node whose prohibition leaves no
    circuit is needed, and is allowed again. The family ends when nothing is left to forbid.

    Nodes of the core are never forbidden: those in all circuits of round 0 without which, all other
    nodes allowed, the model misses the target loss, and one search, with the first seed, finds no
    circuit either. That there is none with any seed is not shown by it. This search ends with the
    first set of nodes that passes: what is superfluous in it does not matter.

    Searches are saved in `out/rounds/ROUND/SEED`, those for the core in `out/core/NODE`. What is
    there is not searched again; other machines can work in the same folder at the same time. The
    result is written to family.json, as a table to family.md, and as a plot to family.svg if
    matplotlib is installed. Arguments that are not listed here are as for `run_suite`.

    Args:
        task: a file or a name, as for `get_task`.
        out: the folder for the circuits and the results.
        seeds: the seeds of each round; one or several.
        max_rounds: the largest number of rounds. More can be run later in the same folder.
        config: how to prune. Its own seed is not used; nodes that it includes are never forbidden.

    Raises:
        SuiteError: if `out` holds a family with other settings, seeds, model, text or pairs; if a
            file of it is damaged; if a process died; or if Ctrl-C was pressed.
        ConfigError: if an argument has the wrong type or value, or `out` holds anything else.
        CheckpointError, DataError, TaskError: for a model, corpus or task that cannot be used. That
            there is no circuit is not an error: the family then has none.
    """
    workers = arguments.at_least_one("workers", workers)
    max_rounds = arguments.at_least_one("max_rounds", max_rounds)
    config = dataclasses.replace(arguments.pruning(config), seed=0)
    seed_list = arguments.seeds(seeds, config)
    folder = arguments.folder("out", out)
    arguments.check_own_folder(folder, _OWN_FILES, "a family")
    setup = FamilySetup(
        folder=folder,
        model=arguments.name("model", model),
        task=arguments.name("task", task),
        seeds=seed_list,
        config=config,
        corpus=arguments.optional_name("corpus", corpus),
        device=arguments.device_name(device),
        contents={},
    )
    setup = dataclasses.replace(setup, contents=_contents(setup))
    refuse_other_jobs(setup)
    history = _Rounds(setup, workers, progress).run(max_rounds)
    family = described_family(setup, history.rounds, history.core, history.needed, history.ending)
    _write(folder, family)
    return family


def _contents(setup: FamilySetup) -> dict[str, str]:
    """The hashes of the model, its corpus and the task."""
    is_dense(setup.model)  # raises if there is no such model
    task = content_of_task(setup.task)
    model, tokens = open_with_corpus(setup.model, setup.corpus, setup.device)
    return task | content_of_model(model_name(setup.model), model, tokens)


def _write(folder: Path, family: Family) -> None:
    write_json(folder / FAMILY_JSON, asdict(family))
    write_text(folder / "family.md", family_table(family))
    if family.n_circuits and find_spec("matplotlib"):
        plots.save(plots.family(asdict(family)), folder / "family.svg", overwrite=True)


@dataclass(frozen=True)
class _History:
    """What the rounds found.

    Attributes:
        needed: the nodes that were found to be needed after round 0.
    """

    rounds: list[FamilyRound]
    core: list[CoreCandidate]
    needed: list[str]
    ending: str


class _Rounds:
    """The rounds of a family, each of which follows from those before it."""

    def __init__(self, setup: FamilySetup, workers: int, progress: bool) -> None:
        self.setup = setup
        self.workers = workers
        self.progress = progress

    def run(self, max_rounds: int) -> _History:
        """Run the rounds that are missing."""
        first = self._searched(0, [], [])
        rounds = [first]
        if not first.found:
            return _History(rounds, [], [], NO_CIRCUIT)
        core = self._core(first)
        allowed = {candidate.node for candidate in core if candidate.is_needed}
        allowed |= self._included(first)
        forbidden: list[str] = []
        needed: list[str] = []
        newly = _shared(first, allowed)
        while newly:
            if len(rounds) == max_rounds:
                return _History(rounds, core, needed, OUT_OF_ROUNDS)
            this = self._searched(len(rounds), forbidden, newly)
            rounds.append(this)
            if this.found:
                forbidden = this.forbidden
                newly = _shared(this, allowed)
            elif len(newly) > 1:
                newly = newly[: len(newly) // 2]
            else:
                needed += newly
                allowed |= {*newly}
                last = next(each for each in reversed(rounds) if each.found)
                newly = _shared(last, allowed)
        return _History(rounds, core, needed, EXHAUSTED)

    def _searched(self, number: int, before: Sequence[str], newly: Sequence[str]) -> FamilyRound:
        """A round, whose missing searches are run."""
        forbidden = [*before, *newly]
        jobs = []
        for seed in self.setup.seeds:
            place = self.setup.folder / "rounds" / str(number) / str(seed)
            jobs.append(SearchJob(place, seed, tuple(forbidden)))
        self._run_missing(jobs, functools.partial(run_search, self.setup), f"round {number}")
        searches = [read_search(self.setup, job) for job in jobs]
        return FamilyRound(number, list(newly), forbidden, searches)

    def _core(self, first: FamilyRound) -> list[CoreCandidate]:
        """Whether each node that all circuits of round 0 have is needed."""
        found = self.setup.folder / "rounds" / "0" / str(first.found[0].seed)
        circuit = Circuit.load(found)
        jobs = []
        for node in _shared(first, self._included(first), all_of_them=True):
            place = self.setup.folder / "core" / circuit.node(node).indexed_name
            jobs.append(CoreJob(place, node, self.setup.seeds[0], found))
        self._run_missing(jobs, functools.partial(run_core, self.setup), "core")
        return [read_core(self.setup, job) for job in jobs]

    def _included(self, first: FamilyRound) -> set[str]:
        """The names of the nodes that the settings always use."""
        if not self.setup.config.include:
            return set()
        found = self.setup.folder / "rounds" / "0" / str(first.found[0].seed)
        circuit = Circuit.load(found)
        return {str(circuit.node(name)) for name in self.setup.config.include}

    def _run_missing(self, jobs: Sequence[J], run: Callable[[J], None], what: str) -> None:
        missing = [job for job in jobs if not job.folder.exists()]
        # Each machine has an order of its own, so that two of them seldom do the same.
        random.SystemRandom().shuffle(missing)
        n_finished = len(jobs) - len(missing)
        options = {"initial": n_finished, "desc": what, "unit": "search"}
        with tqdm(total=len(jobs), disable=not self.progress, **options) as bar:
            for _ in in_processes(run, missing, self.workers):
                bar.update()


def _shared(this: FamilyRound, allowed: Collection[str], all_of_them: bool = False) -> list[str]:
    """The nodes to forbid after a round, in the order of the forward pass.

    Args:
        this: a round with circuits.
        allowed: nodes that must not be forbidden.
        all_of_them: only nodes that are in all circuits; else, if there are none, the one that
            most have.
    """
    counts = Counter[str]()
    for search in this.found:
        counts.update(search.nodes)
    counts = Counter({node: n for node, n in counts.items() if node not in allowed})
    shared = [node for node, n in counts.items() if n == len(this.found)]
    if shared or all_of_them or not counts:
        return shared
    return [max(counts, key=counts.__getitem__)]
