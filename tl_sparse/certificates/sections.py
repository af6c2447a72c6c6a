"""The sections of a certificate: in which order they are measured, and by what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def _likeness(subject: Subject) -> Likeness:
    return likeness(
        subject.circuit,
        subject.model,
        subject.data,
        subject.corpus,
        subject.ablation,
        subject.effort.random_circuits,
        subject.batch_size,
        subject.seed,
    )


def _inside(subject: Subject) -> Inside:
    return inside(
        subject.circuit,
        subject.model,
        subject.data,
        subject.ablation,
        subject.effort.random_circuits,
        subject.batch_size,
        subject.seed,
    )


def _interchange(subject: Subject) -> Interchange:
    return interchange(
        subject.circuit,
        subject.model,
        subject.data,
        subject.ablation,
        n_pairs=subject.effort.interchange_pairs,
        n_random=subject.effort.random_circuits,
        batch_size=subject.batch_size,
        seed=subject.seed,
    )


def _necessity(subject: Subject) -> Necessity:
    return necessity(
        subject.circuit,
        subject.model,
        subject.data,
        n_random=subject.effort.tested_circuits,
        n_random_pairs=subject.effort.tested_pairs,
        batch_size=subject.batch_size,
        seed=subject.seed,
    )


def _backups(subject: Subject) -> Backups:
    return backups(
        subject.circuit,
        subject.model,
        subject.data,
        n_candidates=subject.effort.backup_candidates,
        n_pairs=subject.effort.part_pairs,
        batch_size=subject.batch_size,
        seed=subject.seed,
    )


def _minimality(subject: Subject) -> Minimality:
    return minimality(
        subject.circuit,
        subject.model,
        subject.data,
        n_pairs=subject.effort.part_pairs,
        n_random=subject.effort.random_parts,
        batch_size=subject.batch_size,
        seed=subject.seed,
    )


def _specificity(subject: Subject) -> Specificity:
    return specificity(
        subject.circuit,
        subject.model,
        subject.data,
        n_pairs=subject.effort.other_task_pairs,
        n_random=subject.effort.random_circuits,
        batch_size=subject.batch_size,
        seed=subject.seed,
    )


def _stability(subject: Subject) -> Stability:
    return stability(
        subject.circuit,
        subject.model,
        subject.task,
        n_pairs=subject.effort.search_pairs,
        n_subsets=subject.effort.search_subsets,
        batch_size=subject.batch_size,
        seed=subject.seed,
        progress=False,
    )


def _controls(subject: Subject) -> Controls:
    return controls(
        subject.circuit,
        subject.model,
        subject.task,
        subject.whole_corpus,
        n_pairs=subject.effort.search_pairs,
        n_subsets=subject.effort.search_subsets,
        batch_size=subject.batch_size,
        seed=subject.seed,
        progress=False,
    )


#: In the order in which they are measured.
SECTIONS = (
    Section("sufficiency", "1 sufficient?", sufficiency),
    Section("likeness", "2 like the model?", _likeness),
    Section("inside", "3 inside like the model?", _inside),
    Section("interchange", "4 interchange", _interchange),
    Section("necessity", "5 necessary?", _necessity),
    Section("backups", "5 backups", _backups),
    Section("minimality", "6 minimal?", _minimality),
    Section("stability", "7 stable?", _stability, searches=True),
    Section("specificity", "8 specific?", _specificity),
    Section("controls", "9 controls", _controls, searches=True),
)
