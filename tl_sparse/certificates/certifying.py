"""Making a certificate, section by section, so that an interrupted one can be continued."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.arguments import checked
from tl_sparse.certificates.efforts import FULL, QUICK
from tl_sparse.certificates.record import (
    CERTIFICATE_JSON,
    CERTIFICATE_TEXT,
    Certificate,
    Settings,
    read_certificate,
)
from tl_sparse.certificates.relatives import Relatives, relatives_of
from tl_sparse.certificates.sections import SECTIONS, Section
from tl_sparse.certificates.subject import Subject, subject_of
from tl_sparse.certificates.text import certificate_text
from tl_sparse.certificates.verdicts import verdict
from tl_sparse.circuits import Circuit, hash_of_circuit, hash_of_model, hash_of_tensor
from tl_sparse.config import check
from tl_sparse.errors import CertificateError, TLSparseError
from tl_sparse.evaluation import check_measurable
from tl_sparse.files import write_json, write_text
from tl_sparse.hooks import TLModel
from tl_sparse.outputs import listing
from tl_sparse.records import check_finite
from tl_sparse.resuming import changed_settings, other_contents
from tl_sparse.tasks import Task

#: The packages whose versions can change numbers.
_PACKAGES = ("tl-sparse", "torch", "transformer-lens", "transformers")
#: Why a quick certificate has no stability and no controls.
QUICK_LEAVES_OUT = "a quick certificate leaves it out, because it searches for other circuits"


@checked("task", "corpus")
def certify(
    circuit: Circuit,
    model: TLModel,
    task: Task | str | None = None,
    *,
    corpus: Int[Tensor, "seq pos"] | None = None,
    family: str | Path | None = None,
    quick: bool = False,
    folder: str | Path | None = None,
    progress: bool = True,
    batch_size: int = 256,
    seed: int = 0,
) -> Certificate:
    """Measure whether a circuit is true: all sections, and what they decide.

    A section that cannot be measured is left out, and the certificate says why.

    Args:
        circuit: the circuit.
        model: its model.
        task: the task of the prompts; by default the circuit's own.
        corpus: tokens of the model's training distribution; by default the sample in the folder
            that the model was loaded from. Without either, section 2 has task prompts alone.
        family: the results of the search for all circuits of the task, family.json.
        quick: measure less, and leave out the sections that search for other circuits.
        folder: where to write certificate.json after each section, and certificate.txt at the end.
            If the folder has a part of the same certificate, it is continued. With None, nothing
            is written.
        progress: show a bar over the sections, with what is measured at the moment.
        batch_size: the largest number of prompts to run at a time. It changes nothing but rounding.
        seed: the seed of everything random.

    Raises:
        CircuitError: if the circuit is of another model, or has no means or no nodes.
        CircuitError, TaskError, DataError, TokenizerError: if there are no held-out pairs.
        CertificateError: if the folder holds the certificate of something else; the message names
            the difference. Also after Ctrl-C: finished sections are kept.
        CheckpointError: if certificate.json is damaged.
        ConfigError: for an impossible `batch_size`, or if `folder` holds anything else.
    """
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    check_measurable(circuit, model)
    subject = subject_of(circuit, model, task, corpus, QUICK if quick else FULL, batch_size, seed)
    relatives = None
    if family is not None:
        relatives = relatives_of(circuit, Path(family), subject.data.task)
    certificate = _empty(subject, relatives)
    place = None if folder is None else Path(folder)
    if place is not None:
        certificate = _begun(place, certificate)
    if certificate.is_finished:
        _write_text(certificate, place)  # it is missing if the process died just before
        return certificate
    bar = tqdm(_missing(certificate), "certifying", disable=not progress, unit=" sections")
    subject = replace(subject, tell=bar.set_postfix_str)
    try:
        for section in bar:
            bar.set_description(section.title, refresh=False)
            bar.set_postfix_str("")
            certificate = _with_section(certificate, section, subject)
            _save(certificate, place)
    except KeyboardInterrupt:
        raise CertificateError(_interrupted(certificate, place)) from None
    certificate = replace(certificate, verdict=verdict(certificate))
    _save(certificate, place)
    _write_text(certificate, place)
    return certificate


def _empty(subject: Subject, relatives: Relatives | None) -> Certificate:
    """The certificate before anything is measured."""
    circuit = subject.circuit
    contents = {
        "circuit": hash_of_circuit(circuit),
        "model": hash_of_model(subject.model),
        "pairs": hash_of_tensor(torch.cat([subject.data.tokens, subject.data.candidates], dim=1)),
    }
    if subject.whole_corpus is not None:
        contents["corpus"] = hash_of_tensor(subject.whole_corpus)
    if relatives is not None:
        described = json.dumps(asdict(relatives), sort_keys=True)
        contents["family"] = hashlib.sha256(described.encode()).hexdigest()
    return Certificate(
        relatives=relatives,
        settings=Settings(
            model=circuit.model_name,
            task=subject.data.task,
            seed=subject.seed,
            ablation=subject.ablation,
            target_loss=subject.target_loss,
            n_pairs=subject.data.n_pairs,
            effort=subject.effort,
            contents=contents,
        ),
        n_nodes=circuit.n_nodes,
        n_edges=circuit.n_edges(subject.model),
        n_candidates=circuit.n_candidates,
        versions={name: version(name) for name in _PACKAGES},
    )


def _missing(certificate: Certificate) -> list[Section]:
    """The sections that are not yet measured or left out."""
    missing = []
    for section in SECTIONS:
        is_measured = getattr(certificate, section.name) is not None
        if not is_measured and section.name not in certificate.left_out:
            missing.append(section)
    return missing


def _with_section(certificate: Certificate, section: Section, subject: Subject) -> Certificate:
    """The certificate with one more section or, where that is impossible, with the reason."""
    started = time.perf_counter()
    if section.searches and not subject.effort.searches:
        left_out = certificate.left_out | {section.name: QUICK_LEAVES_OUT}
        return replace(certificate, left_out=left_out)
    try:
        measured = section.measure(subject)
        check_finite(asdict(measured))
    except TLSparseError as error:
        left_out = certificate.left_out | {section.name: str(error)}
        return replace(certificate, left_out=left_out)
    seconds = certificate.seconds | {section.name: time.perf_counter() - started}
    return replace(certificate, **{section.name: measured}, seconds=seconds)


# --- the folder


def _begun(folder: Path, empty: Certificate) -> Certificate:
    """The certificate that a folder holds, or an empty one if the folder has none.

    Raises:
        CertificateError: if it is of something else.
        ConfigError: if the folder holds anything else.
    """
    path = folder / CERTIFICATE_JSON
    is_file = folder.exists() and not folder.is_dir()
    check(not is_file, "folder", str(folder), "a folder; this is a file")
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            found = listing(folder)
            expected = f"a new folder, or one with a certificate; this one holds {found}"
            check(False, "folder", str(folder), expected)
        return empty
    begun = read_certificate(path)
    before, now = asdict(begun.settings), asdict(empty.settings)
    others = _other_contents(before.pop("contents"), now.pop("contents"))
    before |= {"packages": begun.versions}
    now |= {"packages": empty.versions}
    changes = [*changed_settings(before, now), *others]
    if changes:
        raise CertificateError(
            f"{path} was made with {'; '.join(changes)}. Continue with those, or give another "
            "folder"
        )
    return begun


def _other_contents(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What the certificate was made with that is not the same now: a corpus or a family can also
    have been there before, or be there now, alone.
    """
    changes = other_contents(before, now)
    changes += [f"a {name}" for name in before if name not in now]
    changes += [f"no {name}" for name in now if name not in before]
    return changes


def _save(certificate: Certificate, folder: Path | None) -> None:
    if folder is not None:
        write_json(folder / CERTIFICATE_JSON, asdict(certificate))


def _write_text(certificate: Certificate, folder: Path | None) -> None:
    if folder is not None:
        write_text(folder / CERTIFICATE_TEXT, certificate_text(certificate) + "\n")


def _interrupted(certificate: Certificate, folder: Path | None) -> str:
    n_missing = len(_missing(certificate))
    finished = f"{len(SECTIONS) - n_missing} of {len(SECTIONS)} sections are finished"
    if folder is None:
        return f"interrupted; {finished}, and nothing is kept, because no folder was given"
    return f"interrupted; {finished} and kept in {folder}, and the same call continues from there"
