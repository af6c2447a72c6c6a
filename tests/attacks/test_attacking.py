"""Attacks on models that are worked out on paper, and on a counter of brackets that averages."""

import dataclasses
import json
import math

import pytest
import torch

import tl_sparse
from helpers import circuit_means
from micro import AGAINST_YES, MICRO_TASK, W_O, W_U, W_V, diluting_model, micro_circuit, save_pairs
from tl_sparse import checksums
from tl_sparse.attacks import Attack, attack, attack_text
from tl_sparse.attacks.questions import BY_DECLARATION
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.families import node_hooks
from tl_sparse.circuits.fingerprints import fingerprint
from tl_sparse.errors import (
    CheckpointError,
    CircuitError,
    ConfigError,
    DataError,
    TaskError,
    UnsupportedError,
)

NEUTRAL = [" f1", " f2", " f3 f4"]
QUICK = {"n_prompts": 400, "n_test": 8, "progress": False}


def attacked(model, **options):
    return attack(micro_circuit(model), model, MICRO_TASK, **(QUICK | options))


@pytest.fixture(scope="module")
def diluted():
    """The attack on a model that is its own circuit."""
    return attacked(diluting_model(), neutral=NEUTRAL)


def in_one_line(found):
    return " ".join(attack_text(found).split())


def difference(n_tokens):
    """Logit(yes) - logit(no) after A, on paper."""
    written = 2 * W_V * W_O / n_tokens
    return (2 * W_U * written - AGAINST_YES) / math.sqrt((1 + written**2) / 4)


def test_neutral_text_dilutes_the_average_from_twelve_tokens_on(diluted):
    assert diluted.families
    for family in diluted.families:
        assert family.right == " yes"  # after B the answer is always right
        assert family.known_by == BY_DECLARATION
        assert (family.unchanged.n_tokens, family.unchanged.program_errs.value) == (6, 0)
        n_inserted = len(family.text.split())
        assert [each.strength for each in family.trials] == [1, 2, 4, 8, 16, 32][
            : len(family.trials)
        ]
        for trial in family.trials:
            n_tokens = 6 + trial.strength * n_inserted
            errs = float(n_tokens >= 12)
            assert trial.n_tokens == n_tokens
            assert trial.program_errs.value == trial.model_errs.value == errs
            assert trial.program_difference.value == pytest.approx(difference(n_tokens), abs=1e-5)
            assert trial.random.n_tokens == pytest.approx(n_tokens, abs=1)
        assert family.trials[-1].n_held == family.trials[-1].n_predicted == 8
        assert family.trials[-1].holds.value == 1
    assert {family.place for family in diluted.families} == {
        "after the cue",
        "before the cue",
        "before the last word or sign",
    }


def test_examples_have_the_inserted_text_and_err(diluted):
    for family in diluted.families:
        for example in family.examples:
            assert (example.right, example.wrong) == (" yes", " no")
            assert family.text * example.strength in example.prompt
            assert example.program_difference <= 0
            assert len(example.prompt.split()) + 1 >= 12


def test_the_prediction_holds_where_the_circuit_is_the_model(diluted):
    found = diluted.prediction
    assert found.n_held == found.n_predicted > 0
    assert found.holds.value == 1
    assert found.elsewhere.value == 0
    # Other fillers dilute as much.
    assert found.random.value > 0.3
    text = in_one_line(diluted)
    assert "the prediction holds for 100% ± 0" in text
    assert "insert ' f1' n times" in text or "insert ' f2' n times" in text


def test_a_path_outside_the_circuit_can_make_predictions_false():
    # With a second channel that writes three times as much, the model errs from 48 tokens on only.
    model = diluting_model([W_O, 3 * W_O])
    found = attacked(model, neutral=NEUTRAL)
    assert found.prediction.n_predicted > 0
    assert (found.prediction.n_held, found.prediction.holds.value) == (0, 0)
    assert all(trial.model_errs.value == 0 for each in found.families for trial in each.trials)
    assert "the prediction holds for 0% ± 0" in in_one_line(found)


def test_the_same_seed_gives_the_same_and_files_keep_it(diluted, tmp_path):
    again = attacked(diluting_model(), neutral=NEUTRAL)
    assert dataclasses.replace(again, seconds=diluted.seconds) == diluted
    diluted.save(tmp_path / "attack.json")
    assert Attack.load(tmp_path / "attack.json") == diluted
    with pytest.raises(ConfigError, match="overwrite"):
        again.save(tmp_path / "attack.json")
    values = json.loads((tmp_path / "attack.json").read_text())
    del values["prediction"], values[checksums.ENTRY]
    (tmp_path / "damaged.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="damaged, or not an attack: 'prediction' is missing"):
        Attack.load(tmp_path / "damaged.json")


@pytest.mark.any_line
def test_without_neutral_texts_own_tasks_are_only_drawn():
    found = attacked(diluting_model())
    assert (found.families, found.n_searched) == ([], 0)
    assert [each.description for each in found.grammar] == ["draws of the task"]
    assert "no text was declared neutral" in in_one_line(found)
    assert found.prediction.holds is None
    assert "The program errs on none of 8 prompts" in in_one_line(found)


@pytest.mark.any_line
def test_the_search_ends_in_time():
    found = attacked(diluting_model(), neutral=NEUTRAL, seconds=1e-9)
    assert (found.n_searched, found.families) == (0, [])
    assert found.n_tested == 8


# A counter of brackets

#: The average depth above which the counter closes two brackets.
THRESHOLD = 1 / 36
NORM = 10.0


@pytest.fixture(scope="module")
def counter():
    """A model that closes two brackets where those open, divided by all tokens, exceed 1 / 36.

    So it is right about one open bracket from 37 tokens on, and about two up to 71.
    """
    tokenizer = tl_sparse.load("tiny-python-sparse", device="cpu").tokenizer
    config = tl_sparse.SparseConfig(
        n_layers=1, d_model=4, n_heads=1, d_head=1, d_mlp=2, d_vocab=len(tokenizer), n_ctx=128
    )
    model = tl_sparse.create(config, seed=0, tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block = model.blocks[0]
        for norm in (block.ln1, block.ln2, model.ln_final):
            norm.w.fill_(1.0)
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            count = text.count("[") - text.count("]")
            # All embeddings have the same norm, so that RMSNorm multiplies all by 2 / NORM.
            model.embed.W_E[token, 0] = count
            model.embed.W_E[token, 1] = math.sqrt(NORM**2 - count**2)
        block.attn.W_V[0, 0, 0] = NORM / 2
        block.attn.W_O[0, 0, 2] = 1.0
        two = tokenizer.encode("]]")[0]
        model.unembed.W_U[2, two] = 1.0
        model.unembed.W_U[1, two] = -THRESHOLD / NORM
    means = circuit_means(model, torch.arange(32)[None])
    kept = {}
    for name in node_hooks(model).values():
        kept[name] = torch.zeros_like(means[name], dtype=torch.bool)
    kept["blocks.0.ln1.hook_read"][0] = True
    kept["blocks.0.attn.hook_v"][0, 0] = True
    kept["blocks.0.hook_attn_out"][2] = True
    return Circuit(kept, means, fingerprint(model), "counter", "bracket_counting"), model


@pytest.mark.any_line
def test_long_lists_dilute_the_average_of_brackets(counter):
    circuit, model = counter
    found = attack(circuit, model, n_prompts=3000, n_test=16, progress=False)
    assert found.prediction.n_held == found.prediction.n_predicted > 0
    fooled = [each for each in found.families if each.right == "]]"]
    assert fooled
    assert found.prediction.random is not None
    longest = [each.trials[-1] for each in fooled if each.trials[-1].n_tokens > 80]
    assert longest
    assert all(trial.program_errs.value == 1 for trial in longest)
    for family in (*found.grammar, *found.families):
        for example in family.examples:
            closed = example.prompt + example.right
            code = "\n".join(line.split("#")[0] for line in closed.splitlines())
            assert code.count("[") == code.count("]"), example
            n_tokens = 1 + len(model.tokenizer.encode(example.prompt))
            is_two = example.right == "]]"
            assert n_tokens >= 2 / THRESHOLD - 1 if is_two else n_tokens <= 1 / THRESHOLD + 1
    text = attack_text(found)
    assert "Right answers are known: the" in text
    assert "held-out contexts: longer" in text


# What cannot be attacked


@pytest.mark.any_line
def test_circuits_that_cannot_be_compiled():
    model = diluting_model()
    circuit = micro_circuit(model)
    other = diluting_model([2 * W_O])
    with pytest.raises(CircuitError, match=r"other weights in blocks\.0\.attn\.W_O"):
        attack(circuit, other, MICRO_TASK)
    without_means = dataclasses.replace(circuit, means={})
    with pytest.raises(CircuitError, match="means"):
        attack(without_means, model, MICRO_TASK)
    frozen = dataclasses.replace(circuit, frozen_norms=True)
    with pytest.raises(UnsupportedError, match="freeze_norms=False"):
        attack(frozen, model, MICRO_TASK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prompts": -1}, "n_prompts"),
        ({"seconds": 0.0}, "seconds"),
        ({"n_test": 1}, "n_test"),
        ({"n_families": -1}, "n_families"),
        ({"batch_size": 0}, "batch_size"),
        ({"neutral": [" f1", ""]}, "neutral"),
    ],
)
@pytest.mark.any_line
def test_impossible_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        attacked(diluting_model(), **options)


@pytest.mark.any_line
def test_tasks_that_cannot_be_attacked(tmp_path):
    model = diluting_model()
    circuit = micro_circuit(model)
    lines = []
    for number, answers in enumerate([[" yes", " no"], [" A", " B"]] * 4):
        lines.append(
            json.dumps({"prompts": [f"f{number} A end", f"f{number} B end"], "answers": answers})
        )
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    with pytest.raises(TaskError, match="different answers, and an attack needs a task with two"):
        attack(circuit, model, str(tmp_path / "mixed.jsonl"), **QUICK)
    few = save_pairs(tmp_path / "few.jsonl", n_pairs=3)
    with pytest.raises(TaskError, match="must be at most 3"):
        attack(circuit, model, few, **QUICK)
    lines = []
    for number in range(4):
        before = "f1 " * 40 + f"f{number}"
        prompts = [f"{before} A end", f"{before} B end"]
        lines.append(json.dumps({"prompts": prompts, "answers": [" yes", " no"]}))
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="44 tokens, more than the context of 40"):
        attack(circuit, model, str(tmp_path / "long.jsonl"), **QUICK)
    with pytest.raises(CircuitError, match="'micro' of this circuit is not built in"):
        attack(circuit, model, **QUICK)
