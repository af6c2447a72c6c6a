"""The certificate of a circuit as its page shows it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tl_sparse.certificates import (
    CERTIFICATE_FOLDER,
    CERTIFICATE_JSON,
    Certificate,
    read_certificate,
    section_texts,
)
from tl_sparse.circuits import Circuit, hash_of_circuit
from tl_sparse.errors import CircuitError, counted, warn_user


def certificate_to_show(
    circuit: Circuit, certificate: Certificate | str | Path | None, source: str
) -> dict[str, Any] | None:
    """The verdict and the sections of a certificate as JSON values; None if there is none.

    Args:
        circuit: the circuit of the page.
        certificate: its certificate, or the file; None means the one in the circuit's folder.
        source: the folder or repository of the circuit.

    Raises:
        CheckpointError: if the given file is missing or damaged.
        CircuitError: if the given certificate is of another circuit.
    """
    if certificate is None:
        found = Path(source, CERTIFICATE_FOLDER, CERTIFICATE_JSON)
        if not source or not found.is_file():
            return None
        certificate = read_certificate(found)
        if not _belongs(certificate, circuit):
            warn_user(f"the page has no certificate: {found} is of another circuit")
            return None
    if not isinstance(certificate, Certificate):
        certificate = read_certificate(certificate)
    if not _belongs(certificate, circuit):
        raise CircuitError("the given certificate is of another circuit; `certify` makes a new one")
    sections = []
    for section in section_texts(certificate):
        sections.append({"title": section.title, "text": section.body})
    n_pairs = counted(certificate.settings.n_pairs, "held-out pair")
    state = "" if certificate.is_finished else " It is not finished, so there is no verdict yet."
    return {
        "about": f"Measured on {n_pairs}; ± is one standard error. No single score.{state}",
        "verdict": [asdict(criterion) for criterion in certificate.verdict],
        "sections": sections,
    }


def _belongs(certificate: Certificate, circuit: Circuit) -> bool:
    return certificate.settings.contents.get("circuit") == hash_of_circuit(circuit)
