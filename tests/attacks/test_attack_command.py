"""`tl-sparse attack`."""

import pytest

from micro import diluting_model, micro_circuit, save_pairs
from tl_sparse.attacks import Attack, attack_text
from tl_sparse.cli import main

pytestmark = pytest.mark.any_line


@pytest.fixture
def command(tmp_path):
    model = diluting_model()
    model.save_pretrained(tmp_path / "model")
    micro_circuit(model).save(tmp_path / "circuit")
    task = save_pairs(tmp_path / "micro.jsonl")
    which = [str(tmp_path / "circuit"), "--model", str(tmp_path / "model"), "--task", task]
    return ["attack", *which, "--prompts", "200", "--test-prompts", "4"]


def test_the_command_prints_and_saves_what_it_found(command, tmp_path, capsys):
    out = tmp_path / "attack.json"
    neutral = ["--neutral", " f1", "--neutral", " f2"]
    assert main([*command, *neutral, "--families", "1", "-o", str(out), "--quiet"]) == 0
    found = Attack.load(out)
    printed = capsys.readouterr()
    assert printed.out == attack_text(found) + "\n"
    assert printed.err == ""
    assert len(found.families) == 1
    assert found.families[0].text.strip() in ("f1", "f2")
    assert "2 further insertions" in " ".join(printed.out.split())
    assert main([*command, "-o", str(out), "-q"]) == 1
    assert "overwrite" in capsys.readouterr().err


def test_mistakes_are_said_in_one_line(command, capsys):
    assert main([*command, "--prompts", "-1"]) == 1
    assert (
        "n_prompts (--prompts) = -1 is not possible; it must be at least 0"
        in capsys.readouterr().err
    )
    assert main([*command, "-o", "attack.txt"]) == 1
    assert "an attack" in capsys.readouterr().err
    assert main([*command, "--neutral", ""]) == 1
    assert "texts that are not empty" in capsys.readouterr().err
