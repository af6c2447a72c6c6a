"""Compiled circuits as ONNX files: the same logits in onnxruntime."""

import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers import cancels, full_config, random_circuit, random_tokens, sparse_configs, tiny_model
from tl_sparse.errors import CheckpointError, ConfigError, UnsupportedError
from tl_sparse.network.config import paper_topk
from tl_sparse.programs import onnx_file

# torch's exporter takes seconds for each program.
pytestmark = pytest.mark.any_line


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def assert_same_logits(compiled, tokens, folder, last=None, tolerance=1e-9):
    """At several lengths and batch sizes, everywhere or at one position of each row."""
    path = folder / "program.onnx"
    compiled.to_onnx(path, last is not None, overwrite=True)
    running = session(path)
    for rows, length in ((len(tokens), tokens.shape[1]), (1, 1), (3, 2)):
        inputs = {"tokens": tokens[:rows, :length]}
        if last is not None:
            inputs["last"] = last[:rows].clamp(max=length - 1)
        expected = compiled(**inputs)
        arrays = {name: values.numpy() for name, values in inputs.items()}
        (logits,) = running.run(["logits"], arrays)
        assert logits.dtype == expected.numpy().dtype
        close = dict(rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))
        torch.testing.assert_close(torch.from_numpy(logits), expected, **close)


def test_float64_with_gelu_at_one_position(tmp_path):
    """onnxruntime has no Erf in float64, and torch's exporter rounds some numbers to float32."""
    model = tiny_model(
        abs_topk={"attn_in": 0.5, "mlp_neuron": 0.6}, attn_sinks=True, dtype=torch.float64
    )
    compiled = random_circuit(model).compile(model, [3, 1])
    last = torch.tensor([3, 7, 1, 0, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_logits(compiled, random_tokens(model, 5), tmp_path, last)
    file = onnx.load(tmp_path / "program.onnx")
    onnx.checker.check_model(file, full_check=True)
    metadata = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert metadata == {"n_ctx": 8, "tokens": [3, 1], "task": "t", "model_name": "m"}
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*file.graph.input, *file.graph.output]
    }
    assert axes == {"tokens": ["batch", "pos"], "last": ["batch"], "logits": ["batch", 1, 2]}
    assert not any(node.metadata_props for node in file.graph.node)


def test_erf_by_quadrature():
    """The nodes and weights of the integral from 0 to 1, for all x up to 6."""
    nodes, weights = np.polynomial.legendre.leggauss(2 * onnx_file.N_NODES)
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    kept = slice(onnx_file.N_NODES, None)
    terms = torch.exp(-((x[:, None] * torch.from_numpy(nodes[kept])) ** 2))
    erf = 2 / torch.pi**0.5 * x * (terms @ torch.from_numpy(weights[kept]))
    torch.testing.assert_close(erf, torch.erf(x), rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("opset", [18, 25])
def test_every_feature_in_both_dtypes(tmp_path, dtype, opset):
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for config in (full_config(), full_config(act_fn="gelu", normalization="rms", norm_bias=False)):
        model = tiny_model(config, dtype=dtype)
        compiled = random_circuit(model).compile(model)
        assert_same_logits(compiled, random_tokens(model, 5), tmp_path, None, tolerance)


@pytest.mark.slow
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(
    sparse_configs(),
    st.integers(0, 2**20),
    st.sampled_from([0.15, 0.5, 0.9]),
    st.booleans(),
    st.booleans(),
)
def test_random_models(tmp_path, config, seed, share, is_at_last, has_all_logits):
    model = tiny_model(config, seed=seed, dtype=torch.float64)
    tokens = random_tokens(model, 6, seed=seed)
    assume(not cancels(model, tokens))
    wanted = None if has_all_logits else [model.cfg.d_vocab - 1, 0]
    compiled = random_circuit(model, share, seed).compile(model, wanted)
    last = torch.arange(6) % model.cfg.n_ctx if is_at_last else None
    assert_same_logits(compiled, tokens, tmp_path, last)


# What is refused


def test_files_that_cannot_be_written(tmp_path):
    model = tiny_model()
    compiled = random_circuit(model).compile(model)
    with pytest.raises(ConfigError, match=r"\.txt.*must end in \.onnx"):
        compiled.to_onnx(tmp_path / "program.txt")
    (tmp_path / "program.onnx").write_text("another")
    with pytest.raises(ConfigError, match="exists already"):
        compiled.to_onnx(tmp_path / "program.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*folder\.onnx: it is a folder"):
        compiled.to_onnx(tmp_path / "folder.onnx", overwrite=True)
    with pytest.raises(CheckpointError, match="cannot write"):
        compiled.to_onnx(tmp_path / "program.onnx" / "program.onnx")
    assert (tmp_path / "program.onnx").read_text() == "another"


@pytest.mark.parametrize("opset", [17, 26])
def test_opsets_that_are_too_old_or_too_new(tmp_path, opset):
    model = tiny_model()
    compiled = random_circuit(model).compile(model)
    with pytest.raises(ConfigError, match=rf"opset = {opset} is not possible.*from 18 to 25"):
        compiled.to_onnx(tmp_path / "program.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_missing_packages(tmp_path, monkeypatch):
    model = tiny_model()
    compiled = random_circuit(model).compile(model)
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tl-sparse\[onnx\]'"):
        compiled.to_onnx(tmp_path / "program.onnx")


def test_programs_larger_than_a_file(tmp_path, monkeypatch):
    model = tiny_model(abs_topk=paper_topk(0.5))
    compiled = random_circuit(model).compile(model)
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 100)
    with pytest.raises(UnsupportedError, match="an ONNX file holds at most 100"):
        compiled.to_onnx(tmp_path / "program.onnx")
