"""`tl-sparse explain`."""

import pytest

from micro import micro_circuit, micro_model, save_micro, save_pairs
from tl_sparse.cli import main
from tl_sparse.explanations.record import Explanation

pytestmark = pytest.mark.any_line


@pytest.fixture
def places(tmp_path):
    save_micro(tmp_path / "model")
    micro_circuit(micro_model()).save(tmp_path / "circuit")
    task = save_pairs(tmp_path / "micro.jsonl")
    return [str(tmp_path / "circuit"), "--model", str(tmp_path / "model"), "--task", task]


def test_the_command_prints_the_text_and_saves_beside_the_circuit(places, tmp_path, capsys):
    flags = ["--own", "0.attn_v.0=1.5 * sign", "--name", "0.attn_in 0=sign", "--quiet"]
    assert main(["explain", *places, *flags]) == 0
    saved = Explanation.load(tmp_path / "circuit")
    assert capsys.readouterr().out == f"{saved}\n"
    assert saved.n_rows > 0  # of the sample beside the model
    assert saved["sign"].expression == '-2 if token == "B" else 2 if token == "A" else 0'
    assert saved["0.attn_v h0.0"].origin == "own"


def test_mistakes(places, tmp_path, capsys):
    assert main(["explain", "user/circuit"]) == 1
    assert "give it with --out FILE.json" in capsys.readouterr().err
    assert main(["explain", *places, "--out", "x.txt"]) == 1
    assert "--out x.txt must end in .json" in capsys.readouterr().err
    assert main(["explain", *places, "--own", "0.attn_v.0=1 +"]) == 1
    assert "the expression of 0.attn_v h0.0: '1 +' is not an expression" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", *places, "--name", "x"])
    assert "has no '=' between the node and the rest" in capsys.readouterr().err
