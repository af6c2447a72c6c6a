"""`tl-sparse certify`, and the family beside a certificate."""

import dataclasses
import json

import pytest

from micro import MICRO_TASK, micro_circuit, micro_corpus, micro_model, save_micro, save_pairs
from tl_sparse.certificates import certifying
from tl_sparse.certificates.certifying import certify
from tl_sparse.certificates.record import read_certificate
from tl_sparse.certificates.text import certificate_text
from tl_sparse.cli import main
from tl_sparse.errors import CertificateError, CheckpointError, DataError
from tl_sparse.evaluation.kinship import Family, FamilyRound

pytestmark = pytest.mark.any_line

FAMILY = dataclasses.asdict(
    Family(
        model="micro",
        task="micro",
        seeds=[0],
        target_loss=0.15,
        n_model_nodes=24,
        rounds=[FamilyRound(number, [], [], []) for number in range(2)],
        ending="exhausted",
        core=["0.attn_out 2", "0.attn_in 3"],
        core_candidates=[],
        needed_later=[],
        occurrences={},
        overlap_within=0.8,
        overlap_between=0.25,
        overlap_by_chance=None,
        relatedness=None,
        backups=None,
        backups_in_later=[],
        backups_by_chance=None,
    )
)


@pytest.fixture(autouse=True)
def no_sections(monkeypatch):
    monkeypatch.setattr(certifying, "SECTIONS", ())


@pytest.fixture
def places(tmp_path):
    save_micro(tmp_path / "model")
    micro_circuit(micro_model()).save(tmp_path / "circuit")
    task = save_pairs(tmp_path / "micro.jsonl")
    return [str(tmp_path / "circuit"), "--model", str(tmp_path / "model"), "--task", task]


def test_the_command_prints_the_text_and_writes_beside_the_circuit(places, tmp_path, capsys):
    assert main(["certify", *places, "--quick", "--quiet"]) == 0
    folder = tmp_path / "circuit" / "certificate"
    printed = capsys.readouterr().out
    assert printed == (folder / "certificate.txt").read_text()
    assert printed == certificate_text(read_certificate(folder)) + "\n"
    assert main(["certify", *places, "--quick", "--seed", "1", "-q"]) == 1
    assert "seed = 0, now 1" in capsys.readouterr().err


def test_a_circuit_that_is_not_in_a_folder_needs_one_for_its_certificate(capsys):
    assert main(["certify", "user/circuit"]) == 1
    assert "give it with --out FOLDER" in capsys.readouterr().err


def certified(family, folder=None):
    model = micro_model()
    options = {"corpus": micro_corpus(), "quick": True, "progress": False, "folder": folder}
    return certify(micro_circuit(model), model, MICRO_TASK, family=family, **options)


def test_the_family_stands_beside_the_circuit(tmp_path):
    path = tmp_path / "family.json"
    path.write_text(json.dumps(FAMILY))
    made = certified(path)
    assert made.relatives.core_in_circuit == ["0.attn_out 2"]
    text = " ".join(certificate_text(made).split())
    assert "2 nodes are needed by every circuit; 1 of them" in text


def test_a_family_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "family.json"
    path.write_text(json.dumps(FAMILY | {"task": "other"}))
    with pytest.raises(DataError, match="the family of the task 'other', not of 'micro'"):
        certified(path)
    path.write_text(json.dumps({name: FAMILY[name] for name in FAMILY if name != "rounds"}))
    with pytest.raises(CheckpointError, match="damaged, or not a family: 'rounds' is missing"):
        certified(path)
    with pytest.raises(CheckpointError, match="there is no file"):
        certified(tmp_path / "none.json")
    path.write_text(json.dumps(FAMILY | {"n_model_nodes": 28}))
    with pytest.raises(DataError, match="a model of 28 nodes; the circuit's model has 24"):
        certified(path)


def test_a_family_that_comes_later_is_not_ignored(tmp_path):
    path = tmp_path / "family.json"
    path.write_text(json.dumps(FAMILY))
    without, with_family = tmp_path / "without", tmp_path / "with"
    certified(None, folder=without)
    with pytest.raises(CertificateError, match="was made with no family"):
        certified(path, folder=without)
    certified(path, folder=with_family)
    with pytest.raises(CertificateError, match="was made with a family"):
        certified(None, folder=with_family)
