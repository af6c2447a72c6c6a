"""Making a certificate: what it holds, and how an interrupted one is continued."""

import dataclasses
import json
import re
from dataclasses import replace
from functools import partial

import pytest

from micro import MICRO_TASK, micro_circuit, micro_corpus, micro_model
from tl_sparse.certificates import certifying, sufficient
from tl_sparse.certificates.again import Found
from tl_sparse.certificates.certifying import certify
from tl_sparse.certificates.control_searches import Controls
from tl_sparse.certificates.efforts import QUICK, Effort
from tl_sparse.certificates.record import Certificate, read_certificate
from tl_sparse.certificates.sections import SECTIONS
from tl_sparse.certificates.stable import InContext, SearchedAgain, Stability
from tl_sparse.certificates.text import certificate_text, section_texts, verdict_text
from tl_sparse.certificates.verdicts import verdict
from tl_sparse.errors import (
    CertificateError,
    CheckpointError,
    CircuitError,
    ConfigError,
    TokenizerError,
)
from tl_sparse.evaluation import AgainstRandom, Estimate, PValue
from tl_sparse.evaluation.patterns import HeadAttention
from tl_sparse.evaluation.significance import sign_test
from tl_sparse.tasks.pairs import Pair
from tl_sparse.tasks.task import Task

pytestmark = pytest.mark.any_line

#: Enough for the micro model, in which all prompts are alike.
TINY = replace(
    QUICK,
    pairs=16,
    subsets=4,
    subset_pairs=4,
    adversary_steps=3,
    budgets=[1],
    corpus_rows=4,
    interchange_pairs=4,
    tested_circuits=30,
    tested_pairs=2,
    part_pairs=8,
    random_parts=4,
    backup_candidates=2,
)
NAMES = [section.name for section in SECTIONS]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(certifying, "QUICK", TINY)


@pytest.fixture(scope="module")
def model():
    return micro_model()


@pytest.fixture(scope="module")
def circuit(model):
    return micro_circuit(model)


def certified(circuit, model, **options):
    given = {"task": MICRO_TASK, "corpus": micro_corpus(), "quick": True, "progress": False}
    return certify(circuit, model, **(given | options))


@pytest.fixture(scope="module")
def certificate(circuit, model, tmp_path_factory):
    """The certificate of the circuit on paper, and its folder."""
    folder = tmp_path_factory.mktemp("certificate") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "QUICK", TINY)
        return certified(circuit, model, folder=folder), folder


def results_of(certificate):
    return {criterion.code: criterion.result for criterion in certificate.verdict}


def test_the_circuit_on_paper_meets_what_can_be_told(certificate):
    made, _ = certificate
    results = results_of(made)
    # It is all of the model that computes, so nothing outside can break or replace it.
    for code in ("C1", "C4", "I1", "I2", "I4", "M1"):
        assert results[code] == "met", code
    # The micro tokenizer knows no word of the other tasks, and one node is as important as another.
    assert results["C3"] == "not tested"
    assert results["E1"] == "not tested"
    assert results["C5"] == "not tested"
    # With one node at each hook point, random circuits often are the circuit.
    assert results["M3"] == "not met"


def test_sections_measure_what_is_known_on_paper(certificate):
    made, _ = certificate
    assert made.sufficiency.alone == made.sufficiency.evaluation.circuit
    assert made.sufficiency.alone.loss == pytest.approx(made.sufficiency.evaluation.full.loss)
    assert [each.adversary.budget for each in made.sufficiency.attacks] == [1, None]
    assert made.necessity.mean.told_apart.value == pytest.approx(0.5)
    assert made.inside.summary.share == 1.0
    assert made.minimality.indistinct == []


def test_a_certificate_is_read_back_as_it_was(certificate):
    made, folder = certificate
    assert read_certificate(folder) == made
    assert read_certificate(folder / "certificate.json") == made
    assert Certificate.from_dict(json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_the_text_has_every_section_and_is_in_the_folder(certificate):
    made, folder = certificate
    text = certificate_text(made)
    assert (folder / "certificate.txt").read_text() == text + "\n"
    numbers = re.findall(r"^(\w+)\. .*\n-+$", text, re.MULTILINE)
    assert numbers == ["1", "2", "3", "4", "5a", "5b", "5c", "6", "7", "8", "9"]
    assert text.index("\nVerdict\n") < text.index("\n1. ")
    assert "rests on errors" not in text


def test_the_verdict_fits_a_terminal_of_100_columns(certificate):
    made, _ = certificate
    long = replace(made.verdict[0], numbers="; ".join(["subset 0.405"] * 20))
    text = str(verdict_text(replace(made, verdict=[long, *made.verdict[1:]])))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("0.405") == 20
    assert " ".join(made.verdict[-2].threshold.split()) in " ".join(text.split())


def test_sections_say_on_how_many_pairs_they_are_measured(certificate):
    made, _ = certificate
    text = {each.title[:2]: " ".join(each.body.split()) for each in section_texts(made)}
    assert "the mean over subsets is of 4 pairs." in text["1."]
    assert "in the last two tests the circuit beside them, are measured on 2 pairs." in text["5a"]
    assert text["4."].startswith("Measured on 4 of the 16 held-out pairs.")
    assert text["5b"].startswith("Measured on 8 of the 16 held-out pairs.")
    assert text["6."].startswith("Measured on 8 of the 16 held-out pairs.")
    # These are measured on all.
    assert "pairs are used" not in text["2."] + text["3."]
    assert "of the 16" not in text["2."] + text["3."]


def test_tables_say_what_their_numbers_are(certificate):
    made, _ = certificate
    text = {each.title[:2]: " ".join(each.body.split()) for each in section_texts(made)}
    assert "in the model: 1 is best. The normalised error is 0 at best" in text["3."]
    assert "Changes of the logit difference, right answer minus wrong" in text["4."]
    assert "Chance is 50%" in text["5a"]
    assert "A node takes over only if the model can then still do some of the task." in text["5b"]


def test_a_model_that_leans_to_the_wrong_answers_needs_its_circuit(certificate):
    """It no longer does the task, so fewer pairs told apart than by chance are no failure."""
    made, _ = certificate
    without = replace(made.necessity.mean, told_apart=Estimate(0.1, 0.03))
    leaning = replace(made, necessity=replace(made.necessity, mean=without))
    (criterion,) = [each for each in verdict(leaning) if each.code == "I1"]
    assert criterion.result == "met"
    assert "with less the rest leans to the wrong answers" in criterion.threshold


def test_of_few_pairs_nobody_can_say_that_others_know_the_answer(certificate):
    """62 % of eight pairs are no more than chance; of 400, they are."""
    made, _ = certificate
    seems = replace(made.necessity.mean, told_apart=Estimate(0.62, 0.1))
    for n_told_apart, n_pairs, result in ((5, 8, "not tested"), (248, 400, "not met")):
        without = replace(seems, p_knows_nothing=sign_test(n_told_apart, n_pairs, "pairs"))
        changed = replace(made, necessity=replace(made.necessity, mean=without))
        (criterion,) = [each for each in verdict(changed) if each.code == "I1"]
        assert criterion.result == result
        said = " ".join(certificate_text(changed).split())
        assert ("other parts know the answer" in said) == (result == "not met")


def test_reliability_is_that_of_the_ablation_of_the_search(certificate):
    made, _ = certificate
    zero = replace(made.sufficiency.evaluation.zero, standard_error=0.5)
    evaluation = replace(made.sufficiency.evaluation, zero=zero)
    for ablation, result in (("mean", "met"), ("zero", "not met")):
        measured = replace(made.sufficiency, evaluation=evaluation, ablation=ablation)
        (criterion,) = [
            each for each in verdict(replace(made, sufficiency=measured)) if each.code == "M1"
        ]
        assert criterion.result == result


def test_a_worst_subset_just_above_the_rest_is_no_error_that_cancels(certificate):
    made, _ = certificate
    for alone, says_so in ((0.195, False), (0.05, True)):
        score = replace(made.sufficiency.evaluation.circuit, loss=alone)
        worst = replace(made.sufficiency.subsets.worst, loss=0.205)
        measured = replace(
            made.sufficiency,
            evaluation=replace(made.sufficiency.evaluation, circuit=score),
            subsets=replace(made.sufficiency.subsets, worst=worst),
        )
        text = certificate_text(replace(made, sufficiency=measured))
        assert ("rests on errors that cancel" in " ".join(text.split())) == says_so


def test_adversaries_have_seeds_that_searches_do_not(circuit, model, monkeypatch):
    """With its seed n, a robust search trains adversaries of the seeds n, n + 1, …"""
    seeds = []
    real = sufficient.adversary_score

    def spy(*arguments):
        seeds.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(sufficient, "adversary_score", spy)
    monkeypatch.setattr(certifying, "SECTIONS", SECTIONS[:1])
    certified(circuit, model)
    assert len(seeds) == 2
    assert min(seeds) > 2**32


def test_heads_that_are_alike_are_not_held_against_the_circuit(certificate):
    made, _ = certificate
    even = HeadAttention(
        layer=0,
        head=2,
        locations=["attn_v"],
        distance=Estimate(0.0),
        model_to_uniform=Estimate(0.0),
        circuit_to_uniform=Estimate(0.0),
        model_spread=0.0,
        circuit_spread=0.0,
        remark="spreads its attention evenly over all tokens, in the model and under the circuit",
    )
    alike = replace(made, inside=replace(made.inside, heads=[even]))
    assert "head 2" not in certificate_text(alike)
    otherwise = replace(even, circuit_to_uniform=Estimate(0.5), circuit_spread=0.5)
    unlike = replace(made, inside=replace(made.inside, heads=[otherwise]))
    assert "No: head 2 of layer 0 spreads its attention" in certificate_text(unlike)


def test_the_bar_names_the_section_and_its_longest_step(circuit, model, monkeypatch, capsys):
    monkeypatch.setattr(certifying, "SECTIONS", SECTIONS[:1])
    certified(circuit, model, progress=True)
    shown = capsys.readouterr().err
    assert "1 sufficient?: " in shown
    assert " sections" in shown
    assert "adversary with at most 1 node" in shown


def test_a_finished_certificate_is_not_measured_again(circuit, model, certificate, monkeypatch):
    made, folder = certificate
    fail_at(monkeypatch, NAMES[0], AssertionError("it is measured again"))
    text = (folder / "certificate.txt").read_text()
    (folder / "certificate.txt").unlink()  # as if the process had died before it was written
    assert certified(circuit, model, folder=folder) == made
    assert (folder / "certificate.txt").read_text() == text


# --- interrupted, continued, refused


def fail_at(monkeypatch, name, error, made=None):
    """Sections that return those of the certificate `made` at once, and of which one fails."""

    def measure(subject, section):
        if section == name:
            raise error
        return getattr(made, section)

    sections = []
    for section in SECTIONS:
        stand_in = partial(measure, section=section.name)
        sections.append(replace(section, measure=stand_in))
    monkeypatch.setattr(certifying, "SECTIONS", tuple(sections))


def test_an_interrupted_certificate_is_continued(
    circuit, model, certificate, monkeypatch, tmp_path
):
    made, _ = certificate
    with monkeypatch.context() as patch:
        fail_at(patch, "inside", KeyboardInterrupt(), made)
        with pytest.raises(CertificateError, match="2 of 10 sections are finished and kept in"):
            certified(circuit, model, folder=tmp_path)
    kept = read_certificate(tmp_path)
    assert kept.likeness is not None
    assert kept.inside is None
    assert not kept.is_finished
    assert "not finished" in certificate_text(kept)
    fail_at(monkeypatch, "sufficiency", AssertionError("it is measured again"), made)
    continued = certified(circuit, model, folder=tmp_path)
    assert continued.sufficiency == kept.sufficiency
    assert continued.verdict == made.verdict


def test_without_a_folder_an_interruption_says_that_nothing_is_kept(circuit, model, monkeypatch):
    fail_at(monkeypatch, "sufficiency", KeyboardInterrupt())
    with pytest.raises(CertificateError, match="nothing is kept, because no folder was given"):
        certified(circuit, model)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 1}, "seed = 0, now 1"),
        ({"corpus": micro_corpus()[1:]}, "other contents of the corpus"),
        ({"corpus": micro_corpus()[:-1]}, "other contents of the corpus"),  # the last rows count
        ({"corpus": None}, "a corpus"),
        ({"task": replace(MICRO_TASK, name="other")}, "task = 'micro', now 'other'"),
    ],
    ids=["seed", "corpus", "fewer rows", "no corpus", "task"],
)
def test_another_certificate_in_the_folder_is_refused(
    circuit, model, certificate, options, difference
):
    _, folder = certificate
    with pytest.raises(CertificateError, match=difference):
        certified(circuit, model, folder=folder, **options)


def test_another_circuit_and_other_efforts_are_refused(circuit, model, certificate, monkeypatch):
    _, folder = certificate
    kept = dict(circuit.kept)
    name = next(iter(kept))
    kept[name] = kept[name].clone()
    kept[name][1] = True
    with pytest.raises(CertificateError, match="other contents of the circuit"):
        certified(replace(circuit, kept=kept), model, folder=folder)
    monkeypatch.setattr(certifying, "QUICK", replace(TINY, subsets=5))
    with pytest.raises(CertificateError, match="subsets"):
        certified(circuit, model, folder=folder)


def test_a_folder_of_something_else_is_refused(circuit, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"this one holds notes\.txt"):
        certified(circuit, model, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"folder = .*; it must be a folder; this is a file"):
        certified(circuit, model, folder=tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values.pop("settings"), "'settings' is missing"),
        (lambda values: values.update(n_nodes="many"), "'n_nodes' is 'many'"),
        (lambda values: values["settings"]["effort"].update(pairs=0), "pairs = 0"),
    ],
    ids=["missing", "wrong type", "impossible"],
)
def test_a_damaged_certificate_is_named(circuit, model, certificate, tmp_path, change, expected):
    made, _ = certificate
    values = dataclasses.asdict(made)
    change(values)
    (tmp_path / "certificate.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=expected):
        certified(circuit, model, folder=tmp_path)
    (tmp_path / "certificate.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"certificate\.json is not valid JSON"):
        read_certificate(tmp_path)


# --- bad input


def test_circuits_that_cannot_be_measured_are_refused(circuit, model):
    nothing = {name: mask & False for name, mask in circuit.kept.items()}
    with pytest.raises(CircuitError, match="no nodes"):
        certified(replace(circuit, kept=nothing), model)
    with pytest.raises(CircuitError, match="no means"):
        certified(replace(circuit, means={}), model)
    other = micro_model()
    other.blocks[0].attn.W_V.data *= 2
    with pytest.raises(CircuitError, match="belongs to the model 'micro'"):
        certified(circuit, other)


def test_a_task_of_few_prompts_is_measured_as_far_as_that_goes(circuit, model):
    pairs = [Pair(f"f{i} f1 A f2 end", f"f{i} f1 B f2 end", " yes", " no") for i in range(3)]
    task = Task("few", "few", (" yes", " no"), lambda rng: rng.choice(pairs).prompts)
    made = certified(circuit, model, task=task)
    assert "task few has 3 pairs of distinct prompts" in made.sufficiency.no_attacks
    assert made.necessity.p_equivalent.value is None
    text = certificate_text(made)
    assert "No adversaries: task few has 3 pairs" in text
    assert "3 pairs: too few for a test" in text
    assert results_of(made)["I2"] == "met"
    assert results_of(made)["C1"] == "not tested"
    # That a part cannot be tested is no finding against it.
    assert results_of(made)["C4"] == "not tested"
    assert "too few pairs to test the parts: 3" in " ".join(text.split())
    assert "cannot be told from noise" not in text


def test_a_task_without_prompts_is_an_error(circuit, model):
    task = Task("none", "none", (" yes", " no"), MICRO_TASK.sample)
    with pytest.raises(TokenizerError, match="not two different single tokens"):
        certified(circuit, model, task=replace(task, candidates=(" nonsense", " no")))


def test_efforts_are_checked():
    with pytest.raises(ConfigError, match="subsets = 0 is not possible"):
        Effort(subsets=0)
    with pytest.raises(ConfigError, match="budgets"):
        Effort(budgets=[0])


# --- sections that search for other circuits


def found(n_nodes, n_edges, loss):
    return Found(Estimate(0.01), n_nodes, n_edges, Estimate(loss), Estimate(loss), Estimate(0.7))


def test_a_quick_certificate_leaves_out_what_searches(certificate):
    made, _ = certificate
    for name in ("stability", "controls"):
        assert "a quick certificate leaves it out" in made.left_out[name]
    numbers = {criterion.code: criterion.numbers for criterion in made.verdict}
    assert numbers["M3"].endswith("; controls were not run")
    assert numbers["I4"].endswith("; unseen contexts were not tried")


def test_a_circuit_that_no_search_found_has_no_controls(circuit, model, monkeypatch):
    searches = [section for section in SECTIONS if section.searches]
    monkeypatch.setattr(certifying, "SECTIONS", searches)
    made = certified(circuit, model, quick=False)
    assert made.left_out.keys() == {"stability", "controls"}


@pytest.mark.parametrize(
    ("n_nodes", "loss", "overlap", "results"),
    [
        (9, 0.1, 0.6, {"C5": "met", "I4": "met", "M3": "met"}),
        (4, 0.3, 0.4, {"C5": "not met", "I4": "not met", "M3": "not met"}),
    ],
)
def test_searches_decide_by_overlap_contexts_and_sizes(
    certificate, n_nodes, loss, overlap, results
):
    """Controls of four nodes are too near to the circuit's three, an overlap of 0.4 too small."""
    made, _ = certificate
    estimate = Estimate(loss, 0.01)
    context = InContext(*[estimate] * 6, model_can=True, n_pairs=8)
    again = SearchedAgain(1, found(3, 2, 0.1), overlap, withstands=True)
    stability = Stability(
        first=found(3, 2, 0.1),
        seeds=[again],
        samples=[again],
        loss_interval=[0.1, 0.2],
        fresh_losses=[estimate],
        contexts={"names": context},
        left_out={},
        target_loss=0.15,
        n_pairs=8,
        n_subsets=4,
    )
    nothing = Found(Estimate(0.7), not_found="every size fails")
    controls = Controls(
        found(3, 2, 0.1),
        {"nonsense": found(n_nodes, 9, 0.1), "permuted": nothing},
        {"shuffled": "too few pairs"},
        target_loss=0.15,
        n_pairs=8,
        n_subsets=4,
        max_nodes=30,
    )
    better = AgainstRandom(0.0, PValue(0.01, 30, "random circuits"))
    necessity = replace(made.necessity, sufficiency=better, partial_necessity=better)
    searched = replace(made, stability=stability, controls=controls, necessity=necessity)
    searched = replace(searched, verdict=verdict(searched))
    decided = results_of(searched)
    assert {code: decided[code] for code in results} == results
    assert Certificate.from_dict(json.loads(json.dumps(dataclasses.asdict(searched)))) == searched
    text = " ".join(certificate_text(searched).split())
    assert "Permuted weights: none of at most 30 nodes (every size fails)." in text
    assert "permuted: none of at most 30 nodes" in text
    assert "Left out: shuffled: too few pairs." in text
    assert "controls were not run" not in text
    assert "unseen contexts were not tried" not in text
    assert "7. Is it stable? ---------------- Every loss is measured on at most 8 pairs." in text
    # What was not tried does not count as met.
    stability = replace(stability, samples=[], contexts={})
    controls = replace(controls, searches={})
    less = replace(searched, stability=stability, controls=controls)
    less = replace(less, verdict=verdict(less))
    assert results_of(less)["C5"] == ("not tested" if overlap == 0.6 else "not met")
    numbers = {criterion.code: criterion.numbers for criterion in less.verdict}
    assert numbers["C5"].endswith("; no other pairs")
    assert numbers["I4"].endswith("; there are no unseen contexts in which the model can do it")
    assert numbers["M3"].endswith("; no control is possible")
