"""A certificate as text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tl_sparse.arguments import checked
from tl_sparse.certificates import behaviour, belonging, searching
from tl_sparse.certificates.findings import findings
from tl_sparse.certificates.layout import SectionText, paragraph, table_of_words
from tl_sparse.certificates.pairs_used import pairs_used
from tl_sparse.certificates.record import Certificate
from tl_sparse.errors import counted
from tl_sparse.parsing import printable


@dataclass(frozen=True)
class _Writer:
    """How a section is written.

    Attributes:
        name: the field of the certificate.
        title: its number and its question.
        parts: the function that writes the tables and paragraphs of the section's record.
    """

    name: str
    title: str
    parts: Callable[[Any], list[str]]


_WRITERS = (
    _Writer(
        "sufficiency", "1. Is it sufficient, whatever the rest does?", behaviour.sufficiency_text
    ),
    _Writer("likeness", "2. Is it like the model, not only right?", behaviour.likeness_text),
    _Writer("inside", "3. Is it like the model inside?", behaviour.inside_text),
    _Writer("interchange", "4. Do other values move it as the model?", behaviour.interchange_text),
    _Writer("necessity", "5a. Is it necessary?", belonging.necessity_text),
    _Writer("backups", "5b. Backups", belonging.backups_text),
    _Writer("relatives", "5c. The family of all circuits", belonging.relatives_text),
    _Writer("minimality", "6. Is each part needed?", belonging.minimality_text),
    _Writer("stability", "7. Is it stable?", searching.stability_text),
    _Writer("specificity", "8. Is it specific?", belonging.specificity_text),
    _Writer("controls", "9. Controls", searching.controls_text),
)


_NOT_YET = "not measured yet"
_MISSING = {"relatives": "no family was given (`tl-sparse family` searches for all circuits)"}


@checked()
def certificate_text(certificate: Certificate) -> str:
    """A certificate as text, in which every number has its error and its baseline beside it."""
    sections = [_head(certificate), str(verdict_text(certificate))]
    sections += map(str, section_texts(certificate))
    sections.append(_foot(certificate))
    return "\n\n".join(sections)


@checked()
def section_texts(certificate: Certificate) -> list[SectionText]:
    """The text of each section from 1 to 9, with what was found against the circuit on top."""
    against = findings(certificate)
    texts = []
    for writer in _WRITERS:
        measured = getattr(certificate, writer.name)
        if measured is None:
            reason = certificate.left_out.get(writer.name, _MISSING.get(writer.name, _NOT_YET))
            texts.append(SectionText(writer.title, [paragraph(f"Left out: {printable(reason)}")]))
            continue
        parts = writer.parts(measured)
        found = [_against(sentence) for sentence in against.get(writer.name, [])]
        on_pairs = paragraph(pairs_used(writer.name, measured, certificate.settings))
        texts.append(SectionText(writer.title, ["\n".join(found), on_pairs, *parts]))
    return texts


def verdict_text(certificate: Certificate) -> SectionText:
    """The verdict, which stands on top."""
    rows = []
    for criterion in certificate.verdict:
        rows.append([f"{criterion.code} {criterion.name}", criterion.result, criterion.numbers])
    thresholds = [[each.code, each.threshold] for each in certificate.verdict]
    about = paragraph(
        "The criteria are those of the Mechanistic Validity catalogue to which these measurements "
        "speak. There is no single score."
    )
    criteria = table_of_words(["criterion", "", "numbers"], rows)
    parts = [criteria, table_of_words(["", "met if"], thresholds), about]
    if not certificate.is_finished:
        parts = [paragraph("The certificate is not finished, so there is no verdict yet.")]
    return SectionText("Verdict", parts)


def _head(certificate: Certificate) -> str:
    settings = certificate.settings
    title = f"Certificate: {printable(settings.task)} in {printable(settings.model)}"
    size = f"{counted(certificate.n_nodes, 'node')} of {certificate.n_candidates:,}"
    if certificate.n_edges is not None:
        size += f", {counted(certificate.n_edges, 'edge')}"
    about = paragraph(
        f"{size}. Measured on {counted(settings.n_pairs, 'held-out pair')}; where a section uses "
        f"one ablation, it is {settings.ablation}, that of the search. Losses are cross-entropies "
        "between the two answers in nats: 0.693 is chance. ± is one standard error. Lines that "
        "begin with 'No:' say what was found against the circuit."
    )
    return f"{title}\n{'=' * len(title)}\n\n{about}"


def _against(sentence: str) -> str:
    """A finding against the circuit, as the answer to the question of its section."""
    return paragraph(f"No: {sentence[0].lower()}{sentence[1:]}")


def _foot(certificate: Certificate) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in certificate.versions.items())
    seconds = sum(certificate.seconds.values())
    return paragraph(f"Made in {seconds:.0f} s with {versions}; seed {certificate.settings.seed}.")
