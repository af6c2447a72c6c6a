"""A certificate: everything that was measured of one circuit, and what it decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_sparse.arguments import checked
from tl_sparse.certificates.control_searches import Controls
from tl_sparse.certificates.efforts import Effort
from tl_sparse.certificates.relatives import Relatives
from tl_sparse.certificates.stable import Stability
from tl_sparse.certificates.sufficient import Sufficiency
from tl_sparse.errors import CheckpointError, DataError
from tl_sparse.evaluation import (
    Backups,
    Inside,
    Interchange,
    Likeness,
    Minimality,
    Necessity,
    Specificity,
)
from tl_sparse.files import read_json
from tl_sparse.records import record_from

#: The folder of a certificate in that of its circuit, and its files there.
CERTIFICATE_FOLDER = "certificate"
CERTIFICATE_JSON = "certificate.json"
CERTIFICATE_TEXT = "certificate.txt"


@dataclass(frozen=True)
class Settings:
    """What the numbers of a certificate depend on.

    Attributes:
        model: the name of the model.
        task: the name of the task.
        seed: the seed of everything random.
        ablation: the values at which nodes are held where a section uses one ablation: those of the
            search that found the circuit.
        target_loss: the loss that the search had to reach, in nats; the paper's if the circuit
            records none.
        n_pairs: the number of held-out pairs.
        effort: how much is measured.
        contents: "circuit", "model", "pairs", "corpus", "family" → the hash of its contents, of
            those that there are.
    """

    model: str
    task: str
    seed: int
    ablation: str
    target_loss: float
    n_pairs: int
    effort: Effort
    contents: dict[str, str]


@dataclass(frozen=True)
class Criterion:
    """A criterion of the Mechanistic Validity catalogue (mechanistic-validity.github.io).

    Attributes:
        code: its code in the catalogue, such as "I2".
        name: its name.
        result: "met", "not met" or "not tested".
        numbers: the numbers that decided, in words; or why it is not tested.
        threshold: what had to hold, in words.
    """

    code: str
    name: str
    result: str
    numbers: str
    threshold: str


@dataclass(frozen=True)
class Certificate:
    """What was measured of a circuit, section by section, and what it decides.

    A section is None if it was left out, or is not measured yet.

    Attributes:
        settings: what the numbers depend on.
        n_nodes: the number of the circuit's nodes.
        n_edges: the number of the circuit's edges; None if they are not counted.
        n_candidates: the number of all nodes of the model.
        sufficiency: section 1, is the circuit alone enough?
        likeness: section 2, is it like the model, not only right?
        inside: section 3, do its nodes have the values of the model?
        interchange: section 4, do values from other prompts move it as they move the model?
        necessity: section 5a, does the model need it?
        backups: section 5b, which nodes take over when it is gone?
        relatives: section 5c, the circuit in the family of all circuits of its task; None if no
            family is given.
        minimality: section 6, is each part of it needed?
        stability: section 7, is it found again, and does it do the task in other contexts?
        specificity: section 8, do other tasks do without it?
        controls: section 9, what does the search find where there is nothing to find?
        verdict: criteria met, not met, and not tested; empty until all sections are finished.
        left_out: section → why it was left out.
        seconds: section → how long it took.
        versions: package → its version.
    """

    settings: Settings
    n_nodes: int
    n_edges: int | None
    n_candidates: int
    sufficiency: Sufficiency | None = None
    likeness: Likeness | None = None
    inside: Inside | None = None
    interchange: Interchange | None = None
    necessity: Necessity | None = None
    backups: Backups | None = None
    relatives: Relatives | None = None
    minimality: Minimality | None = None
    stability: Stability | None = None
    specificity: Specificity | None = None
    controls: Controls | None = None
    verdict: list[Criterion] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether all sections have been measured or left out."""
        return bool(self.verdict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Certificate":
        """The inverse of `dataclasses.asdict`.

        Raises:
            DataError: if an entry is missing or has the wrong type.
        """
        return record_from(cls, values)


@checked()
def read_certificate(path: str | Path) -> Certificate:
    """Read a certificate.

    Args:
        path: the file certificate.json, or the folder that holds it.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a certificate.
    """
    path = Path(path)
    if path.is_dir():
        path /= CERTIFICATE_JSON
    values = read_json(path)
    try:
        return Certificate.from_dict(values)
    except (DataError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, or not a certificate: {error}") from error
