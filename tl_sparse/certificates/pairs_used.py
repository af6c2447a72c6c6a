"""On how many pairs a section is measured, where these are not all held-out pairs."""

from collections.abc import Callable, Mapping
from typing import Any

from tl_sparse.certificates.control_searches import Controls
from tl_sparse.certificates.record import Settings
from tl_sparse.certificates.stable import Stability
from tl_sparse.certificates.sufficient import Sufficiency
from tl_sparse.errors import counted
from tl_sparse.evaluation import Backups, Interchange, Minimality, Necessity, Specificity


def pairs_used(section: str, measured: Any, settings: Settings) -> str:
    """Which numbers of a section are of fewer pairs than the certificate; "" if none are."""
    in_words = _IN_WORDS.get(section)
    return "" if in_words is None else in_words(measured, settings)


def _sufficiency(measured: Sufficiency, settings: Settings) -> str:
    fewer = []
    if measured.subsets.n_pairs < settings.n_pairs:
        fewer.append(f"the mean over subsets is of {counted(measured.subsets.n_pairs, 'pair')}")
    n_attacked = settings.effort.adversary_pairs
    if measured.attacks and n_attacked < settings.n_pairs:
        fewer.append(f"adversaries are measured on {counted(n_attacked, 'pair')}")
    if not fewer:
        return ""
    return f"All {settings.n_pairs:,} pairs are used, but {' and '.join(fewer)}."


def _necessity(measured: Necessity, settings: Settings) -> str:
    if measured.n_random_pairs >= settings.n_pairs:
        return ""
    return (
        f"All {settings.n_pairs:,} pairs are used, but random circuits, and in the last two tests "
        f"the circuit beside them, are measured on {counted(measured.n_random_pairs, 'pair')}."
    )


def _specificity(measured: Specificity, settings: Settings) -> str:
    if measured.n_pairs >= settings.n_pairs:
        return ""
    return f"Each task is measured on at most {counted(measured.n_pairs, 'pair')}."


def _one_number(measured: Interchange | Backups | Minimality, settings: Settings) -> str:
    if measured.n_pairs >= settings.n_pairs:
        return ""
    return f"Measured on {measured.n_pairs:,} of the {counted(settings.n_pairs, 'held-out pair')}."


def _searches(measured: Stability | Controls, settings: Settings) -> str:
    if measured.n_pairs >= settings.n_pairs:
        return ""
    return f"Every loss is measured on at most {counted(measured.n_pairs, 'pair')}."


#: Section → the function that says so, of the sections that may use fewer pairs.
_IN_WORDS: Mapping[str, Callable[[Any, Settings], str]] = {
    "sufficiency": _sufficiency,
    "interchange": _one_number,
    "necessity": _necessity,
    "backups": _one_number,
    "minimality": _one_number,
    "stability": _searches,
    "specificity": _specificity,
    "controls": _searches,
}
