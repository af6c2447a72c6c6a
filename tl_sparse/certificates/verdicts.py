"""The verdict: which criteria of the Mechanistic Validity catalogue a circuit meets.

There is no single score. Each criterion is met, not met, or not tested, by numbers that the
certificate shows and thresholds that stand here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tl_sparse.certificates.derived import idle_parts, knows_answers, slope_of
from tl_sparse.certificates.record import Certificate, Criterion
from tl_sparse.certificates.searching import none_found
from tl_sparse.certificates.sufficient import limit_in_words
from tl_sparse.certificates.thresholds import (
    CONTROL_SIZE,
    FOLLOWS,
    IDLE_PARTS,
    LARGEST_SLOPE,
    LOST,
    OVERLAP,
    PRECISE,
    SPARED,
    TOLD_APART,
    WITHSTOOD,
)
from tl_sparse.errors import counted

MET, NOT_MET, NOT_TESTED = "met", "not met", "not tested"


@dataclass(frozen=True)
class Condition:
    """A part of a criterion.

    Attributes:
        holds: whether the measured number passes; None if the criterion is decided without it,
            because it was left out, or rests on too little.
        number: the number, in words; or what was left out.
    """

    holds: bool | None
    number: str


@dataclass(frozen=True)
class _Asked:
    """What a criterion asks.

    Attributes:
        code, name: those of the catalogue.
        threshold: what must hold, in words.
        conditions: the function that gives its conditions; none if the sections that it needs were
            left out.
    """

    code: str
    name: str
    threshold: str
    conditions: Callable[[Certificate], list[Condition]]


def verdict(certificate: Certificate) -> list[Criterion]:
    """The criteria, in the order of the catalogue."""
    criteria = []
    for asked in _CRITERIA:
        conditions = asked.conditions(certificate)
        numbers = "; ".join(each.number for each in conditions) or "what it needs was left out"
        decided = [each.holds for each in conditions if each.holds is not None]
        if not decided:
            result = NOT_TESTED
        else:
            result = MET if all(decided) else NOT_MET
        criteria.append(Criterion(asked.code, asked.name, result, numbers, asked.threshold))
    return criteria


# --- the conditions of each criterion


def _falsifiability(certificate: Certificate) -> list[Condition]:
    measured = certificate.sufficiency
    if measured is None or not measured.attacks:
        return []
    conditions = [_loss("worst subset", measured.subsets.worst.loss)]
    for attack in measured.attacks:
        limit = limit_in_words(attack.adversary.budget)
        conditions.append(_loss(f"adversary with {limit}", attack.adversary.score.loss))
    return conditions


def _task_specificity(certificate: Certificate) -> list[Condition]:
    measured = certificate.specificity
    if measured is None or measured.mean_rise is None or measured.mean_random_rise is None:
        return []
    own = measured.own.rise.value
    others = measured.mean_rise.value - measured.mean_random_rise.value
    return [
        Condition(own >= LOST, f"its task loses {own:.3f}"),
        Condition(others <= SPARED, f"others lose {others:+.3f} beside random nodes"),
    ]


def _minimality(certificate: Certificate) -> list[Condition]:
    measured = certificate.minimality
    if measured is None:
        return []
    n_parts = len(measured.parts)
    idle = idle_parts(measured)
    if all(part.p_no_rise.value is None for part in measured.parts):
        return [Condition(None, f"too few pairs to test the parts: {measured.n_pairs}")]
    return [
        Condition(
            len(idle) <= IDLE_PARTS * n_parts,
            f"{len(idle)} of {n_parts} parts have no effect beyond noise or random parts",
        )
    ]


def _necessity(certificate: Certificate) -> list[Condition]:
    measured = certificate.necessity
    if measured is None or measured.resample is None:
        return []
    conditions = []
    is_certain = True
    for without in (measured.mean, measured.resample):
        knows = knows_answers(without)
        number = f"{without.ablation}: {without.told_apart.value:.0%} of pairs told apart"
        if knows is None:
            is_certain = False
            number += ", of too few to tell it from chance"
        conditions.append(Condition(not knows, number))
    if not is_certain and all(each.holds for each in conditions):
        return [replace(each, holds=None) for each in conditions]
    return conditions


def _sufficiency(certificate: Certificate) -> list[Condition]:
    measured = certificate.sufficiency
    if measured is None:
        return []
    target = certificate.settings.target_loss
    loss = measured.alone.loss
    return [Condition(loss <= target, f"loss {loss:.3f}, target {target:g}")]


def _consistency(certificate: Certificate) -> list[Condition]:
    measured = certificate.sufficiency
    if measured is None or measured.evaluation.resample is None:
        return []
    conditions = [
        _loss("mean", measured.evaluation.circuit.loss),
        _loss("zero", measured.evaluation.zero.loss),
        _loss("resample", measured.evaluation.resample.loss),
        _loss("worst subset", measured.subsets.worst.loss),
    ]
    if certificate.stability is None:
        conditions.append(Condition(None, "unseen contexts were not tried"))
    else:
        in_contexts = []
        for kind, context in certificate.stability.contexts.items():
            if context.model_can:
                in_contexts.append(_loss(f"unseen {kind}", context.loss.value))
        none_tried = Condition(None, "there are no unseen contexts in which the model can do it")
        conditions += in_contexts or [none_tried]
    return conditions


def _reach(certificate: Certificate) -> list[Condition]:
    measured = certificate.interchange
    if measured is None or measured.correlation is None:
        return []
    correlation = measured.correlation.value
    conditions = [Condition(correlation >= FOLLOWS, f"correlation {correlation:.2f}")]
    slope = slope_of(measured)
    if slope is not None:
        is_alike = 1 / LARGEST_SLOPE <= slope <= LARGEST_SLOPE
        conditions.append(Condition(is_alike, f"slope {slope:.2f}"))
    return conditions


def _separation(certificate: Certificate) -> list[Condition]:
    measured = certificate.necessity
    if measured is None or measured.sufficiency.p_value.value is None:
        return []
    conditions = []
    compared = {"alone": measured.sufficiency, "without it": measured.partial_necessity}
    for name, against in compared.items():
        conditions.append(Condition(against.p_value.is_significant, f"{name}: {against.p_value}"))
    if certificate.controls is None:
        conditions.append(Condition(None, "controls were not run"))
    elif not certificate.controls.searches:
        conditions.append(Condition(None, "no control is possible"))
    else:
        real = certificate.controls.real.n_nodes or 0
        for name, found in certificate.controls.searches.items():
            size = none_found(certificate.controls.max_nodes)
            if found.n_nodes is not None:
                size = counted(found.n_nodes, "node")
            is_larger = found.n_nodes is None or found.n_nodes >= CONTROL_SIZE * real
            conditions.append(Condition(is_larger, f"{name}: {size}"))
    return conditions


def _reliability(certificate: Certificate) -> list[Condition]:
    measured = certificate.sufficiency
    if measured is None or measured.alone.standard_error is None:
        return []
    error = measured.alone.standard_error
    return [Condition(error <= PRECISE, f"standard error of the loss {error:.3f}")]


def _convergence(certificate: Certificate) -> list[Condition]:
    measured = certificate.stability
    if measured is None:
        return []
    overlaps = []
    for search in [*measured.seeds, *measured.samples]:
        overlaps.append(0.0 if search.overlap is None else search.overlap)
    if not overlaps:
        return []
    lowest = min(overlaps)
    number = f"lowest overlap of {len(overlaps)}: {lowest:.2f}"
    holds = lowest >= OVERLAP
    if measured.samples:
        return [Condition(holds, number)]
    # With another seed alone a high overlap says nothing: it is high by construction.
    return [Condition(None if holds else False, number), Condition(None, "no other pairs")]


def _loss(name: str, loss: float) -> Condition:
    return Condition(loss <= WITHSTOOD, f"{name} {loss:.3f}")


_CRITERIA = (
    _Asked(
        "C1",
        "falsifiability",
        f"attempts to refute it fail: loss at most {WITHSTOOD} under subsets and adversaries",
        _falsifiability,
    ),
    _Asked(
        "C3",
        "task specificity",
        f"its task loses at least {LOST} without it, others at most {SPARED} more than random",
        _task_specificity,
    ),
    _Asked("C4", "minimality", f"at most {IDLE_PARTS:.0%} of parts without effect", _minimality),
    _Asked(
        "C5",
        "convergence of methods",
        f"other seeds and pairs find circuits with an overlap (Jaccard) of at least {OVERLAP}",
        _convergence,
    ),
    _Asked(
        "I1",
        "necessity, two ablations",
        f"at most {TOLD_APART:.0%} of pairs told apart without it; 50% is chance, and with less "
        "the rest leans to the wrong answers",
        _necessity,
    ),
    _Asked(
        "I2",
        "sufficiency",
        "loss between the two answers at most the target of the search, or that of the paper where "
        "the search had another objective, or is not known",
        _sufficiency,
    ),
    _Asked(
        "I4",
        "consistency",
        f"loss at most {WITHSTOOD} under each ablation, the worst subset, and in unseen contexts",
        _consistency,
    ),
    _Asked(
        "E1",
        "reach of interventions",
        f"interchange as in the model: correlation at least {FOLLOWS}, slope within a factor of "
        f"{LARGEST_SLOPE:g}",
        _reach,
    ),
    _Asked(
        "M3",
        "baseline separation",
        "better than 90% of random circuits, alone and without it: p < 0.05; controls give "
        f"nothing up to their limit, or circuits of at least {CONTROL_SIZE} times its nodes",
        _separation,
    ),
    _Asked("M1", "reliability", f"standard error of the loss at most {PRECISE}", _reliability),
)
