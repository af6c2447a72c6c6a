"""The text of sections 7 and 9: what the same search finds elsewhere."""

from collections.abc import Mapping, Sequence

from tl_sparse.certificates.again import Found
from tl_sparse.certificates.control_searches import Controls
from tl_sparse.certificates.layout import NOTHING, estimate, number, paragraph, share, shows
from tl_sparse.certificates.stable import SearchedAgain, Stability
from tl_sparse.errors import counted
from tl_sparse.evaluation import LOSS_NAMES
from tl_sparse.parsing import printable
from tl_sparse.tasks import table

_FOUND = ["nodes", "edges", "loss", "worst subset", "full model"]


def stability_text(measured: Stability) -> list[str]:
    """Section 7."""
    return [
        _searches_table(measured),
        _contexts_table(measured),
        paragraph(
            _objective_in_words(measured.objective),
            *_not_found([*measured.seeds, *measured.samples]),
            _losses_in_words(measured),
            _left_out(measured.left_out),
        ),
        shows(
            "whether the search finds the same again, and whether this circuit also does the task "
            "on prompts that are unlike those on which it was searched.",
            "that circuits with other nodes compute something else: several can be one mechanism "
            "(section 5c).",
        ),
    ]


def _searches_table(measured: Stability) -> str:
    rows = [["this circuit", *_found_cells(measured.first), NOTHING]]
    kinds = {"another seed": measured.seeds, "other pairs": measured.samples}
    for kind, searches in kinds.items():
        for search in searches:
            rows.append([kind, *_found_cells(search.found), number(search.overlap)])
    return table(["searched again", *_FOUND, "overlap"], rows)


def _found_cells(found: Found) -> list[str]:
    n_nodes = NOTHING if found.n_nodes is None else str(found.n_nodes)
    n_edges = NOTHING if found.n_edges is None else str(found.n_edges)
    losses = (found.loss, found.worst_loss, found.full_loss)
    return [n_nodes, n_edges, *map(estimate, losses)]


def _contexts_table(measured: Stability) -> str:
    rows = []
    for kind, context in measured.contexts.items():
        model_can = "" if context.model_can else "the model itself fails"
        rows.append(
            [
                f"other {kind}",
                estimate(context.loss),
                share(context.accuracy),
                estimate(context.full_loss),
                estimate(context.empty_loss),
                model_can,
            ]
        )
    header = ["unseen contexts", "task loss", "accuracy", "full model", "no nodes", ""]
    return table(header, rows) if rows else ""


def _objective_in_words(objective: str) -> str:
    """What the losses of searches are, where they are not those between the two answers."""
    if objective == "candidates":
        return ""
    name = LOSS_NAMES.get(objective, objective)
    return f"Losses of searches are what these looked for, the {printable(name)}."


def _not_found(searches: Sequence[SearchedAgain]) -> list[str]:
    """Why searches found nothing, each reason once."""
    reasons = dict.fromkeys(each.found.not_found for each in searches if each.found.not_found)
    return [f"Nothing was found: {printable(reason)}." for reason in reasons]


def _losses_in_words(measured: Stability) -> str:
    sentences = []
    if measured.loss_interval:
        low, high = measured.loss_interval
        pairs = counted(measured.n_pairs, "held-out pair")
        sentences.append(
            f"Resampled from the {pairs}, the loss lies between {low:.3f} and {high:.3f} (95%)."
        )
    if measured.fresh_losses:
        losses = ", ".join(map(estimate, measured.fresh_losses))
        sentences.append(f"On pairs drawn anew it is {losses}.")
    return " ".join(sentences)


def controls_text(measured: Controls) -> list[str]:
    """Section 9."""
    titles = {
        "nonsense": "answers that make no sense",
        "shuffled": "random labels",
        "permuted": "permuted weights",
    }
    rows = [["the real task", *_found_cells(measured.real)]]
    why = []
    for name, found in measured.searches.items():
        title = titles.get(name, name)
        rows.append([title, *_found_cells(found)])
        if found.not_found:
            size = none_found(measured.max_nodes)
            why.append(f"{title.capitalize()}: {size} ({printable(found.not_found)}).")
    return [
        table(["the same search", *_FOUND], rows),
        paragraph(
            _objective_in_words(measured.objective),
            *why,
            _limit(measured),
            _left_out(measured.left_out),
        ),
        shows(
            "what the search finds where there is nothing to find; a circuit says something as far "
            "as it is smaller, or withstands more.",
            "that a small circuit is the model's own way (sections 3 and 4).",
        ),
    ]


def none_found(max_nodes: int | None) -> str:
    """What a search found that found nothing among so many nodes; None for no limit."""
    return "no circuit" if max_nodes is None else f"none of at most {counted(max_nodes, 'node')}"


def _limit(measured: Controls) -> str:
    if measured.max_nodes is None or not measured.searches:
        return ""
    return (
        f"Sizes were tried up to {counted(measured.max_nodes, 'node')}, before those that are not "
        "needed are removed: controls may have circuits of more nodes."
    )


def _left_out(reasons: Mapping[str, str]) -> str:
    parts: Sequence[str] = [f"{name}: {printable(why)}" for name, why in reasons.items()]
    return f"Left out: {'; '.join(parts)}." if parts else ""
