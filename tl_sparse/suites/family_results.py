"""The results of a family over its rounds: figures, comparisons of circuits, and a table."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from tl_sparse.arguments import checked
from tl_sparse.circuits import Circuit
from tl_sparse.errors import TLSparseError, counted
from tl_sparse.evaluation import (
    EXHAUSTED,
    NO_CIRCUIT,
    Backups,
    CoreCandidate,
    Estimate,
    Family,
    FamilyRound,
    FamilySearch,
    Relatedness,
    backups,
    jaccard,
    relatedness,
)
from tl_sparse.files import read_json
from tl_sparse.hooks import TLModel
from tl_sparse.pruning import heldout_pairs
from tl_sparse.suites.family_jobs import FamilySetup
from tl_sparse.suites.models import loaded, model_name
from tl_sparse.suites.results import markdown_table
from tl_sparse.tasks import TaskData, get_task

#: The file with the family.
FAMILY_JSON = "family.json"
#: The pairs of prompts on which circuits are compared.
N_PAIRS = 64
#: The nodes that family.md lists by their occurrences.
MOST_COMMON = 30


def described_family(
    setup: FamilySetup,
    rounds: Sequence[FamilyRound],
    core: list[CoreCandidate],
    needed_later: list[str],
    ending: str,
) -> Family:
    """The family of these rounds; its circuits are compared on held-out pairs of the first one."""
    rounds = _with_figures(rounds)
    measured = _Measured(None, None, None)
    if rounds[0].found:
        measured = _measured_before(setup, rounds) or _measured(setup, rounds)
    occurrences = Counter[str]()
    for each in rounds:
        for search in each.found:
            occurrences.update(search.nodes)
    later = {node for each in rounds[1:] for search in each.found for node in search.nodes}
    found_backups = _found(measured.backups)
    n_later = len(later - set(_first_nodes(rounds)))
    by_chance = None
    if measured.backups is not None and measured.backups.n_outside:
        by_chance = len(found_backups) * n_later / measured.backups.n_outside
    return Family(
        model=model_name(setup.model),
        task=get_task(setup.task).name,
        seeds=setup.seeds,
        target_loss=setup.config.target_loss,
        n_model_nodes=measured.n_model_nodes or 0,
        rounds=rounds,
        ending=ending,
        core=[candidate.node for candidate in core if candidate.is_needed],
        core_candidates=core,
        needed_later=needed_later,
        occurrences=dict(occurrences.most_common()),
        overlap_within=_mean(_overlaps_within(rounds)),
        overlap_between=_mean(_overlaps_between(rounds)),
        overlap_by_chance=_overlap_by_chance(rounds, measured.n_model_nodes),
        relatedness=measured.relatedness,
        backups=measured.backups,
        backups_in_later=[node for node in found_backups if node in later],
        backups_by_chance=by_chance,
    )


# --- figures of the rounds


def _with_figures(rounds: Sequence[FamilyRound]) -> list[FamilyRound]:
    """The rounds with their costs and overlaps."""
    first = rounds[0].smallest
    described = []
    for each in rounds:
        cost = None
        if each.smallest and first and first.n_edges and each.smallest.n_edges is not None:
            cost = each.smallest.n_edges / first.n_edges
        described.append(replace(each, cost=cost, overlap=_mean(_overlaps_within([each]))))
    return described


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _overlaps_within(rounds: Sequence[FamilyRound]) -> list[float]:
    overlaps = []
    for each in rounds:
        for first, second in itertools.combinations(each.found, 2):
            overlaps.append(jaccard(first.nodes, second.nodes))
    return overlaps


def _overlaps_between(rounds: Sequence[FamilyRound]) -> list[float]:
    overlaps = []
    for one, other in itertools.combinations(rounds, 2):
        for first, second in itertools.product(one.found, other.found):
            overlaps.append(jaccard(first.nodes, second.nodes))
    return overlaps


def _overlap_by_chance(rounds: Sequence[FamilyRound], n_model_nodes: int | None) -> float | None:
    """The Jaccard index of two random sets of nodes, of the expected number that they share."""
    sizes = [len(search.nodes) for each in rounds for search in each.found]
    if not sizes or not n_model_nodes or not any(sizes):
        return None
    size = mean(sizes)
    shared = size**2 / n_model_nodes
    return shared / (2 * size - shared)


def _first_nodes(rounds: Sequence[FamilyRound]) -> list[str]:
    smallest = rounds[0].smallest
    return smallest.nodes if smallest else []


def _found(measured: Backups | None) -> list[str]:
    """The nodes whose effect grows significantly once the circuit is gone."""
    if measured is None:
        return []
    return [each.node for each in measured.candidates if each.p_no_growth.is_significant]


# --- comparisons of circuits


@dataclass(frozen=True)
class _Measured:
    n_model_nodes: int | None
    relatedness: Relatedness | None
    backups: Backups | None


def _measured_before(setup: FamilySetup, rounds: Sequence[FamilyRound]) -> _Measured | None:
    """The comparisons in family.json, if they are of the same circuits.

    They then have the same settings, model and pairs: all jobs of the folder have.
    """
    try:
        before = Family.from_dict(read_json(setup.folder / FAMILY_JSON))
    except TLSparseError:  # there is no such file yet, or it is damaged and will be written anew
        return None
    if _compared(before.rounds) != _compared(rounds):
        return None
    return _Measured(before.n_model_nodes, before.relatedness, before.backups)


def _compared(rounds: Sequence[FamilyRound]) -> list[FamilySearch]:
    """The smallest circuit of each round that has one."""
    return [each.smallest for each in rounds if each.smallest]


def _measured(setup: FamilySetup, rounds: Sequence[FamilyRound]) -> _Measured:
    """The comparisons of the smallest circuits of the rounds."""
    model, _, _ = loaded(setup.model, setup.corpus, setup.device, setup.config, setup.contents)
    circuits = {}
    for each in rounds:
        if each.smallest:
            place = setup.folder / "rounds" / str(each.number) / str(each.smallest.seed)
            circuits[f"round {each.number}"] = Circuit.load(place)
    first = next(iter(circuits.values()))
    if not first.n_nodes:
        return _Measured(first.n_candidates, None, None)
    data = heldout_pairs(first, model)
    return _Measured(
        n_model_nodes=first.n_candidates,
        relatedness=_related(circuits, model, data, setup),
        backups=backups(first, model, data, batch_size=setup.config.batch_size),
    )


def _related(
    circuits: dict[str, Circuit], model: TLModel, data: TaskData, setup: FamilySetup
) -> Relatedness | None:
    if len(circuits) < 2:
        return None
    config = setup.config
    return relatedness(
        circuits, model, data, config.ablation, N_PAIRS, batch_size=config.batch_size
    )


# --- the table


@checked()
def family_table(family: Family) -> str:
    """The family as Markdown: its rounds, its core, and how its circuits stand to each other."""
    sections = [
        f"# Circuits of {family.task} in {family.model}",
        _summary(family),
        _rounds_table(family),
        *_problems(family),
        *_core_sections(family),
        *_relatives_sections(family),
        *_backups_sections(family),
        *_occurrences_sections(family),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(family: Family) -> str:
    n_found = sum(bool(each.found) for each in family.rounds)
    endings = {
        EXHAUSTED: "Then nothing was left to forbid that some circuit does not need.",
        NO_CIRCUIT: "There is no circuit with any seed.",
    }
    ending = endings.get(family.ending, "More rounds can be run in the same folder.")
    return (
        f"{counted(family.n_circuits, 'circuit')} in {counted(n_found, 'round')} of "
        f"{len(family.rounds)}, with the seeds {', '.join(map(str, family.seeds))}. {ending}"
    )


def _rounds_table(family: Family) -> str:
    header = ["round", "forbidden", "circuits", "edges", "nodes", "loss", "cost", "overlap"]
    rows = []
    for each in family.rounds:
        found = each.found
        row = [str(each.number), str(len(each.forbidden)), f"{len(found)} of {len(each.searches)}"]
        row.append(", ".join(str(search.n_edges) for search in found) or "–")
        row.append(", ".join(str(len(search.nodes)) for search in found) or "–")
        row.append(", ".join(f"{search.loss.value:.3f}" for search in found if search.loss) or "–")
        row += [_shown(each.cost, "× {:.2f}"), _shown(each.overlap)]
        rows.append(row)
    note = (
        "Edges, nodes and loss (in nats, alone on held-out pairs) of the circuit of each seed. The "
        "cost is the edges of the smallest circuit relative to round 0; the overlap is the mean "
        "Jaccard index of the nodes of two circuits. Over all rounds it is "
        f"{_shown(family.overlap_within)} within and {_shown(family.overlap_between)} between "
        f"rounds, and would be {_shown(family.overlap_by_chance, '{:.4f}')} by chance."
    )
    return markdown_table(header, rows) + "\n\n" + note


def _shown(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def _estimate(value: Estimate | None) -> str:
    return "–" if value is None else str(value)


def _problems(family: Family) -> list[str]:
    """Why searches found no circuit."""
    lines = []
    for each in family.rounds:
        for search in each.searches:
            if search.problem:
                what = f"- round {each.number}, seed {search.seed}"
                lines.append(f"{what}: {' '.join(search.problem.split())}")
    return ["\n".join(lines)] if lines else []


def _core_sections(family: Family) -> list[str]:
    if not family.core_candidates:
        return []
    core = ", ".join(family.core) or "none"
    lines = [
        f"## The core: {counted(len(family.core), 'node')} of "
        f"{len(family.core_candidates)} that all circuits of round 0 have",
        f"No circuit was found without one of these: {core}.",
    ]
    header = ["node", "needed", "loss of the model without it", "nodes that pass without it"]
    rows = []
    for each in family.core_candidates:
        passing = "not searched"
        if each.problem is not None:
            passing = "none found"
        elif each.n_nodes is not None:
            passing = str(each.n_nodes)
        needed = "yes" if each.is_needed else "no"
        rows.append([each.node, needed, str(each.loss_without), passing])
    lines.append(markdown_table(header, rows))
    if family.needed_later:
        later = ", ".join(family.needed_later)
        lines.append(f"Needed later, given what else was forbidden by then: {later}.")
    return lines


def _relatives_sections(family: Family) -> list[str]:
    related = family.relatedness
    if related is None:
        return []
    losses = ["without first", "without it", "without both", "union"]
    header = ["circuit", "overlap", "agreement", *losses]
    rows = []
    for each in related.relatives:
        row = [each.name, f"{each.overlap:.2f}", _estimate(each.agreement)]
        for loss in (each.without_first, each.without, each.without_both, each.union):
            row.append(str(loss))
        rows.append(row)
    note = (
        f"The smallest circuit of each later round beside that of {related.first}, on "
        f"{counted(related.n_pairs, 'held-out pair')}. Two circuits stand in for each other if the "
        "model keeps the task without the own nodes of either, but not without both. The full "
        f"model's loss is {related.full_loss}, that with every node held "
        f"{related.no_nodes_loss}. Agreement is the correlation of the logit differences among "
        f"prompts with the same answers; {_estimate(related.random_agreement)} with random "
        "circuits of the same size. The union is the loss of both circuits alone."
    )
    return ["## Can they stand in for each other?", markdown_table(header, rows), note]


def _backups_sections(family: Family) -> list[str]:
    if family.backups is None:
        return []
    found = _found(family.backups)
    text = (
        f"Once the smallest circuit of round 0 is gone, the effect of "
        f"{counted(len(found), 'other node')} grows significantly; "
        f"{len(family.backups_in_later)} of them "
        f"({_shown(family.backups_by_chance)} by chance) are in circuits of later rounds"
    )
    return ["## Backups by conditional co-ablation", text + _listed(family.backups_in_later)]


def _listed(nodes: Sequence[str]) -> str:
    return f": {', '.join(nodes)}." if nodes else "."


def _occurrences_sections(family: Family) -> list[str]:
    common = list(family.occurrences.items())[:MOST_COMMON]
    if not common:
        return []
    header = ["node", f"circuits of {family.n_circuits}"]
    rows = [[node, str(n)] for node, n in common]
    heading = f"## The most common of {counted(len(family.occurrences), 'node')}"
    return [heading, markdown_table(header, rows)]
