"""A circuit knows its model in any dtype, and tells it from a model that was changed a little."""

import dataclasses
import json
import math

import pytest
import torch

from helpers import full_config, tiny_config, tiny_model
from micro import micro_circuit, micro_model
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.fingerprints import Fingerprint, fingerprint
from tl_sparse.errors import CheckpointError, CircuitError
from tl_sparse.files import read_json

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
#: Casts one after the other, each of the model that the one before has left.
CASTS = [
    [torch.bfloat16],
    [torch.float16],
    [torch.float64],
    [torch.bfloat16, torch.float16],
    [torch.float16, torch.bfloat16],
    [torch.bfloat16, torch.float32],
    [torch.float16, torch.float64],
]


def smooth_bigram_table(seed=0):
    """A model whose bigram table has large values, all nearly equal, as trained ones have.

    The signs of a sketch nearly cancel there, so that rounding moves the sketch most.
    """
    model = tiny_model(full_config(d_vocab=200), seed)
    with torch.no_grad():
        model.network.bigram.W_bigram.mul_(0.1).sub_(14.0)
    return model


@pytest.mark.parametrize("casts", CASTS)
@pytest.mark.parametrize("make", [smooth_bigram_table, tiny_model, micro_model])
def test_a_model_is_known_in_every_dtype(make, casts):
    model = make()
    original = fingerprint(model)
    for dtype in casts:
        model.to(dtype)
        assert original.difference(fingerprint(model)) is None
    assert fingerprint(model).difference(original) is None


@pytest.mark.parametrize("seed", range(20))
def test_rounding_stays_far_below_the_tolerance(seed):
    """The largest noise that was measured is 0.0031 of the root mean square, of 0.01 allowed."""
    model = tiny_model(full_config(d_mlp=50), seed)
    original = fingerprint(model)
    rounded = fingerprint(model.bfloat16())
    for name, sketch in original.sketch.items():
        if original.weights[name].rms > 0:
            noise = math.dist(sketch, rounded.sketch[name]) / original.weights[name].rms
            assert noise < 0.006, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_weight_is_seen(dtype):
    model = tiny_model(full_config(d_mlp=300)).to(dtype)
    original = fingerprint(model)
    weight = model.network.blocks[1].mlp.W_in
    with torch.no_grad():
        weight[2, 7] += 2 * torch.finfo(dtype).eps * weight[2, 7].abs().clamp(min=1e-3)
    changed = fingerprint(model)
    if dtype == torch.float64:  # less than a digit of float32, in which weights are compared
        assert original.difference(changed) is None
    else:
        assert original.difference(changed) == "other weights in blocks.1.mlp.W_in"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_change_is_seen_across_dtypes(dtype):
    """A step of training moves matrices by far more than these 3 % of their size."""
    model = tiny_model(full_config(d_mlp=300))
    original = fingerprint(model)
    weight = model.network.blocks[1].mlp.W_in
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.add_(0.03 * weight.norm() / noise.norm() * noise)
    changed = fingerprint(model.to(dtype))
    assert original.difference(changed) == "other weights in blocks.1.mlp.W_in"


def test_another_epsilon_is_another_architecture():
    model = tiny_model(tiny_config())
    other = tiny_model(tiny_config(norm_eps=1e-3))
    assert "another architecture" in fingerprint(model).difference(fingerprint(other))


def test_fingerprints_with_other_parameters_differ():
    ours = fingerprint(tiny_model())
    fewer = {name: values for name, values in ours.sketch.items() if name != "ln_final.w"}
    theirs = Fingerprint(ours.architecture, fewer)
    assert ours.difference(theirs) == "no weights ln_final.w"
    assert theirs.difference(ours) == "additional weights ln_final.w"


def old(values):
    """The entry of circuit.json for the model, as the first versions wrote it."""
    return {name: values[name] for name in ("architecture", "sketch")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_circuits_of_the_first_versions_know_their_model(micro, tmp_path, dtype):
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.json"
    values = read_json(path)
    path.write_text(json.dumps(values | {"model": old(values["model"])}))
    circuit = Circuit.load(tmp_path)
    circuit.check_model(micro.to(dtype))
    with torch.no_grad():
        micro.network.unembed.W_U.mul_(1.1)
    with pytest.raises(CircuitError, match=r"other weights in unembed\.W_U"):
        circuit.check_model(micro)


def test_a_fingerprint_is_read_as_it_was_written(micro, tmp_path):
    circuit = micro_circuit(micro)
    circuit.save(tmp_path)
    assert Circuit.load(tmp_path).model == circuit.model


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (lambda s: dict.fromkeys(s, [float("nan")] * 8), "finite number"),
        (lambda s: dict.fromkeys(s, [float("inf")] * 8), "finite number"),
        (lambda s: dict.fromkeys(s, [0.0] * 7), "must be 8 finite numbers"),
        (lambda s: {}, "missing or malformed entry: the sketch"),
        (lambda s: {name: s[name] for name in list(s)[1:]}, "must name the same ones"),
    ],
)
def test_a_sketch_that_would_fit_every_model_is_refused(micro, tmp_path, sketch, message):
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.json"
    values = read_json(path)
    values["model"]["sketch"] = sketch(values["model"]["sketch"])
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        Circuit.load(tmp_path)


@pytest.mark.parametrize("rms", [float("nan"), float("inf"), "1", None])
def test_a_size_that_would_fit_every_model_is_refused(micro, tmp_path, rms):
    micro_circuit(micro).save(tmp_path)
    path = tmp_path / "circuit.json"
    values = read_json(path)
    values["model"]["weights"]["embed.W_E"]["rms"] = rms
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="missing or malformed entry"):
        Circuit.load(tmp_path)


def test_a_huge_size_does_not_fit_every_model(micro):
    ours = fingerprint(micro)
    huge = {}
    for name, facts in ours.weights.items():
        huge[name] = dataclasses.replace(facts, rms=1e30)
    forged = dataclasses.replace(ours, weights=huge)
    with torch.no_grad():
        micro.network.unembed.W_U.mul_(2.0)
    changed = fingerprint(micro.bfloat16())
    assert forged.difference(changed) == "other weights in unembed.W_U"


def test_weights_that_are_no_numbers_have_no_fingerprint(micro):
    with torch.no_grad():
        micro.network.unembed.W_U[0, 0] = float("nan")
    with pytest.raises(CircuitError, match=r"unembed\.W_U .* finite"):
        fingerprint(micro)
