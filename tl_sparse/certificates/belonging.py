"""The text of sections 5a to 6, and 8: whether the circuit, and each part of it, is needed."""

from tl_sparse.certificates.layout import (
    MOST_ROWS,
    NOTHING,
    estimate,
    listed,
    number,
    paragraph,
    share,
    shows,
)
from tl_sparse.certificates.relatives import Relatives
from tl_sparse.errors import counted
from tl_sparse.evaluation import Backups, Minimality, Necessity, Specificity
from tl_sparse.tasks import table


def necessity_text(measured: Necessity) -> list[str]:
    """Section 5a."""
    return [
        paragraph(
            "A pair is told apart if the logit difference moves towards the right answer from one "
            "prompt to the other. Chance is 50%; with less, what is left of the model leans to the "
            "wrong answers, so it does not do the task either."
        ),
        _without_table(measured),
        _tests_table(measured),
        shows(
            "whether the model still knows the answer once the circuit's nodes are held, by two "
            "ablations.",
            "that no other circuit could do the task: backups may take over only later. Dependence "
            "need not be knowledge of the answer, since both runs may find the same prompts hard.",
        ),
    ]


def _without_table(measured: Necessity) -> str:
    rows = [
        [
            "the full model",
            estimate(measured.full_loss),
            share(measured.full_accuracy),
            NOTHING,
            NOTHING,
        ]
    ]
    for without in (measured.mean, measured.resample):
        if without is None:
            continue
        rows.append(
            [
                f"without it, by {without.ablation}",
                estimate(without.loss),
                share(without.accuracy),
                share(without.told_apart),
                f"{estimate(without.random_loss)} ({without.n_random})",
            ]
        )
    header = ["", "task loss", "accuracy", "pairs told apart", "loss without random nodes"]
    return table(header, rows)


def _tests_table(measured: Necessity) -> str:
    rows = [
        [
            "equally good as the model",
            f"better at {share(measured.better)}",
            str(measured.p_equivalent),
        ],
    ]
    for without in (measured.mean, measured.resample):
        if without is None:
            continue
        independence = without.independence
        rows.append(
            [
                f"without it ({without.ablation}), independent of the model",
                f"HSIC {number(independence.hsic)}",
                str(independence.p_value),
            ]
        )
    compared = {
        "alone, nearer to the model than random circuits": measured.sufficiency,
        "without it, further than without random circuits": measured.partial_necessity,
    }
    for name, against in compared.items():
        rows.append([name, f"random as good: {against.share:.0%}", str(against.p_value)])
    return table(["test (Shi et al. 2024)", "measured", "p-value"], rows)


def backups_text(measured: Backups) -> list[str]:
    """Section 5b."""
    effects = paragraph(
        "The effect of a node is the rise of the loss when it is held at its mean. It may grow "
        "once the circuit is gone. A node takes over only if the model can then still do some of "
        "the task."
    )
    found = (
        f"The effect of {counted(measured.n_found, 'node')} of {len(measured.candidates)} tried "
        "grows significantly. Without circuit and these the loss is "
        f"{estimate(measured.without_found_loss)}, without circuit and as many random nodes "
        f"{estimate(measured.without_random_loss)}, without the circuit alone "
        f"{estimate(measured.without_loss)}."
    )
    return [effects, _backups_table(measured), paragraph(found, _what_backups_carry(measured))]


def _what_backups_carry(measured: Backups) -> str:
    """How much of the task is left to the found nodes once the circuit is gone."""
    if measured.share is None:
        return _sentence(measured.problem)
    if not measured.n_found:
        return ""
    return f"They carry {measured.share:.0%} of what the model can still do without the circuit."


def _backups_table(measured: Backups) -> str:
    rows = []
    for backup in measured.candidates[:MOST_ROWS]:
        rows.append(
            [
                backup.node,
                estimate(backup.effect),
                estimate(backup.effect_without),
                estimate(backup.growth),
                str(backup.p_no_growth),
            ]
        )
    rows.append(
        [
            f"random nodes ({measured.n_random})",
            NOTHING,
            NOTHING,
            estimate(measured.random_growth),
            NOTHING,
        ]
    )
    header = ["node outside", "effect", "effect without the circuit", "growth", "p-value"]
    return table(header, rows)


def relatives_text(measured: Relatives) -> list[str]:
    """Section 5c."""
    rows = [
        ["circuits of the same round", number(measured.overlap_within)],
        ["circuits of different rounds", number(measured.overlap_between)],
        ["random sets of nodes", number(measured.overlap_by_chance)],
    ]
    core = "No node is needed by every circuit."
    if measured.core:
        core = (
            f"{counted(len(measured.core), 'node')} are needed by every circuit; "
            f"{len(measured.core_in_circuit)} of them are in this one: {listed(measured.core)}."
        )
    rounds = counted(measured.n_rounds, "round")
    return [
        table(["nodes in common", "Jaccard index"], rows),
        paragraph(f"{rounds} of forbidding what circuits share; ended: {measured.ending}.", core),
        shows(
            "whether there are other circuits of the task, and what all of them need.",
            "which of them the model uses when none is forbidden.",
        ),
    ]


def minimality_text(measured: Minimality) -> list[str]:
    """Section 6."""
    left_out = ""
    if measured.n_left_out:
        left_out = f"{counted(measured.n_left_out, 'part')} were not measured: there are too many."
    return [
        _parts_table(measured),
        paragraph(
            f"The loss of the whole circuit on these {counted(measured.n_pairs, 'pair')} is "
            f"{estimate(measured.circuit_loss)}. P-values are corrected for many tests "
            f"({measured.correction}).",
            left_out,
        ),
        shows(
            "which parts the circuit itself needs, against noise and against random parts.",
            "which parts the model needs, or that no smaller circuit exists with other parts.",
        ),
    ]


def _parts_table(measured: Minimality) -> str:
    rows = []
    for part in measured.parts[:MOST_ROWS]:
        exceeds = NOTHING if part.exceeds is None else f"{part.exceeds:.0%}"
        rows.append(
            [part.name, estimate(part.rise), str(part.p_no_rise), exceeds, str(part.p_matters)]
        )
    baselines = {"nodes": measured.random_nodes, "edges": measured.random_edges}
    for kind, baseline in baselines.items():
        if baseline.n:
            rows.append([f"random {kind} ({baseline.n})", estimate(baseline.rise), *[NOTHING] * 3])
    header = ["removed", "rise of the loss", "no rise", "above random", "superfluous"]
    text = table(header, rows)
    n_more = len(measured.parts) - MOST_ROWS
    return f"{text}\n  … and {n_more} more in certificate.json" if n_more > 0 else text


def specificity_text(measured: Specificity) -> list[str]:
    """Section 8."""
    rows = []
    own = measured.own
    for name, task in {"its own task": own, **measured.others}.items():
        rows.append(
            [
                name,
                estimate(task.rise),
                estimate(task.random_rise),
                share(task.accuracy),
                share(task.full_accuracy),
            ]
        )
    rows.append(
        [
            "mean of the others",
            estimate(measured.mean_rise),
            estimate(measured.mean_random_rise),
            NOTHING,
            NOTHING,
        ]
    )
    header = ["task", "rise without it", "without random nodes", "accuracy", "full model"]
    left_out = ""
    if measured.left_out:
        n_left_out = counted(len(measured.left_out), "task")
        left_out = f"{n_left_out} left out that the model cannot do, or has no prompts of."
    return [
        table(header, rows),
        paragraph(left_out),
        shows(
            "whether what the circuit does is used for this task alone.",
            "that its nodes do one thing: a task may share them for the same reason.",
        ),
    ]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""
