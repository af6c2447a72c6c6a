"""`tl-sparse compile`."""

import json

import onnxruntime
import pytest
import torch

from helpers import tiny_model
from micro import VOCABULARY, micro_circuit, micro_data, micro_model, save_micro, save_pairs
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.cli import main
from tl_sparse.errors import CircuitError
from tl_sparse.explanations import Explanation
from tl_sparse.programs import CompiledCircuit, onnx_file

ANSWERS = [VOCABULARY["yes"], VOCABULARY["no"]]
pytestmark = pytest.mark.any_line


@pytest.fixture
def places(tmp_path):
    save_micro(tmp_path / "model")
    micro_circuit(micro_model()).save(tmp_path / "circuit")
    task = save_pairs(tmp_path / "micro.jsonl")
    circuit = [str(tmp_path / "circuit"), "--model", str(tmp_path / "model"), "--task", task]
    return [*circuit, "--out", str(tmp_path / "program")]


def test_the_program_has_the_logits_of_the_candidates(places, tmp_path, capsys):
    assert main(["compile", *places]) == 0
    printed = capsys.readouterr().out
    assert "the logits of 2 tokens" in printed
    compiled = CompiledCircuit.load(tmp_path / "program")
    assert set(compiled.tokens.tolist()) == {VOCABULARY["yes"], VOCABULARY["no"]}
    model = micro_model()
    data = micro_data(model)
    expected = micro_circuit(model).compile(model, compiled.tokens)
    assert torch.equal(compiled(data.tokens, data.last), expected(data.tokens, data.last))


def test_all_logits_in_float64(places, tmp_path, capsys):
    assert main(["compile", *places, "--tokens", "all", "--dtype", "float64", "-q"]) == 0
    assert capsys.readouterr().out == ""
    compiled = CompiledCircuit.load(tmp_path / "program")
    assert compiled.tokens is None
    assert compiled.start.dtype == torch.float64


@pytest.mark.slow
def test_an_onnx_file_at_one_position(places, tmp_path):
    assert main(["compile", *places, "--onnx", "--last"]) == 0
    compiled = CompiledCircuit.load(tmp_path / "program")
    session = onnxruntime.InferenceSession(tmp_path / "program" / "program.onnx")
    data = micro_data(micro_model())
    inputs = {"tokens": data.tokens.numpy(), "last": data.last.numpy()}
    (logits,) = session.run(["logits"], inputs)
    close = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(logits), compiled(data.tokens, data.last), **close)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["tokens"]) == compiled.tokens.tolist()


def test_python_source_with_the_names_of_an_explanation(places, tmp_path, capsys):
    circuit_and_model = places[: places.index("--out")]
    assert main(["explain", *circuit_and_model, "-q"]) == 0
    explanation = Explanation.load(tmp_path / "circuit")
    file = str(tmp_path / "circuit" / "explanation.json")
    assert main(["compile", *places, "--explanation", file]) == 1
    assert "it needs --python" in capsys.readouterr().err
    assert main(["compile", *places, "--python", "--explanation", file]) == 0
    source = (tmp_path / "program" / "circuit.py").read_text(encoding="utf-8")
    model = micro_model()
    circuit = Circuit.load(tmp_path / "circuit")
    program = explanation.to_python(circuit, model, [*ANSWERS])
    assert source == program.source
    for node in explanation.nodes:
        is_read = node.node == "0.attn_in 0"
        assert (f"# {node.name} = {node.expression}" in source) == is_read
        assert f"    {node.name} = " in source
    with pytest.raises(CircuitError, match="the explanation is of another model"):
        explanation.to_python(circuit, tiny_model())


@pytest.mark.parametrize(
    "name", ["program.json", "program.safetensors", "program.onnx", "circuit.py", "circuit.npz"]
)
def test_nothing_is_replaced_unasked(places, tmp_path, capsys, name):
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / name).write_text("another")
    assert main(["compile", *places, "--onnx", "--python"]) == 1
    assert f"{name} exists already" in capsys.readouterr().err
    assert main(["compile", *places, "--overwrite", "-q"]) == 0
    CompiledCircuit.load(tmp_path / "program")


def test_mistakes_are_said_before_the_model_is_opened(places, monkeypatch, capsys):
    nowhere = ["compile", "nowhere", *places[1:]]
    assert main([*nowhere, "--onnx", "--opset", "12"]) == 1
    assert "opset = 12 is not possible; it must be from 18 to 25" in capsys.readouterr().err
    assert main([*nowhere, "--last"]) == 1
    assert "--last is for the ONNX file, so it needs --onnx" in capsys.readouterr().err
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    assert main([*nowhere, "--onnx"]) == 1
    assert "pip install 'tl-sparse[onnx]'" in capsys.readouterr().err
