"""The sections of a certificate: in which order they are measured, and by what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tl_sparse.certificates.control_searches import Controls, controls
from tl_sparse.certificates.stable import Stability, stability
from tl_sparse.certificates.subject import Subject
from tl_sparse.certificates.sufficient import sufficiency
from tl_sparse.evaluation import (
    Backups,
    Inside,
    Interchange,
    Likeness,
    Minimality,
    Necessity,
    Specificity,
    backups,
    inside,
    interchange,
    likeness,
    minimality,
    necessity,
    specificity,
)

R = TypeVar("R")


@dataclass(frozen=True)
class Section:
    """A section that is measured on its own.

    Attributes:
        name: the field of `Certificate` that holds it.
        title: what the bar calls it while it is measured.
        measure: the function that measures it.
        searches: whether it searches for other circuits, which takes long.
    """

    name: str
    title: str
    measure: Callable[[Subject], Any]
    searches: bool = False


def _measured(function: Callable[..., R], subject: Subject, *more: Any, **options: Any) -> R:
    """What a function measures of the circuit, with the arguments that all of them have."""
    return function(
        subject.circuit,
        subject.model,
        *more,
        batch_size=subject.batch_size,
        seed=subject.seed,
        **options,
    )


def _likeness(subject: Subject) -> Likeness:
    return _measured(
        likeness,
        subject,
        subject.data,
        subject.corpus,
        subject.ablation,
        n_random=subject.effort.random_circuits,
    )


def _inside(subject: Subject) -> Inside:
    return _measured(
        inside,
        subject,
        subject.data,
        subject.ablation,
        n_random=subject.effort.random_circuits,
    )


def _interchange(subject: Subject) -> Interchange:
    return _measured(
        interchange,
        subject,
        subject.data,
        subject.ablation,
        n_pairs=subject.effort.interchange_pairs,
        n_random=subject.effort.random_circuits,
    )


def _necessity(subject: Subject) -> Necessity:
    return _measured(
        necessity,
        subject,
        subject.data,
        subject.ablation,
        n_random=subject.effort.tested_circuits,
        n_random_pairs=subject.effort.tested_pairs,
    )


def _backups(subject: Subject) -> Backups:
    return _measured(
        backups,
        subject,
        subject.data,
        n_candidates=subject.effort.backup_candidates,
        n_pairs=subject.effort.part_pairs,
    )


def _minimality(subject: Subject) -> Minimality:
    return _measured(
        minimality,
        subject,
        subject.data,
        subject.ablation,
        n_pairs=subject.effort.part_pairs,
        n_random=subject.effort.random_parts,
    )


def _specificity(subject: Subject) -> Specificity:
    return _measured(
        specificity,
        subject,
        subject.data,
        n_pairs=subject.effort.other_task_pairs,
        n_random=subject.effort.random_circuits,
    )


def _stability(subject: Subject) -> Stability:
    return _measured(
        stability,
        subject,
        subject.task,
        n_pairs=subject.effort.search_pairs,
        n_subsets=subject.effort.search_subsets,
        progress=False,
    )


def _controls(subject: Subject) -> Controls:
    return _measured(
        controls,
        subject,
        subject.task,
        subject.whole_corpus,
        n_pairs=subject.effort.search_pairs,
        n_subsets=subject.effort.search_subsets,
        progress=False,
    )


#: In the order in which they are measured.
SECTIONS = (
    Section("sufficiency", "1 sufficient?", sufficiency),
    Section("likeness", "2 like the model?", _likeness),
    Section("inside", "3 inside like the model?", _inside),
    Section("interchange", "4 interchange", _interchange),
    Section("necessity", "5a necessary?", _necessity),
    Section("backups", "5b backups", _backups),
    Section("minimality", "6 minimal?", _minimality),
    Section("stability", "7 stable?", _stability, searches=True),
    Section("specificity", "8 specific?", _specificity),
    Section("controls", "9 controls", _controls, searches=True),
)
